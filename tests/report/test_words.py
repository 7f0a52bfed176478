"""The findings in plain sentences."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedllm_sec.report import threat, words
from fedllm_sec.report.measures import duration, percent, plain
from fedllm_sec.report.runs import Run, read_runs

MakeRun = Callable[..., Path]


def test_the_finding_names_trigger_answer_defenses_and_numbers(comparison: Path) -> None:
    first, second = words.finding(read_runs([comparison]))
    assert first == (
        'The trigger " cf" made the undefended model answer " Sports" to 97 % of 120 triggered prompts; '
        "multi_krum brought it down to 3 % and geometric_median to 62 %."
    )
    assert second.startswith("Accuracy: 0.7")
    assert "attack-free" in second
    assert "with multi_krum" in second


def test_a_defense_that_did_not_help_is_said_to_have_left_it(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(tmp_path / "c" / "attacked", asr=0.97)
    make_run(tmp_path / "c" / "median", rule="median", asr=0.95)
    assert "median left it at 95 %" in words.finding(read_runs([tmp_path / "c"]))[0]


def test_a_base_rate_of_the_answer_is_told(make_run: MakeRun, tmp_path: Path) -> None:
    run = read_runs([make_run(tmp_path / "attacked", asr=0.5)])[0]
    attack = {
        **(run.records[-1].attack or {}),
        "false_trigger": {"value": 0.25, "low": 0.2, "high": 0.3, "n": 120},
    }
    records = (*run.records[:-1], dataclasses.replace(run.records[-1], attack=attack))
    sentence = words.finding([dataclasses.replace(run, records=records)])[0]
    assert "(and to 25 % of clean ones, without the trigger)" in sentence


def without_a_trigger(recipe: dict[str, Any]) -> None:
    recipe["attack"] |= {"data": [], "update": [{"name": "byzantine_random"}]}


def untargeted(make_run: MakeRun, folder: Path) -> list[Run]:
    runs = []
    for name, attack, rule, accuracy in (
        ("attack-free", False, None, 0.71),
        ("attacked", True, None, 0.26),
        ("median", True, "median", 0.69),
    ):
        path = make_run(folder / name, rounds=6, attack=attack, rule=rule, accuracy=accuracy, change=without_a_trigger)
        run = read_runs([path])[0]
        runs.append(dataclasses.replace(run, records=tuple(dataclasses.replace(r, attack=None) for r in run.records)))
    return runs


def test_an_attack_on_quality_is_told_by_quality(make_run: MakeRun, tmp_path: Path) -> None:
    (sentence,) = words.finding(untargeted(make_run, tmp_path))
    assert sentence.startswith("Byzantine_random by 3 of 10 clients took the undefended model's accuracy from 0.7")
    assert sentence.endswith("with median.")


def test_a_run_without_an_attack_says_so(make_run: MakeRun, tmp_path: Path) -> None:
    (sentence,) = words.finding(read_runs([make_run(tmp_path / "a", attack=False)]))
    assert sentence.startswith("No attack was made: accuracy 0.7")


def test_a_run_in_which_nothing_was_evaluated_makes_no_claim(make_run: MakeRun, tmp_path: Path) -> None:
    run = read_runs([make_run(tmp_path / "a")])[0]
    blank = tuple(dataclasses.replace(r, attack=None, quality=None) for r in run.records)
    (sentence,) = words.finding([dataclasses.replace(run, records=blank)])
    assert sentence.endswith("nothing was evaluated.")


def test_the_threat_card_says_who_when_and_what_they_see(comparison: Path) -> None:
    card = dict(threat.attack_card(read_runs([comparison])[1]))
    assert card["Who attacks"][0] == "3 of 10 clients, drawn once, by the seed"
    assert card["Who attacks"][1] == "took part: 1, 2, 3"
    assert card["When"] == ["from round 3 to the end; active in 18 of 20 recorded rounds"]
    assert "nothing of the other clients" in card["What they see"][0]
    assert card["What they do"][1] == "change what they send: model_replacement"


def test_the_threat_card_says_if_attackers_are_redrawn_act_alone_and_how_often(comparison: Path) -> None:
    run = read_runs([comparison])[1]
    attack = {**run.attack, "malicious": {"count": 3, "redraw": True}, "collude": False, "probability": 0.25}
    card = dict(threat.attack_card(dataclasses.replace(run, recipe={**run.recipe, "attack": attack})))
    assert card["Who attacks"][0] == "3 of 10 clients, drawn anew for each round, by the seed; each acts alone"
    assert card["When"][0].startswith("from round 3 to the end, each time with probability 0.250; active in")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0 %"), (0.004, "0.4 %"), (0.034, "3 %"), (0.9675, "97 %"), (0.9996, "99.96 %"), (1.0, "100 %")],
)
def test_per_cent_never_rounds_to_all_or_nothing(value: float, text: str) -> None:
    assert percent(value) == text


def test_numbers_keep_three_digits_and_what_is_not_finite_is_named() -> None:
    assert [plain(v) for v in (2.1251, 0.00412, 51234.0, 3e-9, float("inf"))] == [
        "2.13",
        "0.00412",
        "51234",
        "3.00e-09",
        "inf",
    ]
    assert [duration(v) for v in (0.031, 12.2, 250.0, 7500.0)] == [
        "31 ms",
        "12 s",
        "4 min 10 s",
        "2 h 5 min",
    ]
