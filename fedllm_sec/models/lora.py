"""The one base model of a process, and what is trained in it: a LoRA adapter (peft), or the model itself."""

from __future__ import annotations

import os
import re
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fedllm_sec.errors import RecipeError
from fedllm_sec.models import gguf
from fedllm_sec.models.cores import give_cores
from fedllm_sec.models.targets import adaptable, wanted_layers, without_effect
from fedllm_sec.recipe import modelfolder, places

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fedllm_sec.recipe.classifier import Classifier
    from fedllm_sec.recipe.language_model import Lora, Model

OUTPUTS = ("classifier", "score")  # which peft trains whole by itself in a classifier


def source_of(name: str) -> str:
    """Where a model of this name lies: the package for "tiny", a local folder, or the hub.

    An error within seconds where it can be none of them: the libraries would try an unreachable hub for a minute.
    """
    if name == "tiny":
        return str(Path(__file__).parent / "tiny")
    if (problem := places.lost_model(name)) is not None:
        raise RecipeError(problem)
    folder = os.path.expanduser(name)
    if os.path.isfile(os.path.join(folder, "adapter_config.json")):  # transformers would load what that file names
        raise RecipeError(
            f"model.name: {name}: is an adapter (it has an adapter_config.json), not a model. Merge it into its base "
            "model, and give the folder of that."
        )
    if gguf.is_gguf(name) and os.path.isfile(folder):
        gguf.check(Path(folder))
    return folder if os.path.exists(folder) else name


@contextmanager
def told(source: str) -> Iterator[None]:
    """Whatever goes wrong while a model's files are read, as a RecipeError: anybody may have written them."""
    try:
        yield
    except (RecipeError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        why = places.why(error)
        if "ignore_mismatched_sizes" in why:
            why = "its weights have other shapes than its configuration says"
        if "contains custom code" in why:
            why = f"it contains custom code, which model.trust_remote_code: true would run: {why}"
        if "Weights only load failed" in why:
            why = "its weights are a pickle of more than tensors, which could run code; save them as safetensors"
        if isinstance(error, struct.error):
            why = "the file is cut off or damaged"
        elif os.path.isdir(source) and not isinstance(error, (OSError, ValueError)):  # code that stumbles over a value
            why = f"{type(error).__name__}: {why}; most likely a value in its config.json is not what it must be"
        if os.path.isdir(source) and (found := modelfolder.wrong(source)) is not None:
            raise RecipeError(f"model.name: {source}: {found}") from error
        raise RecipeError(f'model.name: "{source}" cannot be loaded ({why}). Mend it, or choose another.') from error


def place(model: Model | Classifier) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` of its configuration, tokenizer or weights is called with: where, and how."""
    source = source_of(model.name)
    where, options = gguf.place(source)
    if model.revision is not None and os.path.exists(source):
        raise RecipeError(f"model.revision: {model.revision}: {model.name} is on this disk, where it has only one.")
    return where, {**options, "revision": model.revision or "main", "trust_remote_code": model.trust_remote_code}


def load_base(model: Model, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model and its tokenizer, from "tiny", a local folder, a GGUF file or the hub."""
    from transformers import AutoModelForCausalLM

    source = source_of(model.name)
    where, options = place(model)
    options |= {"dtype": getattr(torch, model.dtype), **gguf.dense(source), **_packed(model, device)}
    tokenizer = load_tokenizer(model)
    with told(source):
        base, loading = attending(AutoModelForCausalLM.from_pretrained, model, where, options)
    if missing := sorted(loading["missing_keys"]):
        raise RecipeError(
            f'model.name: "{source}" lacks {len(missing)} weights of a causal language model, such as {missing[0]}: '
            "they would be random. Choose another model, or mend its folder."
        )
    if surplus := sorted(loading["unexpected_keys"]):
        warnings.warn(
            f'model.name: "{source}" holds {len(surplus)} weights that its configuration has no place for, such as '
            f"{surplus[0]}: they are left out. Mend config.json unless they are meant to be.",
            stacklevel=2,
        )
    return (base if model.quantized else base.to(device)), tokenizer


def attending(read: Any, model: Model | Classifier, where: str, options: dict[str, Any]) -> Any:
    """The model with its attention computed as asked for; an error where this machine or the model cannot."""
    if model.attn_implementation is not None:
        options = {**options, "attn_implementation": model.attn_implementation}
    try:
        return read(where, output_loading_info=True, **options)
    except (ImportError, ValueError) as error:
        if model.attn_implementation is None or "attention" not in str(error).lower():
            raise
        raise RecipeError(
            f"model.attn_implementation: {model.attn_implementation}: {places.why(error)} Choose another, or null."
        ) from error


def _packed(model: Model, device: torch.device) -> dict[str, Any]:
    """`from_pretrained` options by which weights are kept in 4 or 8 bits; none where they are not to be."""
    if not model.quantized:
        return {}
    from transformers import BitsAndBytesConfig

    key = "load_in_4bit" if model.load_in_4bit else "load_in_8bit"
    if gguf.is_gguf(model.name):
        raise RecipeError(
            f"model.{key}: {model.name} is a GGUF file, whose weights are unpacked to {model.dtype}. Set it to "
            "false, or give a folder of safetensors."
        )
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise RecipeError(
            f"model.{key}: needs bitsandbytes, which is not installed. "
            "pip install 'fedllm_sec[llm-gpu]' or set it to false."
        ) from error
    config = BitsAndBytesConfig(load_in_8bit=True)
    if model.load_in_4bit:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, model.dtype),
        )
    return {"quantization_config": config, "device_map": {"": device}}


def load_tokenizer(model: Model | Classifier) -> PreTrainedTokenizerBase:
    """The base model's tokenizer; where it has no padding token its end token pads."""
    from transformers import AutoTokenizer

    where, options = place(model)
    with told(source_of(model.name)):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(where, **options)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def base_of(model: Any) -> Any:
    """The transformers model without peft's shell; adapters stay in it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


# ---------------------------------------------------------------- what is trained


def add_adapter(
    base: PreTrainedModel, model: Model | Classifier, seed: int, output: Sequence[str] = ()
) -> PeftModel | PreTrainedModel:
    """The base model with a fresh LoRA adapter, drawn by the seed; with `lora: null` itself, all of it trainable.

    The modules `output` of a classifier are trained whole beside the adapter.

    Trainable parameters are float32. Every client starts from the same adapter, so that what it sends is a difference
    to something that all know: also a frozen factor, and what `pissa` and `olora` take out of the base model, follow
    from the base model and the seed alone.
    """
    if model.gradient_checkpointing and not model.quantized:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.enable_input_require_grads()
    if model.lora is None:
        _savable(base)
        return base.requires_grad_(True)
    return _with_lora(base, model, model.lora, seed, output)


def _savable(base: PreTrainedModel) -> None:
    """transformers saves no model whose generation settings contradict each other: said before it is trained."""
    settings = getattr(base, "generation_config", None)  # a classifier has none
    try:
        if settings is not None:
            settings.validate(strict=True)
    except ValueError as error:
        raise RecipeError(
            f"model.name: its generation_config.json contradicts itself ({places.why(error)}), so that the trained "
            "model could not be saved. Mend it."
        ) from error


def _with_lora(
    base: PreTrainedModel, model: Model | Classifier, lora: Lora, seed: int, output: Sequence[str]
) -> PeftModel:
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    targets, possible = wanted_layers(base, lora, output), adaptable(base)
    whole = [*lora.modules_to_save, *(name for name in output if name not in OUTPUTS)]
    if model.quantized:
        base = prepare_model_for_kbit_training(
            base,
            use_gradient_checkpointing=model.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # peft draws the A factors from torch's global generator
        try:
            config = LoraConfig(
                r=lora.r,
                lora_alpha=lora.alpha,
                lora_dropout=lora.dropout,
                target_modules=targets,
                rank_pattern=dict(lora.rank_pattern),
                alpha_pattern=dict(lora.alpha_pattern),
                use_rslora=lora.use_rslora,
                use_dora=lora.use_dora,
                modules_to_save=whole or None,
                init_lora_weights=lora.init_lora_weights,
                task_type="SEQ_CLS" if output else "CAUSAL_LM",
            )
            adapted = get_peft_model(base, config)
        except (ValueError, TypeError, NotImplementedError, RuntimeError, AttributeError) as error:
            reason = str(error).partition(". ")[0]
            raise RecipeError(
                f"model.lora: target_modules: {lora.target_modules}: peft cannot adapt these ({reason}). Name linear "
                f"layers that it can adapt with these settings: {possible}."
            ) from error
    if lora.average == "core":
        give_cores(adapted)
    for name, parameter in adapted.named_parameters():
        if lora.frozen is not None and re.search(rf"\.lora_(embedding_)?{lora.frozen}\.", name):
            parameter.requires_grad_(False)
    if problems := without_effect(adapted, lora):
        raise RecipeError(problems)
    return adapted


def scales(adapted: Any) -> dict[str, float]:
    """How many times the product of each A factor, by its parameter's name, counts in its layer: alpha / r or so."""
    found = {}
    for name, part in adapted.named_modules():
        for factor in ("lora_A", "lora_embedding_A") if hasattr(part, "lora_A") else ():
            if "default" in getattr(part, factor):
                end = ".weight" if factor == "lora_A" else ""
                found[f"{name}.{factor}.default{end}"] = float(part.scaling["default"])
    return found
