"""evaluate.start: round 0 is the untrained model. It is in the history and on the page, and none of the rounds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from fedllm_sec.records import history
from fedllm_sec.records.summary import round_line, scalars
from fedllm_sec.records.verify import look
from fedllm_sec.report.page import page_of
from tests.records.smallest import start, write


def test_the_start_is_a_line_and_a_point_and_changes_no_round(tmp_path: Path, capsys):
    write(tmp_path / "without", evaluate={"start": False})
    assert start(tmp_path / "without") == 0
    capsys.readouterr()
    write(tmp_path)
    assert start(tmp_path) == 0
    out = tmp_path / "out"
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("start", "round"))]
    assert said[0].startswith("start      loss 2.099  accuracy 0.250  ")
    assert said[0].endswith(" s")  # no step length, nothing about the time that is left
    assert [line.split("  ")[0] for line in said[1:]] == ["round 1/2", "round 2/2"]

    lines = (out / "history.jsonl").read_bytes().splitlines(keepends=True)
    assert b"".join(lines[1:]) == (tmp_path / "without" / "out" / "history.jsonl").read_bytes()
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["rounds"], summary["skipped_rounds"], summary["quarantined"]) == (2, 0, 0)
    assert (out / "model-round-1").is_dir()
    assert not (out / "model-round-0").exists()
    assert (look(out).rounds, look(out).finished, look(out).wrong) == (2, True, {})
    assert "Accuracy from round 0 to 2: out 0.25 → 0.30." in page_of(out)


def test_a_run_that_was_stopped_after_its_start_has_a_page_and_is_not_measured_again(tmp_path: Path, capsys):
    write(tmp_path)
    out = tmp_path / "out"
    with mock.patch("fedllm_sec.rounds.federation.play_round", side_effect=KeyboardInterrupt):
        assert start(tmp_path) == 130
    (line,) = (out / "history.jsonl").read_text().splitlines()
    assert json.loads(line)["round"] == 0
    assert (look(out).rounds, look(out).finished, look(out).wrong) == (0, False, {})
    page = page_of(out)
    assert "accuracy 0.25 after 0 rounds" in page
    assert "not finished: 0 of 2 rounds are recorded." in page
    capsys.readouterr()
    assert start(tmp_path) == 0
    said = capsys.readouterr().out
    assert "going on after round 0" in said
    assert "start  " not in said

    first, second, _ = history.read_history(out)
    assert scalars(first) == {"quality/loss": pytest.approx(2.099, abs=1e-3), "quality/accuracy": 0.25}
    assert "update_norm" in scalars(second)
    assert "left" not in round_line(replace(first, seconds={"evaluate": 9.0}), 100)
