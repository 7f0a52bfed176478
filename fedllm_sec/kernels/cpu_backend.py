"""The CPU backend: streams a matrix through the compiled kernels on a few threads.

A matrix in memory is read where it lies, and so is a file, which is mapped into memory and asked for ahead. Mixed rows
are formed one block at a time. Sums are taken over segments of 32,768 columns and added in order, so results do not
depend on the number of threads.
"""

# The compiled kernels have no annotations.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedllm_sec.kernels import compiled_columns, compiled_pairs, team
from fedllm_sec.kernels.compiled import BFLOAT16, FLOAT16, FULL
from fedllm_sec.kernels.compiled import ready as ready
from fedllm_sec.kernels.networks import Network
from fedllm_sec.kernels.torch_backend import WIDE, symmetric
from fedllm_sec.matrix import UpdateMatrix
from fedllm_sec.matrix.updates import new_rows

SEGMENT = 32768  # columns
BATCH = 4  # segments that a thread takes at once: handing one over costs as much as a tenth of its work
BLOCK_MB, AHEAD = 16.0, 4  # of a file: what a thread takes at once, and how many the system is asked for ahead
SMALL = 2**20  # elements below which threads cost more than they gain
KINDS = {torch.float32: FULL, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
NO_ROWS = np.zeros((0, 0), np.float32)

T = TypeVar("T")


@dataclass(frozen=True)
class Segment:
    """Some columns of the rows, as flat arrays for the compiled kernels."""

    place: slice  # which columns of the matrix
    start: int  # where they begin within a stored row
    stop: int
    full: NDArray[np.float32]  # one of the two is empty
    half: NDArray[np.uint16]
    kind: int
    offsets: NDArray[np.int64]  # where each row begins


def segments_of(place: slice, block: Tensor, shift: int, rows: tuple[int, ...] | None) -> Iterator[Segment]:
    """Cut columns `place` of a matrix, which begin at column `shift` of `block`, into segments."""
    if block.stride(1) != 1:
        block = block.contiguous()
    stride = block.stride(0)
    flat = block.as_strided((max(0, (block.shape[0] - 1) * stride + block.shape[1]),), (1,))
    full, half = np.empty(0, np.float32), np.empty(0, np.uint16)
    if block.dtype == torch.float32:
        full = flat.numpy()
    else:
        half = flat.view(torch.int16).numpy().view(np.uint16)
    order = np.arange(block.shape[0]) if rows is None else np.array(rows)
    offsets = (order * stride).astype(np.int64)
    for start in range(place.start, place.stop, SEGMENT):
        stop = min(start + SEGMENT, place.stop)
        begin = start - place.start + shift
        yield Segment(slice(start, stop), begin, begin + stop - start, full, half, KINDS[block.dtype], offsets)


def stream(updates: UpdateMatrix, work: Callable[[Segment], T]) -> Iterator[T]:
    """The results of `work` on all segments, in order."""
    rows, file = updates.picked, updates.file
    threads = team.size() if updates.sources * updates.d > SMALL else 1

    def from_file(place: slice) -> list[T]:
        assert file is not None
        file.check()
        return [work(s) for s in segments_of(place, updates.rows, place.start, rows)]

    def jobs() -> Iterator[Callable[[], list[T]]]:
        if updates.owners is not None or rows is None:
            for place, block in updates.blocks():
                for segment in segments_of(place, block, 0, None):
                    yield lambda s=segment: [work(s)]  # type: ignore[misc]
        elif file is not None:
            places = updates.places(BLOCK_MB)
            for i, place in enumerate(places):
                for later in places[i + AHEAD : i + AHEAD + 1] if i else places[: AHEAD + 1]:
                    file.expect(later)
                yield lambda p=place: from_file(p)  # type: ignore[misc]
        else:
            segments = segments_of(slice(0, updates.d), updates.rows, 0, rows)
            while batch := list(itertools.islice(segments, BATCH)):
                yield lambda b=batch: [work(s) for s in b]  # type: ignore[misc]

    if threads == 1:
        for job in jobs():
            yield from job()
        return
    for found in team.results(jobs(), threads):
        yield from found


def pair_sums(updates: UpdateMatrix, extra: Tensor | None, distances: bool) -> tuple[Tensor, Tensor]:
    """Inner products and, if asked for, squared distances of all rows and `extra` ones: (n, n) float64 each."""
    more = NO_ROWS if extra is None else extra.contiguous().numpy()
    n = updates.n + more.shape[0]
    wide = n * n * updates.d < WIDE

    def work(s: Segment) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        gram, apart = np.zeros((n, n)), np.zeros((n, n))
        compiled_pairs.pair_sums(
            *(s.full, s.half, s.kind, s.offsets, more, s.start, s.stop, s.place.start),
            *(distances, wide, gram, apart),
        )
        return gram, apart

    gram, apart = np.zeros((n, n)), np.zeros((n, n))
    for some_gram, some_apart in stream(updates, work):
        gram += some_gram
        apart += some_apart
    return symmetric(torch.from_numpy(gram)), symmetric(torch.from_numpy(apart))


def accumulate(sums: Tensor, places: Sequence[int], updates: UpdateMatrix) -> Tensor:
    """Add row i to client places[i] of the running `sums`; the inner products of these sums: (n, n) float64."""
    target, clients = sums.view(-1).numpy(), sums.shape[1]
    where = np.array(places, dtype=np.int64)
    n = updates.n
    wide = n * n * updates.d < WIDE

    def work(s: Segment) -> NDArray[np.float64]:
        some = np.zeros((n, n))
        compiled_pairs.accumulate(
            *(s.full, s.half, s.kind, s.offsets, NO_ROWS, s.start, s.stop),
            *(target, clients, where, s.place.start, wide, some),
        )
        return some

    gram = np.zeros((n, n))
    for some in stream(updates, work):
        gram += some
    return symmetric(torch.from_numpy(gram))


def square_sums(updates: UpdateMatrix) -> Tensor:
    """The squared norm of each row: (n,) float64."""

    def work(s: Segment) -> NDArray[np.float64]:
        some = np.zeros(s.offsets.size)
        compiled_pairs.square_sums(s.full, s.half, s.kind, s.offsets, NO_ROWS, s.start, s.stop, some)
        return some

    total = np.zeros(updates.n)
    for some in stream(updates, work):
        total += some
    return torch.from_numpy(total)


def combine(updates: UpdateMatrix, weights: Tensor, extra: Tensor | None, extra_weights: Tensor) -> Tensor:
    """sum_i w_i x_i + sum_e v_e y_e: (d,) float32, summed in float64."""
    more = NO_ROWS if extra is None else extra.contiguous().numpy()
    out = new_rows(updates.d)
    target, w = out.numpy(), torch.cat([weights, extra_weights]).numpy()

    def work(s: Segment) -> None:
        compiled_columns.weighted_sums(
            s.full, s.half, s.kind, s.offsets, more, w, s.start, s.stop, s.place.start, target, s.place.start
        )

    deque(stream(updates, work), maxlen=0)
    return out


def order_statistics(updates: UpdateMatrix, network: Network) -> Tensor:
    """The network's statistic of each column: (d,) float32."""
    out = new_rows(updates.d)
    target = out.numpy()
    steps = np.array(network.comparators, dtype=np.int64).reshape(-1, 3)
    lows, highs, kinds = (np.ascontiguousarray(steps[:, i]) for i in range(3))
    first, last, nearest = network.first, network.last, network.nearest

    def work(s: Segment) -> None:
        compiled_columns.order_statistics(
            *(s.full, s.half, s.kind, s.offsets, NO_ROWS, lows, highs, kinds, first, last, nearest),
            *(s.start, s.stop, target, s.place.start),
        )

    deque(stream(updates, work), maxlen=0)
    return out


def sign_sums(updates: UpdateMatrix) -> Tensor:
    """Per column, the number of positive minus the number of negative values: (d,) float32."""
    out = new_rows(updates.d)
    target = out.numpy()

    def work(s: Segment) -> None:
        compiled_columns.sign_sums(s.full, s.half, s.kind, s.offsets, NO_ROWS, s.start, s.stop, target, s.place.start)

    deque(stream(updates, work), maxlen=0)
    return out
