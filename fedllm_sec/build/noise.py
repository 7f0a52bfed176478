"""How long the noise of a defense will be beside what it is added to, and what it will spend: before anything runs."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

from fedllm_sec.defenses.after import crfl, weak_dp
from fedllm_sec.defenses.before import weak_dp_client
from fedllm_sec.defenses.cluster import flame
from fedllm_sec.defenses.dp_sgd import DpSgd
from fedllm_sec.defenses.pipeline import Pipeline
from fedllm_sec.defenses.privacy import settings_if
from fedllm_sec.protocols import LocalRule, LocalTraining


def noise_in_words(defense: Pipeline, d: int | None, n: int) -> list[str]:
    """A line for each stage that adds noise to n rows of d values, or to the model; d is None where it is not known."""
    lines: list[str | None] = []
    for part in (*defense.before, defense.rule, *defense.after):
        if (own := settings_if(part, weak_dp_client)) is not None:
            lines.append(_bounded("weak_dp_client", own["sigma"], own["absolute"], "rows are clipped to", d, n))
        elif (own := settings_if(part, flame)) is not None:
            lines.append(_bounded("flame", own["noise"], own["absolute"], "rows are clipped to", d, 1))
        elif (own := settings_if(part, weak_dp)) is not None and own["absolute"]:
            lines.append(_of_the_model("weak_dp", own["sigma"], d))
        elif (own := settings_if(part, crfl)) is not None and own["sigma"] is not None:
            lines.append(_of_the_model("crfl", own["sigma"], d))
        elif own is not None and own["noise"]:
            length = own["noise"] * (own["rho"] + own["growth"])
            lines.append(f"crfl: in round 1 its noise has the length {length:.3g}, {own['noise']:g} of rho. {RECORDED}")
    return [line for line in lines if line is not None]


def spent_in_words(
    guards: Sequence[LocalRule], sizes: Sequence[int] | None, training: LocalTraining, rounds: int
) -> list[str]:
    """What dp_sgd will have spent on a row of the least and the largest shard, were their clients in all rounds."""
    beside = [copy.copy(guard) for guard in guards]  # a run counts in its own
    own = next((guard for guard in beside if isinstance(guard, DpSgd)), None)
    if own is None:
        return []
    if not sizes:
        return ["dp_sgd: epsilon depends on the clients' rows, which are not counted."]
    own.plan(sizes, training, rounds)
    own.used = {}
    shards = sorted({min(sizes), max(sizes)})
    for n in shards:
        for _ in range(rounds):
            own.trained(str(n), n, training)
    told = own.told(beside)
    if told["epsilon"] is None:
        return [f"dp_sgd: there is no epsilon: {told['because']}."]
    each = " and ".join(f"{told['epsilon'][str(n)]:.3g} ({n:,} rows)" for n in shards)
    return [
        f"dp_sgd: noise {own.noise:.3g} of the clip {own.clip:g}; a client that takes part in all {rounds} rounds "
        f"spends epsilon {each} at delta {own.delta:g}, by Opacus' Renyi accountant. It protects {told['protects']}."
    ]


RECORDED = "How that compares with each step is in the record (notes)."


def _bounded(name: str, number: float, absolute: bool, unit: str, d: int | None, n: int) -> str | None:
    """Beside the length that rows are clipped to, which no mean of theirs is longer than."""
    if not number:
        return None
    if not absolute:
        return f"{name}: its noise has {number:g} of the length that {unit}, whatever the size of the model."
    if d is None:
        return f"{name}: its noise has {number:g} sqrt(d) of the length that {unit}; d is not counted."
    left = number * math.sqrt(d / n)
    among = f" in the mean of {n} rows" if n > 1 else ""
    told = f"{name}: its noise{among} has {left:.3g} of the length that {unit} ({number:g} on each of {d:,} values)"
    if left <= 1:
        return told + "."
    return told + ", which is LONGER THAN ANY STEP: little is learnt. Lower it, or leave `absolute` out."


def _of_the_model(name: str, sigma: float, d: int | None) -> str | None:
    """Of a length that does not depend on any other."""
    if not sigma:
        return None
    length = f"{sigma:g} sqrt(d), and d is not counted" if d is None else f"{sigma * math.sqrt(d):.3g}"
    return f"{name}: its noise has the length {length} ({sigma:g} on each value). {RECORDED}"
