"""Compiled: column statistics and the scatter of rows, over tiles of columns that stay in the cache.

Values are taken relative to the first row before they are added up, so float32 is enough also where all rows share a
large common part.
"""
# Untyped on purpose: numba reads types from the arguments.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import numpy as np

from fedllm_sec.kernels.compiled import addresses, compiled, load_tile, prefetch, stored_lines
from fedllm_sec.kernels.compiled_columns import TILE as NARROW
from fedllm_sec.kernels.compiled_columns import flip
from fedllm_sec.kernels.compiled_pairs import inner_products
from fedllm_sec.kernels.sums import TILE


@compiled
def mean_of(tile, base, centre):
    """`base` + `centre` becomes the mean of the rows."""
    n = tile.shape[0]
    base[:] = tile[0]
    centre[:] = 0
    for i in range(1, n):
        row = tile[i]
        for c in range(row.size):
            centre[c] += row[c] - base[c]
    scale = np.float32(1.0 / n)
    for c in range(centre.size):
        centre[c] *= scale


@compiled
def centre_rows(tile, base, centre):
    """Subtract the mean of the rows from them; `base` + `centre` is that mean."""
    mean_of(tile, base, centre)
    for i in range(tile.shape[0]):
        row = tile[i]
        for c in range(TILE):
            row[c] = (row[c] - base[c]) - centre[c]


@compiled
def root_mean_square(tile, n, out):
    """Per column of n rows."""
    out[:] = 0
    for i in range(n):
        row = tile[i]
        for c in range(TILE):
            out[c] += row[c] * row[c]
    scale = np.float32(1.0 / n)
    for c in range(TILE):
        out[c] = np.sqrt(out[c] * scale)


@compiled
def ends(words, least, most, lines, ahead):
    """Bits of each column's minimum and maximum, as `flip` gives them; uses up `words`.

    Meanwhile the cache lines `ahead` bytes from `lines` are asked for, unless `ahead` is negative.
    """
    n = words.shape[0]
    least[:], most[:] = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
    share = (lines.size + n - 1) // n if ahead >= 0 else 0
    for i in range(n):
        for line in range(i * share, min((i + 1) * share, lines.size)):
            prefetch(lines[line] + ahead)
        row = words[i]
        flip(row)
        for c in range(NARROW):
            least[c] = min(least[c], row[c])
            most[c] = max(most[c], row[c])
    flip(least)
    flip(most)


@compiled
def statistics(full, half, kind, offsets, extra, start, stop, out_start, mean, deviation):
    """Mean of each column, and where the array is not empty its deviation."""
    n = offsets.size
    tile = np.zeros((n, TILE), np.float32)
    bits = tile.view(np.uint32)
    base, centre, spread = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    for place in range(start, stop, TILE):
        width = min(TILE, stop - place)
        at = out_start + place - start
        load_tile(full, half, kind, offsets, extra, place, 0, width, tile, bits)
        centre_rows(tile, base, centre)
        for c in range(width):
            mean[at + c] = base[c] + centre[c]
        if deviation.size:
            root_mean_square(tile, n, spread)
            deviation[at : at + width] = spread[:width]


@compiled
def beyond(full, half, kind, offsets, extra, start, stop, out_start, b, drawn, out):
    """Fill columns of `out`, (m, d), with values beyond the rows, against their mean's sign; see columns.beyond."""
    n, m = offsets.size, out.shape[0]
    tile = np.zeros((n, NARROW), np.float32)
    bits, words = tile.view(np.uint32), tile.view(np.int32)
    least, most = np.empty(NARROW, np.int32), np.empty(NARROW, np.int32)
    low, high = least.view(np.float32), most.view(np.float32)
    base, centre = np.empty(NARROW, np.float32), np.empty(NARROW, np.float32)
    lines, step = stored_lines(full, half, kind, offsets, start, NARROW)
    for place in range(start, stop, NARROW):
        width = min(NARROW, stop - place)
        at = out_start + place - start
        ahead = (place - start + NARROW) * step if place + 2 * NARROW <= stop else -1
        load_tile(full, half, kind, offsets, extra, place, 0, width, tile, bits)
        mean_of(tile, base, centre)
        ends(words, least, most, lines, ahead)
        for c in range(width):
            rises = base[c] + centre[c] > 0
            edge = low[c] if rises else high[c]
            low[c] = edge
            high[c] = edge * (b - 1) if rises == (edge < 0) else edge * (1 / b - 1)
        share = drawn[at : at + width]
        for k in range(m):
            shift, row = np.float32(k / m), out[k, at : at + width]
            for c in range(width):
                u = share[c] + shift
                row[c] = low[c] + (u - 1 if u >= 1 else u) * high[c]


@compiled
def scatter(full, half, kind, offsets, extra, start, stop, out_start, perturbation, mean, direction, gram):
    """Add the inner products of centred rows and direction, (n + 1, n + 1), j >= i, to `gram` in float64.

    Where `gram` is (n + 2, n + 2), the mean is one row more.
    """
    n = offsets.size
    k = gram.shape[0]
    rows = (k + 2) // 3 * 3
    tile = np.zeros((rows, TILE), np.float32)
    stored = tile[:n]
    bits = tile.view(np.uint32)[:n]
    where = addresses(tile)
    lines, step = stored_lines(full, half, kind, offsets, start, TILE)
    inner = np.zeros((rows, rows))
    base, centre, middle = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    for place in range(start, stop, TILE):
        width = min(TILE, stop - place)
        if width < TILE:
            tile[:] = 0
        at = out_start + place - start
        load_tile(full, half, kind, offsets, extra, place, 0, width, stored, bits)
        centre_rows(stored, base, centre)
        away = tile[n]
        for c in range(TILE):
            middle[c] = base[c] + centre[c]
        if k > n + 1:
            tile[n + 1] = middle
        if perturbation == 0:
            for c in range(TILE):
                away[c] = -middle[c]
        elif perturbation == 1:
            for c in range(TILE):
                away[c] = np.float32(middle[c] < 0) - np.float32(middle[c] > 0)
        else:
            root_mean_square(stored, n, away)
            for c in range(TILE):
                away[c] = -away[c]
        mean[at : at + width] = middle[:width]
        direction[at : at + width] = away[:width]
        ahead = (place - start + TILE) * step if place + 2 * TILE <= stop else -1
        inner_products(where, inner, lines, ahead)
        for i in range(k):
            for j in range(i, k):
                gram[i, j] += inner[i, j]
    return tile[0, 0]  # it lives as long as its addresses are used
