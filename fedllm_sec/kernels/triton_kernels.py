"""The GPU kernels in Triton: each reads the matrix once.

All take the whole columns only (a number that the caller rounds down), so no load carries a mask along a row and every
load is as wide as the rows' alignment allows; what is left over is less than one program's share, and torch does it.
Rows are read where they lie: row i begins `offsets[i]` elements after `x`, in whatever tensor that is.

Inner products: a program owns 4,096 columns and one pair of row tiles, and keeps their sums in registers. float32 is
split into two TF32 parts, high + low, and high high', high low', low high' are added up; what is left out is low low',
2^-22 of the whole. A tile with itself is symmetric: high (high / 2 + low)' + its transpose, two products in place of
three, and one load in place of two.

Order statistics: a program owns some columns and keeps all n values of each in registers; the pruned network is
written out as straight code for each (n, statistic), so a comparator is two instructions.
"""
# Triton reads types from the arguments.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import hashlib
import linecache
from functools import lru_cache
from typing import Any

import triton
import triton.language as tl

from fedllm_sec.kernels.networks import HIGH_ONLY, LOW_ONLY, Network

COLUMNS = 4096  # of one program of the inner products


@triton.jit
def tf32_parts(a):
    """A float32 value as a TF32 value (11 bits, rounded) and the float32 rest."""
    bits = a.to(tl.int32, bitcast=True)
    high = ((bits + 0x1000) & -8192).to(tl.float32, bitcast=True)
    return high, a - high


@triton.jit(do_not_specialize=["n", "pivot"])
def products_kernel(
    x,
    offsets,
    left,
    right,
    out,
    n,
    pivot,
    stride,
    TILE: tl.constexpr,
    PART: tl.constexpr,
    STEPS: tl.constexpr,
    VECTOR: tl.constexpr,
    SAME: tl.constexpr,
    SHIFT: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """out[part, pair] = X_left X_right^T over PART * STEPS columns, (TILE, TILE) float32; rows minus a pivot if SHIFT.

    With SAME (left = right) half of it: add its transpose. `stride` is the distance of two tiles of 512 columns: 512
    where rows are plain. SPLIT: in two TF32 parts, else as the rows' own type.
    """
    pair, part = tl.program_id(0), tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, PART)[None, :]
    rows_a = tl.load(left + pair) * TILE + tl.arange(0, TILE)
    at_a = tl.multiple_of(tl.load(offsets + rows_a, mask=rows_a < n, other=0), VECTOR)
    in_a = (rows_a < n)[:, None]
    if not SAME:
        rows_b = tl.load(right + pair) * TILE + tl.arange(0, TILE)
        at_b = tl.multiple_of(tl.load(offsets + rows_b, mask=rows_b < n, other=0), VECTOR)
        in_b = (rows_b < n)[:, None]
    if SHIFT:
        at_pivot = tl.multiple_of(tl.load(offsets + pivot), VECTOR)
    total = tl.zeros([TILE, TILE], dtype=tl.float32)
    lost = tl.zeros([TILE, TILE], dtype=tl.float32)
    for step in range(STEPS):
        column = part * (STEPS * PART) + step * PART
        here = x + column // 512 * stride + column % 512 + lane
        a = tl.load(here + at_a[:, None], mask=in_a, other=0.0)
        if not SAME:
            b = tl.load(here + at_b[:, None], mask=in_b, other=0.0)
        if SHIFT:
            base = tl.load(here + at_pivot).to(tl.float32)
            a = a.to(tl.float32) - base
            if not SAME:
                b = b.to(tl.float32) - base
        if SPLIT:
            high, low = tf32_parts(a)
            if SAME:
                some = tl.dot(high, tl.trans(high * 0.5), input_precision="tf32")
                some = tl.dot(high, tl.trans(low), some, input_precision="tf32")
            else:
                high_b, low_b = tf32_parts(b)
                some = tl.dot(high, tl.trans(high_b), input_precision="tf32")
                some = tl.dot(high, tl.trans(low_b), some, input_precision="tf32")
                some = tl.dot(low, tl.trans(high_b), some, input_precision="tf32")
        elif SAME:
            some = tl.dot(a, tl.trans(a * 0.5))
        else:
            some = tl.dot(a, tl.trans(b))
        # Tensor cores cut off what they cannot keep, always towards zero: sums of a few columns only, which are then
        # added up as Kahan does.
        some -= lost
        more = total + some
        lost = (more - total) - some
        total = more
    place = (part * tl.num_programs(0) + pair) * TILE * TILE
    local = tl.arange(0, TILE)
    tl.store(out + place + local[:, None] * TILE + local[None, :], total)


@triton.jit(do_not_specialize=["n"])
def weighted_sum_kernel(x, offsets, weights, out, n, WIDTH: tl.constexpr, VECTOR: tl.constexpr):
    """out = sum_i w_i x_i, added up in float64."""
    columns = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], dtype=tl.float64)
    for i in range(n):
        row = tl.load(x + tl.multiple_of(tl.load(offsets + i), VECTOR) + columns)
        total += tl.load(weights + i) * row.to(tl.float64)
    tl.store(out + columns, total.to(tl.float32))


@triton.jit(do_not_specialize=["n"])
def sign_sums_kernel(x, offsets, out, n, WIDTH: tl.constexpr, VECTOR: tl.constexpr):
    """out = number of positive minus number of negative values of each column."""
    columns = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], dtype=tl.int32)
    for i in range(n):
        row = tl.load(x + tl.multiple_of(tl.load(offsets + i), VECTOR) + columns)
        total += (row > 0).to(tl.int32) - (row < 0).to(tl.int32)
    tl.store(out + columns, total.to(tl.float32))


@triton.jit
def square_sums_kernel(x, offsets, out, WIDTH: tl.constexpr, STEPS: tl.constexpr, VECTOR: tl.constexpr):
    """out[part, i] = |x_i|^2 over WIDTH * STEPS columns, in float64."""
    i, part = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = x + tl.multiple_of(tl.load(offsets + i), VECTOR) + part * (WIDTH * STEPS) + tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], dtype=tl.float64)
    for step in range(STEPS):
        values = tl.load(row + step * WIDTH).to(tl.float64)
        total += values * values
    tl.store(out + part * tl.num_programs(0) + i, tl.sum(total, 0))


@triton.jit
def add_rows_kernel(x, offsets, sums, places, stride, VECTOR: tl.constexpr):
    """Add 512 columns of one row to its client's place in a tile of running sums (see `sums.py`)."""
    i, tile = tl.program_id(0), tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, 512)
    row = tl.load(x + tl.multiple_of(tl.load(offsets + i), VECTOR) + tile * 512 + lane)
    there = sums + tile * stride + tl.load(places + i) * 512 + lane
    tl.store(there, tl.load(there) + row.to(tl.float32))


def network_source(network: Network) -> str:
    """The text of a kernel that computes one statistic of n rows."""
    lines = [
        "@triton.jit",
        "def network_kernel(x, offsets, out, WIDTH: tl.constexpr, VECTOR: tl.constexpr):",
        "    columns = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)",
    ]
    load = "tl.load(x + tl.multiple_of(tl.load(offsets + {0}), VECTOR) + columns).to(tl.float32)"
    lines += [f"    v{i} = {load.format(i)}" for i in range(network.n)]
    for a, b, kind in network.comparators:
        if kind == LOW_ONLY:
            lines.append(f"    v{a} = tl.minimum(v{a}, v{b})")
        elif kind == HIGH_ONLY:
            lines.append(f"    v{b} = tl.maximum(v{a}, v{b})")
        else:
            lines.append(f"    low, high = tl.minimum(v{a}, v{b}), tl.maximum(v{a}, v{b})")
            lines.append(f"    v{a}, v{b} = low, high")
    first, last, k = network.first, network.last, network.nearest
    lines.append("    total = tl.zeros([WIDTH], dtype=tl.float64)")
    if k == 0:
        lines += [f"    total += v{r}.to(tl.float64)" for r in range(first, last)]
    else:  # see compiled_columns.order_statistics
        low, high = (network.n - 1) // 2, network.n // 2
        lines.append(f"    middle = v{low}.to(tl.float64) + v{high}.to(tl.float64)")
        for residue in range(first, first + k):
            lines.append(f"    chosen = v{residue}")
            for j in range(residue, last - k, k):
                moves = f"v{j}.to(tl.float64) + v{j + k}.to(tl.float64) < middle"
                lines.append(f"    chosen = tl.where({moves}, v{j + k}, chosen)")
            lines.append("    total += chosen.to(tl.float64)")
    lines.append(f"    tl.store(out + columns, (total / {k or last - first}).to(tl.float32))")
    return "\n".join(lines) + "\n"


@lru_cache(maxsize=64)
def network_kernel(network: Network) -> Any:
    """The compiled kernel of a network; Triton wants to see its source, so it is shown where Python keeps lines."""
    source = network_source(network)
    name = f"<network {hashlib.sha256(source.encode()).hexdigest()[:16]}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    space: dict[str, Any] = {"triton": triton, "tl": tl, "__name__": __name__}
    exec(compile(source, name, "exec"), space)  # our own text, from integers only
    return space["network_kernel"]
