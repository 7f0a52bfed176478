"""The GPU backend: Triton kernels where they pay, torch for the rest; the same functions as `torch_backend`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fedllm_sec.kernels import torch_backend
from fedllm_sec.kernels.networks import Network
from fedllm_sec.kernels.torch_backend import accumulate, sign_sums, square_sums
from fedllm_sec.kernels.triton_kernels import (
    COLUMNS,
    network_kernel,
    products_kernel,
    weighted_sum_kernel,
)
from fedllm_sec.matrix import UpdateMatrix

__all__ = ["accumulate", "combine", "order_statistics", "pair_sums", "sign_sums", "square_sums"]

WIDTH = 1024  # columns of one program of a weighted sum
REGISTERS = 64  # rows that fit a thread's registers, one column each; beyond, torch runs the network
PARTS = 8192  # programs at once: bounds the memory for partial inner products


def stored_blocks(updates: UpdateMatrix) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(place, block, where each row begins in it): the matrix itself where it lies on the device, else its blocks."""
    if updates.picked is None or updates.owners is not None or updates.rows.device != updates.compute_device:
        for place, block in updates.blocks():
            yield place, block, torch.arange(len(block), device=block.device) * block.stride(0)
        return
    rows = updates.rows if updates.rows.stride(1) == 1 else updates.rows.contiguous()
    picked = torch.tensor(updates.picked, device=rows.device)
    yield slice(0, updates.d), rows, picked * rows.stride(0)


def products_pass(updates: UpdateMatrix, extra: Tensor | None, pivot: int | None) -> Tensor:
    """The (n, n) inner products of all rows, or of their differences to row `pivot`."""
    if extra is not None:
        return torch_backend.products_pass(updates, extra, pivot)
    n = updates.n
    tile = max(16, min(64, 1 << (n - 1).bit_length()))
    blocks = -(-n // tile)
    pairs = [(i, j) for i in range(blocks) for j in range(i, blocks)]
    total = torch.zeros(len(pairs), tile, tile, dtype=torch.float64, device=updates.compute_device)
    left, right = torch.tensor(pairs, device=total.device, dtype=torch.int64).T.contiguous()
    for _, block, offsets in stored_blocks(updates):
        for start in range(0, block.shape[1], COLUMNS * PARTS):
            some = block[:, start : start + COLUMNS * PARTS]
            parts = -(-some.shape[1] // COLUMNS)
            out = torch.empty(parts, len(pairs), tile, tile, device=total.device)
            products_kernel[(parts, len(pairs))](
                *(some, offsets, left, right, out, n, some.shape[1], pivot or 0),
                TILE=tile,
                SHIFT=pivot is not None,
                PRECISION="tf32x3" if out.is_cuda else "ieee",
            )
            total += out.sum(0, dtype=torch.float64)
    gram = torch.zeros(blocks * tile, blocks * tile, dtype=torch.float64)
    for (i, j), part in zip(pairs, total.cpu(), strict=True):
        gram[i * tile : (i + 1) * tile, j * tile : (j + 1) * tile] = part
    return gram[:n, :n]


def pair_sums(updates: UpdateMatrix, extra: Tensor | None, distances: bool) -> tuple[Tensor, Tensor]:
    """As `torch_backend.pair_sums`, with this module's inner products."""
    return torch_backend.pair_sums(updates, extra, distances, products_pass)


def combine(updates: UpdateMatrix, weights: Tensor, extra: Tensor | None, extra_weights: Tensor) -> Tensor:
    """sum_i w_i x_i + sum_e v_e y_e: (d,) float32, summed in float64."""
    if extra is not None:
        return torch_backend.combine(updates, weights, extra, extra_weights)
    out = torch.empty(updates.d, device=updates.compute_device)
    w = weights.to(out.device)
    for place, block, offsets in stored_blocks(updates):
        width = block.shape[1]
        weighted_sum_kernel[(-(-width // WIDTH),)](block, offsets, w, out[place], len(w), width, WIDTH=WIDTH)
    return out


def order_statistics(updates: UpdateMatrix, network: Network) -> Tensor:
    """The network's statistic of each column: (d,) float32."""
    if network.n > REGISTERS:
        return torch_backend.order_statistics(updates, network)
    out = torch.empty(updates.d, device=updates.compute_device)
    kernel = network_kernel(network)
    for place, block, offsets in stored_blocks(updates):
        width = block.shape[1]
        kernel[(-(-width // 128),)](block, offsets, out[place], width, WIDTH=128, num_warps=4)
    return out
