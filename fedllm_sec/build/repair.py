"""What a repair after training needs of a recipe, and the one that it asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fedllm_sec import defenses
from fedllm_sec.build.names import make
from fedllm_sec.defenses.repair import Trained, fine_tune, own_answers, prune_directions
from fedllm_sec.recipe.resolve import find
from fedllm_sec.recipe.sections import Recipe

BY_ROWS = (fine_tune, own_answers)


def asked(recipe: Recipe) -> dict[str, Any] | None:
    """The block of the repair, where the defense is switched on."""
    return recipe.defense.repair if recipe.enable_defense and recipe.defense is not None else None


def make_repair(recipe: Recipe) -> Callable[[Trained], Tensor] | None:
    block = asked(recipe)
    return None if block is None else make(block, defenses.REPAIR_MENU, "defense.repair")


def repair_problems(recipe: Recipe) -> list[str]:
    """Why the repair could not act, as far as can be said without a model."""
    block = asked(recipe)
    if block is None or recipe.defense is None:
        return []
    place = f"defense.repair: {block['name']}"
    if recipe.task != "causal_lm":
        return [f"{place}: is for task: causal_lm, this is {recipe.task}: others have no adapter of a language model, "
                "nor answers of their own. Remove it."]  # fmt: skip
    lora, method = recipe.model.lora, find(block["name"], defenses.REPAIR_MENU, "defense.repair")
    problems = []
    if method in BY_ROWS and not recipe.defense.root_rows:
        problems.append(f"{place}: trains on rows of the server's own. Set defense.root_rows.")
    if lora is not None and lora.average == "share_a":
        problems.append(
            f"{place}: with model.lora.average: share_a every client keeps its B to itself: there is no one model to "
            "repair. Remove it, or choose another way of averaging."
        )
    if method is own_answers and block.get("reminder") and recipe.data.template == "chat":
        problems.append(
            f"{place}: reminder: is text in front of a prompt, which a chat template does not have. Put it into "
            "data.system, or leave it out."
        )
    if method is prune_directions:
        way = None if lora is None else lora.average
        why = None
        if lora is None:
            why = "takes directions out of an adapter, and none is trained"
        elif lora.frozen is not None:
            why = f"needs both factors of an adapter, and {lora.frozen} is frozen"
        elif way in ("stack", "exact", "core"):
            why = f"with model.lora.average: {way} the adapter's two factors do not hold what was learnt"
        elif lora.starts_from_base:
            why = f"init_lora_weights: {lora.init_lora_weights} puts directions of the base model into the adapter"
        elif (taken := block.get("directions", 1)) >= (least := min([lora.r, *lora.rank_pattern.values()])):
            why = f"directions: {taken} of rank {least} leave nothing"
        problems += [f"{place}: {why}. Change that, or repair by fine_tune."] if why is not None else []
    return problems
