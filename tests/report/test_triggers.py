"""What a trigger looks like: written by a run, shown side by side, and nothing of a stranger's file is trusted."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fedllm_sec.attacks.data.images import EdgeCase, PixelTrigger
from fedllm_sec.attacks.data.labels import LabelFlip
from fedllm_sec.attacks.data.overlays import Blended
from fedllm_sec.build.pictures import png
from fedllm_sec.build.triggers import SHOWN, pairs, shown
from fedllm_sec.evaluation.arrays import ArrayEvaluation
from fedllm_sec.models.logistic import logistic
from fedllm_sec.protocols import Labelled
from fedllm_sec.report.page import render
from fedllm_sec.report.runs import read_runs
from fedllm_sec.report.triggers import triggers
from fedllm_sec.tasks.classify import Classify
from tests.report.test_page import outline

MakeRun = Callable[..., Path]


PNG = png(torch.zeros(1, 8, 8))


def rows(n: int = 12) -> Labelled:
    x = 0.1 + 0.5 * torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return Labelled(x, torch.arange(n) % 3, 3, torch.zeros(n, dtype=torch.bool))


def pixels(file: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(file))))


def test_a_run_draws_rows_that_the_trigger_changes_and_what_the_model_says():
    attack = PixelTrigger(target=2, size=2, margin=1)
    found = pairs(attack, rows(), seed=1)
    assert found is not None
    clean, triggered = found
    assert len(clean.y) == SHOWN
    assert set(clean.y.tolist()) <= {0, 1}
    assert set(triggered.y.tolist()) == {2}
    assert pairs(LabelFlip(mapping={0: 1}), rows(), 1) is None  # no pixel is changed
    assert pairs(EdgeCase(target=2), rows(), 1) is None
    task = Classify(logistic((1, 8, 8), 3), torch.device("cpu"))
    made = shown(ArrayEvaluation(rows(), 4, pairs=found), task)
    assert made is not None
    for i, image in enumerate(made["images"]):
        assert np.array_equal(pixels(image["triggered"])[5:7, 5:7], np.full((2, 2), 255))
        assert np.array_equal(pixels(image["clean"])[:5], pixels(image["triggered"])[:5])
        assert pixels(image["difference"])[0, 0] == 128  # grey: nothing is changed there
        assert (image["right"], image["wanted"]) == (int(clean.y[i]), 2)
        assert image["said"] == int(task.logits(task.images_of(clean)).argmax(1)[i])
        assert image["said_triggered"] == int(task.logits(task.images_of(triggered)).argmax(1)[i])
    assert shown(ArrayEvaluation(rows(), 4), task) is None


def drawn(folder: Path, said: int, **changes: Any) -> Path:
    found = pairs(Blended(target=2), rows(), 1)
    made = shown(ArrayEvaluation(rows(), 4, pairs=found), Classify(logistic((1, 8, 8), 3), torch.device("cpu")))
    assert made is not None
    for image in made["images"]:
        image |= {"said": image["right"], "said_triggered": said, **changes}
    (folder / "trigger.json").write_text(json.dumps(made))
    return folder


def test_the_models_answers_stand_side_by_side(comparison: Path):
    for name, said in (("attack-free", 1), ("attacked", 2), ("multi_krum", -1)):
        drawn(comparison / name, said)
    found = triggers(read_runs([comparison]))
    assert found is not None
    assert [name for name, _ in found.names] == ["attack-free", "attacked", "multi_krum"]
    first = found.images[0]
    kinds = [cell.kind for cell in first.cells if cell]
    assert kinds == ["good" if first.right == "1" else "other", "bad", "other"]
    assert first.cells[2] is not None
    assert first.cells[2].triggered == "nothing"
    page = render(read_runs([comparison]), [comparison])
    assert page.count('alt="triggered"') == SHOWN
    assert "What the trigger looks like" in page
    outline(page)


def test_of_triggers_that_runs_have_learnt_each_model_is_shown_with_its_own(comparison: Path):
    for name, said, learnt, file in (
        ("attack-free", 1, True, PNG), ("attacked", 2, True, None), ("multi_krum", 2, False, PNG),
    ):  # fmt: skip
        drawn(comparison / name, said, learnt=learnt, **({} if file is None else {"triggered": file}))
    found = triggers(read_runs([comparison]))
    assert found is not None
    free, attacked, fixed = found.images[0].cells
    assert free is not None
    assert attacked is not None
    assert (free.triggered, free.own, attacked.own, fixed) == ("1", True, False, None)
    page = render(read_runs([comparison]), [comparison])
    assert page.count("by the trigger learnt against this model") == SHOWN


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{",
        '{"images": 3}',
        '{"images": [{"right": "<b>"}]}',
        "[" * 100_000,
        '{"images": [{"clean": "<script>"}]}',
    ],
)
def test_a_file_that_no_run_wrote_is_left_out(make_run: MakeRun, tmp_path: Path, content: str):
    folder = make_run(tmp_path / "x")
    (folder / "trigger.json").write_text(content)
    assert triggers(read_runs([folder])) is None
    drawn(folder, 2, right="<script>alert(1)</script>")
    assert "alert(1)" not in render(read_runs([folder]), [folder])
