"""What whole runs were worth: pure functions on records and summaries, which need neither torch nor the parts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fedllm_sec.errors import FedError
from fedllm_sec.records.history import RoundRecord

# measures of `quality` of which less is better; of all others more is
LESS_IS_BETTER = ("loss", "perplexity")


def lifespan(records: Iterable[RoundRecord], stop: int | None) -> dict[str, Any] | None:
    """How many rounds a backdoor outlives its attackers: until attack success falls under half of its peak.

    `stop` is the last round of the attack; the peak is the highest success rate measured up to it. Gives
    {"value": rounds after `stop` at which it was first measured under half, "at_least": rounds after `stop` at which
    it last was not, "peak": the peak}. "value" is None while it has not fallen: then the backdoor lives for
    "at_least" rounds or more. Rounds without an evaluation are not seen, so the true number lies above "at_least" and
    at or under "value". None where there is nothing to outlive: attackers that never stop, no attack success measured
    before or after they stop, or a peak of 0.
    """
    if stop is None:
        return None
    rates = {r.round: float(r.attack["asr"]["value"]) for r in records if r.attack is not None and r.attack.get("asr")}
    during = [rate for round, rate in rates.items() if round <= stop]
    after = sorted((round - stop, rate) for round, rate in rates.items() if round > stop)
    peak = max(during, default=0.0)
    if not after or peak == 0:
        return None
    fallen = next((k for k, rate in after if rate < peak / 2), None)
    stood = [k for k, _ in after if fallen is None or k < fallen]
    return {"value": fallen, "at_least": max(stood, default=0), "peak": peak}


def quality_drop(run: Mapping[str, Any], twin: Mapping[str, Any]) -> dict[str, float]:
    """What clean quality a run lost against its attack-free twin: {measure: loss}, above 0 where the run is worse.

    Both are the contents of a summary.json (or anything with its "quality"). A measure is left out that one of them
    does not have. Rates and numbers are subtracted; for loss and perplexity the sign is turned, so that more is worse
    throughout.
    """
    own, other = _values(run.get("quality")), _values(twin.get("quality"))
    return {
        name: (own[name] - other[name]) if name in LESS_IS_BETTER else (other[name] - own[name])
        for name in other
        if name in own
    }


def _values(quality: Mapping[str, Any] | None) -> dict[str, float]:
    """The measured numbers of a quality or attack block; a rate is its value."""
    found = {}
    for name, given in (quality or {}).items():
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
        asr = _values(runs[m].get("attack")).get("asr", 0.0)
        if not (lost[measure] <= tolerance and asr <= max_asr):
            return m
    return None
