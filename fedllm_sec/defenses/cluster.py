"""Rules that cluster the clients and keep one group: FLAME, FreqFed, SignGuard.

scikit-learn and SciPy are imported where they are used: they take a second, which no other rule should pay.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedllm_sec import kernels
from fedllm_sec.defenses.before import clip_factors
from fedllm_sec.defenses.checks import need
from fedllm_sec.defenses.filters import by_id
from fedllm_sec.defenses.noise import each_value, noise_like, note_noise
from fedllm_sec.defenses.similarity import cosines
from fedllm_sec.defenses.spectral import draw_coordinates, inside
from fedllm_sec.kernels import team
from fedllm_sec.kernels.claims import midpoint
from fedllm_sec.matrix import UpdateMatrix
from fedllm_sec.matrix.updates import new_rows
from fedllm_sec.protocols import Decision, RoundContext


def cosine_distances(gram: Tensor) -> Tensor:
    """1 - cos of each pair: (n, n) in [0, 2], rounding noise set to 0.

    Two zero rows are at distance 0, a zero row and any other at 1.
    """
    distances = 1.0 - cosines(gram)
    zero = gram.diagonal() <= 0
    distances[zero[:, None] & zero[None]] = 0.0
    distances = (distances + distances.T) / 2
    distances = torch.where(distances < 1e-12, 0.0, distances)
    return distances.fill_diagonal_(0.0)


def hdbscan_labels(distances: Tensor, min_cluster_size: int, min_samples: int) -> Tensor:
    """HDBSCAN on a distance matrix: a label for each row, -1 for noise; one cluster is allowed: (n,) int64.

    `min_samples` counts neighbours, as in the hdbscan library that the papers' code uses; scikit-learn counts the row
    itself too. Fewer rows than a cluster needs are one cluster.
    """
    from sklearn.cluster import HDBSCAN

    n = len(distances)
    if n < max(2, min_cluster_size):
        return torch.zeros(n, dtype=torch.long)
    model = HDBSCAN(
        min_cluster_size=max(2, min_cluster_size),
        min_samples=min(min_samples + 1, n),
        metric="precomputed",
        allow_single_cluster=True,
        copy=True,
    )
    return torch.as_tensor(model.fit_predict(distances.numpy()), dtype=torch.long)


def largest_cluster(labels: Tensor) -> Tensor | None:
    """Members of the largest cluster as a mask (the first of equals), None if all rows are noise."""
    if not bool((labels >= 0).any()):
        return None
    return labels == int(torch.bincount(labels[labels >= 0]).argmax())


def majority_core(distances: Tensor) -> Tensor | None:
    """FLAME's filter: HDBSCAN whose only possible cluster holds more than half of the rows."""
    return largest_cluster(hdbscan_labels(distances, len(distances) // 2 + 1, 1))


def flame(updates: UpdateMatrix, ctx: RoundContext, *, noise: float = 0.01, absolute: bool = False) -> Decision:
    """Cluster by cosine distance, clip the majority to the median norm, average, add noise.

    Nguyen et al. 2022, algorithm 1: HDBSCAN with min_cluster_size = n // 2 + 1, min_samples = 1 on pairwise
    cosine distances; S is the median norm of all n rows; kept rows are scaled by min(1, S / |x_i|); the mean
    gets Gaussian noise.

    Stated here: cosines are those of updates, where the paper compares local models, which all point the same way;
    and the noise has the expected length `noise` * S, whatever the size of the model. The paper's is N(0, (lambda S)^2)
    on every value, lambda = 0.001, whose length lambda * S * sqrt(d) passes S from d = 10^6 on: `absolute: true` with
    `noise: 0.001`. Note `flame_noise_to_step` says how it compares with the mean it is added to.

    If the clustering finds no majority, all rows are kept, clipped (note `fallback` = 1). Scores are the
    median cosine distances to the other rows.
    """
    need(noise >= 0, "flame", "noise >= 0", "Raise it.", noise=noise)
    order = by_id(updates.ids)
    gram = kernels.gram(updates)
    distances = cosine_distances(gram[order][:, order])
    core = majority_core(distances)
    kept = torch.ones(updates.n, dtype=torch.bool)
    if core is not None:
        kept[order] = core
    norms = gram.diagonal().clamp_min(0.0).sqrt()
    radius = midpoint(norms)
    weights = clip_factors(norms, radius) * kept / int(kept.sum())
    scores = torch.empty(updates.n, dtype=torch.float64)
    scores[order] = torch.quantile(distances, 0.5, dim=1)
    notes = {"median_norm": radius, "fallback": float(core is None)}
    clean = Decision.weighted(updates, weights, kept=kept, scores=scores, notes=notes)
    if noise == 0:
        return clean
    std = each_value(noise, radius, updates.d, absolute)
    step = float(torch.linalg.vector_norm(clean.update, dtype=torch.float64))
    note_noise(ctx, "flame", std * math.sqrt(updates.d), step, "Lower noise, or leave `absolute` out.")
    return Decision(clean.update + noise_like(clean.update, std, ctx.rng), None, kept, scores, notes)


# ---------------------------------------------------------------- FreqFed

TOGETHER, ROOM = 4, 2**24  # rows of one call, values in them: of four rows of 4.2M one takes 49 ms, alone 106
EXACT = 2**24  # numbers in all rows, below which their transforms are done in float64


def twiddles(d: int, kind: torch.dtype) -> Tensor:
    """sqrt(2 / d) exp(-i pi k / 2 d) for k = 0..d/2, the first by sqrt(2) smaller, in the complex type of `kind`."""
    k = torch.arange(d // 2 + 1, dtype=torch.float64)
    turn = torch.polar(torch.full_like(k, math.sqrt(2 / d)), k * (-math.pi / (2 * d)))
    turn[0] /= math.sqrt(2)
    return turn.to(kind.to_complex())


class LowFrequencies:
    """Room for the transforms of up to `m` rows (d,): fresh memory for each would cost as much as they do.

    By real FFTs in the precision of `turn`, the rows' `twiddles`: with v the values in even places, then those in odd
    ones backwards, coefficient k of the orthonormal DCT-II is the real part of FFT(v)_k turn_k, and coefficient d - k
    the negative imaginary one (Makhoul 1980).
    """

    def __init__(self, m: int, d: int, turn: Tensor) -> None:
        self.turn = turn
        self.signal = torch.empty(m, d, dtype=turn.real.dtype)
        self.found = torch.empty(m, len(turn), dtype=turn.dtype)

    def put(self, rows: Sequence[Tensor], low: Tensor) -> None:
        """The first coefficients of each row / its largest value into `low`, (rows, count) float32.

        Beside an infinite value the finite ones are nothing, as they are beside a growing one in the limit.
        """
        m, d, count = len(rows), self.signal.shape[1], low.shape[1]
        middle, tail = (d + 1) // 2, count - len(self.turn)
        for row, signal in zip(rows, self.signal.numpy(), strict=False):
            values = row.detach().cpu().to(self.turn.real.dtype)
            least, most = (float(value) for value in torch.aminmax(values))
            top = max(-least, most)
            if math.isinf(top):
                values, top = torch.where(values.isinf(), values.sign(), 0.0), 1.0
            there = values.numpy()
            np.divide(there[::2], top or 1.0, out=signal[:middle])
            np.divide(there[1::2][::-1], top or 1.0, out=signal[middle:])
        found = torch.fft.rfft(self.signal[:m], out=self.found[:m]).mul_(self.turn)
        low[:, : count - max(0, tail)] = found.real[:, :count]
        if tail > 0:
            low[:, -tail:] = -found.imag[:, middle - tail : middle].flip(1)


def _stored(updates: UpdateMatrix) -> tuple[int, ...] | None:
    """Which stored rows they are, where each is one that lies in this process' memory."""
    return updates.picked if updates.file is None and updates.owners is None else None


def _row(updates: UpdateMatrix, i: int) -> Tensor:
    """One row, without a copy where it lies in memory."""
    if (stored := _stored(updates)) is not None:
        return updates.rows[stored[i]]
    return kernels.combine(updates, torch.eye(updates.n, dtype=torch.float64)[i])


def freqfed(updates: UpdateMatrix, ctx: RoundContext, *, fraction: float = 0.5) -> Decision:
    """Cluster the low-frequency DCT coefficients of the rows by cosine distance and average the majority.

    Fereidooni et al. 2024: each row is one long signal, its DCT-II keeps the first `fraction` of the
    coefficients (half, as in the paper), HDBSCAN clusters their pairwise cosine distances, and the rows of
    the largest cluster are averaged. As in FLAME a cluster must hold more than half of the rows: the paper
    asks for the majority and names no size. If there is none, all rows are averaged (note `fallback` = 1).

    The kept coefficients of all rows are held at once (n * fraction * d float32 values, where rows are kept), and each
    thread transforms up to four rows at a time, in twice their memory: lower `fraction` where it is short.
    """
    need(0 < fraction <= 1, "freqfed", "0 < fraction <= 1", "Change it.", fraction=fraction)
    updates.need_columns()
    count = max(1, int(fraction * updates.d))
    order = by_id(updates.ids)
    turn = twiddles(updates.d, torch.float64 if updates.n * updates.d < EXACT else torch.float32)
    low, together = new_rows(updates.n, count), max(1, min(TOGETHER, ROOM // updates.d))
    rooms = list[LowFrequencies]()  # one for each thread

    def transform(start: int) -> None:
        chosen = order[start : start + together].tolist()
        room = rooms.pop() if rooms else LowFrequencies(min(together, updates.n), updates.d, turn)
        room.put([_row(updates, i) for i in chosen], low[start : start + together])
        rooms.append(room)

    jobs = (functools.partial(transform, start) for start in range(0, updates.n, together))
    deque(team.results(jobs, 1 if _stored(updates) is None else team.size()), maxlen=0)
    distances = cosine_distances(kernels.gram(UpdateMatrix.of(low, chunk_mb=updates.chunk_mb)))
    core = majority_core(distances)
    kept = torch.ones(updates.n, dtype=torch.bool)
    if core is not None:
        kept[order] = core
    scores = torch.empty(updates.n, dtype=torch.float64)
    scores[order] = torch.quantile(distances, 0.5, dim=1)
    weights = kept.double() / int(kept.sum())
    notes = {"fallback": float(core is None)}
    return Decision.weighted(updates, weights, kept=kept, scores=scores, notes=notes)


# ---------------------------------------------------------------- SignGuard

MOST_SIGNS = 1_000_000  # a share of signs is then known to 0.001


def norms_and_signs(updates: UpdateMatrix, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Row norms, and the shares of positive, zero and negative values among `columns`: (n,), (n, 3)."""
    if (fast := kernels.for_rules(updates)) is not None and len(columns) <= MOST_SIGNS:
        found = fast.sampled_signs(updates, columns)
        return found[:, 0].sqrt(), found[:, 1:] / max(1, len(columns))
    squares = torch.zeros(updates.n, dtype=torch.float64)
    counts = torch.zeros(updates.n, 3, dtype=torch.float64)
    for place, block in updates.blocks():
        squares += block.double().square().sum(1).cpu()
        part = block[:, inside(columns, place).to(block.device)]
        shares = [(part > 0).sum(1), (part == 0).sum(1), (part < 0).sum(1)]
        counts += torch.stack(shares, dim=1).double().cpu()
    return squares.sqrt(), counts / max(1, len(columns))


def similarity_feature(gram: Tensor) -> Tensor:
    """Median cosine to the other rows, cut to [0, m] over 5m for m the median of these: (n, 1) in [0, 0.2]."""
    n = len(gram)
    others = cosines(gram)[~torch.eye(n, dtype=torch.bool)].view(n, n - 1)
    near = torch.quantile(others, 0.5, dim=1) if n > 1 else torch.zeros(n, dtype=torch.float64)
    centre = midpoint(near)
    if centre <= 0:
        return torch.zeros(n, 1, dtype=torch.float64)
    return (near.clamp(0.0, centre) / (5 * centre))[:, None]


def sign_majority(features: Tensor) -> Tensor:
    """The largest mean-shift cluster of the sign shares (and similarities), as a mask: (n,) bool.

    The bandwidth is the mean distance of a row to its (n // 2)-th nearest, itself counted. Fewer than four
    rows are one cluster: their bandwidth would be 0.
    """
    from sklearn.cluster import MeanShift, estimate_bandwidth

    if len(features) < 4:
        return torch.ones(len(features), dtype=torch.bool)
    bandwidth = max(float(estimate_bandwidth(features.numpy(), quantile=0.5)), 1e-9)
    labels = MeanShift(bandwidth=bandwidth, cluster_all=False).fit_predict(features.numpy())
    largest = largest_cluster(torch.as_tensor(labels, dtype=torch.long))
    assert largest is not None  # every seed is a row, so each cluster has one
    return largest


def signguard(
    updates: UpdateMatrix,
    ctx: RoundContext,
    *,
    lower: float = 0.1,
    upper: float = 3.0,
    sample: float = 0.1,
    similarity: Literal["none", "cosine"] = "none",
) -> Decision:
    """Keep rows of ordinary norm whose share of positive, zero and negative signs is the common one.

    Xu et al. 2022 (ICDCS), algorithm 2: a norm test, lower <= |x_i| / median <= upper; mean-shift clustering
    of the sign shares on a random `sample` of the coordinates, largest cluster; the intersection is averaged
    after clipping to the median norm, so the test sees the norms as sent. Where positive and negative values
    balance, turned signs leave the shares as they were: `similarity: cosine` is the paper's SignGuard-Sim,
    with the median cosine to the other rows as one feature more.

    Stated here: a sample has at least 1,000 coordinates (or all of them) and at most a million; the features
    are the plain shares, where the authors' code divides each by its largest value, which blows up a share of
    zeros near 0; that similarity is cut to [0, its median] and divided by 5 times its median, as in the
    authors' code in its first rounds; SignGuard-Dist is left out. If no row passes both tests those that
    pass the norm test are taken (the largest middle norm always passes), clipped (note `fallback` = 1).
    """
    need(
        0 <= lower <= 1 <= upper,
        "signguard",
        "0 <= lower <= 1 <= upper",
        "Change them.",
        lower=lower,
        upper=upper,
    )
    need(0 < sample <= 1, "signguard", "0 < sample <= 1", "Change it.", sample=sample)
    size = min(max(math.ceil(sample * updates.d), 1000), MOST_SIGNS)
    norms, features = norms_and_signs(updates, draw_coordinates(updates.d, size, ctx.rng))
    if similarity == "cosine":
        features = torch.cat([features, similarity_feature(kernels.gram(updates))], dim=1)
    radius = midpoint(norms)
    ordinary = (norms >= lower * radius) & (norms <= upper * radius)
    order = by_id(updates.ids)
    common = torch.empty(updates.n, dtype=torch.bool)
    common[order] = sign_majority(features[order])
    kept = ordinary & common
    fallback = not bool(kept.any())
    if fallback:
        kept = ordinary
    weights = clip_factors(norms, radius) * kept / int(kept.sum())
    notes = {"failed_norm": float((~ordinary).sum()), "failed_signs": float((~common).sum())}
    return Decision.weighted(updates, weights, kept=kept, notes=notes | {"fallback": float(fallback)})
