"""What a classifier's first linear layer was fed, row by row, from neurons that one row of a batch alone moves."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedllm_sec.attacks.privacy.gradients import total_variation
from fedllm_sec.attacks.privacy.reveal import reveal
from fedllm_sec.attacks.privacy.seen import Observation, Reconstruction, as_gradient, known_rows, need_finite
from fedllm_sec.errors import AttackError
from fedllm_sec.seeds import generator_for

ALIKE = 1e-4  # distance of two neurons' quotients, per length, up to which one row has moved both
RIGHT = 1e-2  # distance of a label's bias gradients from those sent, per length, up to which it is the row's
LEAST = 1e-4  # bias gradient, per largest one, below which rounding decides the quotient


@dataclass(frozen=True)
class Fed:
    """Rows of a batch as the named layer was fed them: features (k, width) float64 and labels (k,)."""

    layer: str
    features: Tensor
    labels: Tensor


def exclusive_neurons(
    seen: Observation, *, iterations: int = 300, lr: float = 0.1, smoothness: float = 1e-3, restarts: int = 1,
    seed: int = 0,
) -> Reconstruction:  # fmt: skip
    """Images in [0, 1] with the features that the first linear layer was fed, as its gradient tells them row by row.

    Pan et al. 2022, in two steps. `fed_rows` reads features f and labels of single rows off that layer's gradient.
    Then each row's |f(x) - f|^2 / |f|^2 + `smoothness` TV(x) is minimised by Adam on the sign of the slope from grey,
    `lr` falling to a thousandth along a cosine; each row keeps its best iterate of all `restarts`. No gradient of a
    gradient is taken, and no image is mistaken for another of its class. Deviation: the paper solves the layers before
    for x; with pooling they are no linear system. It needs one gradient, not clipped, and features that fix the image:
    those of `cnn` do, the 400 of `lenet` do not. A row that does not show stays grey; `notes` has how many were read.
    """
    need_finite(seen)
    for name, given in (("iterations", iterations), ("restarts", restarts)):
        if not isinstance(given, int) or given < 1:
            raise AttackError(f"exclusive_neurons: {name}={given!r}: must be a whole number from 1 on.")
    if not (0 < lr < math.inf and 0 <= smoothness < math.inf):
        raise AttackError(f"exclusive_neurons: lr={lr!r}, smoothness={smoothness!r}: must be above 0, and 0 or more.")
    gradient, whole = as_gradient(seen)
    n = known_rows(gradient)
    if not whole:
        raise AttackError(
            "exclusive_neurons: the gradient was clipped, so its length is lost, and labels are told by it. Use "
            "invert_gradient, or set clients.max_grad_norm: null."
        )
    fed = fed_rows(gradient, n)
    network, made, features = gradient.network(), list[Tensor](), fed.features.float()
    network.get_submodule(fed.layer).register_forward_pre_hook(lambda _, given: made.append(given[0]))
    lengths = features.square().sum(1).clamp_min(1e-30)
    inputs, least = torch.full((n, *seen.shape), 0.5), torch.full((len(features),), torch.inf)
    for start in range(restarts):
        rng = generator_for(seed, "exclusive_neurons", start)
        x = (0.5 + 0.1 * torch.randn(len(features), *seen.shape, generator=rng)).clamp(0, 1).requires_grad_()
        optimizer = torch.optim.Adam([x], lr=lr)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations, eta_min=lr * 1e-3)
        for _ in range(iterations):
            made.clear()
            network(gradient.fed(x))
            apart = (made[0] - features).square().sum(1) / lengths
            values = apart + smoothness * torch.stack([total_variation(one) for one in x])  # (rows,)
            better = (values < least).nonzero()[:, 0]
            least[better], inputs[better] = values.detach()[better], x.detach()[better]
            x.grad = torch.autograd.grad(values.sum(), x)[0].sign()
            optimizer.step()
            falling.step()
            with torch.no_grad():
                x.clamp_(0, 1)
    labels = fed.labels
    if len(labels) < n:
        counts = reveal(gradient, n)
        left = (counts - labels.bincount(minlength=len(counts))).clamp_min(0)
        labels = torch.cat([labels, torch.arange(len(counts)).repeat_interleave(left)])[:n]
    return Reconstruction(inputs, labels, float(least.mean()), {"rows_read": float(len(features))})


def fed_rows(seen: Observation, n: int) -> Fed:
    """Features and labels of the rows of a gradient's batch of n, exact to rounding; as many as show, at least one.

    Pan et al. 2022 (neuron exclusivity). With out = W f + b, the gradient by W's row j is sum_i d_ij f_i and that by
    b_j is sum_i d_ij over the rows i. A neuron that ReLU stops for all rows but one has that row's f as its quotient,
    and two such neurons of one row have the same, which is how they are told here. The row's label is the class whose
    bias gradients, by the model behind the layer, are those sent; none fits a quotient of two rows, which is dropped.
    The last row may show in one neuron alone, if the whole layer's are then those sent. A row that a batch holds twice
    has the bias gradients of no label and does not show.
    Deviations: the paper tells neurons apart by ratios in the last layer, and once; here what the rows found have added
    is subtracted, and others then show.
    """
    network, layer, parts = seen.network(torch.float64), first_linear(seen), seen.parts(torch.float64)
    weight, bias = parts[f"{layer}.weight"], parts[f"{layer}.bias"]
    least = float(bias.abs().max()) * LEAST
    features, labels = list[Tensor](), list[Tensor]()
    found = True
    while found and len(labels) < n:
        found = False
        moved = (bias.abs() > least).nonzero()[:, 0]
        for own in alike(weight[moved] / bias[moved, None], one=n - len(labels) == 1):
            own = moved[own]
            fed = weight[own].mul(bias[own, None].sign()).sum(0) / bias[own].abs().sum()
            slopes = slopes_of(seen, network, layer, fed) / n  # (classes, out)
            told = own if len(own) > 1 else slice(None)  # of the last row, which moved all that is left
            off = (slopes[:, told] - bias[told]).norm(dim=1) / bias[told].norm()
            label = off.argmin()
            if not float(off[label]) <= RIGHT:  # nor where it is no number
                continue
            found = True
            features, labels = [*features, fed], [*labels, label]
            weight, bias = weight - slopes[label, :, None] * fed, bias - slopes[label]
            if len(labels) == n:
                break
    if not labels:
        raise AttackError(
            f"exclusive_neurons: no neuron of layer {layer} shows one row of a batch of {n} alone, as the model's own "
            "gradient of it would be: rows overlap, one is there twice, or what was sent is changed (pruned, clipped, "
            "noisy, zero). Use invert_gradient."
        )
    return Fed(layer, torch.stack(features), torch.stack(labels))


def alike(quotients: Tensor, one: bool) -> list[Tensor]:
    """Numbers of those of (k, width) that are the same, the largest group first; single ones only where `one`."""
    if not len(quotients):
        return []
    apart = torch.cdist(quotients, quotients) <= ALIKE * quotients.norm(dim=1)[:, None]
    groups, left = list[Tensor](), torch.ones(len(quotients), dtype=torch.bool)
    for number in range(len(quotients)):
        if bool(left[number]) and len(own := (apart[number] & left).nonzero()[:, 0]) > (0 if one else 1):
            groups.append(own)
            left[own] = False
    return sorted(groups, key=len, reverse=True)


def first_linear(seen: Observation) -> str:
    """The first layer, in the order they are run, that is fed one vector for each row and has a trained bias."""
    network, found = seen.network(), list[str]()

    def look(name: str) -> object:
        return lambda _, given: found.append(name) if given[0].ndim == 2 and len(given[0]) == 2 else None

    for name, part in network.named_modules():
        if isinstance(part, nn.Linear) and {f"{name}.weight", f"{name}.bias"} <= set(seen.layout.names):
            part.register_forward_pre_hook(look(name))  # type: ignore[arg-type]
    with torch.no_grad():
        network(seen.fed(torch.zeros(2, *seen.shape)))
    if not found:
        raise AttackError("exclusive_neurons: no trained linear layer with a bias. Use invert_gradient.")
    return found[0]


def slopes_of(seen: Observation, network: nn.Module, layer: str, fed: Tensor) -> Tensor:
    """The loss' gradient by the layer's output, were it fed this vector with each class in turn: (classes, out)."""
    made = list[Tensor]()
    part = network.get_submodule(layer)
    handles = [
        part.register_forward_pre_hook(lambda _, given: (fed.expand(len(given[0]), -1),)),
        part.register_forward_hook(lambda _, __, out: made.append(out)),
    ]
    try:
        classes = network(seen.fed(torch.zeros(1, *seen.shape, dtype=fed.dtype))).shape[-1]
        made.clear()
        logits = network(seen.fed(torch.zeros(classes, *seen.shape, dtype=fed.dtype)))
    finally:
        for handle in handles:
            handle.remove()
    loss = nn.functional.cross_entropy(logits, torch.arange(classes), reduction="sum")
    return torch.autograd.grad(loss, made[0])[0]
