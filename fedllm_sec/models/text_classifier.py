"""Classifiers of texts by transformers: a base model from a local folder or the hub, and an output layer of their own.

Whatever output layer the folder holds is drawn anew, by the seed: its classes are not those of the data.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedllm_sec.errors import RecipeError
from fedllm_sec.models import gguf
from fedllm_sec.models.lora import attending, load_tokenizer, place, source_of, told
from fedllm_sec.recipe import modelfolder, places

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
    _refuse_others(source, model.name)
    where, options = place(model)
    tokenizer = load_tokenizer(model)
    if tokenizer.pad_token_id is None:
        raise RecipeError(
            f"model.name: {model.name}: its tokenizer has no padding token and no end token to pad with, and texts of "
            "several lengths make a batch. Set pad_token in its tokenizer_config.json."
        )
    config = config_of(model, names, tokenizer.pad_token_id)
    options |= {"config": config, "dtype": getattr(torch, model.dtype), "use_safetensors": True}
    with told(source):
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
    if strange := sorted(name for name in lost if not _within(name, output)):
        raise RecipeError(
            f"model.name: {model.name}: lacks {len(strange)} weights of the model that its configuration describes, "
            f"such as {strange[0]}, or has them in other shapes: they would be random. Mend the folder."
        )
    with torch.no_grad():
        draw(base, output, seed)
    for name in output:
        base.get_submodule(name).register_forward_pre_hook(in_its_own_type, with_kwargs=True)
    return base.to(device), tokenizer, output


def _refuse_others(source: str, name: str) -> None:
    """An error for files that no classifier is read from: GGUF, and pickled weights."""
    if gguf.is_gguf(name):
        raise RecipeError(f"model.name: {name}: is a GGUF file, which holds a language model. Give a model's folder.")
    if not os.path.isdir(source):
        return
    if (wrong := modelfolder.wrong(source)) is not None:
        raise RecipeError(f"model.name: {name}: {wrong}")
    if not any(entry.endswith(".safetensors") for entry in os.listdir(source)):
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
    return [*behind, *([found] if any(_within(name, [found]) for name in lost) else [])]


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


def unreadable(model: Classifier) -> str | None:
    """Why no classifier can be read from a local folder, as far as its files say; None where nothing is seen."""
    try:
        _refuse_others(source_of(model.name), places.home(model.name))
    except RecipeError as error:
        return error.problems[0]
    return None


def _within(name: str, modules: Sequence[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)
