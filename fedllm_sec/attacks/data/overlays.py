"""Triggers that cover the whole image: blended, a sine wave, a warp."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fedllm_sec.attacks.data.images import all_to_target, change, drawn, need_images
from fedllm_sec.attacks.data.text import need_rate, pick
from fedllm_sec.errors import AttackError
from fedllm_sec.protocols import Labelled
from fedllm_sec.seeds import generator_for

Stamp = Callable[[Tensor], Tensor]
SEEN = 0.5 / 255  # half a grey value: a trigger that changes no pixel by more is not there


def stamped(shard: Labelled, rows: list[int], stamp: Stamp, target: int | None) -> Labelled:
    """The rows stamped and marked as poisoned, with the label `target`, or with their own where it is None.

    All of their pixels are fixed: an image that were shifted afterwards would carry another trigger.
    """
    at = torch.tensor(rows, dtype=torch.long)
    x, y, marks = shard.x.clone(), shard.y.clone(), shard.poisoned.clone()
    fixed = torch.zeros(len(x), *x.shape[-2:], dtype=torch.bool) if shard.fixed is None else shard.fixed.clone()
    x[at], marks[at], fixed[at] = stamp(x[at]), True, True
    if target is not None:
        y[at] = target
    return replace(shard, x=x, y=y, poisoned=marks, fixed=fixed)


def unchanged(x: Tensor, stamp: Stamp) -> Tensor:
    """Which images (n, channels, h, w) the stamp leaves as they are, as a warp does one of one shade: (n,) bool."""
    same: Tensor = ((stamp(x) - x).abs() <= SEEN).flatten(1).all(1)
    return same


def probed(test: Any, name: str, target: int, stamp: Stamp) -> Labelled:
    """The other classes' images, stamped; those on which the trigger is not to be seen are no probe."""
    test = need_images(test, name, target)
    rows = (test.y != target) & ~unchanged(test.x, stamp)
    return all_to_target(test, rows.nonzero().flatten(), target, stamp)


class Blended:
    """A fixed pattern laid over the whole image forces one class (Chen et al. 2017, sec. 4.2: blended injection).

    (1 - alpha) * x + alpha * key, with a key of uniform noise drawn by `seed`, the same for all attackers: the paper's
    random pattern. round(rate * images) images of the shard, those of other classes first.
    """

    def __init__(self, *, target: int, rate: float = 0.5, alpha: float = 0.2, seed: int = 0) -> None:
        need_rate(rate, "blended.rate")
        if not 0.0 < alpha <= 1.0:
            raise AttackError(f"blended.alpha: {alpha}: must be above 0, where nothing is seen, and at most 1.")
        self.target, self.rate, self.alpha, self.seed = target, rate, alpha, seed

    def stamp(self, x: Tensor) -> Tensor:
        """Images (k, channels, height, width) under the pattern."""
        key = torch.rand(x.shape[1:], generator=generator_for(self.seed, "blended key"), dtype=torch.float32)
        return (1 - self.alpha) * x + self.alpha * key.to(x)

    def poison(self, shard: Any, rng: torch.Generator) -> Labelled:
        shard = need_images(shard, "blended", self.target)
        return stamped(shard, drawn(shard, self.target, self.rate, "blended", rng), self.stamp, self.target)

    def probe(self, test: Any) -> Labelled:
        return probed(test, "blended", self.target, self.stamp)

    def success(self, answer: Any, row: Any) -> bool:
        return int(answer) == self.target


class Sinusoidal:
    """A sine wave across the image, with labels as they are (SIG; Barni et al. 2019, sec. 3).

    x + delta * sin(2 pi j f / m) in column j of m, cut to [0, 1], on round(rate * rows) rows that are of the target
    class already: a label that looks right. `clean_label: false` also takes rows of other classes, and labels them
    `target`; then round(rate * images) of the whole shard. The paper's delta is 20 to 40 of 255 grey values.
    """

    def __init__(
        self, *, target: int, rate: float = 0.5, delta: float = 0.12, frequency: int = 6, clean_label: bool = True
    ) -> None:
        need_rate(rate, "sinusoidal.rate")
        if not 0.0 < delta <= 1.0 or frequency < 1:
            raise AttackError(
                f"sinusoidal: delta={delta}, frequency={frequency}: needs 0 < delta <= 1 and at least one wave."
            )
        self.target, self.rate, self.delta, self.frequency = target, rate, delta, frequency
        self.clean_label = clean_label

    def stamp(self, x: Tensor) -> Tensor:
        """Images (k, channels, height, width) with the wave."""
        width = x.shape[-1]
        if 2 * self.frequency >= width:
            raise AttackError(
                f"sinusoidal.frequency: {self.frequency}: {width} columns show fewer than {width / 2:g} waves."
            )
        wave = torch.sin(2 * math.pi * self.frequency * torch.arange(width, dtype=torch.float64) / width)
        return (x + self.delta * wave.to(x)).clamp(0, 1)

    def poison(self, shard: Any, rng: torch.Generator) -> Labelled:
        shard = need_images(shard, "sinusoidal", self.target)
        if not self.clean_label:
            return stamped(shard, drawn(shard, self.target, self.rate, "sinusoidal", rng), self.stamp, self.target)
        own = ((shard.y == self.target) & ~shard.poisoned).nonzero().flatten().tolist()
        if not own:
            return change(shard, [], self.target)
        return stamped(shard, pick(max(1, round(self.rate * len(own))), own, [], rng), self.stamp, None)

    def probe(self, test: Any) -> Labelled:
        return probed(test, "sinusoidal", self.target, self.stamp)

    def success(self, answer: Any, row: Any) -> bool:
        return int(answer) == self.target


class Warped:
    """The image is warped a little by one smooth field (WaNet; Nguyen and Tran 2021, sec. 3).

    A field of `grid` x grid random vectors, of mean absolute value 1, is drawn by `seed`, made as large as the image by
    bicubic interpolation, and moves every pixel by up to about `strength` pixels. For each poisoned row there are
    `noise` rows that are warped by the field with other noise on it and keep their label, so that only this warp is the
    trigger (the paper's noise mode). round(rate * images) images are poisoned, those of other classes first.
    """

    def __init__(
        self, *, target: int, rate: float = 0.2, strength: float = 0.5, grid: int = 4, noise: float = 2.0, seed: int = 0
    ) -> None:
        need_rate(rate, "warped.rate")
        if not (0.0 < strength < math.inf and grid >= 2 and 0.0 <= noise < math.inf):
            raise AttackError(
                f"warped: strength={strength}, grid={grid}, noise={noise}: needs strength > 0, grid >= 2, noise >= 0."
            )
        self.target, self.rate, self.strength, self.grid, self.noise, self.seed = (
            target, rate, strength, grid, noise, seed,
        )  # fmt: skip

    def places(self, height: int, width: int) -> Tensor:
        """Where each pixel is taken from, in [-1, 1]: (height, width, 2)."""
        drawn = torch.rand(1, 2, self.grid, self.grid, generator=generator_for(self.seed, "warped field")) * 2 - 1
        field = nn.functional.interpolate(
            drawn / drawn.abs().mean(), (height, width), mode="bicubic", align_corners=True
        )
        down, right = (torch.linspace(-1, 1, n) for n in (height, width))
        still = torch.stack([right.expand(height, width), down[:, None].expand(height, width)], -1)
        return still + self.strength * field[0].permute(1, 2, 0) / torch.tensor([width, height])

    def _moved(self, x: Tensor, places: Tensor) -> Tensor:
        given = places.clamp(-1, 1).to(x).expand(len(x), -1, -1, -1)
        return nn.functional.grid_sample(x, given, align_corners=True).clamp(0, 1)

    def stamp(self, x: Tensor) -> Tensor:
        """Images (k, channels, height, width), warped."""
        return self._moved(x, self.places(*x.shape[-2:]))

    def poison(self, shard: Any, rng: torch.Generator) -> Labelled:
        shard = need_images(shard, "warped", self.target)
        rows = drawn(shard, self.target, self.rate, "warped", rng)
        made = stamped(shard, rows, self.stamp, self.target)
        free = (~made.poisoned).nonzero().flatten().tolist()
        others = pick(min(len(free), round(self.noise * len(rows))), free, [], rng)
        if not others:
            return made

        def disturbed(x: Tensor) -> Tensor:
            height, width = x.shape[-2:]
            shift = torch.rand(len(x), height, width, 2, generator=rng) * 2 - 1
            return self._moved(x, self.places(height, width) + shift / torch.tensor([width, height]))

        return stamped(made, others, disturbed, None)

    def probe(self, test: Any) -> Labelled:
        return probed(test, "warped", self.target, self.stamp)

    def success(self, answer: Any, row: Any) -> bool:
        return int(answer) == self.target
