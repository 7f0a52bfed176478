"""What an attacker reads from its view, and how it is refused what it was not granted."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedllm_sec import kernels
from fedllm_sec.errors import AttackError, CohortError
from fedllm_sec.kernels.claims import midpoint
from fedllm_sec.matrix import UpdateMatrix
from fedllm_sec.matrix.updates import new_rows
from fedllm_sec.protocols import ThreatView

STRETCH = 2**20  # numbers from one generator
PIECE = 2**15  # of these, how many are drawn and scaled while they are in the cache


def honest_rows(view: ThreatView, name: str, *, partial: bool = False) -> Tensor:
    """The rows (h, d) an attack takes for honest: the cohort's, or with `partial` what the attackers
    trained.
    """
    if partial:
        return view.own
    if view.others is None:
        raise AttackError(
            f"{name}: needs to see the honest rows of the round, which attack.knowledge does not grant. "
            "Set attack.knowledge: cohort, or `partial: true` where the attack has it."
        )
    if len(view.others) == 0:
        raise CohortError(f"{name}: no honest client is in this round, so there is nothing to imitate.")
    return view.others


def seen(view: ThreatView) -> Tensor:
    """The honest rows where they are granted, else the attackers' own: they set the scale."""
    return view.own if view.others is None or len(view.others) == 0 else view.others


def median_norm(view: ThreatView) -> float:
    """Median length of the rows `seen`, the midpoint for an even number."""
    return midpoint(kernels.row_norms(UpdateMatrix.of(seen(view))))


def _drawn(
    rows: int, size: int, rng: torch.Generator, device: torch.device, draw: Callable[[np.random.Generator, Any], Any]
) -> Tensor:
    """Fill rows by numpy generators, each with a stretch of its own: several times faster than torch's one."""
    out = new_rows(rows, size)
    stretches = [row[start : start + STRETCH] for row in out.numpy() for start in range(0, size, STRETCH)]
    seeds = torch.randint(2**62, (len(stretches),), generator=rng, device=rng.device).tolist()
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        jobs = zip(seeds, stretches, strict=True)
        list(pool.map(lambda job: draw(np.random.Generator(np.random.SFC64(job[0])), job[1]), jobs))
    return out.to(device)


def pieces(m: int, d: int, rng: torch.Generator, draw: Callable[[int], Tensor]) -> list[list[tuple[slice, Tensor]]]:
    """Noise for m rows, each as (place in the row, numbers) pieces; `draw` gives so many rows of d numbers.

    Random numbers are dear: of more than STRETCH of them one row is drawn, and every row gets it from another random
    place on. Shifted copies of so many numbers are uncorrelated to 1e-3.
    """
    if d <= STRETCH:
        return [[(slice(0, d), row)] for row in draw(m)]
    drawn = draw(1)[0]
    shifts = torch.randint(1, d, (m,), generator=rng, device=rng.device).tolist()
    return [[(slice(0, d - s), drawn[s:]), (slice(d - s, d), drawn[:s])] for s in shifts]


def noisy(own: Tensor, deviations: Sequence[float], rng: torch.Generator) -> Tensor:
    """Rows (m, d) plus normal noise of one standard deviation each, the same on every device and for any threads."""
    m, d = own.shape

    def draw(rows: int) -> Tensor:
        return _drawn(rows, d, rng, own.device, lambda g, out: g.standard_normal(dtype=np.float32, out=out))

    out = new_rows(m, d, device=own.device)
    for i, noise in enumerate(pieces(m, d, rng, draw)):
        for at, numbers in noise:
            torch.add(own[i, at].float(), numbers, alpha=deviations[i], out=out[i, at])
    return out


def random_directions(m: int, d: int, lengths: float | None, rng: torch.Generator, device: torch.device) -> Tensor:
    """Rows (m, d) of numbers that are uniform in [-1, 1], scaled to a length, or as they are."""
    out = new_rows(m, d, device=device)
    noise = pieces(m, d, rng, lambda n: uniform(n, d, rng, device, low=-1.0))
    factor = 1.0
    for i, (row, parts) in enumerate(zip(out, noise, strict=True)):
        if lengths is not None and (i == 0 or d <= STRETCH):  # beyond, all rows are shifted copies of the first
            squares = sum(float(kernels.row_norms(UpdateMatrix.of(numbers[None]))) ** 2 for _, numbers in parts)
            factor = lengths / max(math.sqrt(squares), torch.finfo(torch.float32).tiny)
        for at, numbers in parts:
            torch.mul(numbers, factor, out=row[at])
    return out


def uniform(
    rows: int, size: int, rng: torch.Generator, device: torch.device, low: float = 0.0, high: float = 1.0
) -> Tensor:
    """Numbers in [low, high) of 24 random bits: (rows, size) float32, the same on every device and for any threads."""
    step = np.float32((high - low) * 2.0**-24)

    def draw(generator: np.random.Generator, out: Any) -> None:
        for start in range(0, len(out), PIECE):
            piece = out[start : start + PIECE]
            words = generator.bit_generator.random_raw((len(piece) + 1) // 2).view(np.uint32)[: len(piece)]
            words >>= np.uint32(8)
            piece[:] = words.view(np.int32)
            piece *= step
            piece += np.float32(low)

    return _drawn(rows, size, rng, device, draw)


def repeat(row: Tensor, m: int) -> Tensor:
    """The same row (d,) for all m colluders: an (m, d) view, which takes no memory. Copy before you write to it."""
    return row.expand(m, -1)
