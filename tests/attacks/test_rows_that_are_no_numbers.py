"""Attackers look at rows that the server's screen would let through, and at no others."""

from __future__ import annotations

import warnings

import pytest
import torch

import fedllm_sec
from fedllm_sec.attacks import MENU, NOT_FINITE, needs
from fedllm_sec.attacks.threat import Threat
from fedllm_sec.matrix import Layout, UpdateMatrix
from fedllm_sec.protocols import Decision
from fedllm_sec.recipe.resolve import resolve
from fedllm_sec.seeds import generator_for

LAYOUT = Layout(("q.lora_A.default.weight", "q.lora_B.default.weight"), ((4, 30), (20, 4)))
UPDATE = [name for name, entry in MENU.items() if entry.kind == "update"]
ROWS = torch.randn(9, LAYOUT.size, generator=generator_for(0, "rows"))
BAD = (1, 5)


def rule(updates: UpdateMatrix) -> Decision:
    assert bool(updates.rows.isfinite().all())
    return Decision(updates.rows.mean(0))


def sent(name: str, rows: torch.Tensor, places: list[int], knowledge: str | None = None) -> torch.Tensor:
    """What the attackers c1 and c5 send in a round in which the rows at `places` took part."""
    attack = resolve(name, {"z": 1.0} if name == "alie" else {}, MENU, "attack.update.0")
    threat = Threat(malicious=frozenset({"c1", "c5"}), seed=3, knowledge=knowledge or needs(name, {}), update=[attack])
    updates = UpdateMatrix.of(
        rows[places], ids=[f"c{i}" for i in places], counts=[10.0 + i for i in places], layout=LAYOUT
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return threat.forge(updates, vector=ROWS[0], last_update=ROWS[1], round=2, defense=rule)[1]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e37])
@pytest.mark.parametrize("name", UPDATE)
def test_an_honest_row_that_would_be_set_aside_is_as_if_it_were_not_there(name, value):
    spoilt, everyone = ROWS.clone(), list(range(9))
    spoilt[3, 7] = value
    knowledge = "cohort+defense" if needs(name, {}) == "cohort+defense" else "cohort"
    rows = sent(name, spoilt, everyone, knowledge)
    assert bool(rows.isfinite().all()) is (name not in NOT_FINITE)
    without = sent(name, ROWS, [i for i in everyone if i != 3], knowledge)
    assert torch.equal(rows.nan_to_num(7.0), without.nan_to_num(7.0))


@pytest.mark.parametrize("name", UPDATE)
def test_an_attacker_whose_own_training_went_wrong_still_sends_numbers(name):
    spoilt = ROWS.clone()
    spoilt[5, 0] = float("nan")
    if name not in NOT_FINITE:
        assert bool(sent(name, spoilt, list(range(9))).isfinite().all())
    spoilt[1] = float("inf")
    if name not in NOT_FINITE:
        assert bool(sent(name, spoilt, list(range(9))).isfinite().all())


def test_the_mean_of_the_colluders_stands_in_for_a_row_that_is_no_numbers():
    spoilt = ROWS.clone()
    spoilt[5] = float("nan")
    rows = sent("byzantine_flip", spoilt, list(range(9)))
    assert torch.equal(rows, -ROWS[[1, 1]])


def test_a_client_that_claims_no_examples_is_not_looked_at():
    seen = []

    def look(view):
        seen.append((view.other_ids, view.other_counts, view.order, view.cohort_size))
        return view.own

    threat = Threat(malicious=frozenset({"c1"}), seed=0, knowledge="cohort", update=[look])
    updates = UpdateMatrix.of(ROWS[:4], ids=["c0", "c1", "c2", "c3"], counts=[5.0, 6.0, 0.0, 7.0])
    threat.forge(updates, vector=ROWS[0], last_update=None, round=1, defense=None)
    assert seen == [(("c0", "c3"), (5.0, 7.0), ("c0", "c1", "c3"), 3)]


@pytest.mark.parametrize("name", UPDATE)
def test_forge_leaves_out_honest_rows_that_are_no_numbers_and_says_so(name):
    honest = ROWS.clone()
    honest[2, 0] = float("nan")
    settings = {
        "alie": {"z": 1.0},
        "tailored": {"defense": rule},
        "lora_gauge": {"layout": LAYOUT},
        "threedfed": {"layout": LAYOUT},
    }.get(name, {})
    with pytest.warns(UserWarning, match="not shown: 2"):
        rows = fedllm_sec.forge(honest, name, m=2, **settings)
    assert bool(rows.isfinite().all()) is (name not in NOT_FINITE)
    good = fedllm_sec.forge(honest[[0, 1, 3, 4, 5, 6, 7, 8]], name, m=2, **settings)
    assert torch.equal(rows.nan_to_num(7.0), good.nan_to_num(7.0))
