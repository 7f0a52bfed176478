"""The GPU backend: Triton kernels for what fills them, torch for the last columns; the functions of `torch_backend`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedllm_sec.kernels import torch_backend
from fedllm_sec.kernels.networks import Network
from fedllm_sec.kernels.sums import TILE, plain_rows, tiles
from fedllm_sec.kernels.triton_kernels import (
    COLUMNS,
    add_rows_kernel,
    network_kernel,
    products_kernel,
    sign_sums_kernel,
    square_sums_kernel,
    weighted_sum_kernel,
)
from fedllm_sec.matrix import UpdateMatrix

__all__ = ["accumulate", "combine", "order_statistics", "pair_sums", "sign_sums", "square_sums"]

CHOSEN = 64  # rows of a mean around the median; its choices take the compiler minutes beyond
WIDTH = 1024  # columns of one program of a sum over rows
REGISTERS = 128  # rows that fit a thread's registers, one column each; beyond, torch runs the network
PARTS = 8192  # programs at once: bounds the memory for partial inner products


@dataclass(frozen=True)
class Block:
    """Some columns of all rows on the device, and where each row begins."""

    place: slice
    columns: int
    x: Tensor  # the tensor whose address the kernels get
    offsets: Tensor  # (n,) int64: elements from `x` to each row
    vector: int  # elements that one load may take: 16 bytes, or 1 where a row is not so aligned
    rows: tuple[Tensor, ...]  # the tensors that hold the rows, with the rows of each that are meant
    chosen: tuple[Tensor, ...]

    def rest(self, whole: int) -> Tensor:
        """The columns from `whole` on: (n, c) float32."""
        return torch.cat([rows[chosen, whole:].float() for rows, chosen in zip(self.rows, self.chosen, strict=True)])


def stored_blocks(updates: UpdateMatrix, extra: Tensor | None = None) -> Iterator[Block]:
    """The matrix itself where it lies on the device, else its blocks; `extra` rows (float32) follow, wherever they lie.

    Beside `extra` rows those of half precision come as float32 blocks: a kernel reads one type.
    """
    if updates.picked is None or (extra is not None and updates.rows.dtype != extra.dtype):
        for place, block in updates.blocks():
            yield block_of(place, [block], [torch.arange(len(block), device=block.device)], extra)
        return
    picked = torch.tensor(updates.picked, device=updates.compute_device)
    if updates.owners is None and updates.rows.device == picked.device and updates.rows.stride(1) == 1:
        yield block_of(slice(0, updates.d), [updates.rows], [picked], extra)
        return
    for place, raw in updates.raw_blocks():
        yield block_of(place, [raw if raw.stride(1) == 1 else raw.contiguous()], [picked], extra)


def block_of(place: slice, rows: list[Tensor], chosen: list[Tensor], extra: Tensor | None) -> Block:
    """The block of some rows, with `extra` ones of the same type."""
    if extra is not None:
        part = extra[:, place]
        rows, chosen = [*rows, part], [*chosen, torch.arange(len(part), device=part.device)]
    x = rows[0]
    size, start = x.element_size(), x.data_ptr()
    begins = [(held.data_ptr() - start) // size + held.stride(0) * which for held, which in zip(rows, chosen)]  # noqa: B905
    even = all(held.data_ptr() % 16 == 0 and held.stride(0) * size % 16 == 0 for held in rows)
    vector = 16 // size if even else 1
    return Block(place, x.shape[1], x, torch.cat(begins), vector, tuple(rows), tuple(chosen))


@dataclass(frozen=True)
class Programs:
    """How the inner products of n rows are cut into programs; chosen on an H200 (docs/kernels.md, "On a GPU")."""

    tile: int  # rows
    part: int  # columns of one product
    warps: int
    stages: int  # loads under way


def programs(n: int, split: bool, halves: bool) -> Programs:
    """The fastest that spills no register: for float32 and shifted rows (`split`), or halves multiplied as they are."""
    if split:
        return Programs(16, 64, 1, 3) if n <= 16 and not halves else Programs(32, 32, 2, 2 if halves else 3)
    if n <= 16:
        return Programs(16, 128, 1, 3)
    return Programs(32, 64, 2, 3) if n <= 32 else Programs(64, 64, 4, 3)


def products_settings(cut: Programs, vector: int, same: bool, shift: bool, split: bool) -> dict[str, int | bool]:
    """The constants that `products_kernel` is compiled for."""
    fixed = {"TILE": cut.tile, "PART": cut.part, "STEPS": COLUMNS // cut.part, "VECTOR": vector}
    return {**fixed, "SAME": same, "SHIFT": shift, "SPLIT": split}


def network_width(n: int, halves: bool) -> int:
    """How many columns a program of an order statistic takes: 4, 2 or 1 of a thread."""
    return 512 if n <= 16 and not halves else 256 if n <= 32 else 128


def tile_products(
    x: Tensor, offsets: Tensor, columns: int, vector: int, stride: int, pivot: int | None
) -> tuple[Tensor, int]:
    """Inner products over the whole programs' columns, (n, n) float64 on the device, and how many columns these are."""
    n, device, whole = len(offsets), x.device, columns // COLUMNS
    halves = x.dtype != torch.float32
    split = pivot is not None or not halves
    cut = programs(n, split, halves)
    tile = cut.tile
    blocks = -(-n // tile)
    gram = torch.zeros(blocks, tile, blocks, tile, dtype=torch.float64, device=device)
    every = [(i, i) for i in range(blocks)], [(i, j) for i in range(blocks) for j in range(i + 1, blocks)]
    for pairs in every:
        if not pairs:
            continue
        left, right = torch.tensor(pairs, device=device).T.contiguous()
        same = pairs is every[0]
        for first in range(0, whole, PARTS):
            parts = min(PARTS, whole - first)
            out = torch.empty(parts, len(pairs), tile, tile, device=device)
            products_kernel[(len(pairs), parts)](
                *(x[..., first * COLUMNS :] if stride == TILE else x[first * COLUMNS // TILE :], offsets, left, right),
                *(out, n, pivot or 0, stride),
                **products_settings(cut, vector, same, pivot is not None, split),
                num_warps=cut.warps,
                num_stages=cut.stages,
            )
            sums = out.sum(0, dtype=torch.float64)
            for (i, j), part in zip(pairs, sums, strict=True):
                gram[i, :, j] += part + part.T if same else part
    return gram.view(blocks * tile, -1)[:n, :n], whole * COLUMNS


def products_pass(updates: UpdateMatrix, extra: Tensor | None, pivot: int | None) -> Tensor:
    """The inner products of all rows, or of their differences to row `pivot`: (n, n) float64, the upper half right."""
    total: Tensor | None = None
    for block in stored_blocks(updates, extra):
        gram, whole = tile_products(block.x, block.offsets, block.columns, block.vector, TILE, pivot)
        if whole < block.columns:
            rest = block.rest(whole)
            rest = rest.double() if pivot is None else (rest - rest[pivot]).double()
            gram = gram + rest @ rest.T
        total = gram if total is None else total + gram
    n = updates.n + (0 if extra is None else extra.shape[0])
    return torch.zeros(n, n, dtype=torch.float64) if total is None else total.cpu()


def pair_sums(updates: UpdateMatrix, extra: Tensor | None, distances: bool) -> tuple[Tensor, Tensor]:
    """As `torch_backend.pair_sums`, with this module's inner products."""
    return torch_backend.pair_sums(updates, extra, distances, products_pass)


def accumulate(sums: Tensor, places: Sequence[int], updates: UpdateMatrix) -> Tensor:
    """Add row i to client places[i] of the running `sums`; the inner products of these sums: (n, n) float64."""
    where, stride = torch.tensor(places, device=sums.device), sums.stride(0)
    for block in stored_blocks(updates):
        first, over = divmod(block.place.start, TILE)
        whole = block.columns // TILE if over == 0 else 0
        if whole:
            add_rows_kernel[(updates.n, whole)](
                block.x, block.offsets, sums[first:], where, stride, VECTOR=block.vector, num_warps=4
            )
        touched = slice(first + whole, tiles(block.place.stop))
        if whole * TILE < block.columns:
            start = block.place.start + whole * TILE - touched.start * TILE
            rows = plain_rows(sums[touched, where], (touched.stop - touched.start) * TILE)
            rows[:, start : start + block.columns - whole * TILE] += block.rest(whole * TILE)
            sums[touched, where] = rows.view(updates.n, -1, TILE).transpose(0, 1)
    gram, done = tile_products(sums, where * TILE, sums.shape[0] * TILE, 4, stride, None)
    rest = plain_rows(sums[done // TILE :, where], sums.shape[0] * TILE - done).double()
    gram = torch_backend.symmetric((gram + rest @ rest.T).cpu())
    squares = gram.diagonal()
    if bool(((squares > torch_backend.TINY * updates.d) & (squares < torch_backend.HUGE)).all()):
        return gram
    return direct_products(sums, where)  # a client's sums leave the range of float32 squares


def direct_products(sums: Tensor, where: Tensor) -> Tensor:
    """The inner products of some clients' sums in float64: (n, n)."""
    gram = torch.zeros(len(where), len(where), dtype=torch.float64, device=sums.device)
    for start in range(0, len(sums), 2**13):
        rows = sums[start : start + 2**13, where].double()
        gram += torch.einsum("tic,tjc->ij", rows, rows)
    return gram.cpu()


def square_sums(updates: UpdateMatrix) -> Tensor:
    """The squared norm of each row: (n,) float64."""
    total = torch.zeros(updates.n, dtype=torch.float64, device=updates.compute_device)
    for block in stored_blocks(updates):
        parts = block.columns // COLUMNS
        if parts:
            out = torch.empty(parts, updates.n, dtype=torch.float64, device=total.device)
            square_sums_kernel[(updates.n, parts)](
                block.x, block.offsets, out, WIDTH=WIDTH, STEPS=COLUMNS // WIDTH, VECTOR=block.vector
            )
            total += out.sum(0)
        total += block.rest(parts * COLUMNS).double().square().sum(1)
    return total.cpu()


def combine(updates: UpdateMatrix, weights: Tensor, extra: Tensor | None, extra_weights: Tensor) -> Tensor:
    """sum_i w_i x_i + sum_e v_e y_e: (d,) float32, summed in float64."""
    out = torch.empty(updates.d, device=updates.compute_device)
    w = torch.cat([weights, extra_weights] if extra is not None else [weights]).to(out.device)
    for block in stored_blocks(updates, extra):
        parts = block.columns // WIDTH
        here = out[block.place]
        if parts:
            weighted_sum_kernel[(parts,)](
                block.x, block.offsets, w, here, len(w), WIDTH=WIDTH, VECTOR=block.vector, num_warps=4
            )
        here[parts * WIDTH :] = (w @ block.rest(parts * WIDTH).double()).float()
    return out


def sign_sums(updates: UpdateMatrix) -> Tensor:
    """Per column, the number of positive minus the number of negative values: (d,) float32."""
    out = torch.empty(updates.d, device=updates.compute_device)
    for block in stored_blocks(updates):
        parts = block.columns // WIDTH
        here = out[block.place]
        if parts:
            sign_sums_kernel[(parts,)](block.x, block.offsets, here, updates.n, WIDTH=WIDTH, VECTOR=block.vector)
        here[parts * WIDTH :] = block.rest(parts * WIDTH).sign().sum(0)
    return out


def order_statistics(updates: UpdateMatrix, network: Network) -> Tensor:
    """The network's statistic of each column: (d,) float32."""
    n = network.n
    if n > REGISTERS or (network.nearest and n > CHOSEN):
        return torch_backend.order_statistics(updates, network)
    out = torch.empty(updates.d, device=updates.compute_device)
    kernel = network_kernel(network)
    width = network_width(n, updates.rows.dtype != torch.float32)
    for block in stored_blocks(updates):
        parts = block.columns // width
        here = out[block.place]
        if parts:
            kernel[(parts,)](block.x, block.offsets, here, WIDTH=width, VECTOR=block.vector, num_warps=4)
        here[parts * width :] = torch_backend.sorted_statistic(block.rest(parts * width), network)
    return out
