"""What a run leaves of its model: an adapter, or a whole model, as the recipe asks."""

from __future__ import annotations

from typing import Literal

from fedllm_sec.recipe.places import TEXT_TASKS
from fedllm_sec.recipe.sections import Recipe


def kind_of(recipe: Recipe) -> Literal["adapter", "model"]:
    """What lies in the folder that a run leaves, and how it is called."""
    lora = recipe.model.lora if recipe.task in TEXT_TASKS else None
    return "adapter" if lora is not None and recipe.output.save == "adapter" else "model"


def save_problems(recipe: Recipe) -> list[str]:
    """Why what is asked for cannot be saved, as far as can be said without the model."""
    found = rounds_problem("output.adapter_every", recipe.output.adapter_every, recipe)
    return found if recipe.output.save == "adapter" else found + _merge_problems(recipe)


def rounds_problem(place: str, every: int | None, recipe: Recipe) -> list[str]:
    """Why what is to happen in every k-th round does not."""
    if every is None or every <= recipe.rounds:
        return []
    return [f"{place}: {every:,} is more than rounds={recipe.rounds:,}, so it does not come to that. Lower it."]


def _merge_problems(recipe: Recipe) -> list[str]:
    place = "output.save: merged: "
    if recipe.task not in TEXT_TASKS or recipe.model.lora is None:
        return [f"{place}there is no adapter to merge: the whole model is trained, and saved as it is. Remove it."]
    if getattr(recipe.model, "quantized", False):
        return [f"{place}the base model's weights are packed, and sums would be rounded to that. Set it to adapter."]
    return []
