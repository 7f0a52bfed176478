"""The numbers of a run that tables, pictures and sentences share, and how they are written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedllm_sec.records.history import RoundRecord
from fedllm_sec.report.runs import Run, methods


@dataclass(frozen=True)
class Measure:
    """A measured number: its interval and count where it has them."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    round: int = 0


@dataclass(frozen=True)
class Kind:
    """How a measure is named and written."""

    key: str
    title: str
    unit: str  # rate: 0.71; percent: 97 %; number: 3 digits; seconds
    higher_is_better: bool | None


QUALITY = (
    Kind("accuracy", "accuracy", "rate", True),
    Kind("exact_match", "exact match", "rate", True),
    Kind("token_overlap", "token overlap", "rate", True),
    Kind("loss", "held-out loss", "number", False),
    Kind("perplexity", "perplexity", "number", False),
)
ATTACK = (
    Kind("asr", "attack success", "percent", False),
    Kind("false_trigger", "false triggers", "percent", False),
)


def kinds(runs: Sequence[Run]) -> tuple[list[Kind], list[Kind]]:
    """The quality and the attack measures that at least one run has; unknown ones come after the known."""
    found = []
    for known, field in ((QUALITY, "quality"), (ATTACK, "attack")):
        taken = [getattr(record, field) or {} for run in runs for record in run.records]
        keys = {key for row in taken for key, value in row.items() if value is not None}
        extra = sorted(keys - {kind.key for kind in known})
        found.append([k for k in known if k.key in keys] + [_unknown(runs, field, key) for key in extra])
    return found[0], found[1]


def _unknown(runs: Sequence[Run], field: str, key: str) -> Kind:
    values = [(getattr(r, field) or {}).get(key) for run in runs for r in run.records]
    unit = "rate" if any(isinstance(value, Mapping) for value in values) else "number"
    return Kind(key, key.replace("_", " "), unit, None)


def measure(record: RoundRecord, key: str) -> Measure | None:
    """One quality or attack measure of a round, None where it was not measured."""
    value: Any = (record.quality or {}).get(key)
    if value is None:
        value = (record.attack or {}).get(key)
    if value is None:
        return None
    if not isinstance(value, Mapping):
        return Measure(float(value), round=record.round)
    if value.get("value") is None:
        return None
    n = value.get("n")
    return Measure(value["value"], value.get("low"), value.get("high"), None if n is None else int(n), record.round)


def series(run: Run, key: str) -> list[Measure]:
    """A measure in every round in which it was taken."""
    return [m for record in run.records if (m := measure(record, key)) is not None]


def final(run: Run, key: str) -> Measure | None:
    """The measure when it was last taken."""
    return next((m for record in reversed(run.records) if (m := measure(record, key)) is not None), None)


def main_quality(runs: Sequence[Run]) -> Kind | None:
    """The first quality measure that all runs have, else the first that one has."""
    quality, _ = kinds(runs)
    shared = [kind for kind in quality if all(final(run, kind.key) is not None for run in runs)]
    return next(iter(shared or quality), None)


def detection_mean(run: Run, key: str) -> Measure | None:
    """Mean of a detection rate over the rounds under attack (over all rounds of an attack-free run)."""
    records = [r for r in run.rounds if r.attacking] or (list(run.rounds) if not run.attacked else [])
    values = [v for r in records if r.detection is not None and (v := r.detection.get(key)) is not None]
    return Measure(sum(values) / len(values), n=len(values)) if values else None


def seconds_per_round(run: Run) -> dict[str, float]:
    """Mean seconds of a training round, by what they were spent on."""
    timed = [r.seconds for r in run.rounds if r.seconds]
    keys = dict.fromkeys(key for row in timed for key in row)
    return {key: sum(row.get(key, 0.0) for row in timed) / len(timed) for key in keys}


def total_seconds(run: Run) -> float | None:
    """Seconds of all recorded rounds: the sum of their parts, or their own total where there is one."""
    timed = [r.seconds for r in run.records if r.seconds]
    return sum(row.get("total", sum(row.values())) for row in timed) if timed else None


def peak_memory(run: Run) -> float | None:
    """MiB that the defense took beyond the updates at its peak, over all rounds."""
    return max((peak for r in run.rounds if (peak := r.memory_mb.get("defense")) is not None), default=None)


def flat(value: Any, place: str = "") -> Iterable[tuple[str, Any]]:
    """A nested block as ("clients.lr", 0.003) pairs."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from flat(item, f"{place}.{key}" if place else str(key))
    else:
        yield place, value


# ---------------------------------------------------------------- names


def name_of(entry: Mapping[str, Any]) -> str:
    return str(entry.get("name", "?"))


def attack_name(run: Run) -> str:
    """ "none", or the attack's methods joined by " + "."""
    names = [name_of(entry) for entry in methods(run.attack, "data", "local", "update")]
    return " + ".join(names) if names else "none"


def defense_name(run: Run) -> str:
    """The stages of the defense in the order they act; "none" is a plain mean."""
    if not run.defended:
        return "none"
    names = [name_of(entry) for entry in methods(run.defense, "client", "before", "rule", "after")]
    return " → ".join(name for i, name in enumerate(names) if name != "mean" or len(names) == 1 or i == 0)


# ---------------------------------------------------------------- writing numbers


def percent(value: float) -> str:
    """97 %, 0.4 %; never rounds to 0 % or 100 % what is not."""
    if not math.isfinite(value):
        return str(value)
    hundred = 100.0 * value
    if 0.0 < hundred < 1.0:
        return f"{hundred:.2g} %"
    return f"{min(hundred, 99.9):.1f} %" if 99.0 < hundred < 100.0 else f"{hundred:.0f} %"


def plain(value: float) -> str:
    """Three significant digits or two decimals: 2.13, 0.510, 0.00412, 51234."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size >= 1e6 or 0 < size < 1e-4:
        return f"{value:.2e}"
    return f"{value:.0f}" if size >= 100 or size == 0 else f"{value:#.3g}" if size < 1 else f"{value:.2f}"


def duration(value: float) -> str:
    """31 ms, 2.5 s, 12 s, 4 min 10 s, 2 h 5 min."""
    if not math.isfinite(value):
        return str(value)
    if value < 0.0995:
        return f"{1000 * value:.2g} ms" if value >= 0.001 else "<1 ms"
    if value < 100:
        return f"{value:.2g} s" if value < 10 else f"{value:.0f} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def written(value: float, unit: str) -> str:
    """A number in its unit."""
    if unit == "percent":
        return percent(value)
    if unit == "seconds":
        return duration(value)
    if unit != "rate" or not math.isfinite(value):
        return plain(value)
    text = f"{value:.2f}"
    return "0.00" if text == "-0.00" else text


def interval(m: Measure, unit: str) -> str:
    """The interval as [0.66, 0.76] or [93, 99], empty where there is none."""
    if m.low is None or m.high is None:
        return ""
    if unit == "percent":
        return f"[{100 * m.low:.0f}, {100 * m.high:.0f}]"
    return f"[{written(m.low, unit)}, {written(m.high, unit)}]"


def listed(words: Sequence[str]) -> str:
    """a; a and b; a, b and c."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]])) if words else ""


def plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
