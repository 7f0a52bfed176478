"""What a kind of task contributes to a federation, and what the kinds share: poisoning, making a small model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedllm_sec import models
from fedllm_sec.attacks.threat import Threat
from fedllm_sec.errors import AttackError
from fedllm_sec.protocols import Labelled
from fedllm_sec.recipe.resolve import resolve
from fedllm_sec.recipe.sections import Recipe
from fedllm_sec.seeds import generator_for, seed_for

# class of each row (rows,) -> (rows of the server's clean root set, rows of each client by id)
Split = Callable[[np.ndarray], tuple[np.ndarray, dict[str, np.ndarray]]]


@dataclass(frozen=True)
class Parts:
    """A task, its data as the task wants them, and how it is measured."""

    task: Any
    shards: Mapping[str, Any]  # client id -> shard
    poisoned: Mapping[str, Any]  # malicious client id -> poisoned shard
    root: Any  # the server's clean shard, or None
    evaluation: Any


def make_model(recipe: Recipe, shape: tuple[int, ...], classes: int) -> torch.nn.Module:
    """The model of the recipe, its weights drawn by the seed."""
    settings = {key: value for key, value in recipe.model.items() if key != "name"}
    make = resolve(recipe.model["name"], settings, models.MENU, "model")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(recipe.seed, "model"))  # layers draw from torch's global generator
        made: torch.nn.Module = make(shape, classes)
    return made


def poison(seed: int, threat: Threat | None, shards: Mapping[str, Any], test: Any = None) -> dict[str, Any]:
    """The poisoned shards of the malicious clients.

    An attack that changes no row at all is an error; where the attack's probe of the `test` rows knows the reason, such
    as a class that nobody has, it says so. Clients that hold nothing it acts on (a label flip whose class
    they lack) are named in a warning: they train on clean data.
    """
    if threat is None or not threat.data or not threat.malicious:
        return {}
    poisoned, untouched = {}, []
    attackers = sorted(threat.malicious if threat.ever is None else threat.ever)
    for id in attackers:
        rows, rng = shards[id], generator_for(seed, "poison", id)
        for attack in threat.data:
            rows = attack.poison(rows, rng)
        if any(rows.poisoned.tolist() if isinstance(rows, Labelled) else rows["poisoned"]):
            poisoned[id] = rows
        else:
            untouched.append(id)
    if not poisoned:
        for attack in threat.data if test is not None else ():
            attack.probe(test)
        raise AttackError(
            f"attack.data: poisoned none of the rows of client {', '.join(untouched)}. "
            "Raise the rate, or choose other clients or another target."
        )
    if untouched:
        warnings.warn(
            f"attack.data: {len(untouched)} of {len(attackers)} malicious clients hold no row the attack "
            f"acts on and train on clean data: {', '.join(untouched)}.",
            stacklevel=2,
        )
    return poisoned
