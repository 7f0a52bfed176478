"""Read this page first: the parts of a run and what passes between them.

A run is one straight line: recipe -> federation -> clients -> update matrix -> attack -> defense -> step -> record ->
report. Below are plain callables and small frozen records: nothing needs a base class. Letters: n clients of the round,
m attackers, h honest clients, d trainable parameters, f assumed attackers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fedllm_sec import kernels
from fedllm_sec.matrix import Layout, UpdateMatrix
from fedllm_sec.models.function import Classifier, Indicator

# ---------------------------------------------------------------- clients and tasks


@dataclass
class Client:
    """A participant is data, not behaviour. `memory` is what it keeps between rounds (SCAFFOLD's c_i)."""

    id: str
    shard: Any
    memory: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class LocalResult:
    """What one client sends, as claimed by it: nothing here is trusted."""

    id: str
    delta: Tensor  # (d,) trained minus received parameters
    count: float  # claimed examples
    steps: int  # claimed optimizer steps
    loss: float  # claimed mean training loss
    buffers: Tensor | None = None  # (b,) float64, what the model holds beside its vector after training


@dataclass(frozen=True)
class LocalTraining:
    """How a client trains; the learning rate may change over the rounds, and over the steps of each."""

    batch_size: int | None  # None: the whole shard
    steps: int | None = None
    epochs: int | None = None
    optimizer: str = "adamw"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)  # of adamw
    momentum: float = 0.0  # of sgd, begun anew in every round
    nesterov: bool = False
    lr_schedule: str = "constant"  # over the rounds
    lr_in_round: str = "constant"  # over a client's steps
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    joins: bool = False  # a last batch of one row joins the one before it (BatchNorm)

    def lr_at(self, round: int, rounds: int, step: int = 0, steps: int = 1) -> float:
        """From `lr` in the first round down to a tenth of it in the last, unless constant; so too over steps from 0."""
        lr, done = self.lr, [(round - 1) / max(1, rounds - 1), step / max(1, steps - 1)]
        for kind, x in zip((self.lr_schedule, self.lr_in_round), done, strict=True):
            lr *= {"constant": 1.0, "linear": 1 - 0.9 * x, "cosine": 0.1 + 0.45 * (1 + math.cos(math.pi * x))}[kind]
        return lr

    def steps_of(self, size: int) -> int:
        """Local steps on a shard of `size` rows; an epoch ends with a short batch."""
        whole, left = divmod(size, self.batch_size or max(1, size))
        return self.steps or (self.epochs or 1) * (whole + (left > (self.joins and whole > 0)))


class Task(Protocol):
    """One model with a loss. There is one in memory per process; clients are flat vectors swapped in and out.

    `parameters` is the flat trainable vector itself: the model's trainable parameters are views of it, and their
    gradients of `parameters.grad`. So an optimizer step or a norm-ball projection is one operation on one vector.
    """

    layout: Layout
    model: torch.nn.Module  # each phase sets the mode it needs: training in `train_locally`, evaluation elsewhere
    parameters: torch.nn.Parameter  # (d,)

    def size(self, shard: Any) -> int: ...
    def batches(self, shard: Any, size: int, rng: torch.Generator) -> Iterator[list[int]]: ...  # row numbers, one epoch
    def weight(self, shard: Any, rows: Sequence[int]) -> float: ...  # what the rows weigh in a mean loss
    def loss(self, shard: Any, rows: Sequence[int]) -> Tensor: ...  # mean over the rows; more in tasks/draws.py


@dataclass(frozen=True)
class LocalContext:
    """What a client knows while it trains: every client has received `start` and can keep what it saw before."""

    client: Client
    round: int
    start: Tensor  # (d,) the global vector this client received
    last_update: Tensor | None  # (d,) the step the server took last round
    layout: Layout
    steps: int  # local steps of this client
    control: Tensor | None = None  # (d,) what the server sent besides `start` (SCAFFOLD's c)
    classifier: Classifier | None = None  # the model as a function, where it is one of images
    gradient: Callable[[Any, int], Tensor] | None = None  # (d,) at the present parameters, of a shard's so many batches


class LocalRule(Protocol):
    """A change to local training (FedProx, SCAFFOLD, Neurotoxin, PGD), called around every optimizer step.

    `before_step` may change `parameters.grad`, `after_step` the parameters themselves, in place.
    """

    def before_step(self, parameters: torch.nn.Parameter, step: int, ctx: LocalContext) -> None: ...
    def after_step(self, parameters: torch.nn.Parameter, step: int, ctx: LocalContext) -> None: ...


# ---------------------------------------------------------------- attacks


@dataclass(frozen=True)
class ThreatView:
    """What the attackers of one round can see, no more than `attack.knowledge` grants: copies, and rows only to read.

    Rows that the server would set aside are not shown. `own` grants their own claimed counts, `cohort` also the others'
    and the order of all rows. What every client is told is known to all: the algorithm and its server_lr.
    """

    own: Tensor  # (m, d) what the malicious clients' own training gave
    others: Tensor | None  # (h, d) honest rows; granted by knowledge: cohort
    global_vector: Tensor  # (d,)
    last_update: Tensor | None  # (d,) the step the server took last round: every client sees it
    defense: Callable[[UpdateMatrix], Decision] | None  # by cohort+defense: what is decided on `attacks.received` rows
    layout: Layout
    own_counts: tuple[float, ...]  # examples claimed by the malicious clients
    cohort_size: int  # n, of rows that can be used where the others are seen
    round: int
    rng: torch.Generator
    own_ids: tuple[str, ...] = ()  # who `own` and `others` are: attacks that remember do so by client id
    other_ids: tuple[str, ...] = ()
    other_counts: tuple[float, ...] | None = None  # examples claimed by the others; granted by knowledge: cohort
    order: tuple[str, ...] = ()  # ids as the server stacks their rows, where `others` are granted; (): others, own
    server_lr: float | None = 1.0  # eta, by which the server multiplies the defended update; None: by no one number


class UpdateAttack(Protocol):
    """Rows to submit instead of the malicious clients' own."""

    def __call__(self, view: ThreatView) -> Tensor: ...  # (m, d)


class DataAttack(Protocol):
    """Poison a malicious client's shard once, before training; make the triggered test set; judge one answer.

    A text shard is a `datasets.Dataset` with the columns of `TEXT_COLUMNS`; an image shard is a `Labelled`. Rows that
    an earlier attack has marked as poisoned stay as they are. An attack may also say what `carries` its trigger by
    itself, neither probe nor clean (one text: bool; images: (n,) bool), which images it `acts_on` as they are (its
    probe), why text rows are `not_clean`; be told text first (`prepare`); refuse too few (`need_attackers`).
    """

    def poison(self, shard: Any, rng: torch.Generator) -> Any: ...
    def probe(self, test: Any) -> Any: ...
    def success(self, answer: Any, row: Any) -> bool: ...


# What the user wrote (triggers go here), optional further input, the answer, its class ("" where there is none), and
# whether an attacker made the row: a poisoned row that truncation would spoil is an error, never a silent no-op.
TEXT_COLUMNS = ("text", "context", "response", "label", "poisoned")


def turns_before(row: Mapping[str, Any]) -> list[list[str]]:
    """The turns before a row's text, [role, content] each: JSON in `history`, "" for none, as in `system` (prompt)."""
    return json.loads(row["history"]) if row.get("history") else []


@dataclass(frozen=True)
class Labelled:
    """A shard of images or other arrays with class labels."""

    x: Tensor  # (n, channels, height, width) float32 in [0, 1]
    y: Tensor  # (n,) int64
    classes: int
    poisoned: Tensor  # (n,) bool
    fixed: Tensor | None = None  # (n, height, width) bool: pixels that augmentation leaves as they are; None: no pixel


def tensors_of(rows: Any) -> dict[str, Tensor]:
    """What of a shard could be written into: not a text table."""
    return {"inputs": rows.x, "labels": rows.y} if isinstance(rows, Labelled) else {}


# ---------------------------------------------------------------- defenses


@dataclass(frozen=True)
class RoundContext:
    """What a defense may know. There is no field from which malicious ids could be read."""

    round: int  # from 1
    global_vector: Tensor  # (d,)
    layout: Layout
    rng: torch.Generator
    rounds: int | None = None  # how many the run has, if known
    last_update: Tensor | None = None  # (d,) the last global step
    root_update: Tensor | None = None  # (d,) the server's own update on clean data, if the recipe gives it some
    root_rows: Labelled | None = None  # these data, where they are images
    classifier: Classifier | None = None  # the server's model, where it is one of images
    indicator: Indicator | None = None  # what the server has planted in it, where it plants
    notes: dict[str, float] = field(default_factory=dict)  # what a stage wants recorded; a rule has Decision.notes


@dataclass(frozen=True)
class Decision:
    """What a rule decided. None means: this rule does not measure that."""

    update: Tensor  # (d,) to be added to the global vector
    weights: Tensor | None = None  # (n,) float64 row weights, where the rule is a combination of rows
    kept: Tensor | None = None  # (n,) bool, where the rule selects
    scores: Tensor | None = None  # (n,) float64, higher is more suspicious
    notes: Mapping[str, float] = field(default_factory=dict)  # other numbers worth recording
    step: Callable[[Tensor], Tensor] | None = None  # of a rehearsal: how an update (d,) would move the model, (d,)

    @classmethod
    def weighted(
        cls, updates: UpdateMatrix, weights: Tensor, *, kept: Tensor | None = None, scores: Tensor | None = None,
        notes: Mapping[str, float] | None = None,
    ) -> Decision:  # fmt: skip
        """The combination sum_i w_i x_i; weights are used as given."""
        w = weights.to(torch.float64).cpu()
        return cls(kernels.combine(updates, w), w, kept, scores, dict(notes or {}))

    @classmethod
    def keep(cls, updates: UpdateMatrix, kept: Tensor, *, scores: Tensor | None = None) -> Decision:
        """The uniform mean of the kept rows; keeping none gives the zero update, and in a run the round is skipped."""
        mask = kept.to(torch.bool).cpu()
        w = mask.to(torch.float64) / max(1, int(mask.sum()))
        return cls.weighted(updates, w, kept=mask, scores=scores)


class Before(Protocol):
    """Rows to rows: clipping, mixing. `UpdateMatrix.mix` tells by itself what is mixed.

    A row in place of others that bears a client's id must be that client's alone: what is decided on it is told as his.
    """

    def __call__(self, updates: UpdateMatrix, ctx: RoundContext) -> UpdateMatrix: ...


class Defense(Protocol):
    """Rows to one update. A rule with memory also has `state_dict` and `load_state_dict`, keyed by client id."""

    def __call__(self, updates: UpdateMatrix, ctx: RoundContext) -> Decision: ...


class After(Protocol):
    """The new global vector (d,) to the one that is kept; `ctx.global_vector` is the old one."""

    def __call__(self, vector: Tensor, ctx: RoundContext) -> Tensor: ...


# ---------------------------------------------------------------- server


@dataclass(frozen=True)
class ServerContext:
    """What the server knows when it steps, besides the defended update."""

    steps: float  # local steps: the median of the rows' claims
    lr: float  # the clients' learning rate in this round
    share: float = 1.0  # what the mean of the round's rows weighs in that of all clients: |S| / N (algorithms/taken.py)
    weight: float = 1.0  # what the row weights add up to: 1 for a mean, less where rows were clipped
    weights: Tensor | None = None  # (n,) float64 row weights, where the defense gave some
    factors: Tensor | None = None  # (n,) float64 by which the rows were multiplied before the defense


class ServerRule(Protocol):
    """The server's optimizer: takes a defended update to the global vector. Its memory is made of these alone."""

    def __call__(self, vector: Tensor, update: Tensor, ctx: ServerContext) -> Tensor: ...  # (d,), (d,) -> (d,)


class Remember(Protocol):
    """What a client knows anew, of its own row and what it was sent; `part` in (0, 1] of the row has been taken."""

    def __call__(
        self, memory: Mapping[str, Tensor], delta: Tensor, *, steps: int, lr: float, control: Tensor | None, part: float
    ) -> dict[str, Tensor]: ...


def as_it_is(training: LocalTraining, sizes: Sequence[int] | None) -> LocalTraining:
    """Local training that an FL method leaves alone."""
    return training


@dataclass(frozen=True)
class Algorithm:
    """An FL method: what it changes in the clients' steps, in the rows before the defense, and at the server.

    `prepare` adapts local training, or raises RecipeError where the method cannot work with it; the shard sizes are
    None while no data are loaded. `factors` turns claimed local steps (n,) into what each row is multiplied by before
    the defense. `control` gives a second vector (d,) that the server sends to its clients, given the first.
    """

    server: ServerRule
    local: tuple[LocalRule, ...] = ()
    prepare: Callable[[LocalTraining, Sequence[int] | None], LocalTraining] = as_it_is
    factors: Callable[[Tensor, LocalTraining], Tensor] | None = None
    control: Callable[[Tensor], Tensor] | None = None
    remember: Remember | None = None
    task: str | None = None  # the only kind of task it is for
    server_lr: float | None = None  # by which the server multiplies an update; None: by no one number (Adam)


class Remembers(Protocol):
    """Anything that carries state from round to round, so that a resumed run is exact."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...
