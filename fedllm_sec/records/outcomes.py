"""What whole runs were worth: pure functions on records and summaries, which need neither torch nor the parts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedllm_sec.errors import FedError
from fedllm_sec.records.history import DETAILS, RoundRecord

# measures of `quality` of which less is better; of all others more is
LESS_IS_BETTER = ("loss", "perplexity")
DETECTION, STEALTH = ("tpr", "weight_share", "fpr", "auc"), ("norm_rank", "cosine_rank")


# ---------------------------------------------------------------- over the rounds of a run


def judged_rounds(records: Iterable[RoundRecord], attacked: bool) -> list[RoundRecord]:
    """The rounds over which detection, robustness and stealth are meant: those under attack.

    An attacker who does not attack is an honest client, so a run with attackers that never attacked has none. Of a
    run without attackers all rounds count: whom its rule dropped was honest.
    """
    return [r for r in records if r.round >= 1 and (r.attacking or not attacked)]


def found_under_attack(
    records: Iterable[RoundRecord], attacked: bool, group: str, name: str | None = None
) -> list[float]:
    """The values of `group` ("robustness"), or of `name` in it ("detection", "tpr"), in the judged rounds."""
    given = (getattr(r, group) for r in judged_rounds(records, attacked))
    values = ((block or {}).get(name) for block in given) if name is not None else given
    return [float(value) for value in values if value is not None]


def means_under_attack(records: Sequence[RoundRecord], attacked: bool) -> dict[str, Any]:
    """{"detection", "robustness", "stealth"} as means over the judged rounds, None where no such round has any."""

    def mean(group: str, name: str | None = None) -> float | None:
        values = found_under_attack(records, attacked, group, name)
        return math.fsum(values) / len(values) if values else None

    blocks = {
        group: {name: mean(group, name) for name in names}
        for group, names in (("detection", DETECTION), ("stealth", STEALTH))
    }
    known = {group: block if any(v is not None for v in block.values()) else None for group, block in blocks.items()}
    return {"detection": known["detection"], "robustness": mean("robustness"), "stealth": known["stealth"]}


def accepted(record: RoundRecord) -> list[str]:
    """The attackers whose rows had a say in this round's step: neither quarantined, nor dropped, nor weighed 0."""
    if not record.attacking or record.skipped is not None:
        return []
    weights = record.weights or {}
    return [
        i
        for i in record.malicious
        if i not in record.quarantined
        and (record.kept is None or i in record.kept)
        and (not weights or float(weights.get(i, 0.0)) != 0.0)
    ]


def lifespan(
    records: Sequence[RoundRecord], stop: int | None, clean: Sequence[RoundRecord] | None = None
) -> dict[str, Any] | None:
    """How many rounds a backdoor outlives its attackers: until attack success falls under half of its peak.

    Rounds are counted from the last one in which an attacker's row was accepted, at or before `stop`, the last round
    of the attack. `clean` is the attack-free run that was asked the same: attack success is then what lies above that
    run's rate in the same round. The peak is the highest success measured from the first accepted row to the last.

    {"value": rounds after the last accepted row at which success was first measured under half of the peak (0: it was
    dead already), "at_least": rounds after it at which success last was not, "peak": the peak, "base": what the
    attack-free run had there}. "value" is None while success has not fallen (censored): the backdoor lives for
    "at_least" rounds or more. Rounds without an evaluation are not seen, so the true number lies above "at_least" and
    at or under "value", or is 0. None where there is nothing to outlive: attackers that never stop, none of whose rows
    was accepted, no success measured before or after, or a peak of 0, or one that the attack-free run's interval
    reaches.
    """
    had_a_say = [r.round for r in records if accepted(r)]
    if stop is None or not had_a_say:
        return None
    first, last = min(had_a_say), max(had_a_say)
    own, base = _success(records), None if clean is None else _success(clean)
    above = {
        r: rate["value"] - (base[r]["value"] if base is not None else 0.0)
        for r, rate in own.items()
        if base is None or r in base
    }
    during = [r for r in above if first <= r <= last]
    after = sorted(r for r in above if r >= last)
    top = max(during, key=lambda r: above[r], default=None)
    if top is None or above[top] <= 0:
        return None
    if base is not None and None not in (own[top]["low"], base[top]["high"]) and own[top]["low"] <= base[top]["high"]:
        return None
    fallen = next((r - last for r in after if above[r] < above[top] / 2), None)
    if fallen is None and not any(r > last for r in after):
        return None
    stood = [r - last for r in after if fallen is None or r - last < fallen]
    return {
        "value": fallen,
        "at_least": max(stood, default=0),
        "peak": above[top],
        "base": None if base is None else base[top]["value"],
    }


def _success(records: Iterable[RoundRecord]) -> dict[int, dict[str, Any]]:
    """Round -> attack success {value, low, high}, where it was measured."""
    found = {}
    for record in records:
        rate = (record.attack or {}).get("asr")
        if rate and rate.get("value") is not None and math.isfinite(float(rate["value"])):
            limits = {side: None if rate.get(side) is None else float(rate[side]) for side in ("low", "high")}
            found[record.round] = {"value": float(rate["value"]), **limits}
    return found


# ---------------------------------------------------------------- runs against each other


def same_probe(attack: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> bool:
    """Whether two attack blocks, also of runs without attackers, ask for the same answer to the same trigger.

    The first data attack is the one whose success is measured.
    """
    asked = [(block or {}).get("data") or [] for block in (attack, other)]
    return bool(asked[0]) and asked[0][:1] == asked[1][:1]


def worst_classes(quality: Mapping[str, Any] | None) -> tuple[list[str], Mapping[str, Any]] | None:
    """The classes with the lowest accuracy, all that share it, and its rate {value, low, high, n}."""
    known = {
        str(name): rate
        for name, rate in ((quality or {}).get("per_class") or {}).items()
        if rate is not None and rate.get("value") is not None
    }
    if not known:
        return None
    lowest = min(float(rate["value"]) for rate in known.values())
    names = [name for name, rate in known.items() if float(rate["value"]) == lowest]
    return names, known[names[0]]


def quality_drop(run: Mapping[str, Any], twin: Mapping[str, Any]) -> dict[str, float]:
    """What clean quality a run lost against its attack-free twin: {measure: loss}, above 0 where the run is worse.

    Both are the contents of a summary.json (or anything with its "quality"). A measure is left out that one of them
    does not have. Rates and numbers are subtracted; for loss and perplexity the sign is turned, so that more is worse
    throughout.
    """
    own, other = numbers(run.get("quality")), numbers(twin.get("quality"))
    return {
        name: (own[name] - other[name]) if name in LESS_IS_BETTER else (other[name] - own[name])
        for name in other
        if name in own
    }


def numbers(block: Mapping[str, Any] | None) -> dict[str, float]:
    """The measured numbers of a quality or attack block; a rate is its value."""
    found = {}
    for name, given in (block or {}).items():
        if name in DETAILS:
            continue
        value = given.get("value") if isinstance(given, Mapping) else given
        if value is not None:
            found[name] = float(value)
    return found


def breakdown_point(
    runs: Mapping[int, Mapping[str, Any]],
    twin: Mapping[str, Any],
    *,
    measure: str = "accuracy",
    tolerance: float = 0.05,
    max_asr: float = 0.5,
) -> int | None:
    """The smallest number of attackers that breaks a defense, from the summaries of a sweep {m: summary}.

    It is broken by m attackers where clean quality falls by more than `tolerance` against the attack-free `twin`, or
    the attack succeeds on more than `max_asr` of the prompts (where that was measured); a measure that is NaN is
    broken. None: it held for every m of the sweep. A run without `measure` is a FedError.
    """
    for m in sorted(runs):
        lost = quality_drop(runs[m], twin)
        if measure not in lost:
            raise FedError(
                f"breakdown_point: {measure!r} with {m} attackers: not measured. Name one of {sorted(lost)}."
            )
        asr = numbers(runs[m].get("attack")).get("asr", 0.0)
        if not (lost[measure] <= tolerance and asr <= max_asr):
            return m
    return None
