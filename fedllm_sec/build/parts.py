"""What a kind of task contributes to a federation, and what the kinds share: dealing rows, poisoning, a small model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedllm_sec import models
from fedllm_sec.attacks.threat import Threat
from fedllm_sec.build.names import make
from fedllm_sec.data import partition
from fedllm_sec.errors import AttackError, RecipeError
from fedllm_sec.protocols import Labelled
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


def deal(recipe: Recipe, ids: Sequence[str], labels: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Row numbers of the server's root set and of each client, drawn by the recipe's seed.

    The rows are dealt to the clients first, then the root rows are drawn from all of them and taken away from who had
    them: with and without root rows a client has the same shard but for those few rows.
    """
    shares = partition.split_rows(
        make(recipe.clients.partition, partition.MENU, "clients.partition"),
        labels,
        len(ids),
        np.random.default_rng(seed_for(recipe.seed, "partition")),
    )
    dealt = dict(zip(ids, shares, strict=True))
    block = recipe.defense if recipe.enable_defense else None
    if block is None or not block.root_rows:
        return np.arange(0), dealt
    if block.root_rows >= len(labels):
        raise RecipeError(f"defense.root_rows: {block.root_rows} of {len(labels)} training rows. Lower it.")
    drawn = np.random.default_rng(seed_for(recipe.seed, "root")).permutation(len(labels))
    root = np.sort(drawn[: block.root_rows])
    left = {id: rows[~np.isin(rows, root)] for id, rows in dealt.items()}
    if bare := [id for id, rows in left.items() if len(rows) == 0 < len(dealt[id])]:
        raise RecipeError(
            f"defense.root_rows: {block.root_rows}: takes the last row of client {', '.join(bare)}. Lower it, or raise "
            "data.train_rows."
        )
    return root, left


def make_model(recipe: Recipe, shape: tuple[int, ...], classes: int) -> torch.nn.Module:
    """The model of the recipe, its weights drawn by the seed."""
    maker = make(recipe.model, models.MENU, "model")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(recipe.seed, "model"))  # layers draw from torch's global generator
        made: torch.nn.Module = maker(shape, classes)
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
