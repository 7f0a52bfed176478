"""Compiled: inner products and squared distances of all pairs of rows, in one pass over tiles of 512 columns.

Float32 rows are read where they lie; others are copied into a tile first. The next tile is asked for while this one is
computed. Inner products of a tile are float32 sums over 512 columns; everything beyond a tile is float64. The distance
of a pair is |x|^2 + |y|^2 - 2xy where that is accurate. Where it cancels (D small against |x|^2 + |y|^2), the tile is
taken again relative to one of its rows, the pivot, and pairs that still cancel are summed directly. Rows whose squares
leave the range of float32 are done in float64, so a row of 1e30, or a tile of 1e-30, costs time and not accuracy. None
of this takes more than a fixed multiple of the plain work.
"""
# Untyped on purpose: numba reads types from the arguments.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import numpy as np

from fedllm_sec.kernels.compiled import (
    FULL,
    address,
    addresses,
    compiled,
    compiled_sums,
    load_tile,
    prefetch,
    stored_lines,
    window,
)
from fedllm_sec.kernels.sums import TILE

CANCELS = 16.0  # D below (|x|^2 + |y|^2) / 16 has lost more than 4 bits
TINY, HUGE = 1e-28, 1e36  # float32 squares are trusted where their sum is between these


@compiled_sums
def inner_products(rows, out, lines, ahead):
    """out[i, j] = <x_i, x_j> for j >= i, where x_i are the TILE values at the address rows[i].

    The number of rows is a multiple of 3. Meanwhile the cache lines `ahead` bytes from `lines` are asked for, unless
    `ahead` is negative.
    """
    blocks = rows.size // 3 * (rows.size // 3 + 1) // 2
    share = (lines.size + blocks - 1) // blocks
    block = 0
    for i in range(0, rows.size, 3):
        x0, x1, x2 = window(rows[i], TILE), window(rows[i + 1], TILE), window(rows[i + 2], TILE)
        for j in range(i, rows.size, 3):
            if ahead >= 0:
                for line in range(block * share, min((block + 1) * share, lines.size)):
                    prefetch(lines[line] + ahead)
                block += 1
            y0, y1, y2 = window(rows[j], TILE), window(rows[j + 1], TILE), window(rows[j + 2], TILE)
            s00 = s01 = s02 = s10 = s11 = s12 = s20 = s21 = s22 = np.float32(0)
            for c in range(TILE):
                a0, a1, a2 = x0[c], x1[c], x2[c]
                b0, b1, b2 = y0[c], y1[c], y2[c]
                s00 += a0 * b0
                s01 += a0 * b1
                s02 += a0 * b2
                s10 += a1 * b0
                s11 += a1 * b1
                s12 += a1 * b2
                s20 += a2 * b0
                s21 += a2 * b1
                s22 += a2 * b2
            out[i, j], out[i, j + 1], out[i, j + 2] = s00, s01, s02
            out[i + 1, j], out[i + 1, j + 1], out[i + 1, j + 2] = s10, s11, s12
            out[i + 2, j], out[i + 2, j + 1], out[i + 2, j + 2] = s20, s21, s22


@compiled_sums
def wide_inner_product(x, y):
    total = 0.0
    for c in range(TILE):
        total += np.float64(x[c]) * np.float64(y[c])
    return total


@compiled_sums
def direct_distance(x, y, wide):
    """|x - y|^2, in float64 if `wide` or where float32 overflows or underflows."""
    narrow = np.float32(0)
    for c in range(TILE):
        gap = x[c] - y[c]
        narrow += gap * gap
    if narrow > TINY and narrow < HUGE and not wide:
        return np.float64(narrow)
    total = 0.0
    for c in range(TILE):
        step = np.float64(x[c]) - np.float64(y[c])
        total += step * step
    return total


@compiled
def mark_wild(rows, n, inner, wild, wide):
    """Which rows' squares leave the range of float32 (or all); their inner products are redone in float64."""
    count = 0
    for i in range(n):
        square = inner[i, i]
        wild[i] = not (square > TINY and square < HUGE)
        if wild[i] and square == 0:
            largest = np.float32(0)
            for value in window(rows[i], TILE):
                largest = max(largest, abs(value))
            wild[i] = largest > 0
        wild[i] = wild[i] or wide
        count += wild[i]
    if count > 0:
        for i in range(n):
            for j in range(i, n):
                if wild[i] or wild[j]:
                    inner[i, j] = wide_inner_product(window(rows[i], TILE), window(rows[j], TILE))
    return count


@compiled
def cancelling(inner, n):
    """How many pairs have |x_i|^2 + |x_j|^2 - 2 <x_i, x_j> too small to be trusted."""
    bad = 0
    for i in range(n):
        own = inner[i, i]
        for j in range(i + 1, n):
            both = own + inner[j, j]
            bad += 0 if (both - 2.0 * inner[i, j]) * CANCELS >= both else 1
    return bad


@compiled
def expand(inner, n, out):
    """Add |x_i|^2 + |x_j|^2 - 2 <x_i, x_j> to out[i, j] for j > i."""
    for i in range(n):
        own = inner[i, i]
        for j in range(i + 1, n):
            out[i, j] += own + inner[j, j] - 2.0 * inner[i, j]


@compiled
def add(new, n, total):
    """total[i, j] += new[i, j] for j >= i."""
    for i in range(n):
        for j in range(i, n):
            total[i, j] += new[i, j]


@compiled
def repair(rows, n, inner, wild, distances, shifted, shifted_inner, pivot, bad, wide):
    """Add the distances of a tile in which some cancel; returns the pivot to try on the next tile.

    `shifted` are addresses of memory for as many rows.
    """
    again = bad * 8 > n * (n - 1) and not wide  # a quarter of all pairs: the rows share a large common part
    if again:
        base = window(rows[pivot], TILE)
        for i in range(n):
            source, out = window(rows[i], TILE), window(shifted[i], TILE)
            for c in range(TILE):
                out[c] = source[c] - base[c]
        inner_products(shifted, shifted_inner, rows[:0], -1)
        if cancelling(shifted_inner, n) * 8 > n * (n - 1):
            pivot = (pivot + 1) % n
    for i in range(n):
        for j in range(i + 1, n):
            both = inner[i, i] + inner[j, j]
            value = both - 2.0 * inner[i, j]
            if wild[i] or wild[j] or value * CANCELS < both:
                good = False
                if again and not (wild[i] or wild[j]):
                    both = shifted_inner[i, i] + shifted_inner[j, j]
                    value = both - 2.0 * shifted_inner[i, j]
                    good = value * CANCELS >= both and value > TINY and both < HUGE
                if not good:
                    value = direct_distance(window(rows[i], TILE), window(rows[j], TILE), wide)
            distances[i, j] += value
    return pivot


@compiled
def square_sums(full, half, kind, offsets, extra, start, stop, out):
    """Add each row's sum of squares over columns start..stop to `out`, (n,) float64."""
    tile = np.zeros((1, TILE), np.float32)
    bits = tile.view(np.uint32)
    zero = np.zeros(TILE, np.float32)
    for i in range(offsets.size):
        for place in range(start, stop, TILE):
            width = min(TILE, stop - place)
            if kind == FULL and width == TILE:  # read where they lie
                out[i] += direct_distance(window(address(full) + (offsets[i] + place) * 4, TILE), zero, False)
                continue
            if width < TILE:
                tile[:] = 0
            load_tile(full, half, kind, offsets[i : i + 1], extra, place, 0, width, tile, bits)
            out[i] += direct_distance(tile[0], zero, False)


@compiled
def pair_sums(full, half, kind, offsets, extra, start, stop, extra_start, want_distances, wide, gram, distances):
    """Add the inner products and squared distances over columns start..stop to (n, n) float64 arrays, j >= i.

    `wide`: everything in float64, four times slower.
    """
    n = offsets.size + extra.shape[0]
    size = (n + 2) // 3 * 3
    tile = np.zeros((size, TILE), np.float32)
    bits = tile.view(np.uint32)
    copied = addresses(tile)
    stored = np.empty(size, np.int64)
    spare = np.zeros((size, TILE), np.float32)
    shifted = addresses(spare)
    lines, step = stored_lines(full, half, kind, offsets, start, TILE)
    inner = np.zeros((size, size))
    shifted_inner = np.zeros((size, size))
    plain = np.zeros((n, n))  # of the tiles in which no distance cancels, so that none does in their sum
    wild = np.zeros(n, np.bool_)
    pivot = 0
    for place in range(start, stop, TILE):
        width = min(TILE, stop - place)
        extra_place = extra_start + place - start
        if kind == FULL and width == TILE:  # read where they lie
            for i in range(offsets.size):
                stored[i] = address(full) + (offsets[i] + place) * 4
            for e in range(extra.shape[0]):
                stored[offsets.size + e] = address(extra) + (e * extra.shape[1] + extra_place) * 4
            stored[n:] = stored[0]
            rows = stored
        else:
            if width < TILE:
                tile[:] = 0
            load_tile(full, half, kind, offsets, extra, place, extra_place, width, tile, bits)
            rows = copied
        ahead = (place - start + TILE) * step if place + 2 * TILE <= stop else -1
        inner_products(rows, inner, lines, ahead)
        wilds = mark_wild(rows, n, inner, wild, wide)
        bad = cancelling(inner, n) if want_distances else 0
        if want_distances and (bad > 0 or wilds > 0):
            add(inner, n, gram)
            pivot = repair(rows, n, inner, wild, distances, shifted, shifted_inner, pivot, bad, wide)
        else:
            add(inner, n, plain)
    add(plain, n, gram)
    if want_distances:
        expand(plain, n, distances)
    return tile[0, 0] + spare[0, 0]  # both live as long as their addresses are used


@compiled
def accumulate(full, half, kind, offsets, extra, start, stop, sums, clients, places, sum_start, wide, gram):
    """Add each row to its place in `sums`, which is tiles of TILE columns of `clients` rows, laid out flat.

    The sums' inner products are added to `gram`, (n, n), j >= i.
    """
    n = offsets.size
    size = (n + 2) // 3 * 3
    tile = np.zeros((size, TILE), np.float32)
    bits = tile.view(np.uint32)
    copied = addresses(tile)
    stored = np.empty(size, np.int64)
    lines, step = stored_lines(full, half, kind, offsets, start, TILE)
    inner = np.zeros((size, size))
    wild = np.zeros(n, np.bool_)
    place = start
    while place < stop:
        at = sum_start + place - start
        width = min(TILE - at % TILE, stop - place)
        direct = kind == FULL and width == TILE
        if not direct:
            tile[:] = 0
            load_tile(full, half, kind, offsets, extra, place, 0, width, tile, bits)
        for i in range(n):
            begin = (at // TILE * clients + places[i]) * TILE + at % TILE
            stored[i] = address(sums) + begin * 4
            total = sums[begin : begin + width]
            if direct:
                new = full[offsets[i] + place : offsets[i] + place + width]
                for c in range(width):
                    total[c] += new[c]
            else:
                copy = tile[i]
                for c in range(width):
                    total[c] += copy[c]
                    copy[c] = total[c]
        stored[n:] = stored[0]
        rows = stored if direct else copied
        place += width
        ahead = (place - start) * step if place + TILE <= stop else -1  # of the rows: the sums are foreseen without
        inner_products(rows, inner, lines, ahead)
        mark_wild(rows, n, inner, wild, wide)
        add(inner, n, gram)
    return tile[0, 0]  # it lives as long as its addresses are used
