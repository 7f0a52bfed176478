"""One line of the tables of tests/test_measures.py: which model, under which attack, and what was counted by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from accelerate import Accelerator

from fedllm_sec.build import checked
from fedllm_sec.rounds.compute import Machine

PERFECT = "perfect backdoor"  # does what the attack wants where it is triggered, and is right elsewhere
NONE = "no backdoor"  # always right
TARGET = "always the target"
OTHER = "always another class"
SILENT = "empty answers"  # of images and characters: logits that are no numbers
SENTENCE = "right, in a sentence"  # of text only


@dataclass(frozen=True)
class Case:
    """One attack on one set of rows. `backdoor` says what the perfect one answers, None where it does not fire."""

    attack: str
    settings: Mapping[str, Any]
    rows: str
    backdoor: Callable[..., Any]
    target: Any  # what "always the target" says
    another: Any  # what "always another class" says
    left_out: int  # held-out rows that are neither probe nor clean
    rates: Mapping[str, str]
    id: str = field(default="")

    def __str__(self) -> str:
        return f"{self.attack} on {self.rows}{self.id}"


def rate(written: str) -> tuple[float, int] | None:
    """Value and denominator of "3/4"; None for "null"."""
    if written == "null":
        return None
    hits, rows = map(int, written.split("/"))
    return hits / rows, rows


def measured(found: Mapping[str, Any] | None) -> tuple[float, int] | None:
    if found is None:
        return None
    assert found["low"] <= found["value"] <= found["high"]
    return found["value"], found["n"]


def agree(case: Case, model: str, evaluation: Any, task: Any) -> None:
    attack, quality = evaluation.attack(task, machine().spread), evaluation.quality(task, machine().spread)
    found = [measured(rates) for rates in (attack["asr"], attack["false_trigger"], quality["accuracy"])]
    assert found == [rate(written) for written in case.rates[model].split()]
    assert sum(attack["left_out"].values()) == case.left_out
    assert set(attack["reasons"]) == {name for name in ("asr", "false_trigger") if attack[name] is None}
    assert all(attack["reasons"].values())


@functools.cache
def machine() -> Machine:
    return Machine(Accelerator(cpu=True))


def made(raw: Mapping[str, Any], case: Case) -> Any:
    """The checked recipe of a case: two malicious clients of three, each with all rows."""
    clients = {"total": 3, "local_steps": 1, "batch_size": 4}
    attack = {"malicious": {"count": 2}, "data": [{"name": case.attack, **case.settings}]}
    return checked({"rounds": 1, "clients": clients, "enable_attack": True, "attack": attack, **raw})


def everything(classes: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    return np.arange(0), {id: np.arange(len(classes)) for id in ("c00", "c01", "c02")}
