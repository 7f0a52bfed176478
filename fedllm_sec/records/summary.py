"""A run in words and numbers: the line of a round, the numbers a tracker gets, summary.json."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedllm_sec.records.history import DETAILS, RoundRecord, read_history
from fedllm_sec.records.outcomes import lifespan, means_under_attack

NAMED = 8  # clients in the line of a round; all of them are in the record
LONGEST_REASON = 160


def round_line(record: RoundRecord, rounds: int, lost: int | None = None) -> str:
    """One line a round: what it did, in the order people ask, and how long the rest may take; round 0 is the start.

    `lost` is the round since which the held-out loss is not finite.
    """
    width = len(str(rounds))
    head = f"round {record.round:>{width}}/{rounds}"
    parts = [head if record.round else "start".ljust(len(head))]
    if record.quality is not None:
        parts.append(f"loss {record.quality['loss']:.3f}")
        if lost is not None:
            parts.append(f"DIVERGED: held-out loss not finite since round {lost}")
        if record.quality.get("accuracy"):
            parts.append(f"accuracy {record.quality['accuracy']['value']:.3f}")
    if record.attack is not None:
        if record.attack.get("asr"):
            parts.append(f"ASR {record.attack['asr']['value']:.3f}")
        if record.attack.get("false_trigger"):
            parts.append(f"false triggers {record.attack['false_trigger']['value']:.3f}")
        if failed := _judge_failed(record.attack):
            parts.append(f"A JUDGE FAILED on {failed} answers")
    if record.kept is not None:
        judged = [id for id in record.cohort if id not in record.quarantined]
        dropped = [id + ("*" if id in record.malicious else "") for id in judged if id not in record.kept]
        parts.append(f"dropped {_some(dropped) if dropped else 'none'}")
        if any(id.endswith("*") for id in dropped):
            parts[-1] += " (* malicious)"
    if record.repair is not None:
        rate = ((record.repair["attack"] or {}).get("asr") or {}).get("value")
        parts.append("repaired" + (f" (ASR was {rate:.3f})" if rate is not None else ""))
    if record.quarantined:
        parts.append(f"quarantined {_some(list(record.quarantined))}")
    if record.skipped:
        parts.append(f"SKIPPED ({_in_short(record.skipped)})")
    if record.privacy is not None and isinstance(epsilon := record.privacy.get("epsilon"), float):
        parts.append(f"epsilon {epsilon:.3g} (if the noise were secret)")
    if record.round:
        parts.append(f"step length {record.update_norm:.3g}")
    took = sum(record.seconds.values())
    parts.append(f"{took:.1f} s")
    if 0 < record.round < rounds and took > 0:
        parts[-1] += f", about {_about(took * (rounds - record.round))} left"
    return "  ".join(parts)


def _judge_failed(attack: Mapping[str, Any]) -> int:
    """Answers on which a judge failed, of all data attacks."""
    named: Mapping[str, Any] = attack.get("attacks") or {"": attack}
    return sum(block.get("judge_failed") or 0 for block in named.values())


def _some(ids: Sequence[str]) -> str:
    return " ".join(ids[:NAMED]) + (f" and {len(ids) - NAMED} more" if len(ids) > NAMED else "")


def _in_short(reason: str) -> str:
    """A reason that lists clients names the first of them and counts the others; the record has it whole."""
    first, *others = " ".join(reason.split()).split('; client "')
    more = re.search(r"; and (\d+) more\.?$", reason)
    count = len(others) + (int(more[1]) if more else 0)
    short = first if len(first) <= LONGEST_REASON else first[: LONGEST_REASON - 1] + "…"
    return f"{short}; and {count} more" if others else short


def _about(seconds: float) -> str:
    """40 s, 5 min, 2 h 10 min."""
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def scalars(record: RoundRecord) -> dict[str, float]:
    """The numbers of a round for a tracker."""
    flat: dict[str, float] = {"update_norm": record.update_norm} if record.round else {}
    if record.robustness is not None:
        flat["robustness"] = record.robustness
    for group in ("quality", "attack", "detection", "stealth"):
        for name, value in (getattr(record, group) or {}).items():
            number = value.get("value") if isinstance(value, dict) else value
            if number is not None and name not in DETAILS:
                flat[f"{group}/{name}"] = number
    if record.privacy is not None and isinstance(epsilon := record.privacy.get("epsilon"), float):
        flat["privacy/epsilon"] = epsilon
    return flat


def diverged_since(measured: Sequence[RoundRecord]) -> int | None:
    """The measured round since which no held-out loss has been finite, where the last one is not: the model is lost."""
    since = None
    for record in reversed(measured):
        loss = (record.quality or {}).get("loss")
        if loss is None or math.isfinite(float(loss)):
            break
        since = record.round
    return since


def lost_since(folder: Path, record: RoundRecord) -> int | None:
    """The same of the run in this folder, whose last round this is; the history is read only where the loss is lost."""
    if diverged_since([record]) is None:
        return None
    return diverged_since([r for r in read_history(folder) if r.quality is not None])


def summary(folder: Path, command: str, *, attacked: bool, stop: int | None = None) -> dict[str, Any]:
    """The last measured round, the totals, means over the rounds under attack, and how long a backdoor outlived it.

    Round 0, the model before training, is none of the rounds; the seconds that it took are in the totals.

    `attacked` is whether the run has attackers, `stop` their last round. Without an attack-free run beside it, what
    the lifespan is measured against is 0.
    """
    records = read_history(folder)
    measured = [r for r in records if r.quality is not None]
    last = measured[-1] if measured else None
    names = sorted({name for r in records for name in r.seconds})
    return {
        "rounds": sum(r.round >= 1 for r in records),
        "quality": last.quality if last else None,
        "diverged": diverged_since(measured),
        "attack": last.attack if last else None,
        **means_under_attack(records, attacked),
        "privacy": records[-1].privacy if records else None,
        "lifespan": lifespan(records, stop),
        "skipped_rounds": sum(r.skipped is not None for r in records),
        "quarantined": sum(len(r.quarantined) for r in records),
        "seconds": {name: round(sum(r.seconds.get(name, 0.0) for r in records), 3) for name in names},
        "command": command,
    }
