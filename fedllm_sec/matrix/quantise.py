"""A flat vector as one signed byte a value, with a scale for each block of values, and what vectors are on a wire."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedllm_sec.errors import FedError

BLOCK = 1024  # numbers that share a scale on the wire
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1, "float64": 8}  # of a number on the wire
LARGEST = 127  # codes are -127 to 127: symmetric, so that -x has the codes of x negated


def quantise(flat: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(d,) as codes (d,) int8 and scales (ceil(d / block),) float32: value = code * the scale of its block.

    A block's scale is its largest absolute value / 127 and codes are rounded to the nearest, half to even, so that no
    value moves by more than half a scale (absmax quantisation; Dettmers et al. 2022, sec. 2.1). The last block may be
    shorter. A block of zeros has the scale 0. Values must be finite.
    """
    if flat.ndim != 1 or block < 1:
        raise FedError(
            f"quantise: needs a flat vector and block >= 1, got shape {tuple(flat.shape)} and block={block}. "
            "Flatten it, or raise the block."
        )
    if not bool(flat.isfinite().all()):
        raise FedError("quantise: the vector has values that are not finite, which no scale holds. Do not send it.")
    d, blocks = len(flat), -(-len(flat) // block)
    values = torch.zeros(blocks * block, dtype=torch.float64, device=flat.device)
    values[:d] = flat
    values = values.view(blocks, block)
    scales = (values.abs().amax(1) / LARGEST).float()
    # divided by the scale that is sent; one that underflows to 0 leaves codes of 0
    codes = torch.where(scales[:, None] > 0, values / scales[:, None].double(), torch.zeros_like(values))
    return codes.round().clamp_(-LARGEST, LARGEST).to(torch.int8).flatten()[:d], scales


def dequantise(codes: Tensor, scales: Tensor, block: int) -> Tensor:
    """The vector (d,) float32 of codes (d,) int8 and their blocks' scales (ceil(d / block),)."""
    if codes.ndim != 1 or block < 1 or scales.shape != (-(-len(codes) // block),):
        raise FedError(
            f"dequantise: codes of shape {tuple(codes.shape)} in blocks of {block} do not go with scales of shape "
            f"{tuple(scales.shape)}. Pass what quantise gave, with its block."
        )
    return codes.float() * scales.float().repeat_interleave(block)[: len(codes)]


def bytes_of(wire: str, size: int) -> int:
    """What a vector of `size` numbers is on the wire."""
    return size * BYTES[wire] + (4 * math.ceil(size / BLOCK) if wire == "int8" else 0)
