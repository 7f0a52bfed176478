"""What the server's repair after the last round did, in words: what was measured before it and after."""

from __future__ import annotations

from typing import Any

from fedllm_sec.report.measures import ATTACK, QUALITY, duration, name_of, written
from fedllm_sec.report.runs import Run, methods

SHOWN = ("asr", "false_trigger", "accuracy", "exact_match", "loss")


def repaired(run: Run) -> list[str]:
    """One sentence for a run whose last model was repaired; else none."""
    last = next((record for record in reversed(run.records) if record.repair is not None), None)
    if last is None or last.repair is None:
        return []
    parts = []
    for of, kinds in (("attack", ATTACK), ("quality", QUALITY)):
        old, new = last.repair.get(of), getattr(last, of)
        for kind in kinds:
            before, after = (_number(block, kind.key) for block in (old, new))
            if kind.key in SHOWN and before is not None and after is not None:
                parts.append(f"{kind.title} {written(before, kind.unit)} before, {written(after, kind.unit)} after")
    name = next((name_of(entry) for entry in methods(run.defense, "repair")), "a method that is not known")
    took = last.seconds.get("repair")
    time = f" in {duration(took)}" if took is not None else ""
    measured = "; ".join(parts) or "nothing was measured"
    return [f"after round {last.round} the server repaired the model by {name}{time}: {measured}"]


def _number(block: Any, key: str) -> float | None:
    value = block.get(key) if isinstance(block, dict) else None
    value = value.get("value") if isinstance(value, dict) else value
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
