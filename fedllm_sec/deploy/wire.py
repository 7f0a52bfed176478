"""Numbers on the wire: raw little-endian bytes whose length, type and shape are known before they are read.

Nothing here is unpickled, and no header of a sender decides how much memory is taken: the receiver says how many
numbers there are and in which form, and anything else is refused before a tensor is made of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedllm_sec.errors import FedError
from fedllm_sec.matrix.quantise import BLOCK, BYTES, dequantise, quantise

KIND = "fedllm_sec.raw"  # how the bytes are to be read: no library's format


class Refused(FedError):
    """What a client sent cannot be used; the message says why, in words that go into the record."""


@dataclass(frozen=True)
class Packed:
    """A flat vector as bytes; little-endian whatever the machine."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes
    kind: str = KIND


def pack(flat: Tensor, dtype: str) -> Packed:
    """A vector (d,) as float32, bfloat16 or float64 bytes."""
    x = flat.detach().cpu().contiguous()
    if dtype == "bfloat16":
        raw = x.to(torch.bfloat16).view(torch.int16).numpy().astype("<i2", copy=False)
    else:
        kind, numbers = ("<f4", torch.float32) if dtype == "float32" else ("<f8", torch.float64)
        raw = x.to(numbers).numpy().astype(kind, copy=False)
    return Packed(dtype, (len(x),), raw.tobytes())


def encode(delta: Tensor, wire: str, residual: Tensor | None = None) -> tuple[dict[str, Packed], Tensor | None]:
    """What is sent of a delta (d,), by name, and for int8 the error (d,) that goes on top of the next one.

    float32 is exact; bfloat16 rounds; int8 sends codes of blocks of 1,024 with their scales, and what was lost is
    kept by the sender and added to its next delta (error feedback, Seide et al. 2014 sec. 3.2; Karimireddy et al.
    2019), so that errors do not add up over the rounds.
    """
    if wire != "int8":
        return {"flat": pack(delta, wire)}, None
    wanted = delta.float() if residual is None else delta.float() + residual
    if not bool(wanted.isfinite().all()):  # training diverged: no codes say that, but a scale does
        nothing = torch.full((math.ceil(len(wanted) / BLOCK),), float("nan"))
        return {"flat": Packed("int8", (len(wanted),), bytes(len(wanted))), "scales": pack(nothing, "float32")}, None
    codes, scales = quantise(wanted, BLOCK)
    sent = {"flat": Packed("int8", (len(codes),), codes.cpu().numpy().tobytes()), "scales": pack(scales, "float32")}
    return sent, wanted - dequantise(codes, scales, BLOCK)


def names(wire: str) -> tuple[str, ...]:
    """The arrays of which a delta is made."""
    return ("flat", "scales") if wire == "int8" else ("flat",)


def check(array: Packed, name: str, dtype: str, size: int) -> None:
    """Raise Refused unless an array is so many numbers of this type, to the byte; nothing is read."""
    if array.kind != KIND:
        raise Refused(f"{name}: its bytes are of kind {array.kind[:40]!r}, must be {KIND!r}")
    if array.dtype != dtype:
        raise Refused(f"{name}: is of type {array.dtype[:40]!r}, must be {dtype!r}")
    if array.shape != (size,):
        raise Refused(f"{name}: has shape {str(array.shape)[:60]}, must be ({size},)")
    if len(array.data) != size * BYTES[dtype]:
        raise Refused(f"{name}: holds {len(array.data)} bytes, must be {size * BYTES[dtype]}")


def unpack(array: Packed, name: str, dtype: str, size: int) -> Tensor:
    """The vector (size,) of an array that is what it must be; float64 as such, all else as float32."""
    check(array, name, dtype, size)
    if dtype == "bfloat16":
        halves = np.frombuffer(array.data, dtype="<i2").astype(np.int16)
        return torch.from_numpy(halves).view(torch.bfloat16).float()
    kind = {"float32": "<f4", "float64": "<f8", "int8": "i1"}[dtype]
    numbers = np.frombuffer(array.data, dtype=kind)
    return torch.from_numpy(numbers.astype(numbers.dtype.newbyteorder("="), copy=True))


def decode(arrays: dict[str, Packed], wire: str, size: int) -> Tensor:
    """The delta (size,) float32 of what `encode` made; Refused where it is anything else."""
    if set(arrays) != set(names(wire)):
        raise Refused(f"delta: has arrays {sorted(map(str, arrays))[:5]}, must be {sorted(names(wire))}")
    if wire != "int8":
        return unpack(arrays["flat"], "delta", wire, size)
    blocks = math.ceil(size / BLOCK)
    check(arrays["flat"], "delta", "int8", size)
    scales = unpack(arrays["scales"], "scales", "float32", blocks)
    if not bool((scales.isfinite() & (scales >= 0)).all()):
        raise Refused("scales: are not finite and positive")
    return dequantise(unpack(arrays["flat"], "delta", "int8", size), scales, BLOCK)
