"""What an observer has in hand, and what it makes of it. The truth is in neither: only the metric gets that."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from fedllm_sec.errors import AttackError
from fedllm_sec.matrix import Layout
from fedllm_sec.models.statistics import tracking
from fedllm_sec.protocols import Labelled, LocalTraining


@dataclass(frozen=True)
class Row:
    """A row of text as tokens; local training scores those from number `first` on."""

    ids: tuple[int, ...]
    first: int


@dataclass(frozen=True)
class Question:
    """A question, as the model is asked it, and all answers that there could be, as tokens without an end token."""

    prompt: tuple[int, ...]
    guesses: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Observation:
    """One client's vector as the server or the wire has it, and what anybody knows who runs the federation.

    `sent` is the gradient of the batch's mean loss at `start`, or the delta of `steps` local steps from there. `rows`
    is the size of a batch, None where nobody knows it. Inputs lie in [0, 1]; the model is fed (x - mean) / std.
    """

    sent: Tensor  # (d,)
    what: str  # gradient | delta
    start: Tensor  # (d,) the parameters that the client had received
    layout: Layout
    model: nn.Module  # its structure and its frozen parameters; the trained ones are those of `start`
    shape: tuple[int, ...] = ()  # of one input
    rows: int | None = None
    steps: int = 1
    size: int | None = None  # rows of the shard, as claimed
    training: LocalTraining | None = None  # how clients train; needed for a delta
    lr: float | None = None  # the clients' learning rate in this round; None: `training.lr`
    mean: Tensor | None = None  # (channels, 1, 1)
    std: Tensor | None = None
    auxiliary: Labelled | None = None  # other rows of the same kind, with labels, that the observer happens to own
    own: Sequence[Row] = ()  # the same of text
    candidates: Sequence[Row] = ()  # rows of text of which some were trained on, in an order that says nothing
    questions: Sequence[Question] = ()  # to which somebody's rows may hold the answers
    final: Tensor | None = None  # (d,) the global vector after the last round
    client: str = ""
    round: int = 1

    @property
    def plain_sgd(self) -> bool:
        """Whether the client's steps were its gradients times the learning rate."""
        return self.training is not None and self.training.optimizer == "sgd" and self.training.momentum == 0

    def network(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A copy of the model with the received parameters, in evaluation mode."""
        for name, part in tracking(self.model):
            raise AttackError(
                f"privacy: {name} ({type(part).__name__}) normalised the client's batch by statistics that "
                "were not observed, so no dummy batch gives its gradient. Choose a model with GroupNorm, or none."
            )
        made = copy.deepcopy(self.model).to(dtype).eval()
        own = dict(made.named_parameters())
        with torch.no_grad():
            for name, values in self.layout.split(self.start.to(dtype)).items():
                own[name].copy_(values)
        return made

    def parts(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """What was sent, by parameter name."""
        return self.layout.split(self.sent.detach().to(dtype))

    def fed(self, x: Tensor) -> Tensor:
        """Inputs in [0, 1] as the model is fed them."""
        if self.mean is None or self.std is None:
            return x
        return (x - self.mean.to(x)) / self.std.to(x)

    def learning_rate(self) -> float:
        if self.training is None:
            raise AttackError(
                "privacy: a delta was observed and nothing is known of local training. Give Observation.training."
            )
        return self.lr if self.lr is not None else self.training.lr


@dataclass(frozen=True)
class Reconstruction:
    """What an attack makes of a batch, in no order: inputs (n, *shape) in [0, 1], labels (n,), the objective's value.

    The loss compares restarts of one attack; that of one method says nothing beside another's.
    """

    inputs: Tensor
    labels: Tensor
    loss: float
    notes: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LabelCounts:
    """How often each class stands in what the client trained on, as an attack has it: (classes,) int64."""

    counts: Tensor


@dataclass(frozen=True)
class Suspicion:
    """How much each candidate looks like a row that was trained on: (candidates,), higher is more so."""

    scores: Tensor


@dataclass(frozen=True)
class Guessed:
    """Of each question: the log-loss of every guess, in nats (guesses,), and the tokens that are said to it."""

    losses: Sequence[Tensor]
    said: Sequence[list[int]]


@dataclass(frozen=True)
class Recovered:
    """What an attack reads of a client's text: the distinct tokens that were fed to the model, in order of number.

    `rows` are whole rows as they were fed; None where the attack reads no order.
    """

    tokens: Sequence[int]
    rows: Sequence[tuple[int, ...]] | None = None


def as_gradient(seen: Observation) -> tuple[Observation, bool]:
    """The observation as a gradient, and whether its length is the true one.

    A delta of one SGD step is -lr (c g + decay w), so it *is* a gradient, up to the factor c <= 1 of clipping: that
    factor is 1 unless the step is as long as clipping allows. Adam's steps, and several steps, are no gradient.
    """
    if seen.what == "gradient":
        limit = seen.training.max_grad_norm if seen.training is not None else None
        return seen, limit is None or float(seen.sent.norm()) < limit * (1 - 1e-4)
    if not float(seen.sent.abs().max()) > 0:
        raise AttackError("privacy: the delta is zero: this client sent nothing to learn from. Observe another.")
    lr, training = seen.learning_rate(), seen.training
    assert training is not None
    if not seen.plain_sgd or seen.steps != 1:
        raise AttackError(
            f"privacy: a delta of {seen.steps} {training.optimizer} steps is no gradient. Observe what: gradient, or "
            "let clients take one step of sgd (clients.optimizer, clients.local_steps) without momentum."
        )
    gradient = -seen.sent / lr - training.weight_decay * seen.start
    limit = training.max_grad_norm
    whole = limit is None or float(gradient.norm()) < limit * (1 - 1e-4)
    return replace(seen, sent=gradient, what="gradient"), whole


def gradient_of_one(seen: Observation, method: str, why: str) -> Observation:
    """The observation as the gradient of one row; an error says why the method cannot take several."""
    need_finite(seen)
    gradient, _ = as_gradient(seen)
    if known_rows(gradient) != 1:
        raise AttackError(f"{method}: a batch of {gradient.rows}: {why}")
    return gradient


def known_rows(seen: Observation) -> int:
    """The size of a batch, which every method for images needs."""
    if seen.rows is None or seen.rows < 1:
        raise AttackError("privacy: the size of the batch is not known. Give Observation.rows, or another client.")
    return seen.rows


def need_finite(seen: Observation) -> None:
    """An error for what no attack could use; a client may send anything."""
    if tuple(seen.sent.shape) != (seen.layout.size,):
        raise AttackError(
            f"privacy: {seen.client or 'the client'} sent shape {tuple(seen.sent.shape)}, the model has "
            f"({seen.layout.size},) parameters. Observe another."
        )
    if not bool(seen.sent.isfinite().all()) or not math.isfinite(float(seen.sent.float().norm())):
        raise AttackError(f"privacy: what {seen.client or 'the client'} sent is not finite. Observe another.")
