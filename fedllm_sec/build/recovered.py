"""Recovered text: the tokens and rows that a client really had, and how many of both an attack has read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from fedllm_sec.attacks.privacy import Observation, Recovered, Row
from fedllm_sec.build.members import by_round, rows_of
from fedllm_sec.evaluation.intervals import bootstrap
from fedllm_sec.protocols import Client
from fedllm_sec.recipe.sections import Recipe


@dataclass(frozen=True)
class Written:
    """The rows that a client trained on: the truth, for the metric alone. The last token of a row is not fed."""

    rows: Sequence[Row]

    def shown(self, seen: Observation) -> Observation:
        """The observation as it is: nothing is shown to an attack that reads."""
        return seen

    def judged(self, made: Recovered) -> Read:
        """How many of the distinct tokens were read, how many of those read are right, and which rows are exact."""
        true, found = {token for row in self.rows for token in row.ids[:-1]}, set(made.tokens)
        right, fed = len(true & found), [row.ids[:-1] for row in self.rows]
        exact = None if made.rows is None else sum(ids in set(made.rows) for ids in fed) / len(fed)
        return Read(right / len(true), right / len(found) if found else None, exact, len(true), len(fed))


def written_by(recipe: Recipe, client: Client, trained: Sequence[int]) -> Written:
    """The rows that a client trained on in a round."""
    mine = rows_of(client.shard, recipe.data.loss_on)
    return Written(list(dict.fromkeys(mine[i] for i in trained)))


@dataclass(frozen=True)
class Read:
    """What was read of one client's rows."""

    recall: float  # share of the distinct tokens that were fed
    precision: float | None  # share of the tokens that are said to have been fed; None where none is
    exact: float | None  # share of the rows that were read to the last token that was fed; None where none is asked
    tokens: int  # distinct ones that were fed
    rows: int  # distinct ones

    def in_words(self) -> str:
        right = "" if self.precision is None else f", {self.precision:.2f} of what was read is right"
        rows = "" if self.exact is None else f"; {self.exact:.2f} of {self.rows} rows exact"
        return f"{self.recall:.2f} of {self.tokens} tokens read{right}{rows}"

    def record(self) -> dict[str, Any]:
        return dict(vars(self))


def summed(learnt: Sequence[tuple[int, Read]]) -> dict[str, Any]:
    """The scores of all observations, given with their rounds, and those of each round."""
    return by_round(learnt, _measures)


def _measures(read: Sequence[Read]) -> dict[str, Any]:
    """Means over observations; None where nothing was measured."""
    found: dict[str, Any] = {}
    for name in ("recall", "precision", "exact"):
        values = [value for one in read if (value := getattr(one, name)) is not None]
        found[name] = None
        if values:
            low, high = bootstrap(values)
            found[name] = {"value": fmean(values), "low": low, "high": high, "n": len(values)}
    return found
