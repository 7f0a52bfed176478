"""Exact recovery of an input from a linear layer that is fed it, and where a model's linear layers stand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedllm_sec.attacks.privacy.labels import last_layer, sign_label
from fedllm_sec.attacks.privacy.seen import Observation, Reconstruction, gradient_of_one
from fedllm_sec.errors import AttackError


def first_layer(seen: Observation) -> str:
    """The name of the linear layer, with a bias, that is fed the input itself."""
    network, probe = seen.network(), torch.rand(1, *seen.shape)
    found: list[str] = []

    def look(name: str) -> object:
        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            if given[0].numel() == probe.numel() and torch.equal(given[0].flatten(), probe.flatten()):
                found.append(name)

        return hook

    for name, part in network.named_modules():
        if isinstance(part, nn.Linear) and {f"{name}.weight", f"{name}.bias"} <= set(seen.layout.names):
            part.register_forward_pre_hook(look(name))  # type: ignore[arg-type]
    with torch.no_grad():
        network(probe)
    if not found:
        raise AttackError(
            "linear_layer: no trained linear layer with a bias is fed the input itself. Use invert_gradient, or a "
            "model such as logistic."
        )
    return found[0]


def linear_layer(seen: Observation) -> Reconstruction:
    """The input itself, from the weight and bias gradients of a linear layer that is fed it (batch 1).

    Phong et al. 2018, sec. 3: with out = W x + b, the gradient by W's row j is (dl/d out_j) x and that by b_j is
    dl/d out_j, so x is their quotient, whatever comes after the layer. The row with the largest bias gradient is
    used. In a batch of several, the quotient is a mixture of the inputs: an error here. A scale, as of clipping,
    cancels.
    """
    gradient = gradient_of_one(
        seen,
        "linear_layer",
        "the quotient of the gradients is then a mixture of the inputs. Use invert_gradient, or clients of one row a "
        "step.",
    )
    layer, parts = first_layer(seen), gradient.parts(torch.float64)
    weight, bias = parts[f"{layer}.weight"], parts[f"{layer}.bias"]
    best = int(bias.abs().argmax())
    if float(bias[best].abs()) == 0:
        raise AttackError(f"linear_layer: every bias gradient of {layer} is 0: nothing was learnt from this input.")
    fed = (weight[best] / bias[best]).view(1, *seen.shape)
    x = fed if seen.mean is None or seen.std is None else fed * seen.std.to(fed) + seen.mean.to(fed)
    label = sign_label(gradient, last_layer(seen))
    return Reconstruction(x.clamp(0, 1).float(), torch.tensor([label]), 0.0)
