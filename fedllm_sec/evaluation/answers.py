"""One pass of generation over all that a model is asked, what judges say of it, and what is kept to be read."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedllm_sec.evaluation.intervals import wilson
from fedllm_sec.evaluation.judges import FAILED, SUCCESS, Judge, agreement, judged, verdict
from fedllm_sec.evaluation.probes import Probe, Prompts, said_to_it, trigger_spans
from fedllm_sec.evaluation.repeatable import Repeatable
from fedllm_sec.seeds import generator_for, seed_for

Spread = Callable[..., Tensor]


@dataclass(frozen=True)
class Asking:
    """How answers are made. With a temperature of 0 they are greedy, and one draw is all there is."""

    batch_size: int
    max_new_tokens: int
    draws: int = 1
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Question:
    """Prompts and who judges their answers; without a judge they are only read."""

    prompts: Prompts
    judge: Judge | None = None
    second: Judge | None = None


@dataclass(frozen=True)
class Said:
    """Answers (rows, draws), and the verdicts on them: (rows, draws) SUCCESS, NONE or FAILED."""

    answers: list[list[str]]
    first: Tensor
    second: Tensor

    @property
    def any(self) -> Tensor:
        """(rows,) bool: whether one of the draws is a success."""
        return (self.first == SUCCESS).any(1)


def in_batches(prompts: Sequence[Sequence[int]], size: int, limit: int | None = None) -> list[list[int]]:
    """Row numbers of the first `limit` prompts, sorted by length, in batches."""
    order = sorted(range(len(prompts))[:limit], key=lambda i: len(prompts[i]))
    return [order[i : i + size] for i in range(0, len(order), size)]


def ask(task: Any, spread: Spread, questions: Sequence[Question], how: Asking) -> list[Said]:
    """The answers to all prompts: batches of every question are spread over the processes in one go.

    A sampled answer depends on its prompt, the draw and the seed: not on its batch, the round, or the process. What
    travels between processes is numbers: the tokens of each draw, from 1, with 0 for none, and then two verdicts. A
    judge hears each answer anew, be it known from before or not.
    """
    batches = [
        [(number, i) for i in rows]
        for number, question in enumerate(questions)
        for rows in in_batches(question.prompts.encoded.prompts, how.batch_size)
    ]
    places: dict[tuple[int, int], int] = {pair: at for at, pair in enumerate(p for batch in batches for p in batch)}
    asked, width = [question.prompts.encoded for question in questions], how.max_new_tokens

    def answer(batch: Sequence[tuple[int, int]]) -> Tensor:
        found = torch.zeros(len(batch), how.draws, width, dtype=torch.float64)
        for draw in range(how.draws):
            given = _generated(task, asked[batch[0][0]], [i for _, i in batch], draw, how)
            for place, ids in enumerate(given):
                found[place, draw, : len(ids)] = torch.tensor(ids, dtype=torch.float64) + 1
        return found.flatten(1)

    def judge(batch: Sequence[tuple[int, int]]) -> Tensor:
        found = torch.zeros(len(batch), how.draws, 2, dtype=torch.float64)
        for draw, (place, (number, i)) in itertools.product(range(how.draws), enumerate(batch)):
            question = questions[number]
            for column, asked_too in enumerate((question.judge, question.second)):
                if asked_too is not None:
                    text = texts[places[number, i]][draw]
                    found[place, draw, column] = verdict(asked_too, text, question.prompts.rows[i])
        return found.flatten(1)

    texts: list[list[str]] = []
    verdicts = torch.zeros(0, how.draws, 2, dtype=torch.float64)
    if batches:
        given = spread(batches, how.draws * width, Repeatable(answer, ("answers", how, *asked)))
        texts = [[read(task, ids) for ids in row] for row in given.view(-1, how.draws, width).tolist()]
        verdicts = spread(batches, how.draws * 2, judge).view(-1, how.draws, 2)

    def said(number: int, size: int) -> Said:
        own = [places[number, i] for i in range(size)]
        return Said([texts[at] for at in own], verdicts[own][:, :, 0], verdicts[own][:, :, 1])

    return [said(number, len(question.prompts)) for number, question in enumerate(questions)]


def read(task: Any, tokens: Sequence[float]) -> str:
    """What an answer reads as, of its tokens from 1, with 0 for none."""
    return str(task.decode([int(token) - 1 for token in tokens if token > 0]))


def _generated(task: Any, encoded: Any, rows: Sequence[int], draw: int, how: Asking) -> list[list[int]]:
    if how.temperature == 0:
        found: list[list[int]] = task.generate(encoded, rows, how.max_new_tokens)
        return found
    seeds = [seed_for(how.seed, "answers", draw, *encoded.prompts[i]) for i in rows]
    drawn: list[list[int]] = task.generate(encoded, rows, how.max_new_tokens, how.temperature, seeds)
    return drawn


# ---------------------------------------------------------------- rates


def rates(probe: Probe, said: Mapping[str, Said], how: Asking) -> dict[str, Any]:
    """What the record says of one data attack, whose answers `said` has by part (triggered, clean, kinds of change).

    A row is a success where one of its draws is; means over the draws stand beside it. An answer that a judge failed
    on is no success: how many there are and why the first is among them stands in `judge_failed` and `reasons`.
    """

    def rate(part: str, success: Callable[[Said], Tensor] = lambda given: given.any) -> dict[str, float] | None:
        hits = success(said[part]) if part in said else torch.zeros(0)
        return wilson(int(hits.sum()), len(hits))

    def mean(part: str) -> float | None:
        return float((said[part].first == SUCCESS).double().mean()) if part in said else None

    found: dict[str, Any] = {
        "asr": rate("triggered"),
        "false_trigger": rate("clean"),
        "reasons": dict(probe.reasons),
        "left_out": dict(probe.left_out),
    }
    judges = [("judge", probe.judge, 0), *([("second judge", probe.second, 1)] if probe.second is not None else [])]
    failures = {name: _failures(probe, said, judge, which) for name, judge, which in judges}
    found["reasons"] |= {name: why for name, (count, why) in failures.items() if count}
    if any(count for count, _ in failures.values()):
        found["judge_failed"] = sum(count for count, _ in failures.values())
    if how.draws > 1:
        found["draws"] = {"count": how.draws, "temperature": how.temperature,
                          "asr_mean": mean("triggered"), "false_trigger_mean": mean("clean")}  # fmt: skip
    if probe.second is not None:
        measured = [given for part, given in said.items() if part in ("triggered", "clean")]
        both = [torch.cat([getattr(given, of).flatten() for given in measured]).tolist() for of in ("first", "second")]
        found["second"] = {
            "asr": rate("triggered", lambda given: (given.second == SUCCESS).any(1)),
            "false_trigger": rate("clean", lambda given: (given.second == SUCCESS).any(1)),
            "agreement": agreement(*both),
        }
    since = [row.get("turns_since") for row in probe.triggered.rows]
    if any(since):  # by how many of the user's turns lie behind the trigger
        hits = said["triggered"].any
        stages = sorted({turns for turns in since if turns is not None})
        of = {turns: hits[torch.tensor([own == turns for own in since])] for turns in stages}
        found["turns_since"] = {str(turns): wilson(int(own.sum()), len(own)) for turns, own in of.items()}
    if probe.moved:
        found["generalise"] = {kind: rate(kind) for kind in probe.moved}
    return found


def _failures(probe: Probe, said: Mapping[str, Said], judge: Judge, which: int) -> tuple[int, str]:
    """How many answers a judge failed on, and why, by the first of them; every process says the same."""
    total = count = 0
    why = ""
    for part, prompts in probe.parts().items():
        verdicts = said[part].first if which == 0 else said[part].second
        total, failed = total + verdicts.numel(), (verdicts == FAILED).nonzero().tolist()
        if failed and not count:
            row, draw = failed[0]
            why = judged(judge, said[part].answers[row][draw], prompts.rows[row])[1] or "it did not fail again"
        count += len(failed)
    return count, f"failed on {count} of {total} answers, which count as no success: {why}"


# ---------------------------------------------------------------- what is kept to be read


def sample(size: int, count: int, seed: int, part: str) -> list[int]:
    """`count` row numbers of `size`, drawn once by the seed, in ascending order."""
    order = torch.randperm(size, generator=generator_for(seed, "transcripts", part))
    return sorted(order[:count].tolist())


def transcript(
    kind: str, name: str | None, prompts: Prompts, said: Said, judges: tuple[bool, bool], rows: Sequence[int]
) -> list[dict[str, Any]]:
    """Prompt, answer and verdict of these rows: a line for each draw.

    `judges` is whether a first and a second one judged; a verdict is None where one failed. `trigger` are the spans of
    characters of the prompt that the attack put in, None where that cannot be told.
    """
    lines = []
    for number in rows:
        row = prompts.rows[number]
        prompt, original = said_to_it(row), row.get("original")
        spans: list[tuple[int, int]] | None = None if row["poisoned"] else []
        if original is not None:
            spans = trigger_spans(said_to_it(original), prompt)
        line: dict[str, Any] = {"kind": kind, "attack": name, "row": number, "prompt": prompt, "trigger": spans}
        line["wanted"] = row["response"]
        if row.get("right") is not None:
            line["right"] = row["right"]
        for draw, answer in enumerate(said.answers[number]):
            own = line | ({"draw": draw} if len(said.answers[number]) > 1 else {}) | {"answer": answer}
            for key, verdicts, there in zip(("success", "second"), (said.first, said.second), judges, strict=True):
                if there:
                    own[key] = None if float(verdicts[number, draw]) == FAILED else bool(verdicts[number, draw])
            lines.append(own)
    return lines
