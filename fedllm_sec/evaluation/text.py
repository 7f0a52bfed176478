"""What a language model is worth, and what an attack did to it: measured on held-out rows each round."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedllm_sec.evaluation.intervals import wilson
from fedllm_sec.evaluation.smoothed import Outcomes

SLACK = 0.1  # nats by which two passes over a half-precision model may differ


def token_overlap(answer: str, truth: str) -> float:
    """F1 of the words two texts share, from 0 to 1, case ignored (the SQuAD measure, Rajpurkar et al. 2016)."""
    said, wanted = answer.casefold().split(), truth.casefold().split()
    if not said or not wanted:
        return float(said == wanted)
    common = sum((Counter(said) & Counter(wanted)).values())
    return 2 * common / (len(said) + len(wanted))


@dataclass(frozen=True)
class Choices:
    """The answers that go with classes, among which the model's likeliest is its choice."""

    classes: Tensor  # (k,) the class of each answer
    first: Tensor  # (k,) its first token
    own: Tensor  # (rows,) which of them is the answer of a test row; -1: another text
    answered: Callable[[Sequence[int], Sequence[int]], Any]  # test rows with these answers, encoded


@dataclass
class TextEvaluation:
    """Held-out rows, encoded once, and how they are judged.

    Where answers go with classes, accuracy is over the rows that have a class: the model's choice is the class of the
    answer whose whole text, end token included, has the largest sum of log-probabilities after the prompt. Where
    answers only begin with a label, it is over the first `answer_rows` rows: the greedy answer is `read` for a class.
    `spread(batches, width, score)` runs `score` on all batches over the processes, as `Machine.spread` does.
    """

    test: Any  # encoded clean rows
    truths: Sequence[str]  # their answers
    answer_rows: int  # how many rows are answered and compared, where answers are not chosen among
    batch_size: int
    max_new_tokens: int
    labels: Sequence[str] = ()  # class names, where the set has classes that answers name
    classes: Tensor | None = None  # (rows,) the true class; -1: the row has none
    choices: Choices | None = None
    read: Callable[[str], int] | None = None  # greedy answer -> class, -1 for none
    triggered: Any = None  # encoded probe of the attack
    clean: Any = None  # encoded clean rows on which the attack's success can happen and would be wrong
    triggered_rows: Sequence[dict[str, Any]] = ()
    clean_rows: Sequence[dict[str, Any]] = ()
    success: Callable[[str, dict[str, Any]], bool] | None = None
    reasons: dict[str, str] = field(default_factory=dict)  # name of a rate -> why it is not measured
    left_out: dict[str, int] = field(default_factory=dict)  # reason -> held-out rows that are neither probe nor clean

    def _batches(self, encoded: Any, limit: int | None = None) -> list[list[int]]:
        lengths = [len(prompt) for prompt in encoded.prompts]
        order = sorted(range(len(encoded))[:limit], key=lambda i: lengths[i])
        return [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]

    def quality(self, task: Any, spread: Callable[..., Tensor]) -> dict[str, Any]:
        """Answer loss per token (nats), perplexity, and accuracy for classes or answer match for free text."""
        batches = self._batches(self.test)
        found = spread(batches, 3, lambda rows: self._judge(task, rows))
        loss = float(found[:, 0].sum() / found[:, 1].sum())
        measured: dict[str, Any] = {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "accuracy": None,
            "per_class": None,
            "exact_match": None,
            "token_overlap": None,
        }
        if self.choices is not None:
            measured.update(self._accuracy(batches, found[:, 2]))
        elif self.answer_rows:
            batches = self._batches(self.test, self.answer_rows)
            match = spread(batches, 3, lambda rows: self._match(task, rows))
            measured["exact_match"] = wilson(int(match[:, 0].sum()), len(match))
            measured["token_overlap"] = float(match[:, 1].mean())
            if self.read is not None:
                measured.update(self._accuracy(batches, match[:, 2]))
        return measured

    def _accuracy(self, batches: Sequence[Sequence[int]], said: Tensor) -> dict[str, Any]:
        """Of the rows that have a class, those for which the same was said (-1: none), in all and by class."""
        assert self.classes is not None
        truth = self.classes[torch.tensor([i for rows in batches for i in rows])]
        right = (said == truth) & (truth >= 0)
        counts = {k: int((truth == k).sum()) for k in range(len(self.labels))}
        return {
            "accuracy": wilson(int(right.sum()), sum(counts.values())),
            "per_class": {
                self.labels[k]: wilson(int(right[truth == k].sum()), count) for k, count in counts.items() if count
            },
        }

    def _judge(self, task: Any, rows: Sequence[int]) -> Tensor:
        """Sum of answer log-losses, number of answer tokens, chosen class or -1, of each row: (b, 3)."""
        scores: Tensor = task.score(self.test, rows)
        if self.choices is None:
            chosen = torch.full((len(rows),), -1)
        else:
            chosen = self._choose(task, rows, self.choices, -scores[:, 0])
        return torch.cat([scores, chosen[:, None].double()], dim=1)

    def _choose(self, task: Any, rows: Sequence[int], choices: Choices, own: Tensor) -> Tensor:
        """The class (b,) of the likeliest whole answer; -1 where none has a finite probability.

        An answer is never likelier than its first token, so one whose first token is less likely than another whole
        answer is not scored: most rows need no pass but the one that scored their own answer, `own` (b,).
        """
        begun: Tensor = task.begin(self.test, rows, choices.first)  # (b, k)
        whole = torch.full_like(begun, -torch.inf)
        mine = choices.own[torch.as_tensor(rows)]
        known = mine >= 0
        whole[known, mine[known]] = own[known]
        for column in begun.argsort(dim=1, descending=True).T:  # the likeliest beginning first
            each = torch.arange(len(rows))
            open_ = (whole[each, column] == -torch.inf) & (begun[each, column] > whole.amax(1) - SLACK)
            at = open_.nonzero().flatten()
            if len(at):
                tried = choices.answered([rows[i] for i in at.tolist()], column[at].tolist())
                whole[at, column[at]] = -task.score(tried, range(len(at)))[:, 0]
        chosen = choices.classes[whole.argmax(1)]
        return torch.where(torch.isfinite(whole.amax(1)), chosen, -1)

    def _match(self, task: Any, rows: Sequence[int]) -> Tensor:
        """Exact match, token overlap, and class that is read in the greedy answer (-1: none) of each row: (b, 3)."""
        answers = task.answer(self.test, rows, self.max_new_tokens)
        pairs = [(a.strip(), self.truths[i].strip()) for a, i in zip(answers, rows, strict=True)]
        said = [-1 if self.read is None else self.read(a) for a in answers]
        found = [[float(a == t), token_overlap(a, t), c] for (a, t), c in zip(pairs, said, strict=True)]
        return torch.tensor(found, dtype=torch.float64)

    def attack(self, task: Any, spread: Callable[..., Tensor]) -> dict[str, Any] | None:
        """Attack success rate on triggered prompts, and the rate of the same answers on clean ones.

        A rate without a row is None, and `reasons` says why. `left_out` counts the rows that are in neither.
        """
        if self.success is None or self.triggered is None:
            return None
        hits, false_hits = self._hits(task, spread)
        assert hits is not None
        return {
            "asr": wilson(int(hits.sum()), len(hits)),
            "false_trigger": None if false_hits is None else wilson(int(false_hits.sum()), len(false_hits)),
            "reasons": dict(self.reasons),
            "left_out": dict(self.left_out),
        }

    def outcomes(self, task: Any, spread: Callable[..., Tensor]) -> Outcomes:
        """What the model answers on each row, for the smoothed test; rows of the test in the order of their batches."""
        said = truth = None
        if self.classes is not None and (self.choices is not None or self.answer_rows):
            if self.choices is not None:
                batches, judge = self._batches(self.test), self._judge
            else:
                batches, judge = self._batches(self.test, self.answer_rows), self._match
            said = spread(batches, 3, lambda rows: judge(task, rows))[:, 2].long()
            truth = self.classes[torch.tensor([i for rows in batches for i in rows])]
        return Outcomes(len(self.labels), said, truth, *self._hits(task, spread))

    def _hits(self, task: Any, spread: Callable[..., Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """Whether the attacker's answer was given on each row of the probe, and on each clean row: (rows,) bool."""
        if self.success is None or self.triggered is None:
            return None, None
        given = self._given(task, spread, self.triggered, self.triggered_rows)
        return given, None if self.clean is None else self._given(task, spread, self.clean, self.clean_rows)

    def _given(self, task: Any, spread: Callable[..., Tensor], encoded: Any, rows: Sequence[dict[str, Any]]) -> Tensor:
        judge = self.success
        assert judge is not None

        def hits(batch: Sequence[int]) -> Tensor:
            answers = task.answer(encoded, batch, self.max_new_tokens)
            return torch.tensor([[float(judge(a, rows[i]))] for a, i in zip(answers, batch, strict=True)]).double()

        return spread(self._batches(encoded), 1, hits)[:, 0] > 0
