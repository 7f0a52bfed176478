"""What a defense needs of those who are drawn: cohorts follow from the seed, so it is known before the first round.

A cohort's size is the same in every round, and the rehearsal tries that. Here is what depends on who is in it.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from fedllm_sec.build.threat import client_ids, sure
from fedllm_sec.defenses.pipeline import Pipeline
from fedllm_sec.defenses.prediction import FEWEST, FLDetector
from fedllm_sec.recipe.sections import Recipe
from fedllm_sec.rounds.cohort import cohorts, foreseen


def drawn_problems(recipe: Recipe, defense: Pipeline, tried_without: Callable[[str], list[str]]) -> list[str]:
    """Why a defense that works on some cohort cannot work on those of this run, with the first round that shows it.

    `tried_without(id)` is what goes wrong in a rehearsal in which this client does not take part.
    """
    clients = recipe.clients
    if clients.per_round is None or clients.per_round >= clients.total:
        return []
    needed = {id: found[0] for id in named_clients(recipe) if (found := tried_without(id))}
    problems = [absent for id, text in needed.items() if (absent := _absent(recipe, id, text))]
    return problems + (_unjudged(recipe, defense.rule.warmup) if isinstance(defense.rule, FLDetector) else [])


def named_clients(recipe: Recipe) -> list[str]:
    """The clients that settings of the server's defense name, such as monna's `trusted`."""
    block = recipe.defense if recipe.enable_defense else None
    if block is None:
        return []
    words = list(dict.fromkeys(_words([*block.before, block.rule, *block.after])))
    known = set(client_ids(recipe)) if words else set()
    return [word for word in words if word in known]


def _words(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _words(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _words(item)


def _looked_up(recipe: Recipe) -> tuple[range, Iterator[tuple[int, list[int]]]]:
    """The rounds whose cohorts are looked up, as many as take a second, and these cohorts as places."""
    total = recipe.clients.total
    rounds = foreseen(range(1, recipe.rounds + 1), total)
    return rounds, cohorts(recipe.seed, rounds, total, recipe.clients.per_round, recipe.before, sure(recipe))


def _absent(recipe: Recipe, id: str, text: str) -> str | None:
    """The first round in which a client that the defense cannot do without is not drawn."""
    place, (rounds, drawn) = client_ids(recipe).index(id), _looked_up(recipe)
    clients = recipe.clients
    for r, cohort in drawn:
        if place not in cohort:
            return (
                f"defense: round {r} of {recipe.rounds:,}: client {id} is not among the {clients.per_round:,} of "
                f"{clients.total:,} clients that seed {recipe.seed} draws. {text.removeprefix('defense: ')}"
            )
    if len(rounds) < recipe.rounds:
        warnings.warn(
            f"defense: client {id}, without whom it cannot act, takes part in the first {len(rounds):,} of "
            f"{recipe.rounds:,} rounds. Later ones were not looked up: a run may end where he is not drawn.",
            stacklevel=2,
        )
    return None


def _unjudged(recipe: Recipe, warmup: int) -> list[str]:
    """fldetector judges who has taken part more than `warmup` times: whether enough of these ever meet in a round."""
    parts, most = Counter[int](), 0
    rounds, drawn = _looked_up(recipe)
    for _, cohort in drawn:
        parts.update(cohort)
        most = max(most, sum(parts[place] > warmup for place in cohort))
        if most >= FEWEST:
            return []
    if len(rounds) < recipe.rounds:
        return []  # clients return in later rounds
    return [
        f"defense: fldetector: needs {FEWEST} clients or more in one round that have taken part more than "
        f"warmup={warmup} times, and in {recipe.rounds:,} rounds of {recipe.clients.per_round:,} of "
        f"{recipe.clients.total:,} clients there are at most {most}: it could drop nobody. Raise rounds or "
        "clients.per_round, or lower warmup."
    ]
