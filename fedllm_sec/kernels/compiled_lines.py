"""Compiled: repeated-median lines through the sorted values of each column, and how well each value fits its line.

For residual-based reweighting (`defenses.residual`), a tile of columns at a time in float64. Medians are sorting
networks pruned to the ranks that are asked for.
"""
# Untyped on purpose: numba reads types from the arguments.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import numpy as np

from fedllm_sec.kernels.compiled import compiled, larger, load_tile, smaller

TILE = 64


@compiled
def exchange(rows, steps):
    """Run the comparators (m, 3), low, high and kind, on every column of (n, TILE) float64."""
    for m in range(steps.shape[0]):
        low, high, kind = rows[steps[m, 0]], rows[steps[m, 1]], steps[m, 2]
        if kind == 0:
            for c in range(TILE):
                x, y = low[c], high[c]
                low[c] = smaller(x, y)
                high[c] = larger(x, y)
        elif kind == 1:
            for c in range(TILE):
                low[c] = smaller(low[c], high[c])
        else:
            for c in range(TILE):
                high[c] = larger(low[c], high[c])


@compiled
def mean_of(rows, steps, first, last, out):
    """The mean of ranks first..last-1 (one or two); `rows` are sorted on the way as far as that needs."""
    exchange(rows, steps)
    low, high = rows[first], rows[last - 1]
    for c in range(TILE):
        out[c] = (low[c] + high[c]) / 2


@compiled
def put_line(values, sort, few, many, ordered, slopes, at_point, slope, intercept):
    """The repeated-median line through (rank, value) of each column of (n, TILE)."""
    n = values.shape[0]
    ordered[:] = values
    exchange(ordered, sort)
    for i in range(n):
        k = 0
        for j in range(n):
            if j == i:
                continue
            inverse, one, own, other = 1.0 / (j - i), slopes[k], ordered[i], ordered[j]
            for c in range(TILE):
                one[c] = (other[c] - own[c]) * inverse
            k += 1
        mean_of(slopes, few, (n - 2) // 2, (n - 1) // 2 + 1, at_point[i])
    mean_of(at_point, many, (n - 1) // 2, n // 2 + 1, slope)
    low, high = ordered[(n - 1) // 2], ordered[n // 2]
    for c in range(TILE):
        intercept[c] = (low[c] + high[c]) / 2 - slope[c] * ((n - 1) / 2)


@compiled
def judge(tile, values, slope, intercept, many, upper, reach, work, ranks, fitted, trust, spread, floor):
    """Each value's confidence and its line's value, (n, TILE); `reach` by rank is K sqrt(1 - h)."""
    n = values.shape[0]
    for i in range(n):
        ranks[i] = i
    for i in range(n):
        for j in range(i + 1, n):
            x, y, own, other = tile[i], tile[j], ranks[i], ranks[j]
            for c in range(TILE):
                later = np.int32(x[c] > y[c])
                own[c] += later
                other[c] -= later
    work[:] = values
    mean_of(work, many, (n - 1) // 2, n // 2 + 1, spread)
    for i in range(n):
        row, value = work[i], values[i]
        for c in range(TILE):
            row[c] = abs(value[c] - spread[c])
    mean_of(work, many, (n - 1) // 2, n // 2 + 1, floor)
    for i in range(n):
        row, value, line, rank = work[i], values[i], fitted[i], ranks[i]
        for c in range(TILE):
            line[c] = intercept[c] + slope[c] * rank[c]
            row[c] = abs(value[c] - line[c])
            trust[i, c] = row[c]
    mean_of(work, upper, n // 2, (n + 1) // 2 + 1, spread)
    scale = 1.4826 * (1 + 5 / (n - 1))
    for c in range(TILE):
        spread[c] = max(scale * spread[c], 1e-7 * floor[c])
    for i in range(n):
        row, rank = trust[i], ranks[i]
        for c in range(TILE):
            bound = reach[rank[c]] * spread[c]
            row[c] = bound / max(row[c], 1e-300) if row[c] > bound else 1.0


@compiled
def lines_and_trust(full, half, kind, offsets, extra, start, stop, sort, few, many, upper, reach, place, lines, sums):
    """Put the lines, (2, d) slope and intercept, and add confidence times its deviation in the column to sums (n,)."""
    n = offsets.size
    tile, values, ordered, work, fitted, trust, at_point = _room(n)
    slopes, bits, ranks = np.empty((n - 1, TILE)), tile.view(np.uint32), np.empty((n, TILE), np.int32)
    slope, intercept, spread, floor = np.empty(TILE), np.empty(TILE), np.empty(TILE), np.empty(TILE)
    for at in range(start, stop, TILE):
        width, begin = min(TILE, stop - at), place + at - start
        tile[:] = 0
        load_tile(full, half, kind, offsets, extra, at, 0, width, tile, bits)
        values[:] = tile
        put_line(values, sort, few, many, ordered, slopes, at_point, slope, intercept)
        judge(tile, values, slope, intercept, many, upper, reach, work, ranks, fitted, trust, spread, floor)
        lines[0, begin : begin + width] = slope[:width]
        lines[1, begin : begin + width] = intercept[:width]
        spread[:] = 0
        floor[:] = 0
        for i in range(n):
            row = trust[i]
            for c in range(TILE):
                floor[c] += row[c]
        for i in range(n):
            row = trust[i]
            for c in range(TILE):
                gap = row[c] - floor[c] / n
                spread[c] += gap * gap
        for c in range(TILE):
            spread[c] = np.sqrt(spread[c] / (n - 1)) if c < width else 0.0
        for i in range(n):
            total = 0.0
            for c in range(TILE):
                total += trust[i, c] * spread[c]
            sums[i] += total


@compiled
def corrected_mean(
    full, half, kind, offsets, extra, start, stop, many, upper, reach, threshold, weights, place, lines, out
):
    """The weighted sum of the values, each with a confidence below `threshold` replaced by its line's."""
    n = offsets.size
    tile, values, _, work, fitted, trust, _ = _room(n)
    bits, ranks = tile.view(np.uint32), np.empty((n, TILE), np.int32)
    slope, intercept, spread, floor = np.zeros(TILE), np.zeros(TILE), np.empty(TILE), np.empty(TILE)
    for at in range(start, stop, TILE):
        width, begin = min(TILE, stop - at), place + at - start
        tile[:] = 0
        load_tile(full, half, kind, offsets, extra, at, 0, width, tile, bits)
        values[:] = tile
        slope[:width] = lines[0, begin : begin + width]
        intercept[:width] = lines[1, begin : begin + width]
        judge(tile, values, slope, intercept, many, upper, reach, work, ranks, fitted, trust, spread, floor)
        spread[:] = 0
        for i in range(n):
            row, value, line, weight = trust[i], values[i], fitted[i], weights[i]
            for c in range(TILE):
                spread[c] += weight * (value[c] if row[c] >= threshold else line[c])
        target = out[begin : begin + width]
        for c in range(width):
            target[c] = spread[c]


@compiled
def _room(n):
    """What a tile needs: float32 values, and six (n, TILE) float64 arrays."""
    return (
        np.zeros((n, TILE), np.float32), np.empty((n, TILE)), np.empty((n, TILE)), np.empty((n, TILE)),
        np.empty((n, TILE)), np.empty((n, TILE)), np.empty((n, TILE)),
    )  # fmt: skip
