"""The one base model of a process and its LoRA adapter (peft), and what is special about LoRA vectors."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedllm_sec.errors import RecipeError
from fedllm_sec.matrix import Layout, UpdateMatrix
from fedllm_sec.models import gguf
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
        if "Weights only load failed" in why:
            why = "its weights are a pickle of more than tensors, which could run code; save them as safetensors"
        raise RecipeError(f'model.name: "{source}" cannot be loaded ({why}).') from error


def load_base(model: Model, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The frozen base model and its tokenizer, from "tiny", a local folder, a GGUF file or the hub."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    source = source_of(model.name)
    where, file = gguf.place(source)
    options: dict[str, Any] = {"dtype": getattr(torch, model.dtype), **file, **gguf.dense(source)}
    if file and model.load_in_4bit:
        raise RecipeError(
            f"model.load_in_4bit: {source} is a GGUF file, whose weights are unpacked to {model.dtype}. Set it to "
            "false, or give a folder of safetensors."
        )
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
    with told(source):
        base, loading = AutoModelForCausalLM.from_pretrained(
            where, trust_remote_code=False, output_loading_info=True, **options
        )
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
    return (base if model.load_in_4bit else base.to(device)), tokenizer


def load_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """The base model's tokenizer; where it has no padding token its end token pads."""
    from transformers import AutoTokenizer

    source = source_of(model.name)
    where, file = gguf.place(source)
    with told(source):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(where, trust_remote_code=False, **file)
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
                "layers that it can adapt."
            ) from error
    for name, parameter in adapted.named_parameters():
        if lora.train == "B" and ".lora_A." in name:
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


MOST_FLOPS = 2e11  # of one round's product_gap: some ten seconds on two cores
BLOCK = 2**23  # values of a block of a product: 64 MB


def gap_flops(layout: Layout, n: int) -> float:
    """What `product_gap` of n rows costs, in additions and multiplications."""
    shapes = dict(zip(layout.names, layout.shapes, strict=True))
    return float(sum(2 * min(_costs(n, shapes[a], shapes[b])) for a, b in lora_pairs(layout)))


def _costs(n: int, a: Sequence[int], b: Sequence[int]) -> tuple[int, int]:
    """Of inner products of m = (n + 2) r factors, and of the product itself: factors are (r, in) and (out, r)."""
    (r, wide), tall = a, b[0]
    m = (n + 2) * r
    return m * m * (wide + tall), m * wide * tall


def product_gap(updates: UpdateMatrix, weights: Tensor, start: Tensor) -> float | None:
    """How far averaging A and B apart is from averaging the products B A; None where one factor is frozen.

    ||sum w_i B_i A_i - B' A'|| / ||sum w_i B_i A_i - B_0 A_0||, Frobenius norms over all adapted layers, with A' and
    B' the averaged factors and (A_0, B_0) the start. Stacked over the clients both are products of (out, m) and (m, in)
    with m = (n + 2) r. Where m is small no product is formed: <B1 A1, B2 A2> = sum((B1^T B2) * (A1 A2^T)); where it is
    large the (out, in) products are, block by block. Rows of weight 0 are left out.
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
        products, product = _costs(len(used), shapes[a_name], shapes[b_name])
        square = _square_of_inner if products <= product else _square_of_product
        clients_b, clients_a = torch.cat([*(b * w[:, None, None])], dim=1), torch.cat([*a])  # (out, n r), (n r, in)
        error += square(torch.cat([clients_b, -mean_b], dim=1), torch.cat([clients_a, mean_a]))
        change += square(torch.cat([clients_b, -b0], dim=1), torch.cat([clients_a, a0]))
    return (max(error, 0.0) / change) ** 0.5 if change > 0 else None


def _square_of_inner(tall: Tensor, wide: Tensor) -> float:
    """||tall wide||^2 of (out, m) and (m, in), by inner products of the factors."""
    return float(((tall.T @ tall) * (wide @ wide.T)).sum())


def _square_of_product(tall: Tensor, wide: Tensor) -> float:
    """The same by the product, block by block."""
    return sum(float((part @ wide).square().sum()) for part in tall.split(max(1, BLOCK // wide.shape[1])))
