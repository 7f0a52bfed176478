"""What whole runs were worth, worked by hand."""

from __future__ import annotations

import pytest

from fedllm_sec.errors import FedError
from fedllm_sec.records.history import RoundRecord
from fedllm_sec.records.outcomes import breakdown_point, lifespan, quality_drop


def record(round: int, asr: float | None) -> RoundRecord:
    attack = None if asr is None else {"asr": {"value": asr, "low": 0.0, "high": 1.0, "n": 10}, "false_trigger": None}
    return RoundRecord(
        round=round, cohort=[], malicious=[], attacking=False, losses={}, norms={}, quarantined={}, weights=None,
        kept=None, scores=None, notes={}, update_norm=0.0, skipped=None, lora_gap=None, detection=None, quality=None,
        attack=attack,
    )  # fmt: skip


def records(*rates: float | None) -> list[RoundRecord]:
    return [record(i, rate) for i, rate in enumerate(rates, 1)]


def test_a_backdoor_lives_until_success_is_under_half_of_its_peak():
    # peak 0.8 in round 2, stopped after round 3; 0.5 and 0.4 stand (0.4 is half, not under), 0.3 in round 6 is under
    assert lifespan(records(0.2, 0.8, 0.7, 0.5, 0.4, 0.3, 0.9), 3) == {"value": 3, "at_least": 2, "peak": 0.8}


def test_a_backdoor_that_has_not_fallen_yet_has_a_lower_bound_and_no_value():
    assert lifespan(records(0.2, 0.8, 0.7, 0.6), 2) == {"value": None, "at_least": 2, "peak": 0.8}


def test_a_backdoor_that_is_gone_at_once_lived_for_less_than_a_round():
    assert lifespan(records(0.8, 0.1), 1) == {"value": 1, "at_least": 0, "peak": 0.8}


def test_rounds_without_an_evaluation_widen_the_bounds():
    assert lifespan(records(None, 0.8, None, 0.6, None, 0.1), 3) == {"value": 3, "at_least": 1, "peak": 0.8}


@pytest.mark.parametrize(
    ("rates", "stop"),
    [((0.5, 0.5), None), ((0.5, 0.5), 2), ((0.0, 0.0, 0.0), 1), ((None, 0.5, 0.5), 1), ((0.5, None), 1)],
)
def test_attackers_that_never_stop_or_success_never_measured_give_no_lifespan(rates, stop):
    assert lifespan(records(*rates), stop) is None


def test_the_peak_is_that_of_the_attack_and_not_of_a_later_round():
    assert lifespan(records(0.4, 0.3, 1.0), 1) == {"value": None, "at_least": 2, "peak": 0.4}


def summary(accuracy: float | str | None, loss: float = 1.0, asr: float | None = None) -> dict:
    rate = None if accuracy is None else {"value": accuracy, "low": 0.0, "high": 1.0, "n": 9}
    attack = None if asr is None else {"asr": {"value": asr, "low": 0.0, "high": 1.0, "n": 9}}
    return {"quality": {"accuracy": rate, "loss": loss, "perplexity": None}, "attack": attack}


def test_a_drop_is_positive_where_the_run_is_worse_than_its_twin():
    assert quality_drop(summary(0.75, 1.5), summary(1.0, 1.0)) == {"accuracy": 0.25, "loss": 0.5}


def test_a_measure_that_one_side_lacks_is_left_out():
    assert quality_drop(summary(None), summary(1.0)) == {"loss": 0.0}
    assert quality_drop({"quality": None}, summary(1.0)) == {}


def test_the_breakdown_point_is_the_first_m_that_costs_too_much_quality():
    runs = {3: summary(0.5), 1: summary(0.89), 2: summary(0.86)}
    assert breakdown_point(runs, summary(0.9)) == 3
    assert breakdown_point(runs, summary(0.9), tolerance=0.03) == 2
    assert breakdown_point(runs, summary(0.9), tolerance=0.5) is None


def test_a_backdoor_breaks_a_defense_too_and_so_does_nan():
    assert breakdown_point({1: summary(0.9, asr=0.2), 2: summary(0.9, asr=0.6)}, summary(0.9)) == 2
    assert breakdown_point({1: summary(0.9, "nan")}, summary(0.9), measure="loss") == 1


def test_a_breakdown_by_a_measure_that_was_not_taken_is_an_error():
    with pytest.raises(FedError, match=r"exact_match.*Name one of \['accuracy', 'loss'\]"):
        breakdown_point({1: summary(0.9)}, summary(0.9), measure="exact_match")
