"""Which labels a batch held, from the gradient of the last layer alone: one label, or how often each occurs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedllm_sec.attacks.privacy.seen import Observation
from fedllm_sec.errors import AttackError


@dataclass(frozen=True)
class LastLayer:
    """The linear layer whose output is the logits."""

    name: str
    weight: Tensor  # (classes, features) float64, as the client received it
    bias: Tensor | None  # (classes,)

    def softmax(self, features: Tensor) -> Tensor:
        """(n, features) to (n, classes)."""
        return nn.functional.linear(features, self.weight, self.bias).softmax(-1)


def last_layer(seen: Observation) -> LastLayer:
    """Found by what it gives for a random input, so that a layer's name does not matter."""
    network, probe = seen.network(), torch.rand(2, *seen.shape)
    made: dict[str, Tensor] = {}
    for name, part in network.named_modules():
        if isinstance(part, nn.Linear):
            part.register_forward_hook(lambda _, __, out, name=name: made.update({name: out}))
    with torch.no_grad():
        logits = network(seen.fed(probe))
    names = [name for name, out in made.items() if out.shape == logits.shape and torch.equal(out, logits)]
    if not names or f"{names[-1]}.weight" not in seen.layout.names:
        raise AttackError(
            "reveal_labels: no trained linear layer gives the logits, and the labels are read off its gradient. Give "
            "labels, or choose a model that ends in one."
        )
    parts = seen.layout.split(seen.start.double())
    name = names[-1]
    return LastLayer(name, parts[f"{name}.weight"], parts.get(f"{name}.bias"))


def features_of(seen: Observation, layer: LastLayer, x: Tensor, network: nn.Module | None = None) -> Tensor:
    """What the last layer is fed for inputs in [0, 1]: (n, features) float64."""
    network, fed = network if network is not None else seen.network(), list[Tensor]()
    handle = network.get_submodule(layer.name).register_forward_pre_hook(lambda _, given: fed.append(given[0]))
    try:
        with torch.no_grad():
            network(seen.fed(x))
    finally:
        handle.remove()
    return fed[0].double()


def sign_label(seen: Observation, layer: LastLayer) -> int:
    """The one label of a batch of one: iDLG (Zhao et al. 2020, sec. 3).

    The gradient by logit j is p_j - [j = label]: below 0 for the label alone. The bias gradient is that; without a
    bias, the sum of the weight's row has its sign where the features are not negative (after ReLU or sigmoid).
    """
    parts = seen.parts(torch.float64)
    bias = parts.get(f"{layer.name}.bias")
    return int((bias if bias is not None else parts[f"{layer.name}.weight"].sum(1)).argmin())


def restored_counts(seen: Observation, layer: LastLayer, n: int) -> Tensor:
    """The labels' counts in a batch of n from one gradient: iLRG (Ma et al. 2023, sec. 3), (classes,) that sum to n.

    With P[j, c] the mean probability that the model gives class j on inputs of class c, the bias gradient is
    g_j = sum_c (P[j, c] - [j = c]) n_c / n: linear in the counts. P comes from the model itself: the quotient of the
    weight's and the bias' gradient in row c is about the mean feature of class c, which the last layer turns into
    probabilities. A class whose quotient is not usable (its gradient is too small beside the largest, or a feature lies
    beyond what any quotient shows) gets the mean of the others. The system is solved by least squares with the sum of
    the counts as one more equation (it has rank classes - 1 without), then rounded. Deviation: rounding is a search
    for the integers of least residual.
    """
    parts = seen.parts(torch.float64)
    weight, bias = parts[f"{layer.name}.weight"], parts.get(f"{layer.name}.bias")
    if bias is None:
        raise AttackError("reveal_labels: the last layer has no bias. Give auxiliary rows, or a model with a bias.")
    quotients = weight / bias.where(bias != 0, torch.full_like(bias, torch.nan))[:, None]  # (classes, features)
    present = bias < -1e-3 * bias.abs().max()  # a label that occurs pulls its own logit up
    usable = present & quotients.isfinite().all(1)
    if not bool(usable.any()):
        raise AttackError("reveal_labels: no class has a bias gradient below 0: this is no cross-entropy's gradient.")
    probabilities = layer.softmax(quotients.where(usable[:, None], torch.zeros_like(quotients)))
    probabilities[~usable] = probabilities[usable].mean(0)
    return least_squares_counts(probabilities.T, bias, n)


def statistics(seen: Observation, layer: LastLayer) -> Tensor:
    """P (classes, classes) of `restored_counts`, from the observer's own rows at the received model."""
    aux = seen.auxiliary
    assert aux is not None
    if missing := [c for c in range(aux.classes) if not bool((aux.y == c).any())]:
        raise AttackError(f"reveal_labels: the auxiliary rows have none of class {missing}. Give some of every class.")
    given = layer.softmax(features_of(seen, layer, aux.x))
    return torch.stack([given[aux.y == c].mean(0) for c in range(aux.classes)], -1)


def least_squares_counts(probabilities: Tensor, bias: Tensor, n: int) -> Tensor:
    """Counts (classes,) that sum to n, from P (classes, classes) of `restored_counts` and a mean bias gradient."""
    classes = len(bias)
    system = torch.cat([probabilities - torch.eye(classes, dtype=bias.dtype), bias.new_ones(1, classes)])
    shares = torch.linalg.lstsq(system, torch.cat([bias, bias.new_ones(1)])[:, None]).solution[:, 0]
    return rounded(shares * n, n, system[:-1], bias)


def rounded(counts: Tensor, n: int, system: Tensor, right: Tensor) -> Tensor:
    """Integers >= 0 that sum to n near `counts`, moved one by one while |system counts / n - right| falls."""
    wanted = counts.clamp_min(0)
    wanted = wanted * (n / wanted.sum().clamp_min(1e-12))
    found = wanted.floor().long()
    order = (wanted - found).argsort(descending=True)
    found[order[: n - int(found.sum())]] += 1
    gram, target = (system.T @ system) / n**2, (system.T @ right) / n
    while True:  # each move lowers a residual with finitely many values
        slope, own = 2 * (gram @ found.double() - target), gram.diagonal()
        gain = slope[None, :] - slope[:, None] + own[None, :] + own[:, None] - 2 * gram  # (from, to) one row
        gain[found == 0] = torch.inf
        place = int(gain.argmin())
        if float(gain.flatten()[place]) >= -1e-15:
            return found
        found[place // len(found)] -= 1
        found[place % len(found)] += 1
