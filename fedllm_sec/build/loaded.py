"""What a process has loaded and later runs use again: the base model, data sets, encoded shards, held-out prompts."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

from fedllm_sec.models import pretrained
from fedllm_sec.recipe.sections import Recipe

T = TypeVar("T")


class Loaded:
    """Things by kind and by the settings they were made from; of each kind the newest few are kept.

    Runs share them, so nobody changes what is in here. A run that broke off may have: `clear` after it. What raises
    while a thing is made may ask only for what is in its key: else it is silent where another variant made it before.
    """

    def __init__(self) -> None:
        self.kinds: dict[str, dict[str, Any]] = {}

    def get(self, kind: str, key: str, make: Callable[[], T], *, keep: int = 2) -> T:
        """The thing of this kind and key, made now if it is not there; the oldest go before it is made."""
        there = self.kinds.setdefault(kind, {})
        if key not in there:
            while len(there) >= keep:
                del there[next(iter(there))]
            there[key] = make()
        there[key] = there.pop(key)  # the newest stands last
        found: T = there[key]
        return found

    def clear(self) -> None:
        self.kinds.clear()


def data_key(recipe: Recipe) -> str:
    """Settings on which a data set, as it is read and drawn, depends."""
    model = recipe.model if isinstance(recipe.model, dict) else {}
    brought = (
        [model.get(key) for key in ("name", "revision", "size")] if pretrained.is_folder(model.get("name")) else []
    )
    return recipe.model_dump_json(include={"task", "data", "seed"}) + json.dumps(brought)


def training_key(recipe: Recipe) -> str | None:
    """Settings on which a client's training depends, besides what it is sent and what it holds; None for code from
    outside, of which nobody can say what else it depends on."""
    model = recipe.model if isinstance(recipe.model, dict) else recipe.model.model_dump()
    if ":" in str(model.get("name")) or ":" in recipe.algorithm["name"] or recipe.algorithm["name"] == "fedgkt":
        return None
    return recipe.model_dump_json(include={"task", "model", "data", "clients", "algorithm", "compute", "seed"})


def measuring_key(recipe: Recipe) -> str | None:
    """Settings on which a pass over held-out rows depends, besides the model's vector and the rows; None as above."""
    if training_key(recipe) is None:
        return None
    return recipe.model_dump_json(include={"task", "model", "data", "compute", "seed"})


def split_key(recipe: Recipe) -> str:
    """Settings on which the clients' clean shards depend."""
    root = recipe.defense.root_rows if recipe.enable_defense and recipe.defense is not None else None
    return data_key(recipe) + json.dumps([recipe.clients.total, recipe.clients.partition, root])


def poison_key(recipe: Recipe) -> str:
    """Settings on which the poisoned shards depend."""
    attack = recipe.attack if recipe.enable_attack else None
    if attack is None:
        return split_key(recipe)
    who = attack.model_dump_json(include={"malicious", "spread", "data"})
    if attack.malicious.redraw or recipe.clients.per_round is not None:  # only who attacks in some round is poisoned
        who += attack.model_dump_json(include={"start", "stop", "every", "probability"})
        who += json.dumps([recipe.before, recipe.rounds, recipe.clients.per_round])
    return split_key(recipe) + who


def probe_key(recipe: Recipe) -> str:
    """Settings on which the held-out rows and the attacks' probes depend."""
    data = recipe.attack.data if recipe.attack is not None else []
    return data_key(recipe) + recipe.model_dump_json(include={"evaluate"}) + json.dumps(data)
