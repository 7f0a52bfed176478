"""What a defense that compares products, or decides layer by layer, needs of a recipe."""

from __future__ import annotations

from fedllm_sec.matrix import Layout
from fedllm_sec.recipe.places import TEXT_TASKS
from fedllm_sec.recipe.sections import Recipe

PAIRED = Layout(("layer.lora_A.weight", "layer.lora_B.weight"), ((2, 16), (16, 2)))  # stands in while no model is there


def spaced(recipe: Recipe) -> bool:
    """Whether the recipe's defense asks for pairs of factors."""
    block = recipe.defense if recipe.enable_defense else None
    return block is not None and (block.space != "factors" or block.scope == "layer")


def space_problems(recipe: Recipe) -> list[str]:
    """Why there are no products to compare, as far as can be said without a model."""
    if not spaced(recipe) or recipe.defense is None:
        return []
    block, lora = recipe.defense, getattr(recipe.model, "lora", None)
    what = f"space: {block.space}" if block.space != "factors" else f"scope: {block.scope}"
    if recipe.task not in TEXT_TASKS or lora is None:
        return [f"defense.{what}: is for LoRA adapters, and none is trained. Remove it, or set model.lora."]
    if lora.frozen is not None:
        return [
            f"defense.{what}: needs both factors of an adapter, and {lora.frozen} is frozen here: then "
            "there is no other gauge, and averages of factors are those of products. Remove it."
        ]
    if lora.average == "share_a":
        return [
            f"defense.{what}: needs both factors of an adapter, and with model.lora.average: share_a every client "
            "keeps its B to itself. Remove it."
        ]
    if lora.average == "core":
        return [
            f"defense.{what}: needs two trained factors, and model.lora.average: core trains one matrix between fixed "
            "orthonormal ones: its lengths and angles are those of products. Remove it."
        ]
    return []
