"""What a language model is worth, and what an attack did to it: measured on held-out rows each round."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedllm_sec.evaluation.answers import Asking, Question, Said, ask, in_batches, rates, read, sample, transcript
from fedllm_sec.evaluation.intervals import wilson
from fedllm_sec.evaluation.probes import Probe, Prompts
from fedllm_sec.evaluation.repeatable import Repeatable
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
    answers: Sequence[list[int]]  # (k,) its tokens, with its end token
    single: bool = False  # whether the first token is all there is of an answer, as of a classifier's

    def answered(self, test: Any, rows: Sequence[int], which: Sequence[int]) -> Any:
        """Encoded test rows, each with this one of the answers as its own."""
        return replace(test.select(rows), answers=[list(self.answers[k]) for k in which])


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
    attacks: Sequence[Probe] = ()  # the data attacks; the first is the one that the run's rates are of
    test_rows: Sequence[dict[str, Any]] = ()  # what `test` was encoded from
    fitted: Any = None  # how many of the held-out rows were cut to data.max_length or dropped
    draws: int = 1  # answers to each prompt of an attack
    temperature: float = 0.0  # 0: greedy
    seed: int = 0  # of answers that are drawn, and of those that are kept
    transcripts: int = 0  # answers of each kind that are kept to be read; those of the last round all are

    @property
    def _how(self) -> Asking:
        return Asking(self.batch_size, self.max_new_tokens, self.draws, self.temperature, self.seed)

    def _batches(self, limit: int | None = None) -> list[list[int]]:
        return in_batches(self.test.prompts, self.batch_size, limit)

    def transcribed(
        self, task: Any, spread: Callable[..., Tensor], last: bool
    ) -> tuple[dict[str, Any], dict[str, Any] | None, list[dict[str, Any]]]:
        """`quality`, `attack`, and answers to be read: a fixed sample, in the `last` round all that were given.

        They are those of the attacks' prompts, or without an attack those of test rows.
        """
        quality, match = self._quality(task, spread)
        said = self._answers(task, spread, self.attacks)
        return quality, self._rates(said), self._read(task, spread, match, said, last)

    def quality(self, task: Any, spread: Callable[..., Tensor]) -> dict[str, Any]:
        """Answer loss per token (nats), perplexity, and accuracy for classes or answer match for free text."""
        return self._quality(task, spread)[0]

    def _quality(self, task: Any, spread: Callable[..., Tensor]) -> tuple[dict[str, Any], Tensor | None]:
        """The measures, and what `_match` found of the first rows, in their order, where they were answered."""
        batches, found = self._judged(task, spread)
        loss = float(found[:, 0].sum() / found[:, 1].sum())
        measured: dict[str, Any] = {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)) if self.choices is None or not self.choices.single else None,
            "accuracy": None,
            "per_class": None,
            "exact_match": None,
            "token_overlap": None,
        }
        match = None
        if self.choices is not None:
            measured.update(self._accuracy(batches, found[:, 2]))
        elif self.answer_rows:
            batches = self._batches(self.answer_rows)
            match = self._match(task, spread, batches)
            measured["exact_match"] = wilson(int(match[:, 0].sum()), len(match))
            measured["token_overlap"] = float(match[:, 1].mean())
            if self.read is not None:
                measured.update(self._accuracy(batches, match[:, 2]))
            match = match[torch.tensor([i for rows in batches for i in rows]).argsort()]
        return measured, match

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

    def _judged(self, task: Any, spread: Callable[..., Tensor]) -> tuple[list[list[int]], Tensor]:
        """All test rows in batches, and what `_judge` finds of each: (rows, 3) in their order."""
        batches = self._batches()
        of = ("losses and choices", self.test, self.choices)
        return batches, spread(batches, 3, Repeatable(lambda rows: self._judge(task, rows), of))

    def _judge(self, task: Any, rows: Sequence[int]) -> Tensor:
        """Sum of answer log-losses, number of answer tokens, chosen class or -1, of each row: (b, 3)."""
        if self.choices is None:
            scores, chosen = task.score(self.test, rows), torch.full((len(rows),), -1)
        else:
            scores = task.score(self.test, rows, self.choices.first)
            chosen = self._choose(task, rows, self.choices, -scores[:, 0], scores[:, 2:])
        return torch.cat([scores[:, :2], chosen[:, None].double()], dim=1)

    def _choose(self, task: Any, rows: Sequence[int], choices: Choices, own: Tensor, begun: Tensor) -> Tensor:
        """The class (b,) of the likeliest whole answer; -1 where none has a finite probability.

        `begun` (b, k) is the log-probability of each answer's first token. An answer is never likelier than that, so
        one whose first token is less likely than another whole answer is not scored: most rows need no pass but the one
        that scored their own answer, `own` (b,). Answers of a `single` token need none.
        """
        whole = begun.clone() if choices.single else torch.full_like(begun, -torch.inf)
        mine = choices.own[torch.as_tensor(rows)]
        known = mine >= 0
        whole[known, mine[known]] = own[known]
        for column in begun.argsort(dim=1, descending=True).T:  # the likeliest beginning first
            each = torch.arange(len(rows))
            open_ = (whole[each, column] == -torch.inf) & (begun[each, column] > whole.amax(1) - SLACK)
            at = open_.nonzero().flatten()
            if len(at):
                tried = choices.answered(self.test, [rows[i] for i in at.tolist()], column[at].tolist())
                whole[at, column[at]] = -task.score(tried, range(len(at)))[:, 0]
        chosen = choices.classes[whole.argmax(1)]
        return torch.where(torch.isfinite(whole.amax(1)), chosen, -1)

    def _match(self, task: Any, spread: Callable[..., Tensor], batches: Sequence[Sequence[int]]) -> Tensor:
        """Exact match, token overlap, class that is read in the greedy answer (-1: none), and the answer's tokens.

        (rows, 3 + max_new_tokens) in the order of the batches; tokens count from 1, 0 is none.
        """

        def answer(rows: Sequence[int]) -> Tensor:
            found = torch.zeros(len(rows), self.max_new_tokens, dtype=torch.float64)
            for place, ids in enumerate(task.generate(self.test, rows, self.max_new_tokens)):
                found[place, : len(ids)] = torch.tensor(ids, dtype=torch.float64) + 1
            return found

        of = ("greedy answers", self.test, self.max_new_tokens)
        tokens = spread(batches, self.max_new_tokens, Repeatable(answer, of))
        compared = []
        for i, ids in zip((i for rows in batches for i in rows), tokens.tolist(), strict=True):
            said, truth = read(task, ids), self.truths[i].strip()
            named = -1 if self.read is None else self.read(said)
            compared.append([float(said.strip() == truth), token_overlap(said.strip(), truth), named])
        return torch.cat([torch.tensor(compared, dtype=torch.float64).view(-1, 3), tokens], dim=1)

    # ------------------------------------------------------------ attacks

    def attack(self, task: Any, spread: Callable[..., Tensor]) -> dict[str, Any] | None:
        """Attack success rate on triggered prompts, and the rate of the same answers on clean ones.

        They are those of the first data attack; of several, `attacks` has all by name. A rate without a row is None,
        and `reasons` says why. `left_out` counts the rows that are in neither.
        """
        return self._rates(self._answers(task, spread, self.attacks))

    def _rates(self, said: Sequence[dict[str, Said]]) -> dict[str, Any] | None:
        found = [rates(probe, own, self._how) for probe, own in zip(self.attacks, said, strict=True)]
        if not found:
            return None
        if len(found) == 1:
            return found[0]
        rates_of_first = {key: found[0][key] for key in ("asr", "false_trigger", "reasons", "left_out")}
        return rates_of_first | {"attacks": {probe.name: own for probe, own in zip(self.attacks, found, strict=True)}}

    def _answers(self, task: Any, spread: Callable[..., Tensor], attacks: Sequence[Probe]) -> list[dict[str, Said]]:
        """Of each attack, the answers to its prompts by part: one pass for all of them."""
        parts = [(probe, part, prompts) for probe in attacks for part, prompts in probe.parts().items()]
        said = iter(ask(task, spread, [Question(p, probe.judge, probe.second) for probe, _, p in parts], self._how))
        return [{part: next(said) for part in probe.parts()} for probe in attacks]

    def _read(
        self,
        task: Any,
        spread: Callable[..., Tensor],
        match: Tensor | None,
        said: Sequence[dict[str, Said]],
        last: bool,
    ) -> list[dict[str, Any]]:
        """What is kept to be read, with `sample` for what belongs to the fixed sample."""
        if not self.transcripts:
            return []
        groups: list[tuple[str, str | None, Prompts, Said, tuple[bool, bool]]] = [
            (part, probe.name, prompts, own[part], (True, probe.second is not None))
            for probe, own in zip(self.attacks, said, strict=True)
            for part, prompts in probe.parts().items()
        ]
        if not groups:
            groups = [("test", None, *self._test_answers(task, spread, match), (True, False))]
        lines = []
        for part, name, prompts, own, judges in groups:
            fixed = sample(len(prompts), self.transcripts, self.seed, f"{name} {part}")
            found = transcript(part, name, prompts, own, judges, range(len(prompts)) if last else fixed)
            lines += [line | {"sample": line["row"] in fixed} for line in found]
        return lines

    def _test_answers(self, task: Any, spread: Callable[..., Tensor], match: Tensor | None) -> tuple[Prompts, Said]:
        """Test rows and their greedy answers: those that were compared, else a few that are asked for this."""
        if match is None:
            some = sample(len(self.test), self.transcripts, self.seed, "test")
            batches = [some[i : i + self.batch_size] for i in range(0, len(some), self.batch_size)]
            match = self._match(task, spread, batches)
        else:
            some = list(range(len(match)))
        answers = [[read(task, tokens)] for tokens in match[:, 3:].tolist()]
        return Prompts(None, [self.test_rows[i] for i in some]), Said(answers, match[:, :1], match[:, :1])

    # ------------------------------------------------------------ the smoothed test

    def outcomes(self, task: Any, spread: Callable[..., Tensor]) -> Outcomes:
        """What the model answers on each row, for the smoothed test; rows of the test in the order of their batches."""
        said = truth = None
        if self.classes is not None and (self.choices is not None or self.answer_rows):
            if self.choices is not None:
                batches, found = self._judged(task, spread)
            else:
                batches = self._batches(self.answer_rows)
                found = self._match(task, spread, batches)
            said = found[:, 2].long()
            truth = self.classes[torch.tensor([i for rows in batches for i in rows])]
        first = [replace(probe, moved={}) for probe in self.attacks[:1]]
        hits = [{part: own.any for part, own in given.items()} for given in self._answers(task, spread, first)]
        triggered, clean = (hits[0].get(part) if hits else None for part in ("triggered", "clean"))
        return Outcomes(len(self.labels), said, truth, triggered, clean)
