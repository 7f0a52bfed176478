"""Rows that no rule may see, and what is said about them."""

import math

import pytest
import torch

from fedllm_sec.defenses.screen import screen, stack
from fedllm_sec.errors import DefenseError
from fedllm_sec.matrix import Layout, UpdateMatrix
from tests.defenses.small import matrix

LAYOUT = Layout(("q.lora_A", "q.lora_B"), ((2, 2), (3,)))


def seven(**changed):
    rows = torch.ones(3, 7)
    for place, value in changed.items():
        rows[1, int(place[1:])] = value
    return UpdateMatrix.of(rows, ids=["a", "b", "c"], layout=LAYOUT)


def test_sound_rows_pass_as_they_are():
    updates = seven()
    clean, reasons = screen(updates)
    assert clean is updates
    assert reasons == {}


def test_a_row_that_is_not_finite_is_set_aside_with_count_and_place():
    clean, reasons = screen(seven(_4=math.nan, _6=-math.inf))
    assert clean.ids == ("a", "c")
    assert reasons == {"b": "2 of 7 values are not finite, the first at q.lora_B[0]"}


def test_a_row_beyond_what_float32_sums_can_hold_is_set_aside():
    clean, reasons = screen(seven(_0=-1e37))
    assert clean.ids == ("a", "c")
    assert reasons["b"] == "its length of 1e+37 is beyond the limit of 1e+36"
    assert screen(seven(_0=1e30))[1] == {}


@pytest.mark.parametrize("claim", [math.nan, math.inf, 0.0, -5.0])
def test_a_senseless_claim_of_examples_sets_the_row_aside(claim):
    clean, reasons = screen(matrix([[1.0], [2.0]], counts=[10, claim]))
    assert clean.n == 1
    assert reasons["1"].startswith("claims ")


def test_blocks_of_any_width_find_the_same():
    rows = torch.ones(2, 1000)
    rows[1, 777] = math.nan
    for chunk_mb in (1e-5, 1e-3, 64):
        reasons = screen(UpdateMatrix.of(rows, chunk_mb=chunk_mb))[1]
        assert reasons == {"1": "1 of 1000 values are not finite, the first at vector[777]"}


def test_when_no_row_is_left_all_reasons_are_told():
    with pytest.raises(
        DefenseError, match=r'none of the 2 rows can be used: client "0": 1 of 1 .*client "1": claims nan'
    ):
        screen(matrix([[math.nan], [1.0]], counts=[1, math.nan]))


def test_half_precision_rows_are_screened_in_their_own_type():
    rows = torch.ones(2, 4, dtype=torch.bfloat16)
    rows[0, 1] = math.inf
    clean, reasons = screen(UpdateMatrix.of(rows))
    assert clean.ids == ("1",)
    assert list(reasons) == ["0"]


def test_stacking_sets_aside_rows_of_another_shape_or_type():
    rows = [torch.ones(7), torch.ones(6), torch.ones(1, 7), torch.ones(7, dtype=torch.int64), torch.zeros(7)]
    updates, reasons = stack(rows, ids=list("abcde"), counts=[1, 2, 3, 4, 5], layout=LAYOUT)
    assert updates.ids == ("a", "e")
    assert updates.counts == (1.0, 5.0)
    assert reasons == {
        "b": "has shape (6,), the trained parameters are (7,)",
        "c": "has shape (1, 7), the trained parameters are (7,)",
        "d": "has dtype int64, not a floating type",
    }


def test_stacking_copies_so_that_a_sender_cannot_change_its_row_later():
    row = torch.ones(7)
    updates, _ = stack([row], ids=["a"], layout=LAYOUT)
    row.fill_(9)
    assert float(updates.rows.max()) == 1.0


def test_mixed_rows_are_judged_by_what_they_come_to():
    updates = UpdateMatrix.of(torch.tensor([[1.0], [math.inf], [3.0]])).mix(
        torch.tensor([[0.5, 0.0, 0.5], [0.5, 0.5, 0.0]]), ids=["good", "bad"]
    )
    assert screen(updates)[0].ids == ("good",)
