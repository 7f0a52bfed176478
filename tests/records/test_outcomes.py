"""What whole runs were worth, worked by hand."""

from __future__ import annotations

from typing import Any

import pytest

from fedllm_sec.errors import FedError
from fedllm_sec.evaluation.intervals import wilson
from fedllm_sec.records.history import RoundRecord
from fedllm_sec.records.outcomes import (
    accepted,
    breakdown_point,
    lifespan,
    means_under_attack,
    quality_drop,
    same_probe,
    worst_classes,
)
from fedllm_sec.records.summary import round_line


def record(round: int, asr: float | None, **changes: Any) -> RoundRecord:
    """One attacker among three clients; the rate is one of 1,000 rows."""
    attack = None if asr is None else {"asr": wilson(round_half(1000 * asr), 1000), "false_trigger": None}
    fields = {
        "round": round, "cohort": ["a", "b", "c"], "malicious": ["a"], "attacking": True, "losses": {}, "norms": {},
        "quarantined": {}, "weights": None, "kept": None, "scores": None, "notes": {}, "update_norm": 0.0,
        "skipped": None, "lora_gap": None, "detection": None, "quality": None, "attack": attack,
    }  # fmt: skip
    return RoundRecord(**{**fields, **changes})


def round_half(value: float) -> int:
    return int(value + 0.5)


def records(*rates: float | None, until: int) -> list[RoundRecord]:
    """A round for each rate; the attacker attacks up to and including round `until`."""
    return [record(i, rate, attacking=i <= until) for i, rate in enumerate(rates, 1)]


def lived(value: int | None, at_least: int, peak: float, base: float | None = None) -> dict[str, Any]:
    return {"value": value, "at_least": at_least, "peak": pytest.approx(peak), "base": base}


def test_a_backdoor_lives_until_success_is_under_half_of_its_peak():
    # peak 0.8 in round 2, stopped after round 3; 0.5 and 0.4 stand (0.4 is half, not under), 0.3 in round 6 is under
    assert lifespan(records(0.2, 0.8, 0.7, 0.5, 0.4, 0.3, 0.9, until=3), 3) == lived(3, 2, 0.8)


def test_a_backdoor_that_has_not_fallen_yet_has_a_lower_bound_and_no_value():
    assert lifespan(records(0.2, 0.8, 0.7, 0.6, until=2), 2) == lived(None, 2, 0.8)


def test_a_backdoor_that_is_gone_at_once_lived_for_less_than_a_round():
    assert lifespan(records(0.8, 0.1, until=1), 1) == lived(1, 0, 0.8)


def test_a_backdoor_that_is_dead_in_the_last_round_of_the_attack_lived_for_none():
    # audit F19: 0.747 in round 2, 0.051 in round 4, the last of the attack, 0.063 in round 6
    assert lifespan(records(None, 0.747, None, 0.051, None, 0.063, until=4), 4) == lived(0, 0, 0.747)


def test_rounds_without_an_evaluation_widen_the_bounds():
    assert lifespan(records(None, 0.8, None, 0.6, None, 0.1, until=3), 3) == lived(3, 1, 0.8)


@pytest.mark.parametrize(
    ("rates", "stop"),
    [((0.5, 0.5), None), ((0.5, 0.5), 2), ((0.0, 0.0, 0.0), 1), ((None, 0.5, 0.5), 1), ((0.5, None), 1)],
)
def test_attackers_that_never_stop_or_success_never_measured_give_no_lifespan(rates, stop):
    assert lifespan(records(*rates, until=stop or 2), stop) is None


def test_the_peak_is_that_of_the_attack_and_not_of_a_later_round():
    assert lifespan(records(0.4, 0.3, 1.0, until=1), 1) == lived(None, 2, 0.4)


def test_rounds_count_from_the_last_row_that_was_accepted_and_not_from_the_end_of_the_attack():
    # audit F19: attacks in rounds 2 and 4 of start 2, every 2, stop 5; evaluated after 3, 6 and 8
    rates = {3: 0.9, 6: 0.1, 8: 0.1}
    given = [record(i, rates.get(i), attacking=i in (2, 4)) for i in range(1, 9)]
    assert lifespan(given, 5) == lived(2, 0, 0.9)


@pytest.mark.parametrize(
    "fate",
    [
        {"quarantined": {"a": "not finite"}},
        {"kept": ["b", "c"]},
        {"weights": {"a": 0.0, "b": 0.5, "c": 0.5}},
        {"skipped": "the rule kept nobody"},
        {"cohort": ["b", "c"], "malicious": []},
    ],
    ids=["quarantined", "dropped", "weighs nothing", "round skipped", "not drawn"],
)
def test_attackers_none_of_whose_rows_was_accepted_leave_no_backdoor_to_outlive(fate):
    given = [record(i, rate, attacking=i <= 2, **fate) for i, rate in enumerate((0.8, 0.8, 0.1), 1)]
    assert [accepted(r) for r in given] == [[], [], []]
    assert lifespan(given, 2) is None


def test_success_is_what_lies_above_the_attack_free_run_in_the_same_round():
    clean = records(0.1, 0.1, 0.1, 0.3, until=0)
    # above the clean run: 0.8, 0.7, 0.5, 0.3; the peak is 0.8 and 0.3 is under its half, though 0.6 is not
    assert lifespan(records(0.9, 0.8, 0.6, 0.6, until=2), 2, clean) == lived(2, 1, 0.8, 0.1)


def test_success_that_a_half_trained_model_has_by_itself_is_no_backdoor():
    # audit F19: 0.229 where the attack-free run has 0.244
    assert lifespan(records(0.229, 0.015, 0.018, until=1), 1, records(0.244, 0.015, 0.015, until=0)) is None
    # 0.26 of 1,000 against 0.244 is within the intervals
    assert lifespan(records(0.26, 0.015, 0.018, until=1), 1, records(0.244, 0.015, 0.015, until=0)) is None


# ---------------------------------------------------------------- means over the rounds under attack


def test_detection_robustness_and_stealth_are_means_over_the_rounds_under_attack():
    good, poor = {"tpr": 1.0, "weight_share": 0.25, "fpr": 0.0}, {"tpr": 1 / 3, "fpr": 0.5, "auc": 0.2}
    rates = [{**good, "auc": None}] * 3 + [poor] * 3
    stealth = {"norm_rank": 0.5, "cosine_rank": None}
    given = [
        record(i, None, attacking=i <= 3, detection=rate, robustness=float(i), stealth=stealth)
        for i, rate in enumerate(rates, 1)
    ]
    assert means_under_attack(given, attacked=True) == {
        "detection": {"tpr": 1.0, "weight_share": 0.25, "fpr": 0.0, "auc": None},
        "robustness": 2.0,
        "stealth": {"norm_rank": 0.5, "cosine_rank": None},
    }


def test_of_a_run_without_attackers_all_rounds_count_and_of_one_that_never_attacked_none():
    given = [record(i, None, malicious=[], attacking=False, detection={"tpr": None, "fpr": 0.25 * i}) for i in (1, 2)]
    assert means_under_attack(given, attacked=False) == {
        "detection": {"tpr": None, "weight_share": None, "fpr": 0.375, "auc": None},
        "robustness": None,
        "stealth": None,
    }
    assert means_under_attack(given, attacked=True) == {"detection": None, "robustness": None, "stealth": None}


def test_what_is_quarantined_is_not_told_as_dropped_by_the_rule():
    line = round_line(record(2, None, quarantined={"a": "not finite"}, kept=["b"]), 8)
    assert "dropped c  quarantined a" in line


def test_a_skipped_round_stays_one_line_with_one_client_named_and_the_others_counted():
    reasons = "; ".join(f'client "c{i:02}": 3 of 98304 values are not finite' for i in range(5))
    skipped = f"screen: none of the 40 rows can be used: {reasons}; and 35 more."
    given = record(2, None, quarantined={f"c{i:02}": "not finite" for i in range(40)}, kept=None, skipped=skipped)
    line = round_line(given, 8)
    assert 'SKIPPED (screen: none of the 40 rows can be used: client "c00": 3 of 98304 values are not finite' in line
    assert "; and 39 more)" in line
    assert "quarantined c00 c01 c02 c03 c04 c05 c06 c07 and 32 more" in line
    assert len(line) < 320
    assert "\n" not in round_line(record(2, None, skipped="two\nlines"), 8)


def test_the_line_of_a_round_says_how_long_the_rest_may_take():
    given = record(1, None, kept=["b"], seconds={"train": 9.0, "evaluate": 1.0})
    assert round_line(given, 20).endswith("10.0 s, about 3 min left")
    assert round_line(given, 1).endswith("10.0 s")


def test_the_worst_class_is_named_with_all_that_share_its_accuracy():
    def rate(hits: int) -> dict[str, Any]:
        return wilson(hits, 10) or {}

    quality = {"accuracy": rate(6), "per_class": {"World": rate(9), "Sports": rate(2), "Tech": rate(2), "Other": None}}
    names, worst = worst_classes(quality) or ([], {})
    assert (names, worst["value"]) == (["Sports", "Tech"], 0.2)
    assert worst_classes({"accuracy": rate(6), "per_class": None}) is None
    assert worst_classes(None) is None


def test_only_the_first_data_attack_is_asked_about():
    one, two = {"name": "text_trigger", "trigger": " cf"}, {"name": "label_flip"}
    assert same_probe({"data": [one, two]}, {"data": [one]})  # the twin keeps the first
    assert not same_probe({"data": [one]}, {"data": [{**one, "trigger": " mn"}]})
    assert not same_probe({"data": []}, None)


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


def test_what_stands_beside_the_measures_is_no_measure():
    details = {"per_class": {"a": {"value": 0.1}}, "reasons": {"asr": "no row"}, "left_out": {"why": 3}}
    assert quality_drop({"quality": {"loss": 2.0, **details}}, {"quality": {"loss": 1.5, **details}}) == {"loss": 0.5}


def test_a_breakdown_by_a_measure_that_was_not_taken_is_an_error():
    with pytest.raises(FedError, match=r"exact_match.*Name one of \['accuracy', 'loss'\]"):
        breakdown_point({1: summary(0.9)}, summary(0.9), measure="exact_match")
