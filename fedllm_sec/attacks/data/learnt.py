"""Triggers that attackers learn against the global model of the round: what they know of it, and A3FL."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

from fedllm_sec.attacks.data.images import all_to_target, change, drawn, need_images
from fedllm_sec.attacks.data.text import need_rate
from fedllm_sec.errors import AttackError
from fedllm_sec.models.function import Classifier
from fedllm_sec.protocols import Labelled

GREY = 0.5  # of a patch before it has learnt anything


@dataclass(frozen=True)
class TriggerView:
    """What attackers who learn a trigger know: the model that they were sent and clean rows of their own."""

    classifier: Classifier
    vector: Tensor  # (d,) the global vector of this round
    x: Tensor  # (n, channels, height, width) images in [0, 1] of those who attack in this round, as nobody has poisoned
    y: Tensor  # (n,) int64
    rng: torch.Generator


class Learns(Protocol):
    """A data attack whose trigger is learnt: `tune` sets `learnt`, which poison and probe use from then on.

    One tensor, so that it can be shared between processes and kept in a checkpoint. `poison` takes the same rows of a
    shard for the same generator, whatever has been learnt.
    """

    learnt: Tensor | None

    def tune(self, view: TriggerView) -> None: ...
    def poison(self, shard: Any, rng: torch.Generator) -> Any: ...


def learner(attacks: Sequence[Any]) -> Learns | None:
    """The one of attack.data that has a trigger to learn; it stands there alone."""
    return next((attack for attack in attacks if hasattr(attack, "tune")), None)


def batches(n: int, size: int, rng: torch.Generator, device: torch.device) -> Iterator[Tensor]:
    """One pass over n rows in random order, (size,) row numbers at a time."""
    yield from torch.randperm(n, generator=rng).to(device).split(size)


def need_counts(attack: str, **counts: int) -> None:
    """An AttackError for a setting that is to count something and does not."""
    for name, value in counts.items():
        if value < 1:
            raise AttackError(f"{attack}.{name}: {value}: must be 1 or more.")


class A3FL:
    """A patch learnt against the global model and against a copy that unlearns it (Zhang et al. 2023, A3FL, sec. 3.2).

    The patch t of `size` x `size` pixels, `margin` from the top left, starts grey, is kept between rounds, and in each
    round of the attack takes `passes` passes of steps t <- t - step * sign(gradient), cut to [0, 1], down
    CE(f(theta, x + t), target) + lambda CE(f(theta', x + t), target), lambda = weight * cos(theta', theta). theta' is
    the global model theta after `copy_epochs` epochs of SGD (lr 0.01, momentum 0.9, weight decay 5e-4) on triggered
    images with their own labels, made anew before every `renew`-th pass. Then round(rate * images) images of each shard
    get the patch and the label. Defaults are those of the paper and its code: 200 * (5 + 2) passes over the attackers'
    images a round; `passes: 20, renew: 20` are 5 + 40.

    Stated here: the attackers of a round put their images together, in the authors' code those of the first are used;
    the copy is made before the first pass too, there it is not; cosine is that of the two vectors, as the paper has it,
    there that of gradients of convolutions; the copy trains by the running statistics of BatchNorm as received; steps
    are in units of [0, 1], there of normalised pixels.
    """

    def __init__(
        self,
        *,
        target: int,
        rate: float = 0.25,
        size: int = 5,
        margin: int = 2,
        passes: int = 200,
        step: float = 0.01,
        renew: int = 1,
        copy_epochs: int = 5,
        weight: float = 0.01,
        batch: int = 64,
    ) -> None:
        need_rate(rate, "a3fl.rate")
        need_counts("a3fl", size=size, passes=passes, renew=renew, copy_epochs=copy_epochs, batch=batch)
        if margin < 0 or not 0.0 < step <= 1.0 or not 0.0 <= weight < math.inf:
            raise AttackError(
                f"a3fl: margin={margin}, step={step}, weight={weight}: needs margin >= 0, 0 < step <= 1 in pixels from "
                "0 to 1, and a finite weight of 0 or more."
            )
        self.target, self.rate, self.size, self.margin = target, rate, size, margin
        self.passes, self.step, self.renew, self.copy_epochs = passes, step, renew, copy_epochs
        self.weight, self.batch = weight, batch
        self.learnt: Tensor | None = None  # (channels, size, size)

    def patch(self, x: Tensor) -> Tensor:
        """The patch for images like x, as it is known now."""
        reach = self.size + self.margin
        if reach > min(x.shape[-2:]):
            height, width = x.shape[-2:]
            raise AttackError(f"a3fl: a patch of {self.size} + margin {self.margin} leaves {height} x {width}.")
        if self.learnt is None:
            return x.new_full((x.shape[1], self.size, self.size), GREY)
        return self.learnt.to(x)

    def put(self, x: Tensor, patch: Tensor) -> Tensor:
        """Images (k, channels, height, width) with this patch; differentiable in it."""
        here = slice(self.margin, self.margin + self.size)
        out = x.clone()
        out[..., here, here] = patch
        return out

    def stamp(self, x: Tensor) -> Tensor:
        """Images (k, channels, height, width) with the patch."""
        return self.put(x, self.patch(x))

    def tune(self, view: TriggerView) -> None:
        function, theta = view.classifier, view.vector
        patch, copy, pull = self.patch(view.x).clone(), None, 0.0
        for number in range(self.passes):
            if self.weight > 0 and number % self.renew == 0:
                copy = self.unlearnt(view, patch)
                pull = self.weight * float(cosine_similarity(copy.double(), theta.double(), dim=0))
                if not math.isfinite(pull):  # an unlearning that ended in no numbers says nothing
                    copy = None
            for at in batches(len(view.y), self.batch, view.rng, view.x.device):
                patch.requires_grad_()
                seen, wanted = self.put(view.x[at], patch), torch.full_like(view.y[at], self.target)
                loss = cross_entropy(function.logits(theta, seen), wanted)
                if copy is not None:
                    loss = loss + pull * cross_entropy(function.logits(copy, seen), wanted)
                (slope,) = torch.autograd.grad(loss, patch)
                patch = (patch.detach() - self.step * slope.nan_to_num(0.0).sign()).clamp(0, 1)
        self.learnt = patch.detach()

    def unlearnt(self, view: TriggerView, patch: Tensor) -> Tensor:
        """The global vector (d,) after it has learnt the right answers to images with this patch."""
        vector = view.vector.clone().requires_grad_()
        optimizer = torch.optim.SGD([vector], lr=0.01, momentum=0.9, weight_decay=5e-4)
        for _ in range(self.copy_epochs):
            for at in batches(len(view.y), self.batch, view.rng, view.x.device):
                optimizer.zero_grad()
                cross_entropy(view.classifier.logits(vector, self.put(view.x[at], patch)), view.y[at]).backward()
                optimizer.step()
        return vector.detach()

    def poison(self, shard: Any, rng: torch.Generator) -> Labelled:
        shard = need_images(shard, "a3fl", self.target)
        return change(shard, drawn(shard, self.target, self.rate, "a3fl", rng), self.target, self.stamp)

    def probe(self, test: Any) -> Labelled:
        """The other classes' images, stamped: always the same ones, whatever the patch has become."""
        test = need_images(test, "a3fl", self.target)
        return all_to_target(test, (test.y != self.target).nonzero().flatten(), self.target, self.stamp)

    def success(self, answer: Any, row: Any) -> bool:
        return int(answer) == self.target
