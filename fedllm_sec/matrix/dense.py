"""What a caller gives as numbers must hold them, one after another: other kinds of tensors are refused by name."""

from __future__ import annotations

import torch
from torch import Tensor

from fedllm_sec.errors import FedError


def need_dense(tensor: Tensor, place: str, error: type[FedError]) -> None:
    """An error for a tensor on the meta device, and for a sparse, nested or packed one."""
    if tensor.is_meta:
        raise error(f"{place} is on the meta device, where tensors hold no numbers. Load them first.")
    if tensor.is_nested or tensor.layout is not torch.strided:
        kind = "nested" if tensor.is_nested else tensor.layout
        raise error(f"{place} is not dense ({kind}). Give plain numbers, as its to_dense() has.")
