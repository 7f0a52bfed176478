"""Compiled: weighted sums, sign counts and order statistics of each column, over cache-sized tiles of columns."""
# Untyped on purpose: numba reads types from the arguments.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import numpy as np

from fedllm_sec.kernels.compiled import FULL, compiled, load_tile, prefetch, stored_lines

TILE = 128
SUM_TILE = 1024


@compiled
def weighted_sums(full, half, kind, offsets, extra, weights, start, stop, extra_start, out, out_start):
    """out = sum_i w_i x_i over columns start..stop, summed in float64."""
    n = offsets.size + extra.shape[0]
    group = 4
    tile = np.zeros((group, SUM_TILE), np.float32)
    bits = tile.view(np.uint32)
    total = np.empty(SUM_TILE)
    nothing = extra[:0]
    no_offsets = offsets[:0]
    for place in range(start, stop, SUM_TILE):
        width = min(SUM_TILE, stop - place)
        total[:] = 0
        done = 0
        if kind == FULL:  # read where they lie
            while done + group <= offsets.size:
                w0, w1, w2, w3 = weights[done], weights[done + 1], weights[done + 2], weights[done + 3]
                x0 = full[offsets[done] + place : offsets[done] + place + width]
                x1 = full[offsets[done + 1] + place : offsets[done + 1] + place + width]
                x2 = full[offsets[done + 2] + place : offsets[done + 2] + place + width]
                x3 = full[offsets[done + 3] + place : offsets[done + 3] + place + width]
                for c in range(width):
                    total[c] += w0 * x0[c] + w1 * x1[c] + w2 * x2[c] + w3 * x3[c]
                done += group
        for first in range(done, n, group):
            w = np.zeros(group)
            for g in range(min(group, n - first)):
                i = first + g
                w[g] = weights[i]
                one = tile[g : g + 1]
                if i < offsets.size:
                    rows = offsets[i : i + 1]
                    load_tile(full, half, kind, rows, nothing, place, 0, width, one, bits[g : g + 1])
                else:
                    e = i - offsets.size
                    shift = extra_start + place - start
                    vector = extra[e : e + 1]
                    load_tile(full, half, kind, no_offsets, vector, 0, shift, width, one, bits[g : g + 1])
            for g in range(min(group, n - first), group):
                tile[g] = 0
            w0, w1, w2, w3 = w[0], w[1], w[2], w[3]
            x0, x1, x2, x3 = tile[0], tile[1], tile[2], tile[3]
            for c in range(width):
                total[c] += w0 * x0[c] + w1 * x1[c] + w2 * x2[c] + w3 * x3[c]
        target = out[out_start + place - start : out_start + place - start + width]
        for c in range(width):
            target[c] = total[c]


@compiled
def sign_sums(full, half, kind, offsets, extra, start, stop, out, out_start):
    """out = number of positive minus number of negative values of each column."""
    n = offsets.size
    tile = np.zeros((n, TILE), np.float32)
    bits = tile.view(np.uint32)
    total = np.empty(TILE, np.float32)
    for place in range(start, stop, TILE):
        width = min(TILE, stop - place)
        load_tile(full, half, kind, offsets, extra, place, 0, width, tile, bits)
        total[:] = 0
        for i in range(n):
            row = tile[i]
            for c in range(TILE):
                total[c] += np.float32(row[c] > 0) - np.float32(row[c] < 0)
        out[out_start + place - start : out_start + place - start + width] = total[:width]


@compiled
def ordered(word):
    """float32 bits as an integer of the same order, and back: negative numbers count downwards."""
    return word ^ ((word >> np.int32(31)) & np.int32(0x7FFFFFFF))


@compiled
def flip(words):
    """`ordered` of a tile's row, in place."""
    for c in range(TILE):
        words[c] = ordered(words[c])


@compiled
def exchange(words, lows, highs, kinds, lines, ahead):
    """Run the comparators on every column of a tile of integers (whose min and max compile to one instruction).

    Meanwhile the cache lines `ahead` bytes from `lines` are asked for, unless `ahead` is negative.
    """
    share = (lines.size + lows.size - 1) // max(1, lows.size) if ahead >= 0 else 0
    for m in range(lows.size):
        for line in range(m * share, min((m + 1) * share, lines.size)):
            prefetch(lines[line] + ahead)
        low, high = words[lows[m]], words[highs[m]]
        if kinds[m] == 0:
            for c in range(TILE):
                x, y = low[c], high[c]
                low[c] = min(x, y)
                high[c] = max(x, y)
        elif kinds[m] == 1:
            for c in range(TILE):
                low[c] = min(low[c], high[c])
        else:
            for c in range(TILE):
                high[c] = max(low[c], high[c])


@compiled
def order_statistics(
    full, half, kind, offsets, extra, lows, highs, kinds, first, last, nearest, start, stop, out, out_start
):
    """Sort what is needed of each column, then average some ranks, or the `nearest` around the median.

    `nearest` 0: the mean of ranks first..last-1. Otherwise: of the ranks first..last-1, all in order, the mean
    of the `nearest` values closest to the median of all n; of two equally close values the smaller one counts.
    """
    n = offsets.size
    tile = np.zeros((n, TILE), np.float32)
    bits = tile.view(np.uint32)
    words, stored = tile.view(np.int32), full.view(np.int32)
    total = np.empty(TILE)
    middle = np.empty(TILE)
    chosen = np.empty(TILE, np.float32)
    lines, step = stored_lines(full, half, kind, offsets, start, TILE)
    for place in range(start, stop, TILE):
        width = min(TILE, stop - place)
        ahead = (place - start + TILE) * step if place + 2 * TILE <= stop else -1
        if kind == FULL and width == TILE:  # in one go
            for i in range(n):
                begin = offsets[i] + place
                source, row = stored[begin : begin + TILE], words[i]
                for c in range(TILE):
                    row[c] = ordered(source[c])
        else:
            load_tile(full, half, kind, offsets, extra, place, 0, width, tile, bits)
            for i in range(n):
                flip(words[i])
        exchange(words, lows, highs, kinds, lines, ahead)
        for r in range(first, last):
            flip(words[r])
        total[:] = 0
        if nearest == 0:
            for r in range(first, last):
                row = tile[r]
                for c in range(TILE):
                    total[c] += row[c]
            scale = 1.0 / (last - first)
        else:
            low, high = tile[(n - 1) // 2], tile[n // 2]
            for c in range(TILE):
                middle[c] = np.float64(low[c]) + np.float64(high[c])  # twice the median
            # The values nearest the median are `nearest` consecutive ranks. The window moves up past rank j for
            # as long as rank j + nearest is closer; each residue of the rank modulo `nearest` is in it once.
            for residue in range(first, first + nearest):
                row = tile[residue]
                for c in range(TILE):
                    chosen[c] = row[c]
                for j in range(residue, last - nearest, nearest):
                    below, above = tile[j], tile[j + nearest]
                    for c in range(TILE):
                        moves = np.float64(below[c]) + np.float64(above[c]) < middle[c]
                        chosen[c] = above[c] if moves else chosen[c]
                for c in range(TILE):
                    total[c] += chosen[c]
            scale = 1.0 / nearest
        target = out[out_start + place - start : out_start + place - start + width]
        for c in range(width):
            target[c] = total[c] * scale
