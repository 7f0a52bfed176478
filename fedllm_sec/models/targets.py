"""Which layers of a language model the settings of an adapter mean, and what of them means none."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from fedllm_sec.errors import RecipeError
from fedllm_sec.recipe.resolve import did_you_mean

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from fedllm_sec.recipe.language_model import Lora

# in state-space models (mamba): peft refuses the first two, transformers uses the third's weight without calling it
NOT_CALLED = {"out_proj", "conv1d", "dt_proj"}


def linear_layers(base: PreTrainedModel, apart: Sequence[str] = ()) -> dict[str, Any]:
    """Linear layers by their place in the model; not the output layer, nor what lies in modules `apart`."""
    from transformers.pytorch_utils import Conv1D

    head = base.get_output_embeddings()
    kinds = (torch.nn.Linear, Conv1D)
    linear = {name: part for name, part in base.named_modules() if isinstance(part, kinds) and part is not head}
    return {name: part for name, part in linear.items() if not within(name, apart)}


def within(name: str, modules: Sequence[str]) -> bool:
    """Whether a module or a parameter is one of these modules, or lies in one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def adaptable(base: PreTrainedModel) -> str:
    """The names of linear layers that can be adapted, for an error."""
    refused = NOT_CALLED if "mamba" in base.config.model_type else set()
    return ", ".join(sorted({name.rpartition(".")[2] for name in linear_layers(base)} - refused)) or "there are none"


def _fits(name: str, wanted: str) -> bool:
    """Whether a name in a list of modules means the module of this place."""
    return name == wanted or name.endswith(f".{wanted}")


def _block(name: str) -> int | None:
    """The number of the block that a layer is in: the first in its place; None outside of all blocks."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def wanted_layers(base: PreTrainedModel, lora: Lora, apart: Sequence[str] = ()) -> str | list[str]:
    """What peft is told to adapt; every name that the model lacks is an error.

    What lies in modules `apart` is not adapted: a classifier's output, which is trained whole.
    """
    wanted = [] if isinstance(lora.target_modules, str) else lora.target_modules
    if wanted == lora.target_modules == []:
        raise RecipeError("model.lora.target_modules: is empty, so nothing would be trained. Name some, or all-linear.")
    known = [name for name, _ in base.named_modules()]
    linear = {name.rpartition(".")[2] for name in linear_layers(base)}
    problems = [
        f'model.lora.{key}: the model has no module "{module}".{did_you_mean(module, linear)}'
        for key, names in (("target_modules", wanted), ("modules_to_save", lora.modules_to_save))
        for module in names
        if not any(_fits(name, module) for name in known)
    ]
    if problems:
        raise RecipeError(problems)
    if lora.init_lora_weights == "olora" and any(type(part).__name__ == "Conv1D" for part in base.modules()):
        raise RecipeError(
            "model.lora.init_lora_weights: olora: this model keeps its weights transposed (Conv1D), which peft's OLoRA "
            "does not heed. Use pissa, true or gaussian."
        )
    head = base.get_output_embeddings()
    if head is not None and head.weight is base.get_input_embeddings().weight:
        both = [n for n, p in base.named_modules() if p in (head, base.get_input_embeddings())]
        if named := [module for module in wanted if any(_fits(name, module) for name in both)]:
            warnings.warn(
                f"model.lora.target_modules: {named}: this model's output and embedding are one matrix. The adapter is "
                "right as long as it stays an adapter; merged into the weights it would act in both places. To merge "
                "it, put lm_head into modules_to_save instead.",
                stacklevel=2,
            )
    meant = [name for name in known if any(_fits(name, module) for module in wanted)] or linear_layers(base, apart)
    meant = [name for name in meant if not within(name, apart)]
    if apart and not meant:
        raise RecipeError(
            f"model.lora.target_modules: {lora.target_modules}: no linear layer of the model is called so but in its "
            f"output ({', '.join(apart)}), which is trained whole. Name others, or all-linear."
        )
    if lora.layers_to_transform is None:
        return sorted(meant) if apart else lora.target_modules
    if not wanted and any(parameter.ndim == 3 for parameter in base.parameters()):
        raise RecipeError(
            f"model.lora.layers_to_transform: {lora.layers_to_transform}: this mixture keeps its experts as one "
            "parameter of a block, which peft adapts in all blocks or in none. Name target_modules, or set it to null."
        )
    if lost := sorted(set(lora.layers_to_transform) - {_block(name) for name in meant}):
        raise RecipeError(
            f"model.lora.layers_to_transform: {lost}: no block of these numbers has such layers. The first is 0."
        )
    return sorted(name for name in meant if _block(name) in lora.layers_to_transform)  # peft skips full names here


def without_effect(adapted: PeftModel, lora: Lora) -> list[str]:
    """Settings that fit no adapted layer."""
    names = [name for name, part in adapted.get_base_model().named_modules() if hasattr(part, "lora_A")]
    called = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
    problems = [
        f'model.lora.{key}: "{pattern}" fits none of the adapted layers. They are called {called}.'
        for key, patterns in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern))
        for pattern in patterns
        if not any(_pattern(pattern, name) for name in names)
    ]
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    problems += [
        f'model.lora.modules_to_save: "{module}" has no weights of its own to train. Name another, or remove it.'
        for module in lora.modules_to_save
        if not any(f"{module}.modules_to_save." in name for name in trained)
    ]
    return problems


def _pattern(pattern: str, name: str) -> bool:
    """Whether peft applies a pattern to a layer of this name."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None
