"""answers.jsonl: what the model answered, a line for each answer that is kept.

A line is {round, run, kind, attack, row, prompt, trigger, wanted, answer, success, sample}. `kind` is triggered, clean,
a kind of changed trigger, or test; `trigger` are [start, end) of characters of the prompt. `sample` marks the fixed
sample, which every evaluated round has; the last round has all answers. Where they are: `right`, `draw`, and `second`,
the second judge's verdict.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedllm_sec.records.files import plain

NAME = "answers.jsonl"
MOST = 2_000  # characters of a text that are kept; of a longer one the middle is left out
GAP = " […] "
LARGEST = 64 * 2**20  # bytes of a file that is read to be shown
TEXTS = ("prompt", "wanted", "right", "answer")


def shortened(text: str, spans: Sequence[Sequence[int]] = (), most: int = MOST) -> tuple[str, list[list[int]]]:
    """At most `most` characters, head and tail, and the spans that are still whole in them."""
    if len(text) <= most:
        return text, [list(span) for span in spans]
    head = (most - len(GAP) + 1) // 2
    tail = most - len(GAP) - head
    moved = head + len(GAP) - (len(text) - tail)
    kept = [[a, b] for a, b in spans if b <= head]
    kept += [[a + moved, b + moved] for a, b in spans if a >= len(text) - tail]
    return text[:head] + GAP + text[len(text) - tail :], kept


def answer_lines(round: int, run: str, answers: Iterable[Mapping[str, Any]]) -> bytes:
    """The lines of one round; `run` says whether it is attacked and defended."""
    lines = []
    for answer in answers:
        row = {"round": round, "run": run, **answer}
        for name in TEXTS:
            if name in row:
                row[name], spans = shortened(str(row[name]), row["trigger"] or () if name == "prompt" else ())
                if name == "prompt" and row["trigger"] is not None:
                    row["trigger"] = spans
        lines.append(json.dumps(plain(row), allow_nan=False) + "\n")
    return "".join(lines).encode()


def up_to(data: bytes, done: int) -> bytes:
    """The lines up to round `done`; what a killed process left behind them, perhaps half a line, is no part of them."""
    lines = data.splitlines(keepends=True)
    later = next((n for n, line in enumerate(lines) if (row := _row(line)) is not None and row["round"] > done), None)
    whole = lines[:later] if later is not None else lines
    return b"".join(whole[:-1] if whole and not whole[-1].endswith(b"\n") else whole)


def kept_lines(data: bytes, done: int) -> bytes:
    """Of a run that goes on after round `done`: the lines up to it, all of them of the fixed sample."""
    lines = []
    for line in data.splitlines(keepends=True):
        row = _row(line)
        if row is not None and row["round"] <= done and row.get("sample") is True:
            lines.append(line)
    return b"".join(lines)


@dataclass(frozen=True)
class Answers:
    """The rows of a file that can be read, and what is to be said of it, "" where nothing is."""

    rows: list[dict[str, Any]]
    problem: str = ""


def read_answers(folder: Path) -> Answers:
    """The answers of a run folder, whoever wrote it: what is no answer is left out, and said."""
    path = folder / NAME
    if not path.is_file():
        return Answers([])
    if path.stat().st_size > LARGEST:
        return Answers([], f"{NAME} is larger than {LARGEST // 2**20} MiB and is not shown.")
    lines = path.read_bytes().splitlines()
    rows = [row for line in lines if (row := _row(line)) is not None]
    bad = len(lines) - len(rows)
    return Answers(rows, f"{NAME}: {bad} of {len(lines)} lines are no answers and are left out." if bad else "")


def _row(line: bytes) -> dict[str, Any] | None:
    """A line's row, if everything that is read of it is of its kind."""
    try:
        row = json.loads(line)
        spans = row["trigger"] or []
        fits = (
            type(row["round"]) is int
            and all(isinstance(row.get(name, ""), str) for name in (*TEXTS, "kind", "run"))
            and {"prompt", "wanted", "answer", "kind"} <= row.keys()
            and isinstance(row.get("attack"), (str, type(None)))
            and type(row.get("row")) in (int, type(None))
            and all(row.get(verdict) in (True, False, None) for verdict in ("success", "second"))
            and all(type(a) is int and type(b) is int and 0 <= a <= b <= len(row["prompt"]) for a, b in spans)
            and all(one[1] <= other[0] for one, other in itertools.pairwise(spans))
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return dict(row) if fits else None
