"""DP-SGD in clients: batches by independent draws, each row's gradient clipped, noise on their sum, and its epsilon."""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedllm_sec.defenses.checks import need
from fedllm_sec.defenses.client_side import WhiteBloodCells
from fedllm_sec.defenses.compression import Compressed
from fedllm_sec.defenses.noise import noise_like
from fedllm_sec.errors import RecipeError
from fedllm_sec.protocols import LocalContext, LocalRule, LocalTraining
from fedllm_sec.seeds import generator_for

# Of Opacus' own, whose others below 11 take most of the time: epsilon is never below that of all, 13 % above at the
# worst seen. The larger ones are for small rates.
ORDERS = [1.1, 1.25, 1.5, 1.75, *range(2, 64), 80, 128, 256, 512]
HARMLESS: tuple[type, ...] = (WhiteBloodCells, Compressed)  # they see nothing of the rows but what is noisy
PROTECTS = (
    "one row of a client's shard, in all that the client sends but its claimed loss, if the noise were secret; the "
    "recipe's public seed draws it, so here nobody"
)


class DpSgd:
    """A local rule that draws its own batches and makes their gradient.

    Abadi et al. 2016, algorithm 1: of n rows each is in a step's batch with probability q = batch_size / n,
    independently; the gradient (d,) is (sum_i g_i min(1, clip / |g_i|) + noise clip N(0, I)) / (q n), g_i being that of
    row i's own loss, the mean over its scored tokens. With `epsilon` in place of `noise`, the least noise is taken with
    which no client spends more by the last round, were it in all of them. Gradients of rows are Opacus' (Yousefpour et
    al. 2021), by hooks that are there for one step, and a pass for each row where they do not add up to the batch's.
    epsilon is that of Opacus' Renyi accountant (Mironov et al. 2019), at `ORDERS`, for one row more or less. What the
    optimizer does after it (clients.max_grad_norm, momentum, AdamW) works on the noisy gradient and costs nothing.
    """

    def __init__(
        self, *, clip: float = 1.0, noise: float | None = None, epsilon: float | None = None, delta: float = 1e-5
    ) -> None:
        need(clip > 0 and math.isfinite(clip), "dp_sgd", "clip > 0", "Raise it.", clip=clip)
        need(noise is None or epsilon is None, "dp_sgd", "noise or epsilon", "Drop one.", noise=noise, epsilon=epsilon)
        need(noise is None or 0 <= noise < math.inf, "dp_sgd", "noise >= 0", "Raise it.", noise=noise)
        need(epsilon is None or 0 < epsilon < math.inf, "dp_sgd", "epsilon > 0", "Raise it.", epsilon=epsilon)
        need(0 < delta < 1, "dp_sgd", "0 < delta < 1", "Take one below 1 / rows.", delta=delta)
        self.clip, self.epsilon, self.delta = clip, epsilon, delta
        self.noise = 1.0 if noise is None else noise
        self.expected = 1.0  # rows of a batch, q n
        self.hooked = True  # whether Opacus' gradients have added up so far
        self.used: dict[str, tuple[float, int]] = {}  # client -> q, steps so far

    def prepare(self, task: Any, steps: Sequence[int]) -> None:
        """Opacus must be there, and a row's gradient must be its own."""
        need_opacus()
        for name, part in task.model.named_modules():
            if isinstance(part, torch.nn.modules.batchnorm._BatchNorm):
                raise RecipeError(
                    f"dp_sgd: {name} ({type(part).__name__}) mixes the rows of a batch, so no row has a gradient of "
                    "its own. Choose a model with GroupNorm, or drop dp_sgd."
                )

    def plan(self, sizes: Sequence[int], training: LocalTraining, rounds: int) -> None:
        """Find the noise for `epsilon`, shards of these sizes and all rounds of a run."""
        if self.epsilon is not None:
            ways = {(rate_of(n, training), training.steps_of(n) * rounds) for n in sizes}
            self.noise = max(noise_for(self.epsilon, self.delta, q, steps) for q, steps in ways)

    def batches(self, size: int, batch: int | None, rng: torch.Generator) -> Iterator[list[int]]:
        """Poisson draws of row numbers, without end; a batch may be empty."""
        q = min(1.0, (batch or max(1, size)) / max(1, size))
        self.expected = q * max(1, size)
        return (torch.nonzero(torch.rand(size, generator=rng) < q)[:, 0].tolist() for _ in itertools.count())

    def backward(self, task: Any, shard: Any, rows: Sequence[int], machine: Any) -> Tensor:
        """Put the clipped sum over the rows / (q n) into `task.parameters.grad`; give the mean loss."""
        total = torch.zeros_like(task.parameters)
        loss_sum, weights = total.new_zeros(()), task.weight(shard, rows) if rows else 1.0
        for here, numbers in _parts(task, shard, rows, machine.micro):
            grads, loss = self._of_rows(task, shard, here, numbers, machine)
            total += clipped_sum(grads, self.clip)
            loss_sum += loss * (task.weight(shard, here) / weights)
        task.parameters.grad.copy_(total / self.expected)
        return loss_sum

    def _of_rows(
        self, task: Any, shard: Any, rows: Any, numbers: tuple[Tensor, ...], machine: Any
    ) -> tuple[Tensor, Tensor]:
        if self.hooked:
            made = hooked_gradients(task, shard, rows, numbers, machine)
            if made is not None:
                return made
            self.hooked = False
        return looped_gradients(task, shard, rows, numbers, machine)

    def before_step(self, parameters: torch.nn.Parameter, step: int, ctx: LocalContext) -> None:
        """Add the noise."""
        assert parameters.grad is not None
        # torch is seeded for (seed, round, client); drawing apart leaves its dropout alone
        rng = generator_for(torch.initial_seed(), step, "dp_sgd")
        parameters.grad.add_(noise_like(parameters.grad, self.noise * self.clip / self.expected, rng))

    def after_step(self, parameters: torch.nn.Parameter, step: int, ctx: LocalContext) -> None:
        """Nothing more: what follows works on what is noisy."""

    # ------------------------------------------------------------ what is spent

    def trained(self, client: str, size: int, training: LocalTraining) -> None:
        """A client has trained for one more round."""
        _, steps = self.used.get(client, (0.0, 0))
        self.used[client] = rate_of(size, training), steps + training.steps_of(size)

    def told(self, guards: Sequence[LocalRule]) -> dict[str, Any]:
        """{"epsilon": {client: spent so far} or None, "delta", "noise", "protects", "because"}, beside these rules."""
        others = [rule for rule in guards if rule is not self and not isinstance(rule, HARMLESS)]
        why = f"{type(others[0]).__name__} looks at the rows and adds no noise" if others else None
        why = "its noise is 0" if self.noise == 0 else why
        spent = {id: epsilon_of(self.noise, q, steps, self.delta) for id, (q, steps) in sorted(self.used.items())}
        found = {"epsilon": spent if why is None else None, "delta": self.delta, "noise": self.noise}
        return {**found, "protects": PROTECTS, "because": why}

    def state_dict(self) -> dict[str, Any]:
        return {id: {"rate": q, "steps": steps} for id, (q, steps) in self.used.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.used = {id: (float(one["rate"]), int(one["steps"])) for id, one in state.items()}


def rate_of(size: int, training: LocalTraining) -> float:
    """With which probability a row is in a step's batch."""
    return min(1.0, (training.batch_size or max(1, size)) / max(1, size))


# ---------------------------------------------------------------- gradients of rows


def clipped_sum(grads: Tensor, clip: float) -> Tensor:
    """sum_i g_i min(1, clip / |g_i|) of rows (b, d): (d,). A gradient that is not finite counts as 0."""
    norms = grads.norm(dim=1)
    factors = (clip / norms.clamp_min(1e-30)).clamp_max(1.0)
    made: Tensor = factors.where(norms.isfinite(), torch.zeros_like(factors)) @ grads.nan_to_num(0.0, 0.0, 0.0)
    return made


def _parts(task: Any, shard: Any, rows: Sequence[int], micro: int) -> Iterator[tuple[Any, tuple[Tensor, ...]]]:
    """The rows in `micro` parts, with the random numbers drawn for each; no empty part."""
    if not rows:
        return
    drawn = task.draw(shard, rows)[0] if hasattr(task, "draw") else None
    for k in range(min(micro, len(rows))):
        part = drawn.every(k, micro) if drawn is not None else None
        yield (part.rows, part.numbers) if part is not None else (rows[k::micro], ())


def looped_gradients(
    task: Any, shard: Any, rows: Sequence[int], numbers: tuple[Tensor, ...], machine: Any
) -> tuple[Tensor, Tensor]:
    """The gradients (b, d) of each row's own loss, a pass for each, and the mean loss of the rows."""
    grads = task.parameters.new_empty(len(rows), len(task.parameters))
    losses, weights = [], []
    for i in range(len(rows)):
        task.parameters.grad.zero_()
        with machine.autocast():
            loss = task.loss(shard, rows[i : i + 1], *(t[i : i + 1] for t in numbers))
        loss.backward()
        grads[i] = task.parameters.grad
        losses.append(loss.detach())
        weights.append(task.weight(shard, rows[i : i + 1]))
    share = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    return grads, torch.stack(losses) @ share.to(losses[0])


def hooked_gradients(
    task: Any, shard: Any, rows: Sequence[int], numbers: tuple[Tensor, ...], machine: Any
) -> tuple[Tensor, Tensor] | None:
    """The same in one pass, by Opacus' hooks; None where they do not add up to the batch's gradient.

    In the batch's loss a row's own counts by its share of what is scored; that is divided out.
    """
    from opacus.grad_sample import GradSampleModule
    from opacus.grad_sample.grad_sample_module import GradSampleHooks

    del GradSampleModule  # importing it fills the table of layers
    own = [p for p in task.model.parameters() if p.requires_grad]
    task.parameters.grad.zero_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            hooks = GradSampleHooks(task.model, strict=False, loss_reduction="sum")
            try:
                with machine.autocast():
                    loss = task.loss(shard, rows, *numbers)
                loss.backward()
                found = [p.grad_sample for p in own]
            finally:
                hooks.cleanup()
        except (ValueError, RuntimeError, NotImplementedError, AttributeError, TypeError, IndexError):
            return None  # a layer that Opacus has no rule for
    if any(not isinstance(part, Tensor) or len(part) != len(rows) for part in found):
        return None
    grads = torch.cat([part.reshape(len(rows), -1).float() for part in found], dim=1)
    whole = task.parameters.grad
    if not float((grads.sum(0) - whole).norm()) <= 1e-3 * float(whole.norm()) + 1e-12:
        return None
    weights = torch.tensor([task.weight(shard, rows[i : i + 1]) for i in range(len(rows))]).to(grads)
    return grads * (weights.sum() / weights)[:, None], loss.detach()


# ---------------------------------------------------------------- Opacus' accountant


def need_opacus() -> None:
    """An error where Opacus is not installed."""
    try:
        import opacus  # noqa: F401
    except ImportError as error:
        raise RecipeError(
            "dp_sgd: needs opacus, which is not installed. pip install 'fedllm_sec[privacy]', or drop dp_sgd."
        ) from error


@functools.cache
def divergences(noise: float, rate: float) -> NDArray[np.float64]:
    """The Renyi divergence of one step of the sampled Gaussian mechanism at each of `ORDERS` (Mironov et al. 2019)."""
    from opacus.accountants.analysis import rdp

    return np.asarray(rdp.compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=ORDERS), dtype=np.float64)


def epsilon_of(noise: float, rate: float, steps: int, delta: float) -> float:
    """epsilon at delta of so many steps, in which divergences add up; inf without noise."""
    if noise <= 0:
        return math.inf
    from opacus.accountants.analysis import rdp

    with warnings.catch_warnings():  # that the best order is the last it tried: epsilon is only larger for it
        warnings.simplefilter("ignore")
        return float(rdp.get_privacy_spent(orders=ORDERS, rdp=steps * divergences(noise, rate), delta=delta)[0])


def noise_for(epsilon: float, delta: float, rate: float, steps: int) -> float:
    """The least noise, to 1 %, with which so many steps spend at most epsilon."""
    low, high = 0.0, 1.0
    while epsilon_of(high, rate, steps, delta) > epsilon:
        low, high = high, 2 * high
        if high > 1e6:
            raise RecipeError(
                f"dp_sgd.epsilon: {epsilon}: no noise is enough at delta {delta}, {steps} steps and a sampling rate of "
                f"{rate:.3g}. Raise epsilon or delta."
            )
    while high - low > 1e-2 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if epsilon_of(middle, rate, steps, delta) > epsilon else (low, middle)
    return high


def advantage_bound(epsilon: float, delta: float) -> float:
    """By how much the true positive rate of any membership test can exceed its false positive rate, at the most.

    (e^epsilon - 1 + 2 delta) / (e^epsilon + 1): Kairouz et al. 2015, theorem 2.1 (the region of what a test can reach).
    """
    return (math.expm1(min(epsilon, 700.0)) + 2 * delta) / (math.exp(min(epsilon, 700.0)) + 1)
