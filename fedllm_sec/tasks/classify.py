"""Classification of arrays by a small model: batches are rows of tensors on the device, cut by index."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fedllm_sec.errors import DataError
from fedllm_sec.matrix import Layout
from fedllm_sec.models.function import Classifier
from fedllm_sec.protocols import Labelled
from fedllm_sec.tasks.buffers import Mode, beside, normalises
from fedllm_sec.tasks.draws import Drawn
from fedllm_sec.tasks.flat import flatten

Rows = Sequence[int] | Tensor


def shuffled(size: int, batch: int, rng: torch.Generator, device: torch.device) -> Iterator[Tensor]:
    """One epoch of row numbers in random order, (batch,) at a time, made by one permutation."""
    yield from torch.randperm(size, generator=rng).to(device).split(batch)


def chosen(logits: Tensor) -> Tensor:
    """The class of the largest logit, (..., classes) to (...); -1, which is no class, where a logit is not finite."""
    return torch.where(logits.isfinite().all(-1), logits.argmax(-1), -1)


def logits_of(said: Any) -> Tensor:
    """The logits that a model gave: as they are, as the first of a tuple, or as an output of transformers."""
    found = getattr(said, "logits", said[0] if isinstance(said, (tuple, list)) and said else said)
    if not isinstance(found, Tensor):
        raise DataError(
            f"model.name: gives {type(said).__name__}; must give logits, a tuple that begins with them, or .logits."
        )
    return found.float()


class Classify:
    """A model whose parameters are views of one flat vector, trained by cross-entropy.

    `mean` and `std` (channels,) normalise images before they reach the model: shards stay in [0, 1], where image
    attacks act. `flip` mirrors half of the training images, `crop` shifts each by up to so many pixels (zeros come in).
    `buffers` are what the model holds beside the vector, such as running statistics, and `kept` says how they travel.
    Pixels that a shard holds `fixed` stay as they are: a stamped trigger looks in training as it does at the test.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        device: torch.device,
        *,
        mean: Tensor | None = None,
        std: Tensor | None = None,
        flip: bool = False,
        crop: int = 0,
        buffers: Mode | None = None,
    ) -> None:
        self.model, self.device = model.to(device), device
        self.buffers, self.kept = beside(self.model, buffers)
        self.normalises = normalises(model)
        trainable = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        self.layout = Layout.of(trainable)
        self.parameters = flatten([p for _, p in trainable])
        self.initial = self.parameters.detach().clone()  # (d,)
        self.mean = torch.zeros(1) if mean is None else mean
        self.std = torch.ones(1) if std is None else std
        self.mean, self.std = (t.to(device)[:, None, None] for t in (self.mean, self.std))
        self.flip, self.crop = flip, crop
        self.outputs: int | None = None  # logits of a row, known when the model has run

    def logits(self, x: Tensor) -> Tensor:
        """Those of images as the model is given them, normalised: (b, classes) float32."""
        found = logits_of(self.model(x))
        self.outputs = self.outputs or found.shape[-1]
        if len(found) != len(x) or found.shape[-1] != self.outputs:
            raise DataError(
                f"model.name: gives {tuple(found.shape)} for {len(x)} rows, where it gave {self.outputs} logits a row "
                "before. A model must give as many for every row at any time."
            )
        if torch.is_grad_enabled() and self.parameters.requires_grad and not found.requires_grad:
            raise DataError(
                "model.name: gives logits through which no gradient comes (.detach(), no_grad()?). Mend it."
            )
        return found

    def images_of(self, rows: Labelled) -> Tensor:
        """All images of a shard as the model is given them in evaluation."""
        return (rows.x.to(self.device) - self.mean) / self.std

    def function(self, buffers: Tensor | None = None) -> Classifier:
        """The model as a function of its vector, with these buffers (b + c,) where it has some."""
        held = {} if self.buffers is None or buffers is None else self.buffers.named(buffers.to(self.device))
        return Classifier(self.model, self.layout, logits_of, self.mean, self.std, held)

    def size(self, shard: Labelled) -> int:
        return len(shard.y)

    def batches(self, shard: Labelled, size: int, rng: torch.Generator) -> Iterator[Tensor]:
        """One epoch of row numbers; a last batch of one row joins the one before it where the model has BatchNorm."""
        order = list(shuffled(len(shard.y), size, rng, self.device))
        if self.normalises and len(order) > 1 and len(order[-1]) == 1:
            order[-2:] = [torch.cat(order[-2:])]
        yield from order

    def weight(self, shard: Labelled, rows: Rows) -> float:
        return float(len(rows))

    def draw(self, shard: Labelled, rows: Rows) -> list[Drawn]:
        return [Drawn(rows, self.numbers(len(rows)))]

    def numbers(self, b: int) -> tuple[Tensor, ...]:
        """Whether each of b images is mirrored, (b,) bool, and its shift down and right, (b, 2) from 0 to 2 crop."""
        if not (self.flip or self.crop):
            return ()
        mirrored = torch.zeros(b, dtype=torch.bool, device=self.device)
        shift = torch.zeros(2, b, dtype=torch.long, device=self.device)
        if self.flip:
            mirrored = torch.rand(b, device=self.device) < 0.5
        if self.crop:
            shift = torch.randint(2 * self.crop + 1, (2, b), device=self.device)
        return mirrored, shift.T

    def images(self, shard: Labelled, rows: Rows, *numbers: Tensor) -> Tensor:
        """The images of these rows as the model is trained on them, changed by these numbers, or by new ones."""
        at = torch.as_tensor(rows, device=self.device)
        x = shard.x[at]
        if self.flip or self.crop:
            moved = self.augment(x, *(numbers or self.numbers(len(at))))
            x = moved if shard.fixed is None else torch.where(shard.fixed[at][:, None], x, moved)
        return x.sub_(self.mean).div_(self.std)  # x is a copy, made by its index

    def labels(self, shard: Labelled, rows: Rows) -> Tensor:
        return shard.y[torch.as_tensor(rows, device=self.device)]

    def loss(self, shard: Labelled, rows: Rows, *numbers: Tensor) -> Tensor:
        logits = self.logits(self.images(shard, rows, *numbers))
        return torch.nn.functional.cross_entropy(logits, self.labels(shard, rows))

    def augment(self, x: Tensor, mirrored: Tensor, shift: Tensor) -> Tensor:
        """Images (b, channels, height, width) mirrored and shifted as `numbers` says."""
        b, _, height, width = x.shape
        x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
        if self.crop:
            if self.crop >= min(height, width):
                raise DataError(f"data.crop: {self.crop}: images have {height} x {width} pixels. Lower it.")
            padded = torch.nn.functional.pad(x, (self.crop,) * 4)
            top, left = shift.T
            rows = top[:, None] + torch.arange(height, device=x.device)  # (b, height)
            columns = left[:, None] + torch.arange(width, device=x.device)  # (b, width)
            here = torch.arange(b, device=x.device)[:, None, None]
            x = padded[here, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        return x

    @torch.no_grad()
    def score(self, shard: Labelled, rows: Rows) -> Tensor:
        """Log-loss of the true class and the class chosen, -1 for none, for each row: (b, 2) float64."""
        at = torch.as_tensor(rows, device=self.device)
        logits = self.logits((shard.x[at] - self.mean) / self.std)
        losses = torch.nn.functional.cross_entropy(logits, shard.y[at], reduction="none")
        return torch.stack([losses.double(), chosen(logits).double()], dim=1).cpu()
