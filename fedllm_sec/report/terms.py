"""What the words of a page mean, and how settings are written."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import yaml

from fedllm_sec.records.folder import LOADER
from fedllm_sec.report.measures import kinds
from fedllm_sec.report.runs import Run

UNDER_ATTACK = "mean over the rounds under attack, or over all of a run without attackers"
TERMS = {
    "accuracy of the worst class": "the class with the lowest accuracy at the last evaluation",
    "malicious dropped": f"share of the malicious clients whose rows the rule dropped, {UNDER_ATTACK} (TPR)",
    "malicious weight share": f"what malicious rows weigh in the update, of what all clients' rows do, {UNDER_ATTACK}",
    "honest dropped": f"share of the honest clients whose rows the rule dropped, {UNDER_ATTACK} (FPR)",
    "AUC of its scores": "chance that a malicious row scores worse than an honest one, 0.5 is guessing; "
    f"{UNDER_ATTACK}",
    "robustness ratio": "squared distance from the update that the rule made to the mean of the honest rows, over the "
    f"variance of the honest rows: 0 is the honest mean, 1 as far off as an honest row on average; {UNDER_ATTACK}",
    "norm rank of malicious rows": "how well attackers hide (stealth): share of the honest rows that are shorter than "
    "a malicious one; 0.5 is hidden in the middle, 1 longer than all",
    "cosine rank of malicious rows": "the same for directions: share of the honest rows that point less towards the "
    "mean of all other rows than a malicious one; 0.5 is hidden in the middle, 0 points away more than all",
    "rounds the backdoor outlived the attack": "its lifespan: rounds from the last one in which an attacker's row was "
    "accepted until attack success, above that of the attack-free run, was under half of its peak; 0: dead by then",
}


def terms(runs: Sequence[Run]) -> dict[str, str]:
    """What is measured in these runs, by title, with what it means."""
    quality, attack = kinds(runs)
    return {kind.title: kind.explained for kind in (*attack, *quality) if kind.explained} | TERMS


def as_yaml(value: Any) -> str:
    """A setting as it is typed in a recipe, on one line: true, null, 0.5, " cf", [1, 2], {name: krum}."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{as_yaml(key)}: {as_yaml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(as_yaml, value)) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    if value is None or isinstance(value, (bool, int, float)):
        return json.dumps(value)
    return _text(str(value))


@lru_cache(maxsize=4096)
def _text(value: str) -> str:
    """Plain where YAML reads it back as this text, also inside brackets and as a key, else in double quotes."""
    inside = f"[{value}, {{{value}: 0}}]"
    try:
        simple = len(value) < 1_000 and "?" not in value  # YAML's readers differ on "?", and fall down at great depth
        plain = simple and value.isprintable() and yaml.load(inside, Loader=LOADER) == [value, {value: 0}]
    except (yaml.YAMLError, TypeError):  # a key that is read as a list
        plain = False
    return value if plain else '"' + "".join(map(_quoted, value)) + '"'


def _quoted(letter: str) -> str:
    """A letter inside double quotes; what cannot be seen is written by its number."""
    if letter.isprintable():
        return f"\\{letter}" if letter in '"\\' else letter
    return f"\\u{ord(letter):04x}" if ord(letter) < 0x10000 else f"\\U{ord(letter):08x}"
