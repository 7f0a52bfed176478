"""What a round is remembered by: one JSON line.

history.jsonl holds what is reproducible and is byte-identical between a straight and a resumed run; wall-clock times
and memory go to timings.jsonl.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from fedllm_sec.errors import ResumeError
from fedllm_sec.records.files import in_a_line, plain

# What stands in `quality` and `attack` beside the measures: rates of each class, and of each client with its own
# running statistics, why a rate is None, rows left out, the rates that are certified, by radius; answers on which a
# judge failed, means over several draws, what a second judge says, success by how the trigger was changed and by how
# many turns ago it was, and of several attacks each by name.
DETAILS = (
    *("per_class", "per_client", "reasons", "left_out", "certified"),
    *("judge_failed", "draws", "second", "generalise", "turns_since", "attacks"),  # of answers to an attack's prompts
)


@dataclass(frozen=True)
class RoundRecord:
    """Everything one round is remembered by. None means "not measured", never 0."""

    round: int  # from 1; 0: the model before training, which has no clients and no decision
    cohort: list[str]  # ids of the clients that took part
    malicious: list[str]  # those of them that are malicious: for evaluation and report only
    attacking: bool  # whether the attack was active in this round
    losses: dict[str, float]  # claimed training loss by client id
    norms: dict[str, float]  # norm of the row each client submitted (after the attack)
    quarantined: dict[str, str]  # id -> reason, rows screened out before the defense
    weights: dict[str, float] | None  # row weights the rule gave
    kept: list[str] | None  # ids the rule kept, for rules that select
    scores: dict[str, float] | None  # suspicion by id, higher is worse
    notes: dict[str, float]  # other numbers of the rule
    update_norm: float  # norm of the step the server took
    skipped: str | None  # why the round left the model as it was
    lora_gap: float | None  # relative error of averaging A and B apart instead of B A
    detection: dict[str, float | None] | None  # tpr, weight_share, fpr, auc
    quality: dict[str, Any] | None  # measures on clean held-out data; rates as {value, low, high, n}, and DETAILS
    attack: dict[str, Any] | None  # asr, false_trigger as {value, low, high, n}, and DETAILS
    # Older run folders lack what follows. `robustness`: ||update - honest mean||^2 / honest variance; `stealth`: norm
    # and cosine rank of the malicious rows among the honest ones, each 0..1.
    robustness: float | None = None
    stealth: dict[str, float | None] | None = None
    # epsilon and delta spent so far and whom that protects, or because: why there is none; `rows`: the same of clients
    # that train by dp_sgd, epsilon by client id
    privacy: dict[str, Any] | None = None
    # of the last round, where the server then repaired the model: quality and attack as they were before, how far the
    # vector `moved`, and notes; `quality` and `attack` above are the repaired model's
    repair: dict[str, Any] | None = None
    buffers_refused: dict[str, str] = field(default_factory=dict)  # id -> reason: the server's own took their place
    # The rest is not reproducible and goes to timings.jsonl. `memory_mb`: MiB that the "defense" took at its peak, and
    # the peak of the whole "process" up to then.
    seconds: dict[str, float] = field(default_factory=dict)
    memory_mb: dict[str, float] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)  # what is kept of the answers: goes to answers.jsonl


PEAK = "_peak_mb"
NOT_A_ROW = (ValueError, TypeError, KeyError, AttributeError, RecursionError)  # what reading a strange line can raise


def record_line(record: RoundRecord) -> str:
    """The line of history.jsonl for one record (without its timings and answers)."""
    fields = asdict(record)
    del fields["seconds"], fields["memory_mb"], fields["answers"]
    return json.dumps(plain(fields), allow_nan=False) + "\n"


def timing_line(record: RoundRecord) -> str:
    """The line of timings.jsonl for one record: seconds by name, and memory as NAME_peak_mb."""
    memory = {f"{name}{PEAK}": value for name, value in record.memory_mb.items()}
    return json.dumps({"round": record.round, **plain(record.seconds), **memory}) + "\n"


def read_history(folder: Path, size: int | None = None) -> list[RoundRecord]:
    """The records of a run folder, with their timings where there are any; what an older folder lacks is None.

    `size`: of the first so many bytes of the history, which are those that a checkpoint stands for.
    """
    path = folder / "history.jsonl"
    if not path.is_file():
        raise ResumeError(f"{path}: no such file. Is {folder} a run folder?")
    timings: dict[int, dict[str, float]] = {}
    if (folder / "timings.jsonl").is_file():
        for line in (folder / "timings.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(*NOT_A_ROW):  # these are seconds, no results
                row = json.loads(line)
                number = row.pop("round")
                timings[number] = {name: value for name, value in row.items() if _number(value)}
    records: list[RoundRecord] = []
    for number, line in enumerate(_lines(path, size), 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise TypeError("no mapping")
            timing = timings.get(row["round"], {})
            seconds = {name: value for name, value in timing.items() if not name.endswith(PEAK)}
            memory = {name.removesuffix(PEAK): value for name, value in timing.items() if name.endswith(PEAK)}
            records.append(_checked(RoundRecord(**row, seconds=seconds, memory_mb=memory)))
        except NOT_A_ROW as error:
            raise ResumeError(f"{path}, line {number}: not a round record ({in_a_line(error)}).") from error
        if records[0].round not in (0, 1) or records[-1].round != records[0].round + number - 1:
            raise ResumeError(
                f"{path}, line {number}: is round {records[-1].round!r}. A line is lost, doubled or moved."
            )
    return records


def _checked(record: RoundRecord) -> RoundRecord:
    """The record, if everything in it is of the kind that its field is made for."""
    for name, fits in _fields():
        value = getattr(record, name)
        if not fits(value):
            raise TypeError(f"{name}: {in_a_line(value)[:60]!r} cannot stand there")
    return record


@functools.cache
def _fields() -> list[tuple[str, Callable[[Any], bool]]]:
    return [(name, _test(hint)) for name, hint in get_type_hints(RoundRecord).items()]


def _test(hint: Any) -> Callable[[Any], bool]:
    """Whether a value read from JSON is of this type; a float may be an integer, or a word for what JSON lacks."""
    inner = [_test(each) for each in get_args(hint)]
    if hint is Any:
        return lambda value: True
    if get_origin(hint) is UnionType:
        return lambda value: any(fits(value) for fits in inner)
    if get_origin(hint) is list:
        return lambda value: isinstance(value, list) and all(map(inner[0], value))
    if get_origin(hint) is dict:
        return lambda value: isinstance(value, dict) and all(map(inner[1], value.values()))
    if hint is float:
        return _number
    return lambda value: type(value) is hint


def _number(value: Any) -> bool:
    return type(value) is float or type(value) is int or value in ("nan", "inf", "-inf")


def _lines(path: Path, size: int | None) -> list[str]:
    try:
        return path.read_bytes()[:size].decode().splitlines()
    except UnicodeDecodeError as error:
        raise ResumeError(f"{path}: is not UTF-8 text ({error.reason}). Restore it.") from error
