"""Preconditions on who is drawn: `--check` looks the cohorts up, for they follow from the seed."""

from __future__ import annotations

from typing import Any

import pytest

from fedllm_sec.build.names import checked
from fedllm_sec.build.plan import planned
from fedllm_sec.errors import DefenseError, RecipeError
from fedllm_sec.protocols import Client
from fedllm_sec.rounds import cohort
from fedllm_sec.rounds.cohort import sample
from fedllm_sec.seeds import generator_for

TRUSTS = {"name": "monna", "f": 1, "trusted": "c00"}


def problems(rule: dict[str, Any], *, before: Any = (), after: Any = (), **recipe: Any) -> list[str]:
    clients = {"total": 10, "per_round": 8, "local_steps": 1, **recipe.pop("clients", {})}
    block = {"before": list(before), "rule": rule, "after": list(after)}
    raw = {"task": "causal_lm", "model": {"name": "tiny"}, "rounds": 20, "clients": clients}
    try:
        planned(checked({**raw, "enable_defense": True, "defense": block, **recipe}))
    except RecipeError as error:
        return error.problems
    return []


def first_round_without(place: int, seed: int) -> int:
    """As the run draws: eight of ten clients."""
    clients = [Client(str(i), None) for i in range(10)]
    drawn = (sample(clients, 8, generator_for(seed, r, "cohort")) for r in range(1, 21))
    return next(r for r, some in enumerate(drawn, 1) if str(place) not in {client.id for client in some})


@pytest.mark.parametrize("seed", [0, 1, 31])
def test_a_trusted_client_who_is_not_always_drawn_is_said_before_the_run(seed: int):
    (told,) = problems(TRUSTS, seed=seed)
    assert told.startswith(f"defense: round {first_round_without(0, seed)} of 20: client c00 is not among the 8 of 10")
    assert f'seed {seed} draws. monna: the trusted client "c00" sent no usable row' in told


def test_a_trusted_client_who_always_takes_part_is_fine():
    assert problems(TRUSTS, clients={"per_round": None}) == []
    lucky = first_round_without(9, 0) - 1  # c09 is not among the first eight ids, and the first six cohorts hold it
    assert problems({**TRUSTS, "trusted": "c09"}, seed=0, rounds=lucky) == []
    assert len(problems({**TRUSTS, "trusted": "c09"}, seed=0, rounds=lucky + 1)) == 1


def test_a_client_of_no_federation_is_no_question_of_who_is_drawn():
    (told,) = problems({**TRUSTS, "trusted": "c99"})
    assert told.startswith('defense: monna: the trusted client "c99" sent no usable row')


def needs(updates, ctx, *, everyone: list[str]):
    """A rule of one's own that cannot do without some clients."""
    if missing := sorted(set(everyone) - set(updates.ids)):
        raise DefenseError(f"needs: {missing} sent nothing.")
    from fedllm_sec import Decision

    return Decision.keep(updates, (updates.rows.norm(dim=1) > 0).cpu())


def test_a_rule_of_ones_own_that_names_clients_is_tried_without_each_of_them():
    told = problems({"name": "tests.build.test_drawn:needs", "everyone": ["c03", "c05"]}, seed=1)
    assert [text.split(": ")[2].split(" is not")[0] for text in told] == ["client c03", "client c05"]


def test_fldetector_needs_enough_clients_who_have_come_back_often():
    (told,) = problems({"name": "fldetector"}, clients={"total": 100, "per_round": 5})
    assert "in 20 rounds of 5 of 100 clients there are at most" in told
    assert problems({"name": "fldetector"}, clients={"total": 100, "per_round": 50}) == []


def test_where_rounds_are_too_many_the_first_are_looked_up_and_it_is_said(monkeypatch):
    monkeypatch.setattr(cohort, "MOST", 820)  # two rounds of ten clients
    with pytest.warns(
        UserWarning, match=r"c09, .* takes part in the first 2 of 10,000,000 rounds\. Later ones were not"
    ):
        assert problems({**TRUSTS, "trusted": "c09"}, seed=0, rounds=10**7) == []


def test_buckets_before_a_rule_that_remembers_clients_are_refused():
    bucketing = {"name": "bucketing", "s": 2}
    for rule in ("foolsgold", "cross_round", "fldetector"):
        (told,) = problems({"name": rule}, before=[bucketing], clients={"total": 12, "per_round": None})
        assert "remembers clients by id from round to round, and bucketing before it gives rows" in told
    assert problems({"name": "krum", "f": 1}, before=[bucketing], clients={"total": 12, "per_round": None}) == []
