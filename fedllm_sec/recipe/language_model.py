"""What a recipe may say of a language model and of the adapter that is trained in it."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator

from fedllm_sec.recipe.section import Place, Positive, Section

Rank = Annotated[int, Field(ge=1, le=65_536)]
# Starts of an adapter that peft knows and that cannot be federated, or not here: why, and what to do.
NO_START = {
    **dict.fromkeys(
        ("eva", "corda", "lora_ga"),
        "is computed from training data, which every client has others of: no two would start alike, and a difference "
        "to another's start is no update. Use pissa or olora, which need nothing but the base model",
    ),
    "loftq": "quantises the base by a rule that no saved adapter tells. Use true or gaussian with load_in_4bit",
    False: "makes B random too, so that round 0 is not the base model. Use true or gaussian",
}


def known_start(value: Any) -> Any:
    """The start of an adapter; an error that says why where it is one of those that cannot be federated."""
    if isinstance(value, (str, bool)) and value in NO_START:
        raise ValueError(f"such a start {NO_START[value]}")
    return value


Start = Annotated[Literal[True, "gaussian", "pissa", "pissa_niter_16", "olora"], BeforeValidator(known_start)]
Attention = Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"]


def expression(value: str) -> str:
    """The pattern of a layer's name; an error where it is none."""
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"is no regular expression ({error}). Write a name, such as q_proj") from error
    return value


Average = Literal["factors", "freeze_a", "freeze_b", "alternate", "stack", "exact", "svd", "pad", "core", "share_a"]
BASE_MOVES = ("exact", "stack")  # averages in which rounds add to base weights
Pattern = Annotated[str, AfterValidator(expression)]


def whole_in_float32(lora: Lora | None, dtype: str) -> Lora | None:
    """The adapter; an error where there is none and the whole model is to be of fewer bits."""
    if lora is None and dtype != "float32":
        raise ValueError(
            f"the whole model is trained in float32, and dtype is {dtype}. Set dtype: float32, and "
            "compute.mixed_precision: bf16 for speed"
        )
    return lora


class Lora(Section):
    """LoRA adapters (Hu et al. 2022); names and meanings are peft's."""

    r: Rank = 8  # rank of the adapters
    alpha: Positive = 16.0  # the product B A counts alpha / r times
    dropout: float = Field(0.0, ge=0.0, lt=1.0)  # on the input of the adapters, in training
    target_modules: Literal["all-linear"] | list[str] = "all-linear"  # the layers that get one
    layers_to_transform: list[Annotated[int, Field(ge=0)]] | None = None  # of these blocks alone, counted from 0
    rank_pattern: dict[Pattern, Rank] = {}  # another r for the layers whose name ends so, e.g. {down_proj: 16}
    alpha_pattern: dict[Pattern, Positive] = {}  # the same for alpha
    use_rslora: bool = False  # B A counts alpha / sqrt(r) times (Kalajdzievski 2023)
    use_dora: bool = False  # the lengths of the adapted weights' rows are trained too (DoRA, Liu et al. 2024)
    modules_to_save: list[str] = []  # modules that are trained whole beside the adapters, e.g. [lm_head]
    init_lora_weights: Start = True  # of A and B; pissa and olora take what they start with out of the base model
    average: Average = "factors"  # what the server does with A and B: docs/lora.md
    train: Literal["both", "B"] = "both"  # B alone is FFA-LoRA (Sun et al. 2024); A alone learns nothing: B starts at 0

    @property
    def frozen(self) -> Literal["A", "B"] | None:
        """The factor that is never trained."""
        if self.average == "freeze_b":
            return "B"
        return "A" if self.train == "B" or self.average == "freeze_a" else None

    @property
    def moves_base(self) -> bool:
        """Whether rounds add to the base model's weights."""
        return self.average in BASE_MOVES

    @property
    def starts_from_base(self) -> bool:
        """Whether a product other than 0 is taken out of the base model's weights, to start with."""
        return self.init_lora_weights not in (True, "gaussian")


class Model(Section):
    name: Place = "tiny"  # "tiny", a local folder, a GGUF file or a hub name
    revision: str | None = None  # branch, tag or commit of a hub name; None: its main branch
    trust_remote_code: bool = False  # run the Python code that the folder or the hub's repository brings with it
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the frozen base model
    load_in_4bit: bool = False  # NF4 through bitsandbytes
    load_in_8bit: bool = False  # LLM.int8() through bitsandbytes
    attn_implementation: Attention | None = None  # how attention is computed; None: as transformers chooses
    gradient_checkpointing: bool = False  # less memory for more time
    lora: Lora | None = Lora()  # the adapter, which alone is trained; None: the whole model is
    start: Place | None = None  # a run folder, an adapter folder or a .safetensors file to train on; None: anew

    @property
    def quantized(self) -> bool:
        return self.load_in_4bit or self.load_in_8bit

    @property
    def changes_base(self) -> bool:
        """Whether another run cannot use the base model any more: some of its weights are trained, or were taken."""
        return (
            self.lora is None or self.lora.starts_from_base or bool(self.lora.modules_to_save) or self.lora.moves_base
        )

    @field_validator("load_in_8bit")
    @classmethod
    def _one_packing(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("load_in_4bit"):
            raise ValueError("load_in_4bit is true as well, and a weight is packed once. Set one of them to false")
        return value

    @field_validator("lora")
    @classmethod
    def _trainable(cls, value: Lora | None, info: ValidationInfo) -> Lora | None:
        packed = [name for name in ("load_in_4bit", "load_in_8bit") if info.data.get(name)]
        if value is None and packed:
            raise ValueError(f"packed weights cannot be trained themselves. Keep the adapter, or drop {packed[0]}")
        whole_in_float32(value, info.data.get("dtype", "float32"))
        if value is not None and value.starts_from_base and packed:
            raise ValueError(
                f"init_lora_weights: {value.init_lora_weights} changes the base model's weights, and packed ones would "
                f"be rounded anew. Use true or gaussian, or drop {packed[0]}"
            )
        return value
