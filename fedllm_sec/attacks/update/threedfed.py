"""3DFed: rows under noise that cancels, decoys, and indicators that tell whether a row was accepted."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedllm_sec.attacks.update.sight import median_norm
from fedllm_sec.attacks.update.weights import server_lr
from fedllm_sec.errors import AttackError
from fedllm_sec.matrix import Layout
from fedllm_sec.protocols import ThreatView

ACCEPTED, CLIPPED, REJECTED = "accepted", "clipped", "rejected"


def last_matrix(layout: Layout) -> tuple[slice, tuple[int, int]]:
    """Where the last matrix of the model lies, and its shape (neurons, inputs)."""
    found = [(place, shape) for place, shape in zip(layout.slices().values(), layout.shapes, strict=True)
             if len(shape) == 2 and min(shape) > 1]  # fmt: skip
    if not found:
        raise AttackError("threedfed: the layout has no matrix whose neurons could be masked. Choose another attack.")
    return found[-1][0], (found[-1][1][0], found[-1][1][1])


def masks(base: Tensor, alpha: float, count: int, rng: torch.Generator, *, steps: int = 30, lr: float = 0.1) -> Tensor:
    """`count` masks (count, k, h) over rows `base` (k, h) of a matrix that sum to 0 over the masks: float64.

    Descent on alpha * mean_j u / ||base_j + mask_j||_1 + (1 - alpha) * ||mask|| / ||base|| for each mask, u the mean of
    ||base_j||_1, with lambda * ||sum of masks|| / ||base|| for all, and ascent in lambda; then their mean is taken off.
    """
    k, h = base.shape
    rows, size = base.double(), max(float(base.double().norm()), torch.finfo(torch.float32).tiny)
    rows = rows / size  # of length 1 from here on
    drawn = torch.randn(count, k, h, generator=rng, dtype=torch.float64) / math.sqrt(k * h)
    made, usual, weight = drawn - drawn.mean(0), rows.abs().sum(1).mean(), 1.0
    for _ in range(steps):
        at = made.clone().requires_grad_()
        loud = usual / (rows + at).abs().sum(2).clamp_min(1e-12)  # (count, k): small where a neuron moves much
        lengths = at.flatten(1).norm(dim=1)
        apart = at.sum(0).norm()
        loss = (alpha * loud.mean(1) + (1 - alpha) * lengths + weight * apart).sum() / (1 + weight)
        (gradient,) = torch.autograd.grad(loss, at)
        made = made - lr * gradient.nan_to_num()
        weight += lr * float(apart.detach())
    return (made - made.mean(0)) * size


def verdicts(feedback: Sequence[float], heard: float) -> list[str] | None:
    """What became of each row, by what is left of its indicator in the global step; None: noise hides it.

    At most `heard` is rejected; of the others, at most 0.8 of the largest was clipped. Below -heard or above 1 no row
    could have moved it.
    """
    if any(not -heard <= value <= 1 for value in feedback):
        return None
    most = max(feedback, default=0.0)
    return [REJECTED if v <= heard else CLIPPED if v <= 0.8 * most else ACCEPTED for v in feedback]


def quiet(update: Tensor, reference: Tensor | None, outside: slice, count: int) -> list[int]:
    """The `count` coordinates that move least in both (d,), outside the masked matrix."""
    moves = update.abs() if reference is None else update.abs() + reference.abs()
    moves = moves.clone()
    moves[outside] = torch.inf
    return moves.argsort(stable=True)[:count].tolist()


class ThreeDFed:
    """Backdoored rows that look unlike each other, decoys among them, and a mark in each row that reports back.

    Li et al. 2023 (3DFed, IEEE S&P), by the authors' code (attacks/thrdfed.py): all attackers send the mean of their
    backdoored updates, lengthened to a usual length by at most `most`. To each a noise mask over `neurons` of the
    last layer's least moved neurons is added; the masks of a group of `group` attackers cancel. The last attackers send
    decoys: an honest looking row pushed far in one coordinate of that layer in which backdoored and honest rows differ
    least, so that rules which look for the direction of largest spread find that. Each row has an indicator: a
    coordinate that hardly moves holds a large number. The next global step tells what came of it; while rows are
    accepted masks stay as strong as they were, else alpha, the weight of disguise against shortness, is drawn anew from
    `alpha` on; a decoy is added where nothing was accepted, and taken off for each that was.

    For the first part, training under a constraint (0.3 clean, 0.3 poisoned, 0.4 distance), take the local attack
    `constrain_and_scale` with `alpha: 0.6` beside it. Stated here: only what the model did is read, never the server's
    record. Decoys are of the attackers, always fewer than half of them (the paper has further clients), and the honest
    row they set out from is the honest mean, where knowledge grants it, else the last global step at the usual length;
    there is none in round 1. Their push is as long as the row (a number in the paper), and is no training. Numbers are
    relative: `mark` root mean squares of the row for an indicator (authors: 1e5 times what stood there), heard above a
    tenth of an equal share of the mean (1e-4, 1e-5 there). Quiet coordinates are the least moved alone, without the
    curvature. Masks are descended on as in the paper, and their mean is taken off at the end, so they cancel exactly.
    One attacker of a group has no mask.
    """

    def __init__(
        self, *, neurons: int = 5, alpha: float = 0.0, group: int = 5, mark: float = 10.0, most: float = 5.0
    ) -> None:
        if neurons < 1 or group < 2:
            raise AttackError(f"threedfed: neurons={neurons}, group={group}: needs neurons >= 1 and group >= 2.")
        if not 0 <= alpha < 1:
            raise AttackError(f"threedfed.alpha: {alpha}: must be at least 0 and below 1, where alpha is drawn from.")
        if not (1 <= most < math.inf and 0 < mark < math.inf):
            raise AttackError(f"threedfed: most={most}, mark={mark}: needs most >= 1 and mark > 0, both finite.")
        self.neurons, self.least, self.group, self.mark, self.most = neurons, alpha, group, mark, most
        self.alphas: list[float] = []  # of each group
        self.decoys = 0
        self.hidden = False  # whether the server's noise hides what became of rows
        self.planted: list[tuple[int, float]] = []  # coordinate and number, attackers first, then decoys
        self.sent = (0, 0, 1.0)  # round, how many of those were decoys, and above what a mark is heard

    def __call__(self, view: ThreatView) -> Tensor:
        own = view.own.float()
        m, base, last = len(own), own.mean(0), view.last_update
        place, shape = last_matrix(view.layout)
        self._learn(view)
        usual = median_norm(view)
        honest = self._honest(view, usual)
        decoys = min(self.decoys, (m - 1) // 2) if honest is not None else 0
        backdoored = m - decoys
        length = float(base.norm())
        base = base * min(max(usual / length, 1.0), self.most) if length > 0 else base

        groups = [range(i, min(i + self.group, backdoored)) for i in range(0, backdoored, self.group)]
        self.alphas = [*self.alphas, *(self._draw(view.rng, self.least, 1.0) for _ in groups)][: len(groups)]
        rows = base.repeat(m, 1)
        matrix = base[place].view(shape)
        chosen = matrix.abs().sum(1).argsort(stable=True)[: min(self.neurons, shape[0] - 1)]
        for alpha, group in zip(self.alphas, groups, strict=True):
            if len(group) > 1:
                noise = masks(matrix[chosen].cpu(), alpha, len(group), view.rng).to(rows)
                for i, mask in zip(group, noise, strict=True):
                    rows[i, place].view(shape)[chosen] += mask
        if decoys:
            assert honest is not None
            apart = (matrix - honest[place].view(shape)).abs().flatten()
            rows[backdoored:] = honest
            for i, at in zip(range(backdoored, m), apart.argsort(stable=True).tolist(), strict=False):
                rows[i, place.start + at] += usual

        size = self.mark * usual / math.sqrt(len(base))
        at = quiet(base, last if honest is None else honest, place, m)
        for row, coordinate in zip(rows, at, strict=False):
            row[coordinate] = size
        self.planted = [(coordinate, size) for coordinate in at]
        self.sent = (view.round, decoys, 0.1 * server_lr(view, "threedfed") / view.cohort_size)
        if m == 1:
            warnings.warn("threedfed: one attacker has no masks that cancel and no decoys: it sends a mark alone.",
                          stacklevel=2)  # fmt: skip
        return rows

    def _honest(self, view: ThreatView, usual: float) -> Tensor | None:
        """A row (d,) that looks honest, of the usual length; None where nothing is known of one."""
        row = view.last_update if view.others is None or len(view.others) == 0 else view.others.float().mean(0)
        if row is None or not bool(row.any()):
            return None
        return row.float() * (usual / float(row.float().norm()))

    def _learn(self, view: ThreatView) -> None:
        """Tune masks and decoys by what came of the rows of the round before."""
        before, decoys, heard = self.sent
        if before != view.round - 1 or view.last_update is None or self.hidden or not self.planted:
            return
        found = verdicts([float(view.last_update[at]) / number for at, number in self.planted], heard)
        if found is None:
            self.hidden, self.alphas = True, [0.1] * len(self.alphas)
            return
        rows, false = found[: len(found) - decoys], found[len(found) - decoys :]
        self.decoys = max(0, self.decoys - false.count(ACCEPTED))
        if REJECTED in rows and set(rows) == {REJECTED} and ACCEPTED not in false:
            self.decoys += 1
        self.alphas = self._tuned(rows, view.rng)

    def _tuned(self, rows: Sequence[str], rng: torch.Generator) -> list[float]:
        """The groups' alphas, drawn near those of groups most of whose rows were accepted."""
        groups = [rows[i : i + self.group] for i in range(0, len(rows), self.group)]
        good = sorted(
            alpha for alpha, group in zip(self.alphas, groups, strict=False)
            if group.count(ACCEPTED) >= 0.8 * len(group)
        )  # fmt: skip
        if not good:
            return [self._draw(rng, self.least, 1.0) for _ in self.alphas]
        if len(self.alphas) == 1:
            return self.alphas
        high = good[1] if len(good) == len(self.alphas) else good[0] + 0.1
        return [self._draw(rng, good[0], high) for _ in self.alphas]

    @staticmethod
    def _draw(rng: torch.Generator, low: float, high: float) -> float:
        share = float(torch.rand((), generator=rng, dtype=torch.float64, device=rng.device))
        return min(max(low + (high - low) * share, 0.01), 0.99)

    def state_dict(self) -> dict[str, Any]:
        names = ("alphas", "decoys", "hidden", "planted", "sent")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.alphas, self.decoys, self.hidden = list(state["alphas"]), int(state["decoys"]), bool(state["hidden"])
        self.planted = [(int(at), float(number)) for at, number in state["planted"]]
        before, decoys, heard = state["sent"]
        self.sent = (int(before), int(decoys), float(heard))
