"""A generator against a discriminator: one vector holds both, and one step trains both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import softplus

from fedllm_sec.protocols import Labelled
from fedllm_sec.tasks.classify import Classify, Rows


class Gan(Classify):
    """The gradient of each phase, at the same point, in its part of the flat vector (Rasouli et al. 2020, alg. 1).

    The discriminator's phase is -log D(x) - log(1 - D(G(z))) on fixed fakes, the generator's is -log D(G(z)) through a
    fixed discriminator (Goodfellow et al. 2014, the non-saturating form). Their sum has exactly these two gradients,
    so any optimizer on the flat vector trains both. Rasouli et al. use plain steps; here the recipe's optimizer.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        super().__init__(model, device)

    def numbers(self, b: int) -> tuple[Tensor, ...]:
        """The noise (b, noise) that as many fakes as images are made of."""
        return (torch.randn(b, self.model.noise, device=self.device),)

    def loss(self, shard: Labelled, rows: Rows, *numbers: Tensor) -> Tensor:
        real = 2 * shard.x[torch.as_tensor(rows, device=self.device)] - 1
        (noise,) = numbers or self.numbers(len(real))
        fake = self.model(noise)
        judge = self.model.discriminator
        discriminator = softplus(-judge(real)).mean() + softplus(judge(fake.detach())).mean()
        fixed = {name: p.detach() for name, p in judge.named_parameters()}
        return discriminator + softplus(-functional_call(judge, fixed, (fake,))).mean()

    @torch.no_grad()
    def samples(self, noise: Tensor) -> Tensor:
        """Images (b, channels, height, width) from 0 to 1."""
        images: Tensor = (self.model(noise.to(self.device)).float() + 1) / 2
        return images
