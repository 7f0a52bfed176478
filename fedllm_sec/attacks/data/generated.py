"""IBA: a generator makes each image a trigger of its own, too faint to be seen, and learns what the model falls for."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, cross_entropy

from fedllm_sec.attacks.data.images import all_to_target, drawn, need_images
from fedllm_sec.attacks.data.learnt import TriggerView, batches, need_counts
from fedllm_sec.attacks.data.overlays import stamped
from fedllm_sec.attacks.data.text import need_rate
from fedllm_sec.errors import AttackError
from fedllm_sec.protocols import Labelled
from fedllm_sec.seeds import generator_for

SIDE = 3  # pixels of a convolution's kernel


class IBA:
    """Images with a learnt faint change of their own force one class (Nguyen et al. 2023, IBA, sec. 4.1).

    T(x) = x + epsilon * g(x), cut to [0, 1], g a generator with values in [-1, 1]: no pixel changes by more than
    `epsilon`. In each round of the attack g, kept between rounds, takes `passes` passes over the attackers' clean
    images by Adam with `lr` down CE(f(theta, T(x)), target), theta the global model as received; then
    round(rate * images) images of each shard get their trigger and the label.

    Stated here: g is three convolutions of `width` channels with a tanh behind them, the paper has a U-Net or an
    autoencoder; it learns against the model as received, in the authors' code against what the attacker has made of it,
    and there nothing is poisoned before g reaches 0.85, epsilon then falls, and every other round leaves g alone. Their
    mask on rarely moved parameters is `neurotoxin` beside this, their projection `pgd`. Their 0.3 falling to 0.05 are
    in units of normalised pixels, about 0.07 falling to 0.01 here.
    """

    def __init__(
        self,
        *,
        target: int,
        rate: float = 0.5,
        epsilon: float = 0.07,
        passes: int = 10,
        lr: float = 0.01,
        width: int = 16,
        batch: int = 64,
        seed: int = 0,
    ) -> None:
        need_rate(rate, "iba.rate")
        need_counts("iba", passes=passes, width=width, batch=batch)
        if not (0.0 < epsilon <= 1.0 and 0.0 < lr < math.inf):
            raise AttackError(
                f"iba: epsilon={epsilon}, lr={lr}: needs 0 < epsilon <= 1 in pixels from 0 to 1 (divide by 255), and a "
                "finite lr above 0."
            )
        self.target, self.rate, self.epsilon = target, rate, epsilon
        self.passes, self.lr, self.width, self.batch, self.seed = passes, lr, width, batch, seed
        self.learnt: Tensor | None = None  # the generator's parameters in one vector

    def shapes(self, channels: int) -> list[tuple[int, int]]:
        """Channels out and in of each convolution."""
        return [(self.width, channels), (self.width, self.width), (channels, self.width)]

    def generator(self, x: Tensor) -> Tensor:
        """The generator's parameters as they are known now; before anything was learnt, He et al. 2015's, by `seed`."""
        if self.learnt is not None:
            return self.learnt.to(x)
        rng, parts = generator_for(self.seed, "iba generator"), list[Tensor]()
        for out, given in self.shapes(x.shape[1]):
            fan = given * SIDE * SIDE
            parts += [torch.randn(out * fan, generator=rng) * math.sqrt(2 / fan), torch.zeros(out)]
        return torch.cat(parts).to(x)

    def change(self, x: Tensor, vector: Tensor) -> Tensor:
        """What the generator of this vector makes of images (k, channels, height, width): as many in [-1, 1]."""
        made, place = x, 0
        shapes = self.shapes(x.shape[1])
        for number, (out, given) in enumerate(shapes):
            size = out * given * SIDE * SIDE
            kernel, bias = vector[place : place + size].view(out, given, SIDE, SIDE), vector[place + size :][:out]
            made = conv2d(made, kernel, bias, padding=1)
            made = made.relu() if number < len(shapes) - 1 else made.tanh()
            place += size + out
        return made

    def put(self, x: Tensor, vector: Tensor) -> Tensor:
        """T(x), differentiable in the generator's vector."""
        return (x + self.epsilon * self.change(x, vector)).clamp(0, 1)

    @torch.no_grad()
    def stamp(self, x: Tensor) -> Tensor:
        """Images (k, channels, height, width), each with its trigger."""
        return torch.cat([self.put(part, self.generator(x)) for part in x.split(1024)]) if len(x) else x.clone()

    def tune(self, view: TriggerView) -> None:
        vector = self.generator(view.x).clone().requires_grad_()
        optimizer = torch.optim.Adam([vector], lr=self.lr)
        for _ in range(self.passes):
            for at in batches(len(view.y), self.batch, view.rng, view.x.device):
                seen, wanted = self.put(view.x[at], vector), torch.full_like(view.y[at], self.target)
                (slope,) = torch.autograd.grad(cross_entropy(view.classifier.logits(view.vector, seen), wanted), vector)
                vector.grad = slope.nan_to_num(0.0, 0.0, 0.0)  # a model that is not finite teaches nothing
                optimizer.step()
        self.learnt = vector.detach()

    def poison(self, shard: Any, rng: torch.Generator) -> Labelled:
        shard = need_images(shard, "iba", self.target)
        return stamped(shard, drawn(shard, self.target, self.rate, "iba", rng), self.stamp, self.target)

    def probe(self, test: Any) -> Labelled:
        """The other classes' images, each with its trigger: always the same ones, whatever has been learnt."""
        test = need_images(test, "iba", self.target)
        return all_to_target(test, (test.y != self.target).nonzero().flatten(), self.target, self.stamp)

    def success(self, answer: Any, row: Any) -> bool:
        return int(answer) == self.target
