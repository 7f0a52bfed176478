"""What `backdoor_indicator` needs of a recipe: its rows, and how the server trains them into the model."""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import Tensor

from fedllm_sec.data import arrays
from fedllm_sec.defenses.indicator import NOISE, BackdoorIndicator, Tether
from fedllm_sec.defenses.pipeline import Pipeline
from fedllm_sec.errors import DataError, RecipeError
from fedllm_sec.models.pretrained import Wanted, brought
from fedllm_sec.protocols import Labelled, LocalTraining
from fedllm_sec.recipe.sections import Recipe
from fedllm_sec.rounds.planting import Planting
from fedllm_sec.seeds import generator_for, seed_for

PLACE = "defense.rule: backdoor_indicator"


def indicator_problems(recipe: Recipe) -> list[str]:
    """Why its rows could not be out of the task's distribution, or be there, as far as can be said without data."""
    block = recipe.defense.rule if recipe.enable_defense and recipe.defense is not None else {}
    source = block.get("source")
    if block.get("name") != "backdoor_indicator" or not isinstance(source, str) or source == NOISE:
        return []
    if _same(source, recipe.data.name):
        return [f"{PLACE}: source: {source}: is data.name itself, rows of the task. Name another set, or noise."]
    return []


def _same(one: str, other: str) -> bool:
    return os.path.realpath(os.path.expanduser(one)) == os.path.realpath(os.path.expanduser(other))


def make_planting(recipe: Recipe, defense: Pipeline, like: Labelled, device: torch.device) -> Planting | None:
    """The planting that the defense asks for; None where it asks for none. `like` are rows of the task."""
    if not isinstance(rule := defense.rule, BackdoorIndicator):
        return None
    if rule.rows < like.classes:
        raise RecipeError(f"{PLACE}: rows: {rule.rows} for {like.classes} labels: each needs one. Raise it.")
    rows = indicator_rows(rule, like, recipe.seed)
    training = LocalTraining(
        batch_size=rule.batch_size, epochs=rule.epochs, optimizer="sgd", lr=rule.lr, momentum=rule.momentum,
        weight_decay=rule.weight_decay, max_grad_norm=None,
    )  # fmt: skip
    return Planting(arrays.to_device(rows, device), training, (Tether(rule.mu),), rule.threshold)


def indicator_rows(rule: BackdoorIndicator, like: Labelled, seed: int) -> Labelled:
    """The indicator's images, in the shape of the task's, with balanced labels in random order; none is augmented."""
    rng, (_, channels, height, width) = generator_for(seed, "indicator", "rows"), like.x.shape
    if rule.source == NOISE:
        x = torch.rand(rule.rows, channels, height, width, generator=rng)
    else:
        x = _drawn(rule, Wanted(channels, (height, width), None, None), seed)
    y = torch.arange(len(x)) % like.classes
    y = y[torch.randperm(len(x), generator=generator_for(seed, "indicator", "labels"))]
    unmarked = torch.zeros(len(x), dtype=torch.bool)
    return Labelled(x, y, like.classes, unmarked, fixed=torch.ones(len(x), height, width, dtype=torch.bool))


def _drawn(rule: BackdoorIndicator, wanted: Wanted, seed: int) -> Tensor:
    """`rule.rows` training images of its source."""
    try:
        known, _ = arrays.load(rule.source, size=wanted.size, seed=seed)
        if len(known.y) < rule.rows:
            raise RecipeError(f"has {len(known.y)} images for rows: {rule.rows}. Lower rows, or name a larger set.")
        rng = np.random.default_rng(seed_for(seed, "indicator", "rows"))
        drawn = arrays.sample(known, rule.rows, rng).x
        if drawn.shape[1] != wanted.channels and wanted.channels == 1:
            drawn = drawn[:, :3].mean(1, keepdim=True)
        return brought(drawn, wanted)
    except (DataError, RecipeError) as error:
        why = str(error).replace(
            f'data.name: "{rule.source}" is neither', "is neither noise, a folder of images by class,"
        )
        raise RecipeError(f"{PLACE}: source: {rule.source}: {why}") from error
