"""A run of very many rounds has a page like any other: pictures draw some of them and say so."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from fedllm_sec.report.page import page_of
from fedllm_sec.report.thin import thin, thinned
from tests.report.conftest import write_run


def test_what_is_drawn_begins_with_the_first_round_and_ends_with_the_last():
    assert thin([1, 2, 3, 4, 5, 6, 7], 3) == [1, 4, 7]
    assert thin([1, 2, 3, 4, 5, 6], 3) == [1, 3, 5, 6]
    assert thin([1, 2, 3], 3) == [1, 2, 3]
    assert thinned(10_000) == " One of 10 rounds is drawn, of 10,000; the numbers are of all."
    assert thinned(1_000) == ""


@pytest.mark.parametrize("rounds", [1_200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_the_page_of_very_many_rounds_is_small_and_says_what_it_draws(tmp_path: Path, rounds: int):
    write_run(tmp_path / "long", rounds=rounds, clients=5)
    begun = time.process_time()
    page = page_of(tmp_path / "long")
    assert time.process_time() - begun < 20
    assert len(page) < 1_000_000
    assert f"rounds is drawn, of {rounds:,}; the numbers are of all." in page
