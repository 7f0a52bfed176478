"""lm-evaluation-harness on the model in memory: what is refused before training, and what is read of its results."""

from __future__ import annotations

import json
import random
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedllm_sec.build.measuring import harnessed, known_from, settings_of
from fedllm_sec.build.names import checked
from fedllm_sec.errors import RecipeError
from fedllm_sec.evaluation import harness
from fedllm_sec.evaluation.harness import harness_problems, measured
from fedllm_sec.recipe.sections import Harness

TASK = """task: house_spelling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: ["Sports", "Food"]
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(autouse=True)
def _forget():
    harness._tasks_of.cache_clear()
    yield
    harness._tasks_of.cache_clear()


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The parts of lm-eval that are used, pretended: two tasks, of which the data of one cannot be had."""
    seen: dict[str, Any] = {"evaluated": 0}

    class Manager:
        def __init__(self, include_path=None, include_defaults=True):
            self.all_tasks = ["house", "far"] if include_path else ["public"]

        def load(self, names):
            if names == ["far"]:
                raise ConnectionError("the hub\nis out of reach")
            task = types.SimpleNamespace(set_fewshot_seed=lambda seed: None, set_config=lambda key, value: None)
            return {"tasks": dict.fromkeys(names, task), "groups": {}, "group_map": {}}

    def evaluate(lm, tasks, limit, **_):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
        seen["evaluated"] += 1
        row = {
            "alias": "x",
            "acc,none": np.float64(0.25),
            "acc_stderr,none": 0.1,
            "f1,strict": 0.5,
            "f1_stderr,strict": "N/A",
        }
        return {"results": dict.fromkeys(tasks["tasks"], row), "n-samples": {"house": {"effective": limit}}}

    names = ("lm_eval", "lm_eval.tasks", "lm_eval.evaluator", "lm_eval.models", "lm_eval.models.huggingface")
    modules: dict[str, Any] = {name: types.ModuleType(name) for name in names}
    modules["lm_eval.tasks"].TaskManager = Manager
    modules["lm_eval.evaluator"].evaluate = evaluate
    modules["lm_eval.models.huggingface"].HFLM = lambda **settings: seen.update(settings)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(harness, "find_spec", lambda name: object())
    return seen


def test_without_the_package_or_the_task_it_is_refused_in_a_line(pretended, tmp_path: Path, monkeypatch):
    folder = str(tmp_path)
    assert harness_problems(Harness(tasks=["house"], include_path=folder)) == []
    assert harness_problems(Harness(tasks=["hose"], include_path=folder)) == [
        'evaluate.harness.tasks: there is no "hose". Did you mean "house"? The task files of '
        f"{folder} have no such name either."
    ]
    assert harness_problems(Harness(tasks=["qqq"])) == [
        'evaluate.harness.tasks: there is no "qqq". `lm_eval ls tasks` lists them.'
    ]
    (said,) = harness_problems(Harness(tasks=["house"], include_path="/nowhere"))
    assert said.startswith("evaluate.harness.include_path: /nowhere: no such folder.")
    with pytest.raises(RecipeError, match=r"far: cannot be loaded \(ConnectionError: the hub is out of reach\)"):
        measured(None, None, Harness(tasks=["house", "far"], include_path=folder))
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    (said,) = harness_problems(Harness(tasks=["house"]))
    assert said.startswith("evaluate.harness: lm-evaluation-harness is not installed. pip install lm-eval")


def test_its_results_are_read_and_it_leaves_random_numbers_as_they_were(pretended, tmp_path: Path):
    random.seed(5), np.random.seed(5), torch.manual_seed(5)  # noqa: NPY002
    expected = random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
    random.seed(5), np.random.seed(5), torch.manual_seed(5)  # noqa: NPY002
    found = measured("model", "tokenizer", Harness(tasks=["house"], include_path=str(tmp_path), limit=7))
    assert found == {
        "house": {"acc": {"value": 0.25, "stderr": 0.1, "n": 7}, "f1 (strict)": {"value": 0.5, "stderr": None, "n": 7}}
    }
    assert (pretended["pretrained"], pretended["tokenizer"]) == ("model", "tokenizer")
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected  # noqa: NPY002


def test_what_was_measured_before_a_run_was_stopped_is_not_measured_again(pretended, tmp_path: Path):
    raw = {"clients": {"local_steps": 1}, "evaluate": {"harness": {"tasks": ["house"], "include_path": str(tmp_path)}}}
    recipe = checked(raw)
    task = types.SimpleNamespace(parameters=torch.zeros(2), model=torch.nn.Identity(), tokenizer=None)
    machine = types.SimpleNamespace(main=True, autocast=lambda: torch.autocast("cpu", enabled=False))
    first = harnessed(recipe, task, torch.zeros(2), machine, tmp_path, {}, "before")
    assert list(first) == ["before"]
    known = known_from(tmp_path, settings_of(recipe))
    assert known == first
    both = harnessed(recipe, task, torch.ones(2), machine, tmp_path, known, "before")
    both = harnessed(recipe, task, torch.ones(2), machine, tmp_path, both, "after")
    assert (list(both), pretended["evaluated"], task.parameters.tolist()) == (["before", "after"], 2, [1.0, 1.0])
    assert known_from(tmp_path, {"tasks": ["another"]}) == {}
    (tmp_path / "harness.json").write_text("[1")
    assert known_from(tmp_path, settings_of(recipe)) == {}
    assert (
        harnessed(checked({"clients": {"local_steps": 1}}), task, torch.ones(2), machine, tmp_path, {}, "after") is None
    )


def test_the_real_harness_runs_a_task_file_without_a_hub(tmp_path: Path):
    pytest.importorskip("lm_eval", reason="needs the extra harness")
    from accelerate import Accelerator

    from fedllm_sec.build.text import load_task
    from fedllm_sec.rounds.compute import Machine

    rows = [{"text": f"match {n}", "label": n % 2} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "house.yaml").write_text(TASK.format(folder=tmp_path))
    (tmp_path / "lost.yaml").write_text(TASK.format(folder="/nowhere").replace("house_spelling", "lost"))
    settings = Harness(tasks=["house_spelling"], include_path=str(tmp_path), limit=4)
    assert harness_problems(settings) == []
    task = load_task(checked({"clients": {"local_steps": 1}}), Machine(Accelerator(cpu=True)))
    found = measured(task.model.get_base_model(), task.tokenizer, settings)
    assert (found["house_spelling"]["acc"]["n"], 0 <= found["house_spelling"]["acc"]["value"] <= 1) == (4, True)
    with pytest.raises(RecipeError, match=r"evaluate\.harness\.tasks: lost: cannot be loaded"):
        measured(task.model.get_base_model(), task.tokenizer, Harness(tasks=["lost"], include_path=str(tmp_path)))
