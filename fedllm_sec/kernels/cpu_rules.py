"""The passes of `compiled_rules` and `compiled_lines` on a matrix in host memory; `kernels.for_rules` says where.

Letters: n rows, d columns. Rows of a matrix that truly mixes are formed block by block, as everywhere.
"""

# The compiled kernels have no annotations, and all begin with the arguments of `_rows`.
# mypy: disable-error-code="no-untyped-call,call-arg"

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedllm_sec.kernels import compiled_lines, compiled_rules, networks, team
from fedllm_sec.kernels.cpu_backend import NO_ROWS, SEGMENT, Segment, stream
from fedllm_sec.matrix import UpdateMatrix
from fedllm_sec.matrix.updates import new_rows


def beside(updates: UpdateMatrix, vectors: Sequence[Tensor | None], common: Tensor | None = None) -> Tensor:
    """<x_i, x_i>, <x_i, y_i>, <y_i, y_i>, |x_i - y_i|^2, y_i float32 vectors (none: x_i itself), and <x_i, c>: (n, 5).

    In float64, c the `common` vector; without one the last column is 0.
    """
    partners, whole = _addresses(vectors), _addresses([common])[0]

    def add(s: Segment, some: NDArray[np.float64]) -> None:
        compiled_rules.beside(*_rows(s), partners, whole, s.place.start, some)

    return _summed(updates, (updates.n, 5), add)


def keep(updates: UpdateMatrix, targets: Sequence[Tensor | None]) -> None:
    """Write each row into a float32 vector (d,); none: it is left out."""
    places = _addresses(targets)
    deque(stream(updates, lambda s: compiled_rules.keep(*_rows(s), places, s.place.start)), maxlen=0)


def inner_products(vectors: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """<v_i, w_j> of float32 vectors (d,) in float64, one read of each: (vectors, others)."""
    left, right = _addresses(vectors), _addresses(others)

    def work(start: int, stop: int) -> NDArray[np.float64]:
        some = np.zeros((len(left), len(right)))
        compiled_rules.inner_products(left, right, start, stop, some)
        return some

    d = len(vectors[0])
    jobs = (functools.partial(work, at, min(at + SEGMENT, d)) for at in range(0, d, SEGMENT))
    return torch.from_numpy(sum(team.results(jobs, team.size()), np.zeros((len(left), len(right)))))


def forecast(
    updates: UpdateMatrix,
    last: Sequence[Tensor | None],
    vectors: Sequence[Tensor],
    weights: Tensor,
    which: Sequence[int],
) -> Tensor:
    """|x_i - last_i - sum_j weights[which_i, j] v_j|^2 (0 without a last row), (n,); the last rows become the new ones.

    In float64; `vectors` are float32 ones (d,).
    """
    partners, sources, shares, choice = (
        _addresses(last),
        _addresses(vectors),
        weights.numpy(),
        np.array(which, np.int64),
    )

    def add(s: Segment, some: NDArray[np.float64]) -> None:
        compiled_rules.forecast(*_rows(s), partners, sources, shares, choice, s.place.start, some)

    return _summed(updates, (updates.n,), add)


def turned_mean(updates: UpdateMatrix, theta: float) -> tuple[Tensor, int]:
    """The mean, negated where fewer than theta net sign votes agree, (d,), and in how many columns that is."""
    out = new_rows(updates.d)
    target = out.numpy()

    def work(s: Segment) -> int:
        return int(compiled_rules.turned_mean(*_rows(s), float(theta), s.place.start, target))

    return out, sum(stream(updates, work))


def sampled_signs(updates: UpdateMatrix, columns: Tensor) -> Tensor:
    """Sums of squares, and how many of the values in `columns` are positive, zero and negative: (n, 4) float64."""
    drawn = torch.zeros(updates.d, dtype=torch.uint8)
    drawn.scatter_add_(0, columns, torch.ones(1, dtype=torch.uint8).expand(len(columns)))
    times = drawn.numpy()

    def add(s: Segment, some: NDArray[np.float64]) -> None:
        compiled_rules.sampled_signs(*_rows(s), times, s.place.start, some)

    squares, up, down = _summed(updates, (updates.n, 3), add).unbind(1)
    return torch.stack([squares, up, len(columns) - up - down, down], 1)


SAMPLE = 2**14  # values of a row that say about where its threshold lies
SIGMAS = 5.0


def magnitude_thresholds(updates: UpdateMatrix, keep: int) -> tuple[Tensor, Tensor] | None:
    """Each row's norm and its `keep`-th largest |value|, exact: (n,) float64, (n,) float32; None if it was not found.

    A sample of the columns gives two magnitudes between which the threshold lies almost surely; one pass counts what
    is below and collects the few values between.
    """
    n, d = updates.n, updates.d
    step = max(1, d // SAMPLE)
    parts = [block[:, -place.start % step :: step].abs() for place, block in updates.blocks()]
    sample = torch.cat(parts, dim=1).sort(dim=1).values
    m, rank = sample.shape[1], d - keep  # the threshold is the value of that rank, from 0
    share = rank / d
    reach = math.ceil(SIGMAS * math.sqrt(m * share * (1 - share)) + 1)
    middle = round(share * m)
    low = sample[:, max(0, middle - reach)] if middle > reach else torch.full((n,), -1.0)
    high = sample[:, middle + reach] if middle + reach < m else torch.full((n,), torch.inf)
    lows, highs = low.contiguous().numpy(), high.contiguous().numpy()

    def work(s: Segment) -> tuple[NDArray[np.int64], NDArray[np.float64], list[NDArray[np.float32]] | None]:
        counts, squares = np.zeros((n, 3), np.int64), np.zeros(n)
        found, sizes = np.empty((n, max(64, (s.stop - s.start) // 4)), np.float32), np.zeros(n, np.int64)
        compiled_rules.between(*_rows(s), lows, highs, counts, squares, found, sizes)
        inside = None if sizes.min() < 0 else [found[i, : sizes[i]].copy() for i in range(n)]
        return counts, squares, inside

    counts, squares, inside, missing = (
        np.zeros((n, 3), np.int64),
        np.zeros(n),
        [list[NDArray[np.float32]]() for _ in range(n)],
        False,
    )
    for some_counts, some_squares, some in stream(updates, work):
        counts += some_counts
        squares += some_squares
        if some is None:
            missing = True
        elif not missing:
            for own, new in zip(inside, some, strict=True):
                own.append(new)
    if missing:
        return None
    thresholds = np.empty(n, np.float32)
    for i in range(n):
        left = rank - counts[i, 0]
        values = np.concatenate(inside[i])
        if left < 0 or left >= counts[i, 1] + values.size + counts[i, 2]:
            return None
        if left < counts[i, 1]:
            thresholds[i] = lows[i]
        elif (left := left - counts[i, 1]) < values.size:
            thresholds[i] = np.partition(values, left)[left]
        else:
            thresholds[i] = highs[i]
    return torch.from_numpy(squares).sqrt(), torch.from_numpy(thresholds)


def layer_sums(updates: UpdateMatrix, thresholds: Tensor, layers: Sequence[slice]) -> Tensor:
    """Squares, signs and number of each row's values of |x| >= its threshold in each layer: (n, layers, 3) float64.

    Layers follow each other without a gap.
    """
    edges, least = _edges(layers), thresholds.numpy()

    def work(s: Segment) -> tuple[int, NDArray[np.float64]]:
        first, last = _touched(edges, s.place)
        some = np.zeros((updates.n, last - first, 3))
        compiled_rules.layer_sums(*_rows(s), least, edges, first, s.place.start, some)
        return first, some

    total = np.zeros((updates.n, len(layers), 3))
    for first, some in stream(updates, work):
        total[:, first : first + some.shape[1]] += some
    return torch.from_numpy(total)


def layer_mean(updates: UpdateMatrix, thresholds: Tensor, layers: Sequence[slice], shares: Tensor) -> Tensor:
    """sum_i shares[i, l] x_i in each layer l, of the values of |x| >= the row's threshold: (d,) float32."""
    edges, least, weights = _edges(layers), thresholds.numpy(), shares.contiguous().numpy()
    out = new_rows(updates.d)
    target = out.numpy()

    def work(s: Segment) -> None:
        first, last = _touched(edges, s.place)
        compiled_rules.layer_mean(*_rows(s), least, edges, first, last, weights, s.place.start, target)

    deque(stream(updates, work), maxlen=0)
    return out


class Lines:
    """Residual-based reweighting's two passes over n > 3 rows: lines and sums of confidences, then the mean."""

    def __init__(self, updates: UpdateMatrix, tuning: float) -> None:
        n = updates.n
        self.updates, self.lines = updates, np.empty((2, updates.d))
        self.sort = np.array([(low, high, networks.BOTH) for low, high in networks.batcher(n)], np.int64)
        self.many = _steps(networks.median(n))
        self.few, self.upper = (
            _steps(networks.median(n - 1)),
            _steps(networks.mean_of_ranks(n, n // 2, (n + 1) // 2 + 1)),
        )
        gaps = np.arange(n) - (n - 1) / 2
        leverage = 1 / n + gaps**2 * 12 / (n * (n * n - 1))
        self.reach = tuning * math.sqrt(2 / n) * np.sqrt(np.maximum(1 - leverage, 0))

    def sums(self) -> Tensor:
        """Confidences, each times their deviation in the column, added up: (n,) float64."""

        def add(s: Segment, some: NDArray[np.float64]) -> None:
            compiled_lines.lines_and_trust(
                *_rows(s), self.sort, self.few, self.many, self.upper, self.reach, s.place.start, self.lines, some
            )

        return _summed(self.updates, (self.updates.n,), add)

    def mean(self, weights: Tensor, threshold: float) -> Tensor:
        """The weighted sum of the values, with those below the threshold replaced by their line's: (d,) float32."""
        out = new_rows(self.updates.d)
        target, shares = out.numpy(), weights.numpy()

        def work(s: Segment) -> None:
            compiled_lines.corrected_mean(
                *_rows(s), self.many, self.upper, self.reach, threshold, shares, s.place.start, self.lines, target
            )

        deque(stream(self.updates, work), maxlen=0)
        return out


def _summed(
    updates: UpdateMatrix, shape: tuple[int, ...], add: Callable[[Segment, NDArray[np.float64]], None]
) -> Tensor:
    """What `add` adds to zeros of this shape for each segment, added up in the segments' order: float64."""

    def work(s: Segment) -> NDArray[np.float64]:
        some = np.zeros(shape)
        add(s, some)
        return some

    return torch.from_numpy(sum(stream(updates, work), np.zeros(shape)))


def _rows(s: Segment) -> tuple[Any, ...]:
    return s.full, s.half, s.kind, s.offsets, NO_ROWS, s.start, s.stop


def _addresses(vectors: Sequence[Tensor | None]) -> NDArray[np.int64]:
    """Where contiguous float32 vectors lie; 0 for none."""
    return np.array([0 if v is None else v.data_ptr() for v in vectors], np.int64)


def _steps(network: networks.Network) -> NDArray[np.int64]:
    return np.array(network.comparators, np.int64).reshape(-1, 3)


def _edges(layers: Sequence[slice]) -> NDArray[np.int64]:
    return np.array([*(layer.start for layer in layers), layers[-1].stop], np.int64)


def _touched(edges: NDArray[np.int64], place: slice) -> tuple[int, int]:
    """The layers that have columns of that place: first..last-1."""
    first = int(np.searchsorted(edges, place.start, side="right")) - 1
    return first, int(np.searchsorted(edges, place.stop, side="left"))
