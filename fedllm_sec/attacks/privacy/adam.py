"""The gradient behind the first step of AdamW, and how much of it rounding has left."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fedllm_sec.attacks.privacy.seen import Observation
from fedllm_sec.attacks.privacy.spans import Span, factor_of, parameters_of
from fedllm_sec.errors import AttackError

EPS = 1e-8  # that Adam adds to the root of its second moment
HALF = 2.0**-24  # by how much a number just below 1 may be off in float32
OVER = 2.0  # a direction is told whose singular value is so many times what rounding alone would give


def is_first_step(seen: Observation) -> bool:
    """Whether a delta of one step of AdamW was sent: its moments begin at 0 in every round."""
    training = seen.training
    return seen.what == "delta" and seen.steps == 1 and training is not None and training.optimizer == "adamw"


def undone(seen: Observation) -> tuple[Tensor, Tensor]:
    """The gradient (d,) that moved the model by this delta, and by how much each value may be off: float64.

    After one step both moments of Adam (Kingma and Ba 2015, alg. 1) hold the gradient alone, so that the step is
    u = g / (|g| + EPS) times the learning rate, and g = EPS u / (1 - |u|): signs are all that is left of it only where
    |g| is so large that 1 - |u| is lost in rounding. Half a unit of float32 below 1, and the rounding of the parameters
    themselves, divided by the learning rate, make du; then dg = (|g| + EPS)^2 / EPS du. The weights' decay is to be
    taken out before. Clipping is a factor of g and makes it better known. No paper; Petrov et al. 2024 read FedAvg with
    SGD alone.
    """
    lr, begun = seen.learning_rate(), seen.start.double()
    u = -seen.sent.double() / lr
    off = HALF * (1 + begun.abs() / lr)
    if bool((u.abs() > 1 + 64 * off).any()):
        raise AttackError(
            "privacy: what was sent is longer than a step of AdamW at this learning rate: noise, or lies."
        )
    g = EPS * u / (1 - u.abs()).clamp_min(HALF)
    return g, (g.abs() + EPS).square() / EPS * off


def widest_span(seen: Observation, layers: list[str]) -> Span | None:
    """Of layers with the same inputs the span that shows most directions of them; None where none has room for more.

    Each output's row of a gradient is divided by the length of its error first, so that all are equally wrong; the
    largest singular value of such errors is about 1 + sqrt(outputs / width). Of equal numbers of directions, those
    count whose shortest is longest. A span of one dimension less than there are is taken for a full one.
    """
    gradient, wrong = undone(seen)
    parts, off = replace(seen, sent=gradient).parts(torch.float64), seen.layout.split(wrong)
    found: list[tuple[int, float, Span]] = []
    for layer in layers:
        for parameter, factor in parameters_of(layer, seen.model.get_submodule(layer)):
            if parameter not in parts:
                continue
            values = parts[parameter] / off[parameter].norm(dim=1, keepdim=True).clamp_min(1e-300)
            _, lengths, rows = torch.linalg.svd(values, full_matrices=False)
            k = int((lengths > OVER * (1 + (values.shape[0] / values.shape[1]) ** 0.5)).sum())
            if 0 < k < min(values.shape) - 1:
                span = Span(layer, rows[:k], factor_of(seen, factor), True, min(values.shape))
                found.append((k, float(lengths[k - 1]), span))
    return max(found, key=lambda one: one[:2], default=(0, 0.0, None))[2]
