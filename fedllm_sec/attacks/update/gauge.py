"""A LoRA adapter that is the same model in other numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from fedllm_sec import kernels
from fedllm_sec.attacks.update.simple import need_positive
from fedllm_sec.errors import AttackError
from fedllm_sec.matrix import UpdateMatrix
from fedllm_sec.matrix.factors import lora_pairs
from fedllm_sec.matrix.updates import new_rows
from fedllm_sec.protocols import ThreatView


def lora_gauge(view: ThreatView, *, factor: float = 10.0) -> Tensor:
    """The own update with every A scaled by `factor` and every B by its inverse: B A, the model, does not
    change.

    Rows are deltas, so A's part becomes factor * (A_g + dA) - A_g and B's (B_g + dB) / factor - B_g. Rules that
    compare raw factors see other lengths and distances, and averaging A and B apart from each other is no longer
    averaging B A. What stands beside the factors (DoRA's lengths, modules that are trained whole) stays as it is: the
    model is the same with them too. Not from a paper: it is LoRA's own gauge freedom (Hu et al. 2022, sec. 4.1).
    """
    need_positive(factor, "lora_gauge.factor")
    if factor == 1.0:
        raise AttackError("lora_gauge.factor: 1 changes nothing. Choose another factor.")
    pairs = lora_pairs(view.layout)
    if not pairs:
        raise AttackError(
            f"lora_gauge: found no pair ...lora_A...weight / ...lora_B...weight among {len(view.layout.names)} "
            f"parameters (first: {view.layout.names[0]!r}). Train both factors of an adapter."
        )
    places = view.layout.slices()
    own, start = view.own.float(), view.global_vector.float()
    scale = torch.ones_like(start)
    for a, b in pairs:
        scale[places[a]], scale[places[b]] = factor, 1 / factor
    rows = torch.addcmul(start * (scale - 1), own, scale, out=new_rows(*own.shape, device=own.device))
    if not bool(kernels.row_norms(UpdateMatrix.of(rows)).isfinite().all()):
        raise AttackError(f"lora_gauge.factor: {factor}: the scaled factors are no longer finite. Lower it.")
    return rows
