"""--check is bounded in time and memory: what is too much to be looked at is left out, and said."""

from __future__ import annotations

import resource
import time
from typing import Any

import pytest
import torch

from fedllm_sec.build.explain import active_rounds, named
from fedllm_sec.build.names import checked
from fedllm_sec.build.plan import planned
from fedllm_sec.build.rehearsal import MOST_ROWS, Rehearsal
from fedllm_sec.build.threat import attacking, make_threat, sure
from fedllm_sec.defenses import MENU
from fedllm_sec.defenses.claims import capped_shares
from fedllm_sec.defenses.columns import mean
from fedllm_sec.defenses.pipeline import Pipeline
from fedllm_sec.errors import RecipeError
from fedllm_sec.protocols import Client
from fedllm_sec.recipe.resolve import resolve, settings_of
from fedllm_sec.recipe.sections import Recipe
from fedllm_sec.rounds import cohort
from fedllm_sec.rounds.cohort import cohorts, foreseen, places, sample
from fedllm_sec.seeds import generator_for

HUGE: dict[str, Any] = {
    "rounds": 10_000_000,
    "clients": {"total": 100_000, "local_steps": 1},
    "enable_attack": True,
    "attack": {"malicious": {"share": 0.1}, "knowledge": "cohort", "update": [{"name": "alie"}]},
    "enable_defense": True,
    "defense": {"rule": {"name": "krum", "f": 10_000}},
}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ["a round of 100,000 clients is not rehearsed"]),
        ({"clients": {"per_round": 5, "total": 100_000, "local_steps": 1}, "defense": {"rule": {"name": "median"}}},
         ["looked up in the first 99 of 10,000,000 rounds"]),
        ({"attack": {**HUGE["attack"], "malicious": {"count": 9, "redraw": True}, "probability": 1e-6}},
         ["looked up in the first 9 of", "is not rehearsed"]),
    ],
)  # fmt: skip
def test_ten_million_rounds_of_a_hundred_thousand_clients_are_checked_in_seconds(changes, said):
    begin, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    plan = planned(checked({**HUGE, **changes}))
    assert active_rounds(plan.recipe) in ("10,000,000", "about 10")
    assert time.process_time() - begin < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB; an n x n matrix has 80 GB
    assert len(plan.notes()) == len(said)
    for note, part in zip(plan.notes(), said, strict=True):
        assert part in note


def test_an_ordinary_run_is_looked_at_whole():
    small = {**HUGE, "rounds": 2000, "clients": {"total": 20, "per_round": 10, "local_steps": 1}}
    assert planned(checked({**small, "defense": {"rule": {"name": "krum", "f": 2}}})).notes() == []


def test_all_malicious_clients_get_poisoned_data_where_not_all_rounds_are_foreseen(monkeypatch):
    raw = {**HUGE, "rounds": 10, "clients": {"total": 40, "per_round": 2, "local_steps": 1}, "enable_defense": False}
    raw["attack"] = {"malicious": {"count": 8}, "data": [{"name": "label_flip", "mapping": {"a": "b"}}]}
    recipe = checked(raw)
    whole = attacking(recipe)
    assert whole.complete
    assert whole.note is None
    assert 0 < len(whole.ids) < 8
    monkeypatch.setattr(cohort, "MOST", 3 * (cohort.ONE_ROUND + 40))
    attacking.__globals__["_foreseen"].cache_clear()
    some = attacking(recipe)
    attacking.__globals__["_foreseen"].cache_clear()
    assert (some.looked, some.rounds, some.complete) == (3, 10, False)
    assert some.ids < whole.ids


def test_cohorts_are_those_of_the_run():
    found = dict(cohorts(7, range(1, 4), 50, 5))
    assert found[2] == places(50, 5, generator_for(7, 2, "cohort"))
    assert len(foreseen(range(1, 10**9), 10)) == 24_390
    assert foreseen(range(5, 8), 10**9) == range(5, 6)


def test_attackers_who_are_present_take_part_in_every_round_of_the_attack_and_are_foreseen():
    raw = {**HUGE, "rounds": 4, "clients": {"total": 40, "per_round": 5, "local_steps": 1}, "enable_defense": False}
    raw["attack"] = {
        "malicious": {"count": 8, "present": 2},
        "stop": 3,
        "data": [{"name": "label_flip", "mapping": {"a": "b"}}],
    }
    recipe = checked(raw)
    threat, found = make_threat(recipe), set()
    for r, drawn_places in cohorts(recipe.seed, range(1, 5), 40, 5, 0, sure(recipe)):
        here = {f"c{place:02d}" for place in drawn_places} & threat.malicious
        drawn = set(places(40, 5, generator_for(recipe.seed, r, "cohort")))
        assert len(drawn_places) == 5
        assert r == 4 or (len(here) == 2 and len(drawn & set(drawn_places)) >= 3)
        assert r < 4 or set(drawn_places) == drawn
        found |= here if r < 4 else set()
        ids = [Client(f"c{place:02d}", None) for place in range(40)]
        assert [c.id for c in sample(ids, 5, generator_for(recipe.seed, r, "cohort"), threat.sure(r))] == [
            f"c{place:02d}" for place in drawn_places
        ]
    assert attacking(recipe).ids == found
    refused = [(9, 20, "9 of 8 attackers"), (6, 5, "6 of 8 attackers in rounds of 5"), (2, None, "all clients")]
    for present, per_round, said in refused:
        wrong = {**raw, "clients": {**raw["clients"], "per_round": per_round}}
        wrong["attack"] = {**raw["attack"], "malicious": {"count": 8, "present": present}}
        with pytest.raises(RecipeError, match=rf"attack\.malicious\.present: .*{said}"):
            checked(wrong)


def rehearsed(name: str, n: int, f: int) -> list[str]:
    entry = MENU[name]
    known = {"f": f, "rho": 5.0, "theta": 1, "trusted": "c1", "source": "noise"}
    settings = {key: value for key, value in known.items() if key in settings_of(entry.make)}
    part = resolve(name, settings, MENU, "defense")
    stages = {"before": ([part], mean, []), "after": ([], mean, [part])}.get(entry.kind, ([], part, []))
    found = Rehearsal([f"c{i}" for i in range(n)], n, 10, 0, True, True).problems(Pipeline(*stages), None)
    return [text.replace(f"{n}", "N") for text in found]


@pytest.mark.parametrize("name", [name for name in MENU if "f" in settings_of(MENU[name].make)])
def test_what_a_rule_asks_of_the_number_of_clients_is_checked_where_it_is_not_rehearsed(name: str):
    few, many = 24, 20_000
    assert few <= MOST_ROWS < many
    assert rehearsed(name, many, many) == rehearsed(name, few, few) != []
    assert rehearsed(name, many, 1) == []


def test_claims_are_weighed_with_numbers_where_a_rehearsal_makes_tensors_without():
    with torch.device("meta"):
        assert capped_shares([1.0, 1.0, 100.0], 3.0, "mean").tolist() == [0.2, 0.2, 0.6]


def test_no_stage_of_the_menu_makes_room_for_a_hundred_thousand_clients():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in MENU:
        assert rehearsed(name, 100_000, 10) == [], name
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000
    assert torch.zeros(1).device.type == "cpu"  # what is tried on "meta" leaves nothing behind


def test_the_names_of_many_attackers_fit_a_few_lines():
    assert named(["c2", "c1"]) == "c1, c2"
    assert named(f"c{i:03d}" for i in range(250)).endswith("c099 and 150 more")


def test_sizes_beyond_any_machine_are_refused():
    for section, key, value in (
        ("evaluate", "max_new_tokens", 1_000_000),
        ("compute", "threads", 100_000),
        ("clients", "total", 10**9),
    ):
        raw = {"clients": {"local_steps": 1}}
        raw[section] = {**raw.get(section, {}), key: value}
        with pytest.raises(ValueError, match=f"{section}.{key}: {value}: Input should be less than or equal to"):
            checked(raw)
    assert isinstance(checked({"clients": {"local_steps": 1}, "rounds": 10**9}), Recipe)
