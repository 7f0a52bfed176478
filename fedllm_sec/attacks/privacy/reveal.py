"""Counts of labels from whatever was observed: a gradient, a delta, with or without rows of the observer's own."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fedllm_sec.attacks.privacy.labels import (
    LastLayer,
    last_layer,
    least_squares_counts,
    restored_counts,
    sign_label,
    statistics,
)
from fedllm_sec.attacks.privacy.seen import LabelCounts, Observation, as_gradient, known_rows, need_finite
from fedllm_sec.attacks.privacy.simulated import rehearsed_counts
from fedllm_sec.errors import AttackError


def reveal(seen: Observation, n: int) -> Tensor:
    """The counts (classes,) of the labels of n rows; they sum to n. Which method, follows from what was observed.

    A gradient: iDLG at n = 1, iLRG with the model's own statistics, or with auxiliary ones where there are auxiliary
    rows (Ma et al. 2023). A delta of one SGD step is a gradient. A delta of several SGD steps needs auxiliary rows:
    the mean bias gradient over the steps is linear in the counts. Any other delta is rehearsed (`simulated`).
    """
    need_finite(seen)
    training = seen.training
    if seen.what == "gradient" or (seen.steps == 1 and seen.plain_sgd):
        gradient, whole = as_gradient(seen)
        layer = last_layer(gradient)
        if n == 1:
            counts = torch.zeros(len(layer.weight), dtype=torch.long)
            counts[sign_label(gradient, layer)] = 1
            return counts
        if not whole:
            raise AttackError(
                "reveal_labels: the gradient was clipped, and counts are read off its size. Give labels, or set "
                "clients.max_grad_norm: null."
            )
        if gradient.auxiliary is None:
            return restored_counts(gradient, layer, n)
        return _from_statistics(gradient, layer, n)
    if seen.auxiliary is None:
        raise AttackError(
            "reveal_labels: labels are read off a delta of several steps, or of adamw, by statistics of other rows. "
            "Give auxiliary rows, or observe what: gradient."
        )
    layer = last_layer(seen)
    assert training is not None
    if seen.plain_sgd and training.max_grad_norm is None and layer.bias is not None:
        slope = -seen.sent / (seen.learning_rate() * seen.steps) - training.weight_decay * seen.start
        return _from_statistics(seen, layer, n, slope)
    return rehearsed_counts(seen, layer, n)


def _from_statistics(seen: Observation, layer: LastLayer, n: int, slope: Tensor | None = None) -> Tensor:
    """By the auxiliary rows' probabilities at the received model, and at the sent one where a delta is known."""
    if layer.bias is None:
        raise AttackError("reveal_labels: the last layer has no bias. Choose a model with one, or give labels.")
    means = statistics(seen, layer)
    if slope is not None:
        moved = replace(seen, start=seen.start + seen.sent)
        means = (means + statistics(moved, last_layer(moved))) / 2
    bias = (slope if slope is not None else seen.sent).double()
    return least_squares_counts(means, seen.layout.split(bias)[f"{layer.name}.bias"], n)


def reveal_labels(seen: Observation) -> LabelCounts:
    """How often each class occurs in the batch, or in all batches of a delta, from the last layer (Ma et al. 2023).

    The menu's method: see `reveal`. The number of rows is the batch size times the steps, which the server knows.
    """
    rows = known_rows(seen)
    return LabelCounts(reveal(seen, rows if seen.what == "gradient" else rows * seen.steps))
