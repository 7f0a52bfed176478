"""What is measured beside the rounds: the harness, before the first round and after the last, in harness.json."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fedllm_sec.evaluation.harness import measured
from fedllm_sec.recipe.sections import Recipe
from fedllm_sec.records.files import write_json
from fedllm_sec.rounds.compute import Machine

NAME = "harness.json"


def known_from(folder: Path, settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the harness has measured of this run already, {"before", "after"}; what was asked otherwise is not known."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        found = json.loads((folder / NAME).read_text(encoding="utf-8"))
        if found["settings"] == settings:
            return {when: found[when] for when in ("before", "after") if isinstance(found.get(when), dict)}
    return {}


def settings_of(recipe: Recipe) -> dict[str, Any] | None:
    """What a recipe asks of the harness, as harness.json has it; None where it asks nothing."""
    asked = getattr(recipe.evaluate, "harness", None)
    return None if asked is None else dict(asked.model_dump(mode="json"))


def harnessed(
    recipe: Recipe, task: Any, vector: torch.Tensor, machine: Machine, folder: Path, known: dict[str, Any], when: str
) -> dict[str, Any] | None:
    """All that is measured so far, with the model of this vector as `when`, "before" or "after"; None where none is.

    Every process measures, none waits for another: `known` must be what all of them know.
    """
    settings = settings_of(recipe)
    if settings is None:
        return None
    if when not in known:
        with torch.no_grad():
            task.parameters.copy_(vector)
        task.model.eval()
        base = task.model.get_base_model() if hasattr(task.model, "get_base_model") else task.model
        with machine.autocast():
            known[when] = measured(base, task.tokenizer, recipe.evaluate.harness)
        if machine.main:
            write_json(folder / NAME, {"settings": settings, **known})
    return known
