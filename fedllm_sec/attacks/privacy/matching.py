"""Deep leakage from gradients: dummy inputs whose gradient is the one that was sent, found by L-BFGS."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fedllm_sec.attacks.privacy.gradients import gradient_of
from fedllm_sec.attacks.privacy.labels import last_layer, sign_label
from fedllm_sec.attacks.privacy.seen import (
    Observation,
    Reconstruction,
    as_gradient,
    gradient_of_one,
    known_rows,
    need_finite,
)
from fedllm_sec.errors import AttackError
from fedllm_sec.seeds import generator_for

SOLVED = 1e-10  # squared distance of gradients, per squared length of the one sent, at which no other start is tried


def dlg(
    seen: Observation, labels: Tensor | None = None, *, iterations: int = 600, restarts: int = 3, spread: float = 0.3,
    seed: int = 0,
) -> Reconstruction:  # fmt: skip
    """Inputs and labels together, such that their gradient has the least squared distance from the one sent.

    Zhu et al. 2019, alg. 1, with L-BFGS. It needs a twice differentiable model (sigmoid, no pooling: `sigmoid_cnn`)
    and small batches. Deviations: 64-bit numbers and a strong Wolfe line search, without which it stalls at 50 dB;
    starts are drawn N(0, `spread`^2) about 0 and not N(0, 1); of up to `restarts` starts the lowest loss wins, and the
    first that is solved ends them. `labels` (n,), if known, are not searched.
    """
    need_finite(seen)
    gradient, whole = as_gradient(seen)
    if not whole:
        raise AttackError(
            "dlg: the gradient was clipped, so its length is lost, and a squared distance needs it. Use "
            "invert_gradient, or set clients.max_grad_norm: null."
        )
    network, n = gradient.network(torch.float64), known_rows(gradient)
    target = list(gradient.parts(torch.float64).values())
    length = float(torch.stack([t.square().sum() for t in target]).sum())
    classes = int(network(gradient.fed(torch.zeros(1, *gradient.shape, dtype=torch.float64))).shape[-1])
    best: tuple[float, Tensor, Tensor] | None = None
    for start in range(restarts):
        rng = generator_for(seed, "dlg", start)
        x = (spread * torch.randn(n, *gradient.shape, generator=rng, dtype=torch.float64)).requires_grad_()
        dummy = torch.randn(n, classes, generator=rng, dtype=torch.float64).requires_grad_()
        searched = [x] if labels is not None else [x, dummy]

        def distance(x: Tensor = x, dummy: Tensor = dummy) -> Tensor:
            said = labels if labels is not None else dummy.softmax(-1)
            made = gradient_of(network, gradient.layout.names, gradient.fed(x), said)
            return torch.stack([(a - b).square().sum() for a, b in zip(made, target, strict=True)]).sum()

        value = _minimised(distance, searched, iterations, SOLVED * length)
        if math.isfinite(value) and (best is None or value < best[0]):
            said = labels if labels is not None else dummy.detach().argmax(-1)
            best = value, x.detach().clone(), said.clone()
        if best is not None and best[0] <= SOLVED * length:
            break
    if best is None:
        raise AttackError("dlg: no start gave a finite loss. Raise restarts, or lower spread.")
    return Reconstruction(best[1].clamp(0, 1).float(), best[2], best[0])


def _minimised(distance: Callable[[], Tensor], searched: list[Tensor], iterations: int, enough: float) -> float:
    """L-BFGS in stretches of 100 iterations, until the distance is small enough; gives the last one."""
    optimizer = torch.optim.LBFGS(
        searched, max_iter=100, history_size=100, tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        value = distance()
        for tensor, slope in zip(searched, torch.autograd.grad(value, searched), strict=True):
            tensor.grad = slope
        return value

    value = math.inf
    for _ in range(0, iterations, 100):
        optimizer.step(closure)  # type: ignore[no-untyped-call]
        value = float(closure().detach())
        if not math.isfinite(value) or value <= enough:
            break
    return value


def idlg(
    seen: Observation, *, iterations: int = 600, restarts: int = 3, spread: float = 0.3, seed: int = 0
) -> Reconstruction:
    """The label from the sign of the last layer's gradient, then as `dlg` with that label (batch 1; Zhao et al. 2020).

    Exact for any model whose last layer is trained; see `labels.sign_label`.
    """
    gradient = gradient_of_one(
        seen,
        "idlg",
        "the sign of the gradient names one label. Use invert_gradient, which reveals the counts of labels first.",
    )
    label = torch.tensor([sign_label(gradient, last_layer(gradient))])
    return dlg(seen, label, iterations=iterations, restarts=restarts, spread=spread, seed=seed)
