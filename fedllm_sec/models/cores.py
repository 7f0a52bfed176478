"""A trained r x r core between fixed outer factors: W + s B R A, in which a mean of cores is the mean of products.

LoRA-SB and Fed-SB (Singhal et al. 2025) take B and A from the gradient of a first batch, which no server without data
has; here they are the leading singular vectors of the layer's own weight, as in LoRA-XS (Balazy et al. 2024), and R
starts at 0. B and A are orthonormal, so that lengths and angles of cores are those of products.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from fedllm_sec.errors import RecipeError

MORE, TURNS = 8, 8  # columns beside the r, and passes, of the search for singular vectors


class Core(torch.nn.Module):
    """lora_B as the product of a fixed (out, r) and the trained (r, r), which is the parameter's original."""

    def __init__(self, outer: Tensor) -> None:
        super().__init__()
        self.register_buffer("outer", outer)

    def forward(self, core: Tensor) -> Tensor:
        return self.outer @ core  # type: ignore[operator]

    def right_inverse(self, whole: Tensor) -> Tensor:
        return self.outer.T @ whole  # type: ignore[operator]


def give_cores(adapted: Any) -> None:
    """Fix the outer factors of every adapted layer and train what lies between them."""
    for name, layer in adapted.named_modules():
        if not hasattr(layer, "lora_A") or "default" not in (*layer.lora_A, *getattr(layer, "lora_embedding_A", ())):
            continue
        weight = layer.get_base_layer().weight
        if "default" not in layer.lora_A or weight.ndim != 2:
            raise RecipeError(
                f"model.lora.average: core: {name} is no linear layer, whose weight has singular vectors. Leave it out "
                "of target_modules."
            )
        tall, wide = layer.lora_B["default"], layer.lora_A["default"]
        if not weight.is_meta:  # where a model is only counted
            left, right = leading(weight.T if layer.fan_in_fan_out else weight, wide.weight.shape[0])
            with torch.no_grad():
                wide.weight.copy_(right)
        else:
            left = torch.empty_like(tall.weight)
        wide.weight.requires_grad_(False)
        # B is 0 and so is R; the shapes of the two differ, which torch calls unsafe
        parametrize.register_parametrization(tall, "weight", Core(left.to(tall.weight)), unsafe=True)


def leading(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U (out, r) and V^T (r, in) of the largest singular values, orthonormal; the same whatever the run's seed.

    By subspace iteration from fixed numbers (Halko et al. 2011): of singular values that lie close together it may find
    a mixture, which serves as well.
    """
    w = weight.detach().float()
    drawn = torch.randn(w.shape[1], min(rank + MORE, *w.shape), generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(drawn.to(w.device))[0]
    for _ in range(TURNS):
        basis = torch.linalg.qr(w.T @ (w @ basis))[0]
    left, _, right = torch.linalg.svd(w @ basis, full_matrices=False)
    return left[:, :rank].contiguous(), (right @ basis.T)[:rank].contiguous()


def whole_factors(tensors: Mapping[str, Tensor], adapted: Any) -> dict[str, Tensor]:
    """The tensors of a peft adapter, with B R as the B of each layer in place of R and the fixed B."""
    made = {name: tensor for name, tensor in tensors.items() if ".parametrizations." not in name}
    for name, layer in adapted.named_modules():
        if hasattr(layer, "lora_B") and parametrize.is_parametrized(layer.lora_B["default"]):
            made[f"{name}.lora_B.weight"] = layer.lora_B["default"].weight.detach()
    return made
