"""What an attacker reads from its view, and how it is refused what it was not granted."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedllm_sec import kernels
from fedllm_sec.errors import AttackError, CohortError
from fedllm_sec.protocols import ThreatView
from fedllm_sec.updates import UpdateMatrix


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
    """Median length of the rows `seen`."""
    return float(kernels.row_norms(UpdateMatrix.of(seen(view))).median())


def _drawn(
    rows: int, size: int, rng: torch.Generator, device: torch.device, draw: Callable[[np.random.Generator, Any], Any]
) -> Tensor:
    """Fill rows by numpy generators of their own, seeded from the round's: several times faster than torch's."""
    seeds = torch.randint(2**62, (rows,), generator=rng, device=rng.device).tolist()
    out = torch.empty(rows, size)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        jobs = zip(seeds, out.numpy(), strict=True)
        list(pool.map(lambda job: draw(np.random.Generator(np.random.SFC64(job[0])), job[1]), jobs))
    return out.to(device)


def normal(rows: int, size: int, rng: torch.Generator, device: torch.device) -> Tensor:
    """Standard normal numbers (rows, size) float32, the same on every device and for any number of threads."""
    return _drawn(rows, size, rng, device, lambda g, out: g.standard_normal(dtype=np.float32, out=out))


def uniform(rows: int, size: int, rng: torch.Generator, device: torch.device) -> Tensor:
    """Numbers in [0, 1): (rows, size) float32, likewise; 24 random bits each."""

    def draw(generator: np.random.Generator, out: Any) -> None:
        words = generator.bit_generator.random_raw((size + 1) // 2).view(np.uint32)[:size]
        np.multiply(words >> np.uint32(8), np.float32(2.0**-24), out=out, casting="unsafe")

    return _drawn(rows, size, rng, device, draw)


def repeat(row: Tensor, m: int) -> Tensor:
    """The same row (d,) for all m colluders: an (m, d) view, which takes no memory. Copy before you write to it."""
    return row.expand(m, -1)
