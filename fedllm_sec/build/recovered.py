"""Recovered text: the tokens and rows that a client really had, and how many of both an attack has read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from statistics import fmean
from typing import Any

from fedllm_sec.attacks.privacy import Observation, Recovered, Row
from fedllm_sec.build.members import by_round, rows_of
from fedllm_sec.evaluation.images import best_median_worst
from fedllm_sec.evaluation.intervals import bootstrap
from fedllm_sec.evaluation.overlap import Tokens, partners, rouge
from fedllm_sec.protocols import Client
from fedllm_sec.recipe.sections import Recipe


@dataclass(frozen=True)
class Written:
    """The rows that a client trained on: the truth, for the metric alone. The last token of a row is not fed."""

    rows: Sequence[Row]
    decode: Callable[[Sequence[int]], str] | None = None  # from tokens to text; None: no texts are kept

    def shown(self, seen: Observation) -> Observation:
        """The observation as it is: nothing is shown to an attack that reads."""
        return seen

    def judged(self, made: Recovered) -> Read:
        """How many of the distinct tokens were read, how many of those read are right, and what of which rows."""
        true, found = {token for row in self.rows for token in row.ids[:-1]}, set(made.tokens)
        right, fed = len(true & found), [row.ids[:-1] for row in self.rows]
        read = Read(right / len(true), right / len(found) if found else None, None, len(true), len(fed))
        if made.rows is None:
            return read
        exact = sum(ids in set(made.rows) for ids in fed) / len(fed)
        pairs = list(zip(partners(list(made.rows), fed), fed, strict=True))
        one, two = ([rouge(*pair, n) for pair in pairs] for n in (1, 2))
        chosen = best_median_worst([a + b for a, b in zip(one, two, strict=True)])
        texts: tuple[dict[str, Any], ...] = () if self.decode is None else tuple(
            {"which": which, "rouge_1": one[i], "rouge_2": two[i], **beside(*pairs[i], self.decode)}
            for which, i in chosen.items()
        )  # fmt: skip
        return replace(read, exact=exact, rouge_1=fmean(one), rouge_2=fmean(two), texts=texts)


def beside(made: Tokens, true: Tokens, decode: Callable[[Sequence[int]], str]) -> dict[str, Any]:
    """Both rows as text: the true one, and what was read in pieces, each with whether it stands in the true one too.

    Right is what a longest common run and, on both sides of it, the next one holds (Ratcliff and Metzener 1988).
    """
    blocks = SequenceMatcher(None, made, true, autojunk=False).get_matching_blocks()
    pieces: list[tuple[Tokens, bool]] = []
    at = 0
    for block in blocks:
        pieces += [(made[at : block.a], False), (made[block.a : block.a + block.size], True)]
        at = block.a + block.size
    return {"true": decode(true), "said": [[decode(piece), right] for piece, right in pieces if piece]}


def written_by(recipe: Recipe, client: Client, trained: Sequence[int], task: Any) -> Written:
    """The rows that a client trained on in a round."""

    def decode(ids: Sequence[int]) -> str:
        """All of them: `task.decode` ends with the first stop token, which a conversation has in its midst."""
        return str(task.tokenizer.decode(list(ids), skip_special_tokens=True))

    mine = rows_of(client.shard, recipe.data.loss_on)
    return Written(list(dict.fromkeys(mine[i] for i in trained)), decode)


@dataclass(frozen=True)
class Read:
    """What was read of one client's rows."""

    recall: float  # share of the distinct tokens that were fed
    precision: float | None  # share of the tokens that are said to have been fed; None where none is
    exact: float | None  # share of the rows that were read to the last token that was fed; None where none is asked
    tokens: int  # distinct ones that were fed
    rows: int  # distinct ones
    rouge_1: float | None = None  # the mean of rows, each with its best partner
    rouge_2: float | None = None
    texts: Sequence[dict[str, Any]] = ()  # the best, the median and the worst row, beside what was read of it

    def in_words(self) -> str:
        right = "" if self.precision is None else f", {self.precision:.2f} of what was read is right"
        rows = "" if self.exact is None else f"; {self.exact:.2f} of {self.rows} rows exact, ROUGE-1 {self.rouge_1:.2f}"
        return f"{self.recall:.2f} of {self.tokens} tokens read{right}{rows}"

    def record(self) -> dict[str, Any]:
        return dict(vars(self))


def summed(learnt: Sequence[tuple[int, Read]]) -> dict[str, Any]:
    """The scores of all observations, given with their rounds, and those of each round."""
    return by_round(learnt, _measures)


def _measures(read: Sequence[Read]) -> dict[str, Any]:
    """Means over observations; None where nothing was measured."""
    found: dict[str, Any] = {}
    for name in ("recall", "precision", "exact", "rouge_1", "rouge_2"):
        values = [value for one in read if (value := getattr(one, name)) is not None]
        found[name] = None
        if values:
            low, high = bootstrap(values)
            found[name] = {"value": fmean(values), "low": low, "high": high, "n": len(values)}
    return found
