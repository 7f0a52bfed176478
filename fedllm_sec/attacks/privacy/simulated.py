"""Reading labels off a delta by rehearsal: the last layer trained many times on the observer's own rows."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from fedllm_sec.attacks.privacy.labels import LastLayer, features_of, rounded
from fedllm_sec.attacks.privacy.seen import Observation, known_rows
from fedllm_sec.seeds import generator_for

SKEWS = (0.1, 0.3, 1.0, 10.0)  # Dirichlet parameters of the rehearsed batches, in turn: from one class to all alike
STRENGTHS = tuple(10.0**power for power in range(-1, 6))  # of the ridge regression, chosen by leaving one out


def head_delta(seen: Observation, layer: LastLayer) -> Tensor:
    """What the last layer moved, bias as a last column: (classes, features + 1)."""
    parts = seen.parts(torch.float64)
    return with_bias(parts[f"{layer.name}.weight"], parts.get(f"{layer.name}.bias"))


def with_bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.cat([weight, torch.zeros_like(weight[:, :1]) if bias is None else bias[:, None]], 1)


def rehearse(
    begun: Tensor, features: Tensor, labels: Tensor, seen: Observation, times: int, rng: torch.Generator, biased: bool
) -> tuple[Tensor, Tensor]:
    """Deltas of the last layer (times, classes, features + 1) and the counts (times, classes) that each was trained on.

    The features of the auxiliary rows (n, features) are held fixed, so that all rehearsals are one batch of small
    matrices. Optimizer, learning rate, steps and batch are the client's; clipping, which a last layer alone does not
    foresee, is left out.
    """
    training, rows, n = seen.training, known_rows(seen), known_rows(seen) * seen.steps
    assert training is not None
    classes = len(begun)
    skew = torch.tensor(SKEWS, dtype=torch.float64)[torch.arange(times) % len(SKEWS)]
    shares = torch._sample_dirichlet(skew[:, None].expand(times, classes).contiguous(), rng).clamp_min(1e-12)
    drawn = torch.multinomial(shares, n, replacement=True, generator=rng)  # (times, n) classes
    own = [(labels == c).nonzero()[:, 0] for c in range(classes)]
    each = torch.stack([o[torch.randint(len(o), (times, n), generator=rng)] for o in own], -1)
    picked = each.gather(2, drawn[:, :, None])[:, :, 0]  # (times, n) rows
    fed = torch.cat([features, torch.full((len(features), 1), float(biased), dtype=features.dtype)], 1)
    now = begun.expand(times, *begun.shape).clone()
    first, second = torch.zeros_like(now), torch.zeros_like(now)
    for t in range(seen.steps):
        here = slice(t * rows, (t + 1) * rows)
        lr = seen.learning_rate() * training.lr_at(1, 1, t, seen.steps) / training.lr
        h, y = fed[picked[:, here]], drawn[:, here]
        slope = ((h @ now.mT).softmax(-1) - nn.functional.one_hot(y, classes)).mT @ h / rows
        if training.optimizer == "sgd":
            slope = slope + training.weight_decay * now
            first = training.momentum * first + slope
            now = now - lr * (slope + training.momentum * first if training.nesterov else first)
            continue
        a, b = training.betas
        first, second = a * first + (1 - a) * slope, b * second + (1 - b) * slope.square()
        step = (first / (1 - a ** (t + 1))) / ((second / (1 - b ** (t + 1))).sqrt() + 1e-8)
        now = now * (1 - lr * training.weight_decay) - lr * step
    return now - begun, nn.functional.one_hot(drawn, classes).sum(1)


def rehearsed_counts(seen: Observation, layer: LastLayer, n: int, *, times: int = 600, seed: int = 0) -> Tensor:
    """The counts (classes,) in a delta of any optimizer's local steps, by a regression learnt on rehearsals.

    Adam's step is little but the gradient's sign, so no system of equations in the counts is left. Instead the last
    layer is trained `times` times on auxiliary rows of known counts, and a ridge regression from its delta to the
    counts is applied to what was sent. The features are the mean of those at the received and at the sent model. No
    paper; the idea of learning an inverse on simulations is that of shadow models (Shokri et al. 2017).
    """
    from sklearn.linear_model import RidgeCV

    aux, rng = seen.auxiliary, generator_for(seed, "reveal_labels")
    assert aux is not None
    network = seen.network()
    features = features_of(seen, layer, aux.x, network)
    with torch.no_grad():
        for name, moved in seen.parts().items():
            network.get_parameter(name).add_(moved)
    features = (features + features_of(seen, layer, aux.x, network)) / 2
    begun = with_bias(layer.weight, layer.bias)
    deltas, counts = rehearse(begun, features, aux.y, seen, times, rng, layer.bias is not None)
    flat = deltas.flatten(1)
    middle, width = flat.mean(0), flat.std(0) + 1e-9 * flat.std()
    known = ((flat - middle) / width).numpy()
    wanted = ((head_delta(seen, layer).flatten() - middle) / width)[None].numpy()
    guess = RidgeCV(alphas=STRENGTHS).fit(known, counts.double().numpy()).predict(wanted)[0]
    eye = torch.eye(len(begun), dtype=torch.float64)
    return rounded(torch.from_numpy(np.asarray(guess)), n, eye, torch.from_numpy(np.asarray(guess)) / n)
