"""Classifiers of texts by transformers: a base model from a local folder or the hub, and an output layer of their own.

Whatever output layer the folder holds is drawn anew, by the seed: its classes are not those of the data.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedllm_sec.errors import RecipeError
from fedllm_sec.models.lora import attending, load_tokenizer, place, source_of, told
from fedllm_sec.models.targets import within

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fedllm_sec.recipe.classifier import Classifier

POOLER = "pooler"  # of BERT: part of the base model, and yet lacking where that was trained on masked words alone
SPREAD = 0.02  # of an output layer's weights, where the configuration does not say


def config_of(model: Classifier, names: Sequence[str], pad: int | None) -> Any:
    """The configuration of the folder for these classes and this padding token."""
    from transformers import AutoConfig

    where, options = place(model)
    with told(source_of(model.name)):
        found = AutoConfig.from_pretrained(where, **options)
        found.num_labels = len(names)
        found.id2label, found.label2id = dict(enumerate(names)), {name: k for k, name in enumerate(names)}
        found.problem_type, found.pad_token_id = "single_label_classification", pad
    return found


def unweighted(model: Classifier, classes: int) -> PreTrainedModel:
    """The model from its configuration alone, on torch's device of the day: its weights say nothing."""
    from transformers import AutoModelForSequenceClassification

    with told(source_of(model.name)):
        config = config_of(model, [str(k) for k in range(classes)], 0)
        made: PreTrainedModel = AutoModelForSequenceClassification.from_config(
            config, dtype=getattr(torch, model.dtype), trust_remote_code=False
        )
    return made


def load_classifier(
    model: Classifier, names: Sequence[str], seed: int, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[str]]:
    """The model with an output for each of `names`, drawn by the seed; its tokenizer; the modules that are the output.

    Weights are read from safetensors only, and no code of the folder is run.
    """
    from transformers import AutoModelForSequenceClassification

    source = source_of(model.name)
    _refuse_pickles(source, model.name)
    where, options = place(model)
    tokenizer = load_tokenizer(model)
    if tokenizer.pad_token_id is None:
        raise RecipeError(
            f"model.name: {model.name}: its tokenizer has no padding token and no end token to pad with, and texts of "
            "several lengths make a batch. Set pad_token in its tokenizer_config.json."
        )
    config = config_of(model, names, tokenizer.pad_token_id)
    options |= {"config": config, "dtype": getattr(torch, model.dtype), "use_safetensors": True}
    with told(source), _unreported():
        try:
            base, loading = attending(
                AutoModelForSequenceClassification.from_pretrained, model, where,
                {**options, "ignore_mismatched_sizes": True},
            )  # fmt: skip
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            raise RecipeError(
                f"model.name: {model.name}: transformers has no classifier of texts for a {config.model_type}. Choose "
                "another, such as a BERT."
            ) from error
    lost = [*loading["missing_keys"], *(key[0] for key in loading["mismatched_keys"])]
    output = outputs(base, lost)
    if strange := sorted(name for name in lost if not within(name, output)):
        raise RecipeError(
            f"model.name: {model.name}: lacks {len(strange)} weights of the model that its configuration describes, "
            f"such as {strange[0]}, or has them in other shapes: they would be random. Mend the folder."
        )
    with torch.no_grad():
        draw(base, output, seed)
    for name in output:
        base.get_submodule(name).register_forward_pre_hook(in_its_own_type, with_kwargs=True)
    return base.to(device), tokenizer, output


@contextmanager
def _unreported() -> Iterator[None]:
    """Without transformers' table of new weights and of those left out: what may be new is checked here."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _refuse_pickles(source: str, name: str) -> None:
    """An error for a folder whose weights are pickled: no classifier is read from those."""
    endings = {os.path.splitext(entry)[1] for entry in os.listdir(source)} if os.path.isdir(source) else set()
    if ".safetensors" not in endings and endings & {".bin", ".pt", ".pth"}:
        raise RecipeError(
            f"model.name: {name}: holds its weights as a pickle alone, which can run code. Save them as safetensors: "
            "AutoModel.from_pretrained(FOLDER).save_pretrained(FOLDER)."
        )


def outputs(base: PreTrainedModel, lost: Sequence[str] = ()) -> list[str]:
    """The modules behind the base model, and its pooler where the folder lacks that: what is new, and trained whole."""
    inner = base.base_model_prefix
    behind = [name for name, part in base.named_children() if name != inner and any(True for _ in part.parameters())]
    if not hasattr(base, inner) or not behind:
        raise RecipeError(
            f"model.name: {type(base).__name__} is not a base model with an output layer behind it, so that nothing "
            "tells what is new. Choose another."
        )
    found = f"{inner}.{POOLER}"
    return [*behind, *([found] if any(within(name, [found]) for name in lost) else [])]


def lost_pooler(model: Classifier, base: PreTrainedModel) -> list[str]:
    """The weights of a pooler that the base model has and the local folder lacks; [] where nothing is seen of that."""
    from safetensors import safe_open

    own = [name for name, _ in base.named_parameters() if within(name, [f"{base.base_model_prefix}.{POOLER}"])]
    files = sorted(Path(source_of(model.name)).glob("*.safetensors"))
    with told(source_of(model.name)):
        for file in files if own else ():
            with safe_open(file, framework="pt") as opened:
                if any(POOLER in name.split(".") for name in opened.keys()):  # noqa: SIM118
                    return []
    return own if files else []


def draw(base: PreTrainedModel, output: Sequence[str], seed: int) -> None:
    """Draw the output's linear layers as BERT's: normal with the configuration's initializer_range, biases 0."""
    rng = torch.Generator().manual_seed(seed)
    spread = getattr(base.config, "initializer_range", None) or SPREAD
    for name in output:
        for part in base.get_submodule(name).modules():
            if isinstance(part, nn.Linear):
                part.weight.copy_(torch.randn(part.weight.shape, generator=rng) * spread)
                if part.bias is not None:
                    part.bias.zero_()
            elif hasattr(part, "reset_parameters"):
                part.reset_parameters()  # of norms: ones and zeros


def in_its_own_type(part: nn.Module, args: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What an output layer is given in the type of its weights: they are float32 where the base is of fewer bits."""
    kind = next((p.dtype for p in part.parameters() if p.is_floating_point()), torch.float32)

    def cast(value: Any) -> Any:
        return value.to(kind) if isinstance(value, Tensor) and value.is_floating_point() else value

    return tuple(map(cast, args)), {key: cast(value) for key, value in named.items()}


def positions(base: Any) -> int | None:
    """How many tokens long a text may be; None where nothing bounds it.

    RoBERTa and its kin number the first token behind the padding token's number: so many positions are never used.
    """
    most = getattr(base.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if not isinstance(most, int) or most <= 0:
        return None
    numbered = [
        part.padding_idx
        for name, part in base.named_modules()
        if name.endswith("position_embeddings") and isinstance(part, nn.Embedding) and part.padding_idx is not None
    ]
    return most - (numbered[0] + 1 if numbered else 0)
