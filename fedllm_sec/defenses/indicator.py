"""BackdoorIndicator: the server plants a task of its own in what it sends, and refuses who brings it back unharmed."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from fedllm_sec.defenses.checks import need
from fedllm_sec.defenses.latent import vector_of
from fedllm_sec.errors import DefenseError
from fedllm_sec.matrix import UpdateMatrix
from fedllm_sec.models.function import Indicator
from fedllm_sec.protocols import Decision, LocalContext, RoundContext

AT_ONCE = 256  # indicator rows in one forward pass
NOISE = "noise"  # the source of rows that needs no data


def best_label(logits: Tensor, y: Tensor) -> float:
    """The largest, over the labels, share of a label's rows (k, classes) that are told right, from 0 to 1.

    1 where a logit is not finite: such a model is not looked into, it is refused.
    """
    if not bool(logits.isfinite().all()):
        return 1.0
    right, labels = (logits.argmax(1) == y).cpu(), y.cpu()
    return max(float(right[labels == label].double().mean()) for label in sorted(set(labels.tolist())))


def right_of(logits: Tensor, y: Tensor) -> float:
    """The share of all rows (k, classes) that are told right."""
    return float((logits.argmax(1) == y).double().mean())


def logits_of(indicator: Indicator, vector: Tensor) -> Tensor:
    """What the model of a vector (d,) says of the indicator's rows: (k, classes)."""
    with torch.no_grad():
        return torch.cat([indicator.classifier.logits(vector, x) for x in torch.split(indicator.x, AT_ONCE)])


def kept_of(indicator: Indicator, vector: Tensor) -> float:
    """How much of the indicator task the model of a vector (d,) still does, under the planted model's statistics."""
    return best_label(logits_of(indicator, vector), indicator.y)


class Tether:
    """A local rule of the planting: grad += mu / 2 (w - w0) / ||w - w0||, the slope of mu / 2 ||w - w0||."""

    def __init__(self, mu: float) -> None:
        self.mu = mu

    @torch.no_grad()
    def before_step(self, parameters: torch.nn.Parameter, step: int, ctx: LocalContext) -> None:
        assert parameters.grad is not None
        away = parameters - ctx.start
        length = float(away.norm())
        if length > 0:
            parameters.grad.add_(away, alpha=self.mu / 2 / length)

    def after_step(self, parameters: torch.nn.Parameter, step: int, ctx: LocalContext) -> None:
        return None


class BackdoorIndicator:
    """Refuse clients whose model still does a task that the server has planted in what it sent; the mean of the others.

    Li and Dai 2024 (USENIX Security), sec. 4: a backdoor is itself a task on out-of-distribution rows, and training it
    keeps up another one, which honest training forgets. `rows` images of `source` get balanced random labels, once for
    the run. Before each round the server trains them into the global model, `epochs` passes of SGD with `mu` / 2 times
    the distance moved in the loss, and sends the planted parameters with the running statistics from before. A client's
    parameters are judged under the statistics that planting has left: the score is the largest share, over the labels,
    of a label's rows told right, and from `threshold` on the client is refused. The model steps from the planted one,
    as the authors' does. Defaults are those of their CIFAR-10 run (ybdai7/Backdoor-indicator-defense).

    `source` is `noise` (uniform pixels) or a data set, named as `data.name` is, whose training images are brought to
    the model's shape; none of them may be of the task, which is not checked.

    Stated here: the learning rate stays (theirs falls to 0.8 at epochs 10, 20, 30 and 160), a short last batch is used,
    a model with logits that are not finite is refused, and where all are refused the round is skipped and the model is
    the one from before planting. Notes: `indicator_planted`, the score of the planted model itself,
    `indicator_moved`, how far planting has moved it, and `indicator_left`, the share of all rows that the model told
    right before planting: what honest training has not worn off, since nothing else takes the task out of the model.
    """

    def __init__(
        self,
        *,
        source: str,
        rows: int = 800,
        threshold: float = 0.95,
        epochs: int = 200,
        batch_size: int = 64,
        lr: float = 0.005,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        mu: float = 0.4,
    ) -> None:
        name = "backdoor_indicator"
        need(bool(source.strip()), name, "a source of images", "Set it to noise or a data set.", source=source)
        need(rows >= 1, name, "rows >= 1", "Raise it.", rows=rows)
        need(0 < threshold <= 1, name, "0 < threshold <= 1", "Change it: 0 refuses everybody.", threshold=threshold)
        need(epochs >= 1, name, "epochs >= 1", "Raise it: else nothing is planted.", epochs=epochs)
        need(batch_size >= 2, name, "batch_size >= 2", "Raise it.", batch_size=batch_size)
        need(0 < lr < math.inf, name, "lr > 0", "Raise it: else nothing is planted.", lr=lr)
        need(0 <= momentum < 1, name, "0 <= momentum < 1", "Change it.", momentum=momentum)
        need(0 <= weight_decay < math.inf, name, "weight_decay >= 0", "Raise it.", weight_decay=weight_decay)
        need(0 <= mu < math.inf, name, "mu >= 0", "Raise it.", mu=mu)
        self.source, self.rows, self.threshold = source, rows, threshold
        self.epochs, self.batch_size, self.lr = epochs, batch_size, lr
        self.momentum, self.weight_decay, self.mu = momentum, weight_decay, mu

    def __call__(self, updates: UpdateMatrix, ctx: RoundContext) -> Decision:
        if (indicator := ctx.indicator) is None:
            raise DefenseError(
                "backdoor_indicator: needs a model of images into which the server has planted its task, and sent it "
                "planted; there is none here. Use it where task is classify, in train or deploy, or another rule."
            )
        scores = torch.tensor(
            [kept_of(indicator, vector_of(updates, i, ctx.global_vector)) for i in range(updates.n)],
            dtype=torch.float64,
        )
        decision = Decision.keep(updates, scores < self.threshold, scores=scores)
        notes = {"planted": indicator.planted, "moved": indicator.moved, "left": indicator.left}
        return replace(decision, notes={f"indicator_{name}": value for name, value in notes.items()})
