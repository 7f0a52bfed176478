"""The numbers of a run that tables, pictures and sentences share, and how they are written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedllm_sec.records.history import DETAILS, RoundRecord
from fedllm_sec.records.outcomes import found_under_attack
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
    """How a measure is named, explained and written."""

    key: str
    title: str
    unit: str  # rate: 0.71; percent: 97 %; number: 3 digits; seconds
    higher_is_better: bool | None
    explained: str = ""
    least: float | None = None  # below which it cannot be

    @property
    def bounds(self) -> tuple[float, float]:
        """The smallest and the largest value that it can have."""
        if self.unit in ("rate", "percent"):
            return 0.0, 1.0
        return (-math.inf if self.least is None else self.least), math.inf


QUALITY = (
    Kind("accuracy", "accuracy", "rate", True, "share of clean held-out rows answered right"),
    Kind("exact_match", "exact match", "rate", True, "share of answers that are the right text exactly"),
    Kind("token_overlap", "token overlap", "rate", True, "how many tokens an answer shares with the right one"),
    Kind("smoothed_accuracy", "smoothed accuracy", "rate", True, "accuracy of what most noisy copies of it name"),
    Kind("client_accuracy", "accuracy of clients", "rate", True, "mean over clients with what they keep as their own"),
    Kind("client_exact_match", "exact match of clients", "rate", True, "the same mean of exact match"),
    Kind("loss", "held-out loss", "number", False, "", 0.0),
    Kind("perplexity", "perplexity", "number", False, "exp of the held-out loss", 0.0),
)
ATTACK = (
    Kind("asr", "attack success", "percent", False, "share of triggered held-out rows that got the attacker's answer"),
    Kind(
        "false_trigger", "false triggers", "percent", False,
        "share of clean held-out rows, without the trigger, that got the attacker's answer",
    ),
    Kind("smoothed_asr", "smoothed attack success", "percent", False, "attack success of most noisy copies of it"),
    Kind("smoothed_false_trigger", "smoothed false triggers", "percent", False, "the same answer on clean rows"),
    Kind("client_asr", "attack success at clients", "percent", False, "mean over clients with what they keep"),
    Kind("client_false_trigger", "false triggers at clients", "percent", False, "the same answer on clean rows"),
)  # fmt: skip
# What is written under "loss", by task: its name, and what it is a mean of.
LOSSES = {
    "causal_lm": ("held-out loss", "mean loss per token on clean held-out rows"),
    "classify": ("held-out loss", "mean log-loss of a clean held-out row"),
    "classify_text": ("held-out loss", "mean log-loss of a clean held-out row"),
    "nas": ("held-out loss", "mean log-loss of a clean held-out row"),
    "next_char": ("held-out loss", "mean loss per character on clean held-out text"),
    "gan": (
        "Fréchet distance",
        "from generated to real images in the first 32 principal components of these, over their variance: 0 is the "
        "same distribution, 1 a generator that always gives the mean image",
    ),
}
ASKED = {"causal_lm": "prompt", "next_char": "character"}  # what the model is asked on; else rows


def tasks_of(runs: Iterable[Run]) -> list[str]:
    return list(dict.fromkeys(str(run.recipe.get("task", "causal_lm")) for run in runs))


def asked(run: Run) -> str:
    """What a trigger is put into: prompts, characters, rows."""
    return ASKED.get(tasks_of([run])[0], "row")


def kinds(runs: Sequence[Run]) -> tuple[list[Kind], list[Kind]]:
    """The quality and the attack measures that at least one run has; unknown ones come after the known."""
    found = []
    for known, field in ((QUALITY, "quality"), (ATTACK, "attack")):
        taken = [getattr(record, field) or {} for run in runs for record in run.records]
        keys = {key for row in taken for key, value in row.items() if value is not None and key not in DETAILS}
        extra = sorted(keys - {kind.key for kind in known})
        named = [_named(k, runs) if k.key == "loss" else k for k in known if k.key in keys]
        found.append(named + [_unknown(runs, field, key) for key in extra])
    return found[0], found[1]


def _named(loss: Kind, runs: Sequence[Run]) -> Kind:
    """The loss under the name that it has in these runs' tasks."""
    told = dict.fromkeys(LOSSES.get(task, ("held-out loss", "")) for task in tasks_of(runs))
    titles, texts = (list(dict.fromkeys(filter(None, parts))) for parts in zip(*told, strict=True))
    return replace(loss, title=" or ".join(titles), explained="; or ".join(texts))


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


def answered(record: RoundRecord) -> tuple[Measure, Measure] | None:
    """Attack success and false triggers of one round, None where one of them was not measured in it."""
    success, anyway = measure(record, "asr"), measure(record, "false_trigger")
    return None if success is None or anyway is None else (success, anyway)


def finally_answered(run: Run) -> tuple[Measure, Measure] | None:
    """The same in the last round in which both were measured."""
    return next((both for record in reversed(run.records) if (both := answered(record)) is not None), None)


def main_quality(runs: Sequence[Run]) -> Kind | None:
    """The first quality measure that all runs have, else the first that one has."""
    quality, _ = kinds(runs)
    shared = [kind for kind in quality if all(final(run, kind.key) is not None for run in runs)]
    return next(iter(shared or quality), None)


def detection_mean(run: Run, key: str) -> Measure | None:
    """Mean of a detection rate over the rounds under attack (over all rounds of a run without attackers)."""
    values = found_under_attack(run.rounds, run.attacked, "detection", key)
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
    return " + ".join(names) + " (spread)" * bool(run.attack.get("spread")) if names else "none"


def defense_name(run: Run) -> str:
    """The stages of the defense in the order they act; "none" is a plain mean."""
    if not run.defended:
        return "none"
    names = [name_of(entry) for entry in methods(run.defense, "client", "before", "rule", "after", "repair")]
    return " → ".join(name for i, name in enumerate(names) if name != "mean" or len(names) == 1 or i == 0)


# ---------------------------------------------------------------- writing numbers


LEAST_SEEN = 1e-9  # what is smaller is rounding: nothing is a rate of a thousand million rows


def _fixed(value: float, decimals: int) -> str:
    """So many decimals; nothing has no sign."""
    text = f"{value:.{decimals}f}"
    return text.lstrip("-") if float(text) == 0 else text


def _decimals(value: float, usual: int, whole: float) -> int:
    """So many decimals as tell a share of `whole` from none and from all of it; `usual` where those do."""
    size, decimals = abs(value), usual
    while (text := float(f"{size:.{decimals}f}")) in (0.0, whole) and abs(size - text) > LEAST_SEEN:
        decimals += 1
    return decimals


def percent(value: float) -> str:
    """97 %, 0.4 %, -0.04 %, 99.96 %; never rounds to 0 % or 100 % what is not."""
    if not math.isfinite(value):
        return str(value)
    hundred = 100.0 * value
    size = abs(hundred)
    if LEAST_SEEN < size < 1.0:  # two digits
        decimals = 1 - math.floor(math.log10(size))
    else:
        decimals = _decimals(hundred, 1 if 99.0 < size < 100.0 else 0, 100.0)
    text = _fixed(hundred, decimals)
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text} %"


def plain(value: float) -> str:
    """Three significant digits or two decimals: 2.13, 0.510, 0.00412, 51234."""
    if not math.isfinite(value):
        return str(value)
    value += 0.0  # -0 is 0
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


def two_rates(success: float, anyway: float) -> str:
    """Attack success and false triggers side by side: 93 / 91 %."""
    return f"{percent(success).removesuffix(' %')} / {percent(anyway)}"


def written(value: float, unit: str) -> str:
    """A number in its unit."""
    if unit == "percent":
        return percent(value)
    if unit == "seconds":
        return duration(value)
    if unit != "rate" or not math.isfinite(value):
        return plain(value)
    return share(value)


def share(value: float, usual: int = 2) -> str:
    """A rate by so many decimals, or more where it would be rounded to nothing or all."""
    return _fixed(value, _decimals(value, usual, 1.0)) if math.isfinite(value) else str(value)


def interval(m: Measure, unit: str) -> str:
    """The interval as [0.66, 0.76] or [93, 99], empty where there is none; a rate's limits have its decimals."""
    if m.low is None or m.high is None:
        return ""
    if unit not in ("percent", "rate") or not math.isfinite(m.value):
        return f"[{written(m.low, unit)}, {written(m.high, unit)}]"
    decimals = len(written(m.value, unit).removesuffix(" %").partition(".")[2])
    return f"[{_limit(m.low, unit, decimals)}, {_limit(m.high, unit, decimals)}]"


def _limit(value: float, unit: str, decimals: int) -> str:
    """A rate's limit by so many decimals, or more: it is never rounded to nothing or all either."""
    times = 100.0 if unit == "percent" else 1.0
    text = _fixed(times * value, decimals)
    rounded = abs(float(text)) in (0.0, times) and abs(float(text) - times * value) > LEAST_SEEN
    return written(value, unit).removesuffix(" %") if rounded else text


def listed(words: Sequence[str]) -> str:
    """a; a and b; a, b and c."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]])) if words else ""


def plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
