"""The server's side of buffers: which of a client's are refused, and how the others are combined."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedllm_sec.matrix import Layout

MEAN, VARIANCE = "running_mean", "running_var"  # how torch calls the statistics of BatchNorm
TIMES = 100.0  # a variance may be so many times what is usual
DEVIATIONS = 10.0  # a mean may lie so many standard deviations from what is usual
MOST_BATCHES = 1e9  # that a counter may gain in a round: as many as the local steps that a client may claim


def refused(buffers: Tensor, sent: Tensor, layout: Layout, ids: Sequence[str]) -> dict[str, str]:
    """Why the buffers (n, b + c) of some clients are not taken, by client id; `layout` is that of the b floats.

    They must be finite, variances and counters not negative, and no counter MOST_BATCHES beyond what was `sent`
    (b + c,): honest clients count on from the server's, which would soon be no number. What is usual is the median over
    the clients: a variance may be TIMES the usual one, or the usual one of its layer where that is larger, and a mean
    may lie DEVIATIONS times the root of that from the usual mean. Where half of the clients lie, so does the median.
    """
    reasons: dict[str, str] = {}

    def refuse(rows: Tensor, why: str) -> None:
        for i in rows.nonzero().flatten().tolist():
            reasons.setdefault(ids[i], why)

    places = layout.slices()
    refuse(~buffers.isfinite().all(1), "buffers: not all are finite")
    counts = buffers[:, layout.size :]
    refuse((counts < 0).any(1), "buffers: a counter is negative")
    refuse((counts - sent[layout.size :] > MOST_BATCHES).any(1), f"buffers: a counter gains over {MOST_BATCHES:g}")
    for name, at in places.items():
        if name.rpartition(".")[2] == VARIANCE:
            refuse((buffers[:, at] < 0).any(1), f"buffers: {name} is negative")
    sound = torch.tensor([id not in reasons for id in ids])
    if not bool(sound.any()):
        return reasons
    for name, at in places.items():
        stem, _, kind = name.rpartition(".")
        if kind != VARIANCE:
            continue
        usual = _median(buffers[sound][:, at])
        scale = torch.maximum(usual, usual.mean())
        refuse(
            sound & (buffers[:, at] > TIMES * scale).any(1), f"buffers: {name} is more than {TIMES:g} times the usual"
        )
        mean = places.get(f"{stem}.{MEAN}" if stem else MEAN)
        if mean is not None:
            far = (buffers[:, mean] - _median(buffers[sound][:, mean])).abs() > DEVIATIONS * scale.sqrt()
            refuse(
                sound & far.any(1), f"buffers: {stem}.{MEAN} lies more than {DEVIATIONS:g} deviations from the usual"
            )
    return reasons


def combined(buffers: Tensor, floats: int, weights: Tensor | None) -> Tensor:
    """One vector (b + c,) of the clients' (n, b + c): the mean of the floats by the rule's own row weights (n,).

    Weights are divided by their sum. Where a rule has none, as coordinate-wise ones, or some below 0, it is the
    coordinate-wise median. Counters are the middle one of those who have a weight, the larger of two: the largest
    would be whatever one client says.
    """
    own = weights.to(buffers) if weights is not None else None
    if own is None or bool((own < 0).any()) or not float(own.sum()) > 0:
        taken, found = torch.ones(len(buffers), dtype=torch.bool), _median(buffers[:, :floats])
    else:
        taken = own > 0
        found = (own[taken] / own.sum()) @ buffers[taken, :floats]
    counts = buffers[taken, floats:].sort(dim=0).values
    return torch.cat([found, counts[len(counts) // 2]])


def _median(values: Tensor) -> Tensor:
    """The median (b,) of each column; of an even number the mean of the middle two."""
    order = values.sort(dim=0).values
    n = len(order)
    return (order[(n - 1) // 2] + order[n // 2]) / 2
