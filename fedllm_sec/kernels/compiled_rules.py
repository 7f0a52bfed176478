"""Compiled: passes that one rule or two need, over the same segments of columns as the others.

Rows beside rows of their own (FLTrust, MoNNA, the cross-round check, FLDetector), signs of a sample (SignGuard), a mean
turned by its sign votes, LASA's thresholds and layers.
"""
# Untyped on purpose: numba reads types from the arguments.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import numpy as np

from fedllm_sec.kernels.compiled import compiled, compiled_sums, load_tile, window

TILE = 1024


@compiled_sums
def four_sums(x, y, out):
    """Add <x, x>, <x, y>, <y, y> and |x - y|^2 to `out`, all in float64."""
    xx = xy = yy = apart = 0.0
    for c in range(x.size):
        a, b = np.float64(x[c]), np.float64(y[c])
        gap = a - b
        xx += a * a
        xy += a * b
        yy += b * b
        apart += gap * gap
    out[0] += xx
    out[1] += xy
    out[2] += yy
    out[3] += apart


@compiled_sums
def square_from(x, y, shift):
    """|x - y - shift|^2 in float64."""
    total = 0.0
    for c in range(x.size):
        gap = np.float64(x[c]) - np.float64(y[c]) - shift[c]
        total += gap * gap
    return total


@compiled
def row_at(full, half, kind, offsets, i, extra, place, width, tile, bits):
    """Row i's columns from `place` on, where they lie if they are float32, else in the (1, TILE) tile."""
    if kind == 0:
        return full[offsets[i] + place : offsets[i] + place + width]
    load_tile(full, half, kind, offsets[i : i + 1], extra, place, 0, width, tile, bits)
    return tile[0, :width]


@compiled_sums
def dot(x, y):
    """<x, y> in float64."""
    total = 0.0
    for c in range(x.size):
        total += np.float64(x[c]) * np.float64(y[c])
    return total


@compiled
def beside(full, half, kind, offsets, extra, start, stop, partners, common, place, out):
    """Sums of `four_sums` of each row and the float32 vector at the address partners[i] (0: none), (n, 5).

    The fifth is the inner product with the vector at `common`, if there is one.
    """
    tile = np.zeros((1, TILE), np.float32)
    bits = tile.view(np.uint32)
    for i in range(offsets.size):
        for at in range(start, stop, TILE):
            width, begin = min(TILE, stop - at), place + at - start
            x = row_at(full, half, kind, offsets, i, extra, at, width, tile, bits)
            y = x if partners[i] == 0 else window(partners[i] + begin * 4, width)
            four_sums(x, y, out[i])
            if common != 0:
                out[i, 4] += dot(x, window(common + begin * 4, width))


@compiled
def keep(full, half, kind, offsets, extra, start, stop, targets, place):
    """Each row into the float32 vector at the address targets[i] (0: none)."""
    tile = np.zeros((1, TILE), np.float32)
    bits = tile.view(np.uint32)
    for i in range(offsets.size):
        if targets[i] == 0:
            continue
        for at in range(start, stop, TILE):
            width = min(TILE, stop - at)
            x = row_at(full, half, kind, offsets, i, extra, at, width, tile, bits)
            y = window(targets[i] + (place + at - start) * 4, width)
            for c in range(width):
                y[c] = x[c]


@compiled
def inner_products(left, right, start, stop, out):
    """Add <v_i, w_j> over columns start..stop of the float32 vectors at these addresses to (left, right)."""
    for at in range(start, stop, TILE):
        width = min(TILE, stop - at)
        for j in range(right.size):
            y = window(right[j] + at * 4, width)
            for i in range(left.size):
                out[i, j] += dot(window(left[i] + at * 4, width), y)


@compiled
def forecast(full, half, kind, offsets, extra, start, stop, partners, sources, weights, which, place, out):
    """|x_i - y_i - shift|^2 for the vector y_i at partners[i]; y_i then becomes x_i.

    The shift is row which[i] of `weights` times the float32 vectors at `sources`.
    """
    tile = np.zeros((1, TILE), np.float32)
    bits = tile.view(np.uint32)
    shifts = np.zeros((weights.shape[0], stop - start))
    for k in range(weights.shape[0]):
        for j in range(sources.size):
            if weights[k, j] != 0:
                add_scaled(weights[k, j], window(sources[j] + place * 4, stop - start), shifts[k])
    for i in range(offsets.size):
        if partners[i] == 0:
            continue
        for at in range(start, stop, TILE):
            width, begin = min(TILE, stop - at), at - start
            x = row_at(full, half, kind, offsets, i, extra, at, width, tile, bits)
            y = window(partners[i] + (place + begin) * 4, width)
            out[i] += square_from(x, y, shifts[which[i], begin : begin + width])
            for c in range(width):
                y[c] = x[c]


@compiled
def add_scaled(weight, x, out):
    """Add a multiple of the float32 values x to `out`, in float64."""
    for c in range(x.size):
        out[c] += weight * np.float64(x[c])


@compiled
def turned_mean(full, half, kind, offsets, extra, start, stop, theta, place, out):
    """The mean, negated where |positive - negative values| < theta; returns how many columns were."""
    n = offsets.size
    tile = np.zeros((1, TILE), np.float32)
    bits = tile.view(np.uint32)
    total, votes, turned = np.empty(TILE), np.empty(TILE, np.int32), 0
    for at in range(start, stop, TILE):
        width = min(TILE, stop - at)
        total[:] = 0
        votes[:] = 0
        for i in range(n):
            x = row_at(full, half, kind, offsets, i, extra, at, width, tile, bits)
            for c in range(width):
                total[c] += x[c]
                votes[c] += np.int32(x[c] > 0) - np.int32(x[c] < 0)
        target = out[place + at - start : place + at - start + width]
        for c in range(width):
            weak = abs(votes[c]) < theta
            target[c] = -total[c] / n if weak else total[c] / n
            turned += weak
    return turned


@compiled
def sampled_signs(full, half, kind, offsets, extra, start, stop, drawn, place, out):
    """Add each row's sum of squares, and its positive and negative values, each as often as drawn: (n, 3)."""
    tile = np.zeros((1, TILE), np.float32)
    bits = tile.view(np.uint32)
    for i in range(offsets.size):
        for at in range(start, stop, TILE):
            width, begin = min(TILE, stop - at), place + at - start
            x = row_at(full, half, kind, offsets, i, extra, at, width, tile, bits)
            times = drawn[begin : begin + width]
            up = down = np.int32(0)
            for c in range(width):
                up += np.int32(times[c]) * np.int32(x[c] > 0)
                down += np.int32(times[c]) * np.int32(x[c] < 0)
            out[i, 0] += dot(x, x)
            out[i, 1] += up
            out[i, 2] += down


@compiled
def between(full, half, kind, offsets, extra, start, stop, low, high, counts, squares, found, sizes):
    """Of each row's magnitudes: how many are below low[i], equal to it, equal to high[i], (n, 3), and those between.

    The last go to `found`, (n, columns / 4), how many they are to `sizes`; -1 where they do not fit.
    """
    tile = np.zeros((1, TILE), np.float32)
    bits = tile.view(np.uint32)
    inside = np.empty(TILE, np.float32)
    for i in range(offsets.size):
        l, h, size = low[i], high[i], 0
        for at in range(start, stop, TILE):
            width = min(TILE, stop - at)
            x = row_at(full, half, kind, offsets, i, extra, at, width, tile, bits)
            squares[i] += dot(x, x)
            below = level = top = np.int32(0)
            for c in range(width):
                size_of = abs(x[c])
                below += np.int32(size_of < l)
                level += np.int32(size_of == l)
                top += np.int32(size_of == h)
            counts[i, 0] += below
            counts[i, 1] += level
            counts[i, 2] += top
            more = 0
            for c in range(width):
                size_of = abs(x[c])
                inside[more] = size_of
                more += (size_of > l) & (size_of < h)
            if size < 0 or size + more > found.shape[1]:
                size = -1
                continue
            for c in range(more):
                found[i, size + c] = inside[c]
            size += more
        sizes[i] = size


@compiled_sums
def sparse_sums(x, threshold, out):
    """Add the sum of squares, the sum of signs and the number of values of |x| >= threshold to `out`."""
    squares = 0.0
    signs = filled = np.int32(0)
    for c in range(x.size):
        stays = abs(x[c]) >= threshold
        value = np.float64(x[c]) if stays else 0.0
        squares += value * value
        signs += np.int32(stays & (x[c] > 0)) - np.int32(stays & (x[c] < 0))
        filled += np.int32(stays & (x[c] != 0))
    out[0] += squares
    out[1] += signs
    out[2] += filled


@compiled
def layer_sums(full, half, kind, offsets, extra, start, stop, thresholds, edges, first, place, out):
    """`sparse_sums` of each row in each of the layers from `first` on that begin at `edges`: (n, layers, 3)."""
    tile = np.zeros((1, TILE), np.float32)
    bits = tile.view(np.uint32)
    for i in range(offsets.size):
        for l in range(out.shape[1]):
            begin, end = max(place, edges[first + l]), min(place + stop - start, edges[first + l + 1])
            for at in range(begin - place + start, end - place + start, TILE):
                width = min(TILE, end - place + start - at)
                x = row_at(full, half, kind, offsets, i, extra, at, width, tile, bits)
                sparse_sums(x, thresholds[i], out[i, l])


@compiled
def layer_mean(full, half, kind, offsets, extra, start, stop, thresholds, edges, first, last, shares, place, out):
    """sum_i shares[i, l] x_i in each layer l of first..last-1, without values of |x| < thresholds[i]."""
    tile = np.zeros((1, TILE), np.float32)
    bits = tile.view(np.uint32)
    total = np.empty(TILE)
    for l in range(first, last):
        begin, end = max(place, edges[l]), min(place + stop - start, edges[l + 1])
        for at in range(begin - place + start, end - place + start, TILE):
            width = min(TILE, end - place + start - at)
            total[:] = 0
            for i in range(offsets.size):
                share, threshold = shares[i, l], thresholds[i]
                if share == 0:
                    continue
                x = row_at(full, half, kind, offsets, i, extra, at, width, tile, bits)
                for c in range(width):
                    total[c] += share * np.float64(x[c]) if abs(x[c]) >= threshold else 0.0
            target = out[place + at - start : place + at - start + width]
            for c in range(width):
                target[c] = total[c]
