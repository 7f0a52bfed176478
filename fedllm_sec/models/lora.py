"""The one base model of a process and its LoRA adapter (peft), and what is special about LoRA vectors."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedllm_sec.errors import RecipeError
from fedllm_sec.matrix import Layout, UpdateMatrix
from fedllm_sec.recipe import places
from fedllm_sec.recipe.resolve import did_you_mean

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fedllm_sec.recipe.sections import Model


def source_of(name: str) -> str:
    """Where a model of this name lies: the package for "tiny", a local folder, or the hub.

    An error within seconds where it can be none of them: the libraries would try an unreachable hub for a minute.
    """
    if name == "tiny":
        return str(Path(__file__).parent / "tiny")
    folder = os.path.expanduser(name)
    if os.path.isdir(folder):
        return folder
    if places.is_local(name) or os.path.exists(folder):
        raise RecipeError(
            f"model.name: {name}: no such folder in {places.here()}. Give an existing folder, a hub name or tiny."
        )
    if (problem := places.hub_problem()) is not None and not _downloaded(name):
        raise RecipeError(
            f'model.name: "{name}": no such folder in {places.here()}, not downloaded before, and {problem}. Give an '
            "existing folder or tiny."
        )
    return name


def _downloaded(name: str) -> bool:
    """Whether the hub's cache on this machine has the model."""
    from huggingface_hub import try_to_load_from_cache

    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except ValueError:  # no hub name
        return False


def load_base(model: Model, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The frozen base model and its tokenizer, from "tiny", a local folder or the hub."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    source = source_of(model.name)
    options: dict[str, Any] = {"dtype": getattr(torch, model.dtype)}
    if model.load_in_4bit:
        try:
            import bitsandbytes  # noqa: F401
        except ImportError as error:
            raise RecipeError(
                "model.load_in_4bit: needs bitsandbytes, which is not installed. "
                "pip install 'fedllm_sec[llm-gpu]' or set it to false."
            ) from error
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, model.dtype),
        )
        options["device_map"] = {"": device}
    tokenizer = load_tokenizer(model)
    try:
        base = AutoModelForCausalLM.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        raise RecipeError(f'model.name: "{source}" cannot be loaded ({places.why(error)}).') from error
    return (base if model.load_in_4bit else base.to(device)), tokenizer


def load_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """The base model's tokenizer; where it has no padding token its end token pads."""
    from transformers import AutoTokenizer

    source = source_of(model.name)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise RecipeError(f'model.name: "{source}" cannot be loaded ({places.why(error)}).') from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _need_targets(base: PreTrainedModel, targets: str | list[str]) -> None:
    """Each named module must be in the model; all that are not are named at once."""
    if isinstance(targets, str):
        return
    if not targets:
        raise RecipeError("model.lora.target_modules: is empty, so nothing would be trained. Name some, or all-linear.")
    known = {name for name, _ in base.named_modules()}
    linear = {name.rpartition(".")[2] for name, part in base.named_modules() if isinstance(part, torch.nn.Linear)}
    problems = [
        f'model.lora.target_modules: the model has no module "{wanted}".{did_you_mean(wanted, linear)}'
        for wanted in targets
        if not any(name == wanted or name.endswith(f".{wanted}") for name in known)
    ]
    if problems:
        raise RecipeError(problems)


def add_adapter(base: PreTrainedModel, model: Model, seed: int) -> PeftModel:
    """Wrap the base model with a fresh LoRA adapter; its trainable parameters are float32."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    lora = model.lora
    _need_targets(base, lora.target_modules)
    if model.load_in_4bit:
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=model.gradient_checkpointing)
    elif model.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.enable_input_require_grads()
    base.config.use_cache = not model.gradient_checkpointing
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # peft draws the A factors from torch's global generator
        try:
            adapted = get_peft_model(base, config)
        except ValueError as error:
            reason = str(error).partition(". ")[0]
            raise RecipeError(
                f"model.lora.target_modules: {lora.target_modules}: peft cannot adapt these ({reason}). Name linear "
                "layers, or all-linear."
            ) from error
    frozen = {"A": ".lora_B.", "B": ".lora_A."}.get(lora.train)
    for name, parameter in adapted.named_parameters():
        if frozen is not None and frozen in name:
            parameter.requires_grad_(False)
    return adapted


def save_adapter(adapted: PeftModel, folder: Path) -> None:
    """Write a peft adapter folder, whole or not at all: it appears under its name only when complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        adapted.save_pretrained(temporary)
        folder.mkdir(exist_ok=True)
        # the config first: a folder with weights is then always loadable
        for file in sorted(Path(temporary).iterdir(), key=lambda p: p.suffix == ".safetensors"):
            if file.is_file():
                file.replace(folder / file.name)


def lora_pairs(layout: Layout) -> list[tuple[str, str]]:
    """The (A, B) parameter names that form one product B A."""
    names = set(layout.names)
    pairs = [(name, name.replace(".lora_A.", ".lora_B.")) for name in layout.names if ".lora_A." in name]
    return [(a, b) for a, b in pairs if b in names]


def product_gap(updates: UpdateMatrix, weights: Tensor, start: Tensor) -> float | None:
    """How far averaging A and B apart is from averaging the products B A; None where one factor is frozen.

    ||sum w_i B_i A_i - B' A'|| / ||sum w_i B_i A_i - B_0 A_0||, Frobenius norms over all adapted layers, with A' and
    B' the averaged factors and (A_0, B_0) the start. Products are never formed: <B1 A1, B2 A2> =
    sum((B1^T B2) * (A1 A2^T)), stacked over clients. Rows of weight 0 are left out.
    """
    pairs = lora_pairs(updates.layout)
    used = torch.nonzero(weights).flatten().tolist()
    if not pairs or not used or updates.mixing is not None:
        return None
    w = (weights[used] / weights[used].sum()).to(torch.float64)
    places, shapes = updates.layout.slices(), dict(zip(updates.layout.names, updates.layout.shapes, strict=True))
    error = change = 0.0
    for a_name, b_name in pairs:

        def factors(name: str) -> tuple[Tensor, Tensor]:
            origin = start[places[name]].double().cpu().view(shapes[name])
            rows = updates.rows[used, places[name]].double().cpu().view(len(used), *shapes[name])
            return origin, origin + rows

        a0, a = factors(a_name)  # (r, in), (n, r, in)
        b0, b = factors(b_name)  # (out, r), (n, out, r)
        mean_a, mean_b = torch.einsum("n,nri->ri", w, a), torch.einsum("n,nor->or", w, b)
        tall_b = torch.cat([*(b * w[:, None, None]), -mean_b, -b0], dim=1)  # (out, (n + 2) r)
        tall_a = torch.cat([*a, mean_a, a0])  # ((n + 2) r, in)
        products = (tall_b.T @ tall_b) * (tall_a @ tall_a.T)
        r = a0.shape[0]
        clients, averaged, origin = slice(0, -2 * r), slice(-2 * r, -r), slice(-r, None)

        def square(*parts: slice) -> float:
            return float(sum(products[p, q].sum() for p in parts for q in parts))  # noqa: B023

        error += square(clients, averaged)
        change += square(clients, origin)
    return (max(error, 0.0) / change) ** 0.5 if change > 0 else None
