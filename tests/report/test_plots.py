"""The pictures: what they say in words, and odd records they must survive."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedllm_sec.report import client_plots, plots
from fedllm_sec.report.measures import ATTACK, QUALITY
from fedllm_sec.report.page import render
from fedllm_sec.report.runs import Run, read_runs

MakeRun = Callable[..., Path]


def test_the_text_of_a_curve_says_where_each_run_starts_and_ends(comparison: Path) -> None:
    picture = plots.curves(read_runs([comparison]), ATTACK[0])
    assert picture is not None
    assert picture.alt == (
        "Attack success from round 2 to 20: attacked 4 % → 97 %; multi_krum 4 % → 3 %; geometric_median 4 % → 62 %."
    )


def test_a_measure_that_nobody_took_has_no_curve(comparison: Path) -> None:
    assert plots.curves(read_runs([comparison]), QUALITY[1]) is None


def test_the_text_of_the_norms_tells_how_much_longer_malicious_updates_are(comparison: Path) -> None:
    picture = client_plots.norms(read_runs([comparison])[2], "x")
    assert picture is not None
    assert "times as long. 2 rows quarantined." in picture.alt


def test_a_rule_that_weighs_says_how_much_the_malicious_rows_weighed(comparison: Path) -> None:
    picture = client_plots.decisions(read_runs([comparison])[3], "x")
    assert picture is not None
    assert picture.alt.startswith("geometric_median weighed malicious rows 0.")


def test_equal_weights_need_no_picture(comparison: Path) -> None:
    assert client_plots.decisions(read_runs([comparison])[0], "x") is None


def test_runs_have_their_own_colours_and_markers(comparison: Path) -> None:
    strokes = plots.strokes(read_runs([comparison]))
    assert len({stroke.colour for stroke in strokes.values()}) == 4
    assert len({stroke.marker for stroke in strokes.values()}) == 4
    assert strokes["attack-free"].colour == plots.BLUE
    assert strokes["attacked"].colour == plots.VERMILLION


ODD: dict[str, dict[str, Any]] = {
    "nobody's update is finite": {"norms": {str(i): math.nan for i in range(4)}, "kept": None, "weights": None},
    "all rows are zero": {"norms": {str(i): 0.0 for i in range(4)}},
    "one row is huge": {"norms": {"0": 1e30, "1": 1.0, "2": 2.0, "3": 1e-12}},
    "nobody is kept": {"kept": [], "weights": {str(i): 0.0 for i in range(4)}},
    "everybody is quarantined": {"quarantined": {str(i): "not finite" for i in range(4)}, "skipped": "no row left"},
    "weights are negative": {"kept": None, "weights": {"0": -1.0, "1": 2.0, "2": 0.0, "3": 0.0}},
    "nothing was measured": {"quality": None, "attack": None, "detection": None, "kept": None, "weights": None},
    "loss is not finite": {"quality": {"loss": math.nan, "perplexity": math.inf}},
    "there is no timing": {"seconds": {}},
    "nobody came": {"cohort": [], "malicious": [], "norms": {}, "kept": None, "weights": None, "losses": {}},
}


@pytest.mark.parametrize("change", ODD.values(), ids=ODD)
def test_a_page_can_be_made_when(make_run: MakeRun, tmp_path: Path, change: dict[str, Any]) -> None:
    run = read_runs([make_run(tmp_path / "run", rounds=3, clients=4, malicious=1, rule="multi_krum")])[0]
    odd = dataclasses.replace(run, records=tuple(dataclasses.replace(r, **change) for r in run.rounds))
    assert "</html>" in render([odd], [tmp_path])


def test_a_page_can_be_made_before_the_first_round_is_done(make_run: MakeRun, tmp_path: Path) -> None:
    run: Run = read_runs([make_run(tmp_path / "run", rounds=3)])[0]
    assert "</html>" in render([dataclasses.replace(run, records=run.records[:1])], [tmp_path])
