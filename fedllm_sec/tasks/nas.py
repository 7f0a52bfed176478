"""Architecture search: one vector holds weights and architecture, and one step trains both on separate rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.func import functional_call

from fedllm_sec.protocols import Labelled
from fedllm_sec.tasks.classify import Classify, Rows
from fedllm_sec.tasks.draws import Drawn

ARCHITECTURE = "arch_"  # how the names of architecture parameters begin


class Nas(Classify):
    """Weights learn on the even rows of a shard, the architecture on the odd ones (He et al. 2020, FedNAS, alg. 1).

    First-order: each gradient is taken at the same point with the other part fixed, and the sum of both losses has
    exactly these two gradients. Deviation: FedNAS adds a share of the training loss to the architecture's (MiLeNAS).
    """

    def batches(self, shard: Labelled, size: int, rng: torch.Generator) -> Iterator[Tensor]:
        """Even and odd rows by turns, at most `size` a batch; one epoch takes every row once.

        So a batch has as many of the one as of the other, give or take one, and only a batch of a single row lacks one.
        """
        n = len(shard.y)
        order = torch.empty(n, dtype=torch.long)
        order[0::2] = 2 * torch.randperm((n + 1) // 2, generator=rng)
        order[1::2] = 2 * torch.randperm(n // 2, generator=rng) + 1
        yield from order.to(self.device).tensor_split(max(1, -(-n // size)))

    def draw(self, shard: Labelled, rows: Rows) -> list[Drawn]:
        """The even rows and the odd ones: the loss is the sum of a mean over each."""
        at = torch.as_tensor(rows, device=self.device)
        numbers = self.numbers(len(at))
        halves = (at % 2 == 0, at % 2 == 1)
        return [Drawn(at[half], tuple(t[half] for t in numbers)) for half in halves if bool(half.any())]

    def loss(self, shard: Labelled, rows: Rows, *numbers: Tensor) -> Tensor:
        at = torch.as_tensor(rows, device=self.device)
        named = dict(self.model.named_parameters())
        architecture = {n: p.detach() for n, p in named.items() if n.startswith(ARCHITECTURE)}
        weights = {n: p.detach() for n, p in named.items() if not n.startswith(ARCHITECTURE)}
        numbers = numbers or self.numbers(len(at))
        total = torch.zeros((), device=self.device)
        for half, fixed in ((at % 2 == 0, architecture), (at % 2 == 1, weights)):
            if bool(half.any()):
                images = self.images(shard, at[half], *(t[half] for t in numbers))
                logits = functional_call(self.model, fixed, (images,))
                total = total + torch.nn.functional.cross_entropy(logits.float(), self.labels(shard, at[half]))
        return total
