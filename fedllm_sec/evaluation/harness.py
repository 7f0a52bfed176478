"""lm-evaluation-harness (Gao et al. 2024) on the model as it stands: public tasks, or task files of your own.

Its package, lm-eval, is no part of this one: without it, and with a task that it does not have, a recipe that asks for
it is refused before anything is trained.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import math
import random
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedllm_sec.errors import RecipeError
from fedllm_sec.recipe.resolve import did_you_mean
from fedllm_sec.recipe.sections import Harness
from fedllm_sec.records.files import in_a_line

SEED = 1234  # of the examples before a row; the harness's own


def harness_problems(harness: Harness) -> list[str]:
    """Why it cannot be run: not installed, no such folder, no such task. Of task files only names are read."""
    place = "evaluate.harness"
    if find_spec("lm_eval") is None:
        return [f"{place}: lm-evaluation-harness is not installed. pip install lm-eval, or remove the block."]
    if harness.include_path is not None and not Path(harness.include_path).is_dir():
        return [
            f"{place}.include_path: {harness.include_path}: no such folder. Give the one that holds the task files."
        ]
    try:
        known = set(_manager(harness).all_tasks)
    except Exception as error:  # a task file may hold anything
        return [f"{place}.include_path: {harness.include_path}: cannot be read ({_short(error)})."]
    lost = [name for name in harness.tasks if name not in known]
    return [f'{place}.tasks: there is no "{name}".{_hint(name, harness, known)}' for name in lost]


def _hint(name: str, harness: Harness, known: set[str]) -> str:
    near = did_you_mean(name, known)
    where = f" The task files of {harness.include_path} have no such name either." if harness.include_path else ""
    return (near if near.startswith(" Did") else " `lm_eval ls tasks` lists them.") + where


def _manager(harness: Harness) -> Any:
    """The tasks of the folder, and the public ones, whose list takes long to read, where the folder has not all."""
    own = _tasks_of(harness.include_path, False) if harness.include_path is not None else None
    if own is not None and set(harness.tasks) <= set(own.all_tasks):
        return own
    return _tasks_of(harness.include_path, True)


@functools.lru_cache(maxsize=2)
def _tasks_of(folder: str | None, public: bool) -> Any:
    with _apart():
        from lm_eval.tasks import TaskManager

        return TaskManager(include_path=folder, include_defaults=public)


def measured(model: Any, tokenizer: Any, harness: Harness) -> dict[str, dict[str, Any]]:
    """{task: {metric: {value, stderr, n}}} of the model in memory; stderr is None where the harness has none.

    Every process measures by itself and finds the same. Random numbers of the run are as before.
    """
    with _apart():
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM

        tasks: dict[str, dict[str, Any]] = {}
        for name in harness.tasks:
            try:
                loaded = _manager(harness).load([name])
                for task in loaded["tasks"].values():
                    if harness.num_fewshot is not None:
                        task.set_config("num_fewshot", harness.num_fewshot)
                    task.set_fewshot_seed(seed=SEED)
                for part, content in loaded.items():
                    tasks.setdefault(part, {}).update(content)
            except Exception as error:  # its data may be on a hub that is out of reach, or its file wrong
                raise RecipeError(
                    f"evaluate.harness.tasks: {name}: cannot be loaded ({_short(error)}). Mend its file, fetch its "
                    "data, or remove it."
                ) from error
        try:
            lm = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=harness.batch_size)
            found = evaluate(
                lm, tasks, limit=harness.limit, bootstrap_iters=1000, log_samples=False,
                apply_chat_template=harness.chat_template,
            )  # fmt: skip
        except (torch.OutOfMemoryError, OSError):
            raise
        except Exception as error:
            raise RecipeError(
                f"evaluate.harness: {', '.join(harness.tasks)}: cannot be run on this model ({_short(error)}). "
                "Change its settings or remove it."
            ) from error
    return {task: _metrics(row, found["n-samples"].get(task, {})) for task, row in found["results"].items()}


def _metrics(row: dict[str, Any], counts: dict[str, Any]) -> dict[str, Any]:
    """ "acc,none" and "acc_stderr,none" as acc: {value, stderr, n}; another filter than none stands behind the name."""
    out = {}
    for key, value in row.items():
        metric, _, chosen = key.partition(",")
        if not chosen or metric.endswith("_stderr") or isinstance(value, str):
            continue
        error = row.get(f"{metric}_stderr,{chosen}")
        number = float(error) if isinstance(error, (int, float, np.floating)) else math.nan
        name = metric if chosen == "none" else f"{metric} ({chosen})"
        stderr = number if math.isfinite(number) else None
        out[name] = {"value": float(value), "stderr": stderr, "n": counts.get("effective")}
    return out


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {in_a_line(error)}"


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """Without its bars and remarks, and with everybody's random numbers as they were afterwards."""
    logger = logging.getLogger("lm_eval")
    before, python, numbers = logger.level, random.getstate(), np.random.get_state()  # noqa: NPY002
    logger.setLevel(logging.CRITICAL)
    try:
        with torch.random.fork_rng(), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(before)
        random.setstate(python)
        np.random.set_state(numbers)  # noqa: NPY002
