"""What a kind of task contributes to a federation, and what the kinds share: dealing rows, poisoning, a small model."""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fedllm_sec import models
from fedllm_sec.attacks.threat import Threat
from fedllm_sec.build.names import make, model_block, told_in_a_line
from fedllm_sec.data import partition
from fedllm_sec.errors import AttackError, RecipeError
from fedllm_sec.matrix.shown import only_shown
from fedllm_sec.protocols import Labelled, tensors_of
from fedllm_sec.recipe.resolve import find
from fedllm_sec.recipe.sections import Recipe
from fedllm_sec.seeds import generator_for, seed_for

OF_TORCHVISION = "torchvision.models"  # whose functions are told the number of classes and no shape

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
    poisoned_share: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # attack -> client id -> share
    too_long: Mapping[str, Any] | None = None  # part of the data -> how many of its rows were cut or dropped
    triggered: Callable[[], Any] | None = None  # the evaluation with the trigger as attackers have learnt it

    def facts(self) -> dict[str, Any]:
        """What was made of data and model before the first round, for summary.json."""
        stops = {"stop_tokens": self.task.stop_tokens} if hasattr(self.task, "stop_tokens") else {}
        return {"poisoned_share": dict(self.poisoned_share) or None, "too_long": self.too_long, **stops}


def handed_out(parts: Parts, threat: Threat | None) -> dict[str, Any]:
    """What each client trains on while it is honest: where poisoned rows are spread, that is what it was given.

    The threat gets the poisoned shards of those who are malicious.
    """
    if threat is None:
        return dict(parts.shards)
    if threat.spread:
        return {**parts.shards, **parts.poisoned}
    threat.poisoned = dict(parts.poisoned)
    return dict(parts.shards)


def deal(recipe: Recipe, ids: Sequence[str], labels: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Row numbers of the server's root set and of each client, drawn by the recipe's seed.

    The rows are dealt to the clients first, then the root rows are drawn from all of them and taken away from who had
    them: with and without root rows a client has the same shard but for those few rows.
    """
    split = make(recipe.clients.partition, partition.MENU, "clients.partition")
    with told_in_a_line(recipe.clients.partition, "clients.partition"):
        shares = partition.split_rows(
            split, labels, len(ids), np.random.default_rng(seed_for(recipe.seed, "partition"))
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
    name = recipe.model["name"]
    with told_in_a_line(recipe.model, "model"):
        if ":" in name and not name.startswith(OF_TORCHVISION):
            _need_function(name)
        maker = make(model_block(recipe.model), models.MENU, "model")
    with torch.random.fork_rng(devices=[]), told_in_a_line(recipe.model, "model"):
        torch.manual_seed(seed_for(recipe.seed, "model"))  # layers draw from torch's global generator
        made = maker(num_classes=classes) if name.startswith(OF_TORCHVISION) else maker(shape, classes)
    if not isinstance(made, torch.nn.Module):
        raise RecipeError(f"model.name: {name}: gives {type(made).__name__}, no torch.nn.Module.")
    if any(torch.nn.parameter.is_lazy(p) for p in made.parameters()):
        raise RecipeError(
            f"model.name: {name}: has lazy layers, whose parameters are not there yet. Call the model once on an input "
            "in the function that makes it."
        )
    if isinstance(made, torch.jit.ScriptModule):
        raise RecipeError(f"model.name: {name}: is compiled by torch.jit, which hides its layers. Give it uncompiled.")
    counted = torch.empty(0).is_meta  # where it is only counted, all that is made is on it
    if not counted and any(tensor.is_meta for tensor in (*made.parameters(), *made.buffers())):
        raise RecipeError(
            f"model.name: {name}: is on the meta device, where tensors hold no numbers. Make it elsewhere."
        )
    if not any(p.requires_grad and p.numel() for p in made.parameters()):
        raise RecipeError(f"model.name: {name}: has no parameter to be trained. Set requires_grad on some.")
    return made


def _need_function(name: str) -> None:
    """Raise where what the model's name stands for cannot be called with (shape, classes)."""
    maker = find(name, models.MENU, "model")
    wrong = "is a class of models, not a function that makes one"
    if not (isinstance(maker, type) and issubclass(maker, torch.nn.Module)):
        try:
            inspect.signature(maker).bind((1,), 2)
            return
        except TypeError as error:
            wrong = f"cannot be called with (shape, classes): {error}"
    raise RecipeError(
        f"model.name: {name}: {wrong}. Name a function such as: def wide(shape, classes, *, width: int = 8) -> "
        "torch.nn.Module"
    )


class Poisoned(dict[str, Any]):
    """The poisoned shards by client id, and what share of each one's rows each attack changed.

    `shares` is {"attack.data.0": {client id: share}, ...}, contrast rows among the changed ones.
    """

    def __init__(self, shards: Mapping[str, Any], shares: Mapping[str, Mapping[str, float]]) -> None:
        super().__init__(shards)
        self.shares = shares

    def each(self, change: Callable[[Any], Any]) -> Poisoned:
        """The same with every shard changed in form, such as moved to a device."""
        return Poisoned({id: change(rows) for id, rows in self.items()}, self.shares)


def poison(seed: int, threat: Threat | None, shards: Mapping[str, Any], test: Any = None) -> Poisoned:
    """The poisoned shards of malicious clients, or of honest ones who hold poisoned rows, by id.

    Each attack of the list takes rows that those before it left.

    An attack that changes no row at all is an error; where its probe of the `test` rows knows the reason, such as a
    class that nobody has, it says so. So is one that rewrites what another has poisoned, or that needs more attackers
    than there are. Clients that hold nothing an attack acts on (a label flip whose class they lack) are named in a
    warning: with no other attack they train on clean data.
    """
    if threat is None or not threat.data or not (threat.malicious or threat.spread):
        return Poisoned({}, {})
    attackers = sorted(threat.spread or (threat.malicious if threat.ever is None else threat.ever))
    for attack in threat.data:
        if hasattr(attack, "need_attackers"):
            attack.need_attackers(len(attackers))
    done: dict[str, Any] = {}
    shares: dict[str, dict[str, float]] = {f"attack.data.{k}": {} for k in range(len(threat.data))}
    for id in attackers:
        rows, rng = shards[id], generator_for(seed, "poison", id)
        for attack, (place, share) in zip(threat.data, shares.items(), strict=True):
            with only_shown(place, AttackError, **tensors_of(rows)):  # other attacks and later runs have them too
                made = of_rows(attack.poison(rows, rng), rows, f"{place}: poison")
            _refuse_overwriting(rows, made, f"{place}: client {id}")
            share[id] = _changed(rows, made) / max(_size(made), 1)
            rows = made
        if _marked(rows):
            done[id] = rows
    for attack, (place, share) in zip(threat.data, shares.items(), strict=True):
        untouched = [id for id, changed in share.items() if changed == 0]
        if len(untouched) == len(attackers):
            if test is not None:
                attack.probe(test)
            raise AttackError(
                f"{place}: poisoned none of the rows of client {', '.join(untouched)}. "
                "Raise the rate, or choose other clients or another target."
            )
        if untouched:
            warnings.warn(
                f"{place}: {len(untouched)} of {len(attackers)} clients with poisoned data hold no row the attack "
                f"acts on{' and train on clean data' if len(shares) == 1 else ''}: {', '.join(untouched)}.",
                stacklevel=2,
            )
    return Poisoned(done, shares)


def of_rows(made: Any, rows: Any, place: str) -> Any:
    """What an attack made of rows; an error where it is none of their kind."""
    if not isinstance(made, type(rows)):
        raise AttackError(f"{place} gave back {type(made).__name__}, must give {type(rows).__name__}. Mend it.")
    if isinstance(made, Labelled) and not len(made.x) == len(made.y) == len(made.poisoned):
        raise AttackError(
            f"{place} gave back {len(made.x)} inputs, {len(made.y)} labels and {len(made.poisoned)} marks, must give "
            "one of each for a row. Mend it."
        )
    return made


def _size(rows: Any) -> int:
    return len(rows.y) if isinstance(rows, Labelled) else len(rows)


def _marked(rows: Any) -> int:
    """How many rows are poisoned."""
    return int(rows.poisoned.sum()) if isinstance(rows, Labelled) else sum(rows["poisoned"][:])


def _changed(before: Any, after: Any) -> int:
    """How many rows an attack has changed. A row of characters may be changed by several, one after the other."""
    if isinstance(before, Labelled) and before.y.ndim > 1:
        return int((before.y != after.y).any(1).sum())
    return _marked(after) - _marked(before)


def _refuse_overwriting(before: Any, after: Any, place: str) -> None:
    """Raise where rows that were poisoned before are no longer what they were."""
    if _marked(before) == 0:
        return
    if isinstance(before, Labelled):
        at = before.poisoned
        if before.y.ndim > 1:  # a sequence is marked where one of its characters is: others may still be changed
            return
        lost = int((before.y[at] != after.y[at]).sum() + (before.x[at] != after.x[at]).flatten(1).any(1).sum())
    else:
        columns = [name for name in before.column_names if name != "poisoned"]
        before = before.select(np.flatnonzero(before["poisoned"][:]))
        after = after.select(np.flatnonzero(after["poisoned"][:]))
        old, new = (Counter(zip(*(table[c][:] for c in columns), strict=True)) for table in (before, after))
        lost = (old - new).total()
    if lost:
        raise AttackError(
            f"{place}: {lost} rows that an attack before it in the list has poisoned are rewritten. An attack in a "
            "list must leave rows alone that are marked as poisoned."
        )
