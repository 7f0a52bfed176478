"""What became of a key of a FedML YAML, and the YAML as FedML reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fedllm_sec.errors import RecipeError

# translated: means the same here; differs: stands for the nearest thing here; ignored: has no effect on results;
# missing: was asked for and has no equivalent
Kind = Literal["translated", "differs", "ignored", "missing"]


@dataclass(frozen=True)
class Note:
    """One key of the YAML and what became of it."""

    kind: Kind
    key: str
    text: str


Part = tuple[dict[str, Any], list[Note]]  # a block of the recipe, and what it was made of


def same(key: str, place: str) -> Note:
    return Note("translated", key, f"is {place}")


def differs(key: str, place: str, how: str) -> Note:
    return Note("differs", key, f"becomes {place}, but {how}")


def ignored(key: str, why: str) -> Note:
    return Note("ignored", key, f"because {why}")


def missing(key: str, what: str) -> Note:
    return Note("missing", key, what)


def number(flat: Mapping[str, Any], key: str, default: float | None = None) -> Any:
    """A number of the YAML; text or a list in its place is an error."""
    value = flat.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RecipeError(f"{key}: {value!r}: must be a number.")
    return value


@dataclass(frozen=True)
class Flat:
    """All keys in one space of names, as FedML reads them: a later section wins over an earlier one."""

    values: dict[str, Any]
    places: dict[str, str]  # key -> section it is taken from
    notes: list[Note]


def flatten(raw: Any) -> Flat:
    """The sections of a FedML YAML as one mapping; a key that stands twice with different values is noted."""
    if not isinstance(raw, dict) or not raw:
        raise RecipeError("a FedML YAML is a mapping of sections such as train_args and attack_args.")
    stray = [name for name, section in raw.items() if not isinstance(section, dict) and section is not None]
    if stray:
        raise RecipeError(f"{stray[0]}: {raw[stray[0]]!r}: must be a section, a mapping of keys to values.")
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    notes: list[Note] = []
    for section, keys in raw.items():
        for key, value in (keys or {}).items():
            if key in values and values[key] != value:
                text = f"stands in {places[key]} as {values[key]!r} too; as in FedML, the later one counts: {value!r}"
                notes.append(Note("differs", str(key), text))
            values[str(key)], places[str(key)] = value, str(section)
    return Flat(values, places, notes)
