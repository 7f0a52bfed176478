"""What words mean stands on the page, and settings are written as they are typed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm_sec.grid import results
from fedllm_sec.report.grid.folder import read_grid
from fedllm_sec.report.grid.page import render
from fedllm_sec.report.terms import as_yaml
from tests.report import made_up
from tests.report.test_grid_page import data_of

LEAVES = st.one_of(st.none(), st.booleans(), st.integers(-(10**9), 10**9), st.text(max_size=12))
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)


@settings(max_examples=80, deadline=None)
@given(VALUES)
def test_a_setting_is_written_on_one_line_as_yaml_reads_it(value: Any) -> None:
    text = as_yaml(value)
    assert yaml.safe_load(text) == value
    assert "\n" not in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "true"), (None, "null"), (0.5, "0.5"), ("krum", "krum"), (" cf", '" cf"'), ("true", '"true"'),
        ([{"name": "krum", "f": None}], "[{name: krum, f: null}]"), ("a, b", '"a, b"'), (math.inf, ".inf"),
        ({"0?": None}, '{"0?": null}'),
    ],
)  # fmt: skip
def test_settings_are_not_shown_as_python(value: Any, text: str) -> None:
    assert as_yaml(value) == text


@pytest.fixture(scope="module")
def schedules(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("made") / "grid"
    folder.mkdir()
    return folder, made_up.write_grid(folder, "schedules", made_up.Fate(seed=3, per_class=True))


def test_every_measure_of_an_opened_run_is_explained(schedules: tuple[Path, Any]) -> None:
    text = render(read_grid(schedules[0]))
    data = data_of(text)
    titles = {title for run in data["runs"] for title, _, _ in run.get("measures", ())}
    assert {"robustness ratio", "norm rank of malicious rows", "attack success beyond false triggers"} <= titles
    assert titles <= set(data["terms"])
    assert "<dt>cosine rank of malicious rows</dt>" in text
    assert "0.5 is hidden in the middle" in text


def test_a_lifespan_is_counted_only_against_an_attack_free_run_that_was_asked_the_same(
    schedules: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lived() -> list[Any]:
        return [row["lifespan_at_least"] for row in results.table(schedules[1])]

    assert any(value is not None for value in lived())
    monkeypatch.setattr(results, "same_probe", lambda *given: False)  # as where the twin has no trigger
    assert lived() == [None] * len(lived())
