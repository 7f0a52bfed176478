"""One byte a number: blocks of a flat vector as int8 codes with a float32 scale each."""

from __future__ import annotations

import torch
from torch import Tensor


def quantise(flat: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Codes (d,) int8 and scales (ceil(d / block),) float32 of a vector (d,): x is near code * scale.

    A block's scale is its largest |x| / 127, so no value is off by more than half a scale, and 0 stays 0. A block that
    is not finite has a scale that is not finite: the receiver sees that.
    """
    x = flat.detach().to(torch.float32)
    padded = torch.nn.functional.pad(x, (0, -len(x) % block)).view(-1, block)
    scales = padded.abs().amax(1) / 127
    codes = (padded / torch.where(scales > 0, scales, 1.0)[:, None]).round().clamp(-127, 127).nan_to_num()
    return codes.to(torch.int8).view(-1)[: len(x)].contiguous(), scales


def dequantise(codes: Tensor, scales: Tensor, block: int) -> Tensor:
    """The vector (d,) float32 that codes (d,) and scales (ceil(d / block),) stand for."""
    return codes.to(torch.float32) * scales.repeat_interleave(block)[: len(codes)]
