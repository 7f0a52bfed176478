"""Gaussian noise that stages add, and how long it is beside what it is added to.

Noise of standard deviation s on each of d values has a length of about s sqrt(d). So that one recipe suits models of
any size, a stage's noise is given as a length by default, and only on request as a number for each value.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from fedllm_sec.protocols import RoundContext


def noise_like(vector: Tensor, sigma: float, rng: torch.Generator) -> Tensor:
    """N(0, sigma^2) for each value, drawn where the generator lives."""
    return sigma * torch.randn(vector.shape, generator=rng, device=rng.device).to(vector)


def each_value(number: float, unit: float, d: int, absolute: bool) -> float:
    """The standard deviation of a value where the noise has the expected length `number` * `unit`.

    `absolute`: where `number` * `unit` is the standard deviation itself.
    """
    return number * unit if absolute else number * unit / math.sqrt(d)


def note_noise(ctx: RoundContext, rule: str, noise: float, step: float, way_out: str) -> None:
    """Put the noise's expected length, in lengths of the step, into the record; in round 1 warn where it is longer."""
    if step <= 0:
        return
    ratio = noise / step
    ctx.notes[f"{rule}_noise_to_step"] = ratio
    if ratio > 1 and ctx.round == 1:
        warnings.warn(
            f"{rule}: the noise is {ratio:.3g} times as long as the step it is added to: little is learnt. {way_out}",
            stacklevel=3,
        )
