"""A run in words and numbers: the line of a round, the numbers a tracker gets, summary.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedllm_sec.records.history import DETAILS, RoundRecord, read_history
from fedllm_sec.records.outcomes import lifespan, means_under_attack


def round_line(record: RoundRecord, rounds: int) -> str:
    """One line a round: what it did, in the order people ask."""
    width = len(str(rounds))
    parts = [f"round {record.round:>{width}}/{rounds}"]
    if record.quality is not None:
        parts.append(f"loss {record.quality['loss']:.3f}")
        if record.quality.get("accuracy"):
            parts.append(f"accuracy {record.quality['accuracy']['value']:.3f}")
    if record.attack is not None:
        if record.attack.get("asr"):
            parts.append(f"ASR {record.attack['asr']['value']:.3f}")
        if record.attack.get("false_trigger"):
            parts.append(f"false triggers {record.attack['false_trigger']['value']:.3f}")
    if record.kept is not None:
        judged = [id for id in record.cohort if id not in record.quarantined]
        dropped = [id + ("*" if id in record.malicious else "") for id in judged if id not in record.kept]
        parts.append("dropped " + (" ".join(dropped[:8]) + (" ..." if len(dropped) > 8 else "") if dropped else "none"))
    if record.quarantined:
        parts.append(f"quarantined {' '.join(record.quarantined)}")
    if record.skipped:
        parts.append(f"SKIPPED ({record.skipped})")
    parts.append(f"step {record.update_norm:.3g}")
    parts.append(f"{sum(record.seconds.values()):.1f} s")
    return "  ".join(parts)


def scalars(record: RoundRecord) -> dict[str, float]:
    """The numbers of a round for a tracker."""
    flat: dict[str, float] = {"update_norm": record.update_norm}
    if record.robustness is not None:
        flat["robustness"] = record.robustness
    for group in ("quality", "attack", "detection", "stealth"):
        for name, value in (getattr(record, group) or {}).items():
            number = value.get("value") if isinstance(value, dict) else value
            if number is not None and name not in DETAILS:
                flat[f"{group}/{name}"] = number
    return flat


def summary(folder: Path, command: str, *, attacked: bool, stop: int | None = None) -> dict[str, Any]:
    """The last measured round, the totals, means over the rounds under attack, and how long a backdoor outlived it.

    `attacked` is whether the run has attackers, `stop` their last round. Without an attack-free run beside it, what
    the lifespan is measured against is 0.
    """
    records = read_history(folder)
    measured = [r for r in records if r.quality is not None]
    last = measured[-1] if measured else None
    names = sorted({name for r in records for name in r.seconds})
    return {
        "rounds": len(records),
        "quality": last.quality if last else None,
        "attack": last.attack if last else None,
        **means_under_attack(records, attacked),
        "lifespan": lifespan(records, stop),
        "skipped_rounds": sum(r.skipped is not None for r in records),
        "quarantined": sum(len(r.quarantined) for r in records),
        "seconds": {name: round(sum(r.seconds.get(name, 0.0) for r in records), 3) for name in names},
        "command": command,
    }
