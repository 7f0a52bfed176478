"""Membership: the rows among which members are to be found, the truth, and how well they were told from others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch

from fedllm_sec.attacks.privacy import Observation, Row, Suspicion
from fedllm_sec.errors import AttackError
from fedllm_sec.evaluation.membership import Told, told_apart
from fedllm_sec.protocols import Client
from fedllm_sec.recipe.sections import Recipe
from fedllm_sec.rounds.federation import Federation
from fedllm_sec.seeds import generator_for

OTHERS = 300  # held-out rows beside the members, where the recipe says nothing
FEW_ANSWERS = 20  # up to so many different answers of all rows name classes, whose shares tell members from others

T = TypeVar("T")


def rows_of(encoded: Any, loss_on: str) -> list[Row]:
    """Encoded rows as an observer would write them, with the tokens that local training scores."""
    return [
        Row((*prompt, *answer), 1 if loss_on == "all" else len(prompt))
        for prompt, answer in zip(encoded.prompts, encoded.answers, strict=True)
    ]


@dataclass(frozen=True)
class Lineup:
    """Rows in an order that says nothing, and which of them the client trained on: the truth, for the metric alone."""

    rows: list[Row]
    member: np.ndarray  # (rows,) bool
    own: list[Row]  # the observer's

    def shown(self, seen: Observation) -> Observation:
        """The observation with the rows."""
        return replace(seen, candidates=self.rows, own=self.own)

    def judged(self, made: Suspicion) -> Apart:
        """How well the scores tell members from others."""
        scores = made.scores.double().cpu().numpy()
        if scores.shape != self.member.shape:
            raise AttackError(f"privacy: gave scores of shape {scores.shape}, needs {self.member.shape}.")
        return Apart(told_apart(scores[self.member], scores[~self.member]))


def lineup(recipe: Recipe, federation: Federation, client: Client, trained: Sequence[int]) -> Lineup:
    """The rows that a client trained on in a round, and held-out ones of the same distribution, drawn by the seed.

    Where answers are few they name classes: then others are drawn so that each answer has the share that it has among
    the members, as far as there are rows; a client's own mix of classes would tell them apart otherwise.
    """
    assert recipe.attack is not None
    assert recipe.attack.observe is not None
    evaluation: Any = federation.evaluation
    loss_on = recipe.data.loss_on
    held = rows_of(evaluation.fitted.encoded, loss_on)
    order = torch.randperm(len(held), generator=generator_for(recipe.seed, "observer")).tolist()
    own = [held[i] for i in order[: recipe.attack.observe.own_rows]]
    mine = rows_of(client.shard, loss_on)
    members = list(dict.fromkeys(mine[i] for i in trained))
    known = {row.ids for row in mine} | {row.ids for row in own}
    left = list(dict.fromkeys(held[i] for i in order if held[i].ids not in known))
    others = _alike(left, members, recipe.attack.observe.others or min(OTHERS, len(left)))
    rows, member = [*members, *others], np.arange(len(members) + len(others)) < len(members)
    mixed = torch.randperm(len(rows), generator=generator_for(recipe.seed, "lineup", client.id)).tolist()
    return Lineup([rows[i] for i in mixed], member[mixed], own)


def _alike(left: Sequence[Row], members: Sequence[Row], count: int) -> list[Row]:
    """The first `count` of the rows, or as many of each answer as its share among the members asks for."""
    if len(left) < count:
        raise AttackError(
            f"attack.observe.others: {count} of {len(left)} held-out rows that are no row of this client. Lower it."
        )

    def answer(row: Row) -> tuple[int, ...]:
        return row.ids[row.first :]

    shares, there = Counter(map(answer, members)), Counter(map(answer, left))
    if not 1 < len(shares.keys() | there.keys()) <= FEW_ANSWERS or any(row.first == 1 for row in members):
        return list(left[:count])
    most = min([count, *(there[said] * len(members) // n for said, n in shares.items() if there[said])])
    quota = {said: round(most * n / len(members)) for said, n in shares.items()}
    found = []
    for row in left:
        if quota.get(answer(row), 0) > 0:
            quota[answer(row)] -= 1
            found.append(row)
    return found


@dataclass(frozen=True)
class Apart:
    """How well one observation's members were told from others."""

    told: Told

    def in_words(self) -> str:
        return f"AUC {self.told.auc:.2f}, TPR at 1 % FPR {self.told.tpr:.2f}"

    def record(self) -> dict[str, Any]:
        rounded = [[round(x, 4), round(y, 4)] for x, y in self.told.curve]
        return {**_measures([self]), "members": self.told.members, "others": self.told.others, "roc": rounded}


def summed(learnt: Sequence[tuple[int, Apart]]) -> dict[str, Any]:
    """The scores of all observations, given with their rounds, and those of each round."""
    return by_round(learnt, _measures)


def by_round(learnt: Sequence[tuple[int, T]], measures: Callable[[Sequence[T]], dict[str, Any]]) -> dict[str, Any]:
    """`measures` of all observations, given with their rounds, and of those of each round."""
    rounds = sorted({r for r, _ in learnt})
    return {
        "scores": measures([one for _, one in learnt]),
        "rounds": [{"round": r, **measures([one for at, one in learnt if at == r])} for r in rounds],
    }


def _measures(apart: Sequence[Apart]) -> dict[str, Any]:
    """AUC and TPR, means over observations; in every resample the rows of each are drawn anew."""
    rows = sum(one.told.members + one.told.others for one in apart)
    found: dict[str, Any] = {}
    for name, of in (("auc", "aucs"), ("tpr", "tprs")):
        if not apart:
            found[name] = None
            continue
        drawn = np.mean([getattr(one.told, of) for one in apart], axis=0)
        low, high = np.quantile(drawn, [0.025, 0.975])
        value = float(np.mean([getattr(one.told, name) for one in apart]))
        found[name] = {"value": value, "low": float(low), "high": float(high), "n": rows}
    return found
