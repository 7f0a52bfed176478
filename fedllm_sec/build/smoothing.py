"""CRFL's test-time half for one run: the noise of its smoothed test, and the radius that can be certified, if any."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fedllm_sec.build.threat import attack_rounds, client_ids, sure
from fedllm_sec.defenses.after import crfl, crfl_bound
from fedllm_sec.defenses.pipeline import Pipeline
from fedllm_sec.defenses.privacy import settings_if
from fedllm_sec.errors import RecipeError
from fedllm_sec.evaluation.certify import Attacker, certified_radius, logistic_lipschitz
from fedllm_sec.evaluation.smoothed import Smoothing
from fedllm_sec.protocols import LocalTraining
from fedllm_sec.recipe.sections import Recipe
from fedllm_sec.rounds.cohort import cohorts

COPIES = 50  # noisy models where the recipe does not say


def smoothing(
    recipe: Recipe,
    defense: Pipeline,
    task: Any,
    evaluation: Any,
    sizes: Mapping[str, float],
    poisoned_share: Mapping[str, Mapping[str, float]],
    training: LocalTraining,
) -> Smoothing | None:
    """How the model of the last round is smoothed; None without crfl, or where its answers are no classes."""
    settings = next((found for stage in defense.after if (found := settings_if(stage, crfl)) is not None), None)
    if settings is None:
        return None
    asked = {**settings}
    copies = asked.pop("copies", None)
    if not hasattr(evaluation, "outcomes"):
        if copies:
            raise RecipeError(
                f"defense.after: crfl.copies: {copies}: copies vote where classes are told apart, which task: "
                f"{recipe.task} does not. Remove it."
            )
        return None
    if copies == 0:
        return None
    bounds = functools.partial(crfl_bound, d=task.layout.size, **asked)
    sigma = bounds(recipe.rounds)[1]
    made = functools.partial(Smoothing, sigma, COPIES if copies is None else copies)
    why = (
        _no_lipschitz(recipe) or _not_plain(recipe, defense) or _not_one_round(recipe) or _forged(recipe)
        or ("there is no noise" if sigma <= 0 or bounds(1)[1] <= 0 else None)
    )  # fmt: skip
    if why is not None:
        return made(why=why)
    attackers, at = _attackers(recipe, sizes, poisoned_share, training)
    rho, own_sigma = bounds(at)
    last = recipe.rounds
    radius = functools.partial(
        certified_radius,
        attackers=attackers,
        lipschitz=logistic_lipschitz(rho, *_inputs(task)),
        sigma=own_sigma if at < last else sigma,
        later=[bounds(r) for r in range(at + 1, last + 1)],
    )
    return made(radius=radius)


# ---------------------------------------------------------------- what the theorem asks


def _not_plain(recipe: Recipe, defense: Pipeline) -> str | None:
    """The theorem is about plain federated averaging: the next model is made of the last one and nothing else."""
    clients, block = recipe.clients, recipe.defense
    name = recipe.algorithm["name"]
    momentum, server_lr = recipe.algorithm.get("server_momentum", 0.0), recipe.algorithm.get("server_lr", 1.0)
    if name != "fedavg" or momentum != 0 or server_lr != 1:
        return "the theorem is about a server that adds the mean (algorithm: {name: fedavg}, server_lr 1)"
    if (
        clients.optimizer != "sgd"
        or clients.momentum != 0
        or clients.max_grad_norm is not None
        or clients.weight_decay != 0
    ):
        return "the theorem is about plain local SGD (optimizer: sgd, max_grad_norm: null, weight_decay: 0)"
    assert block is not None
    plain = block.rule.get("name") == "mean" and block.rule.get("weights") == "uniform"
    if block.client or block.before or not plain or len(defense.after) != 1:
        return (
            "the theorem is about crfl alone, behind a mean with equal weights (rule: {name: mean, weights: uniform})"
        )
    return None


def _no_lipschitz(recipe: Recipe) -> str | None:
    if recipe.task == "classify" and recipe.model.get("name") == "logistic":
        return None
    what = recipe.model.get("name") if isinstance(recipe.model, dict) else "a transformer"
    return f"no Lipschitz constant is known for the loss gradient of {what}; there is one for logistic"


def _not_one_round(recipe: Recipe) -> str | None:
    rounds = attack_rounds(recipe, 2)
    if len(rounds) == 1:
        return None
    return "the theorem is about attackers who act in one round" + (", and nobody attacks" if not rounds else "")


def _forged(recipe: Recipe) -> str | None:
    block = recipe.attack
    if block is None or (not block.update and not block.local):
        return None
    return "the theorem is about poisoned data; this attack changes training or rows as well"


# ---------------------------------------------------------------- what it is given


def _attackers(
    recipe: Recipe,
    sizes: Mapping[str, float],
    poisoned_share: Mapping[str, Mapping[str, float]],
    training: LocalTraining,
) -> tuple[list[Attacker], int]:
    """The attackers of the one attacked round, each with the most poisoned examples that a batch of its may hold."""
    ((at, malicious),) = attack_rounds(recipe, 2)
    ids, clients = client_ids(recipe), recipe.clients
    at_it = range(at, at + 1)
    ((_, cohort),) = cohorts(recipe.seed, at_it, clients.total, clients.per_round, recipe.before, sure(recipe))
    found = []
    for id in sorted(malicious & {ids[place] for place in cohort}):
        size = int(sizes[id])
        batch = min(training.batch_size or size, size)
        poisoned = math.ceil(size * sum(share.get(id, 0.0) for share in poisoned_share.values()))
        found.append(
            Attacker(
                weight=1 / len(cohort),
                scale=1.0,
                steps=training.steps_of(size),
                lr=training.lr_at(at, recipe.rounds),
                poisoned_share=min(1.0, poisoned / max(batch, 1)),
            )
        )
    return found, at


def _inputs(task: Any) -> tuple[float, float]:
    """The longest input of the model that an image of values in [0, 1] can be, its bias included, and how much
    longer a change of an image is after it is normalised."""
    mean, std = (_spread(part) for part in (task.mean, task.std))
    pixels = task.layout.shapes[0][1]  # of the linear layer: classes x inputs
    per_channel = pixels / len(mean)
    longest = math.sqrt(1 + per_channel * sum(max(m, 1 - m) ** 2 / s**2 for m, s in zip(mean, std, strict=True)))
    return longest, 1 / min(std)


def _spread(part: Tensor) -> Sequence[float]:
    return [float(value) for value in part.flatten()]
