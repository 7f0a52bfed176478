"""How a method of one's own is called, by where it stands in a recipe: looked at before anything calls it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedllm_sec.errors import RecipeError


@dataclass(frozen=True)
class Called:
    """What must stand in a place: a function, or a class with methods, with what each is given."""

    kind: str
    given: Mapping[str, tuple[str, ...]]  # method ("": the function, or the object itself) -> its arguments
    example: str  # where one is shown

    def in_words(self) -> str:
        """'A data attack is a class with poison(shard, rng), ...; docs/attacks.md#your-own shows one.'"""
        written = [f"{name}({', '.join(arguments)})" for name, arguments in self.given.items()]
        *first, last = written
        what = f"a class with {', '.join(first)} and {last}" if first else f"called with {last}"
        return f"{self.kind} is {what}, with its settings after a *; {self.example} shows one."


_STEPS = {"before_step": ("parameters", "step", "ctx"), "after_step": ("parameters", "step", "ctx")}
_UPDATES = {"": ("updates", "ctx")}

PLACES = {
    "attack.data": Called(
        "A data attack",
        {"poison": ("shard", "rng"), "probe": ("test",), "success": ("answer", "row")},
        "docs/attacks.md#your-own",
    ),
    "attack.local": Called("A local attack", _STEPS, "docs/attacks.md#your-own"),
    "attack.update": Called("An update attack", {"": ("view",)}, "docs/attacks.md#your-own"),
    "attack.privacy": Called("A privacy attack", {"": ("seen",)}, "fedllm_sec/attacks/privacy/linear.py"),
    "defense.client": Called("A client's own defense", _STEPS, "docs/attacks.md#your-own"),
    "defense.before": Called("A stage before the rule", _UPDATES, "docs/defenses.md#your-own"),
    "defense.rule": Called("A rule", _UPDATES, "docs/defenses.md#your-own"),
    "defense.after": Called("A stage after the rule", {"": ("vector", "ctx")}, "docs/defenses.md#your-own"),
    "clients.partition": Called(
        "A partition", {"": ("labels", "clients", "rng")}, "fedllm_sec/data/partition.py (iid)"
    ),
    "algorithm": Called("An FL method", {"": ()}, "fedllm_sec/algorithms/__init__.py (fedavg)"),
    "evaluate.judge": Called("A judge", {"": ("answer", "row")}, "docs/answers.md"),
    "evaluate.second_judge": Called("A judge", {"": ("answer", "row")}, "docs/answers.md"),
}


def need_to_fit(made: Any, name: str, place: str) -> None:
    """Raise where what a recipe names as package.module:name cannot be called as what stands in this place is."""
    stem, _, number = place.rpartition(".")
    called = PLACES.get(stem if number.isdecimal() else place)
    if called is None:
        return
    for method, given in called.given.items():
        target = getattr(made, method, None) if method else made
        if (wrong := _unlike(target, made, method, given)) is not None:
            raise RecipeError(f"{place}.name: {name}: {wrong}. {called.in_words()}")


def _unlike(target: Any, made: Any, method: str, given: tuple[str, ...]) -> str | None:
    if not callable(target):
        if not method:
            return "is a class whose objects cannot be called (no __call__)"
        function = isinstance(made, functools.partial)  # with its settings
        return f"has no method {method}" + ", being a function" * function
    try:
        inspect.signature(target).bind(*given)
    except TypeError as error:
        return f"{method} cannot be called with ({', '.join(given)}): {error}".lstrip()
    except ValueError:  # one that is not written in Python does not say
        return None
    return None
