"""What a run leaves of a language model: a folder that stands on its own, for peft or transformers to load.

The same run writes the same bytes, whenever it does: what peft keeps in sets is sorted.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedllm_sec.errors import RecipeError
from fedllm_sec.models.cores import whole_factors
from fedllm_sec.models.lora import source_of
from fedllm_sec.models.shifted import Shifted, folded

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedTokenizerBase

    from fedllm_sec.recipe.sections import Model

CARD = "README.md"
CLASSES = "classes"  # a key of the metadata of an adapter's tensors


def base_name(model: Model, base: Any) -> tuple[str, str | None]:
    """How anybody finds the base model: its absolute path, or its hub name with the commit that was loaded."""
    source = source_of(model.name)
    if os.path.exists(source):
        return os.path.abspath(source), None
    return source, model.revision or getattr(base.config, "_commit_hash", None)


def save_adapter(
    adapted: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    model: Model,
    folder: Path,
    *,
    initial: Mapping[str, Tensor],
    card: str = "",
    shifted: Shifted | None = None,
    scales: Mapping[str, float] | None = None,
    classes: Sequence[str] = (),
) -> None:
    """Write a peft adapter folder: factors, where the base model is, tokenizer with its template, and the card.

    `initial` has the trainable parameters as they started, by name. A start that was taken out of the base model
    (pissa, olora) is put back: the adapter is saved as the difference to its start, at twice the rank, which fits the
    base model as it is published. A core is saved as the B that it makes with its outer factor. What was added to base
    weights (`shifted`) becomes a part of the adapter, whose rank grows by it. `classes` are a classifier's, in the
    order of its outputs: they go with the tensors, see `classes_of`.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    config = copy.deepcopy(adapted.peft_config["default"])
    config.inference_mode = True
    config.base_model_name_or_path, config.revision = base_name(model, adapted.get_base_model())
    tensors = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    if model.lora is not None and model.lora.average == "core":
        tensors = whole_factors(tensors, adapted)
    if model.lora is not None and model.lora.starts_from_base:
        started = {name.replace(".default", ""): tensor for name, tensor in initial.items()}
        tensors = minus_start(tensors, started)
        config = twice_the_rank(config)
    if shifted is not None and shifted.parts:
        tensors, config = folded(tensors, config, shifted, scales or {})
    settings = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    with appearing(folder) as made:
        (made / "adapter_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")
        own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        named = {CLASSES: json.dumps(list(classes))} if classes else {}
        save_file(own, made / "adapter_model.safetensors", metadata={"format": "pt", **named})
        tokenizer.save_pretrained(made)
        (made / CARD).write_text(card, encoding="utf-8")


def classes_of(file: Path) -> tuple[str, ...] | None:
    """The classes that an adapter's file of tensors says it tells apart, in the order of its outputs; None: no word."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        said = (opened.metadata() or {}).get(CLASSES)
    try:
        found = json.loads(said) if said is not None else None
    except (ValueError, RecursionError):
        return None
    return tuple(map(str, found)) if isinstance(found, list) else None


def save_whole(whole: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, *, card: str = "") -> None:
    """Write a model folder: weights, configuration, tokenizer with its template, and the card."""
    with appearing(folder) as made:
        whole.save_pretrained(made)
        tokenizer.save_pretrained(made)
        (made / CARD).write_text(card, encoding="utf-8")


def save_merged(
    adapted: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    card: str = "",
    shifted: Shifted | None = None,
    classes: Sequence[str] = (),
) -> None:
    """Write the model that an adapter and what was added to base weights make of the base, as a whole one.

    A copy is merged: the run goes on with its own. Weights are of the base's type, to which sums are rounded.
    """
    copied = copy.deepcopy(adapted)
    modules = dict(copied.named_modules())
    for name, part in (shifted.parts if shifted is not None else {}).items():
        if name in shifted.published:  # type: ignore[union-attr]
            continue  # it is in the weight
        layer = modules[name.partition(".lora_A.")[0]]
        gained = part[0] if len(part) == 1 else part[0].double() @ part[1].double()
        weight = layer.get_base_layer().weight
        weight.data += (gained.T if layer.fan_in_fan_out else gained).to(weight)
    whole = copied.merge_and_unload()
    head, embedding = whole.get_output_embeddings(), whole.get_input_embeddings()
    if head is not None and head.weight is not embedding.weight:  # a head that was trained whole is tied no more
        whole.config.tie_word_embeddings = False
    if classes:
        whole.config.id2label = dict(enumerate(classes))
        whole.config.label2id = {label: i for i, label in enumerate(classes)}
    save_whole(whole, tokenizer, folder, card=card)


def refuse_tied(adapted: Any) -> None:
    """An error where merging would change the model: its output and embedding are one matrix, one of them adapted."""
    base = adapted.get_base_model()
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    if head is None or not any(hasattr(part, "lora_A") for part in (head, embedding)):
        return
    if head.weight is embedding.weight:
        raise RecipeError(
            "output.save: merged: this model's output and embedding are one matrix, and an adapter of one of them "
            "would act in both places. Set it to adapter, or put lm_head into model.lora.modules_to_save instead."
        )


def minus_start(tensors: Mapping[str, Tensor], started: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Factors (2r, in) and (out, 2r) of B A - B_0 A_0, from A (r, in), B (out, r) and those that they started as.

    A factor that is not trained is still its start.
    """
    made = dict(tensors)
    for name, tensor in tensors.items():
        start = started.get(name, tensor).to(tensor.device)
        if ".lora_A." in name:
            made[name] = torch.cat([tensor, start], dim=0)
        elif ".lora_B." in name:
            made[name] = torch.cat([tensor, -start], dim=1)
    return made


def twice_the_rank(config: LoraConfig) -> LoraConfig:
    """The settings of an adapter of twice the rank, on the base as it is, whose product counts as often as before."""
    made = copy.deepcopy(config)
    more = 2**0.5 if config.use_rslora else 2  # alpha / sqrt(r), or alpha / r
    made.init_lora_weights = True
    made.r, made.lora_alpha = 2 * config.r, more * config.lora_alpha
    made.rank_pattern = {name: 2 * rank for name, rank in config.rank_pattern.items()}
    made.alpha_pattern = {name: more * alpha for name, alpha in config.alpha_pattern.items()}
    return made


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A folder to write into, which appears under its name only when complete; its weights come last."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        made = Path(temporary)
        yield made
        folder.mkdir(exist_ok=True)
        # a folder with weights is then always loadable
        for path in sorted(made.iterdir(), key=lambda p: p.suffix == ".safetensors"):
            if path.is_dir() and (there := folder / path.name).is_dir():
                shutil.rmtree(there)
            path.replace(folder / path.name)
