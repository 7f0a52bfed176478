"""Ways to average adapters: what becomes of A, B and the base weights once the rows have their weights.

The mean product of a round is T = B_0 A_0 + sum_i w_i (B_i A_i - B_0 A_0), of which a mean of the A and a mean of the B
are no factors. `exact` and `stack` put what is missing into the base weights, `svd` takes the best factors of rank r.
Products are factors side by side, (out, k) and (k, in) in float64: none is formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedllm_sec.matrix.factors import Pair, Products
from fedllm_sec.models.products import square_of_inner
from fedllm_sec.protocols import LocalContext

Factors = tuple[Tensor, Tensor]  # (out, k), (k, in)
Mode = Literal["exact", "stack", "svd", "pad"]
WITHIN = ("svd", "pad")  # whose model is its factors alone
LONGEST = 2.0  # times the median length, above which a client's product weighs no more: a length is a claim


@dataclass(frozen=True)
class Averaged:
    """The new global vector (d,), what each layer's base weight gains (None: it stays), and how far T is missed."""

    vector: Tensor
    gains: list[Factors] | None
    gap: float  # ||T - what the model holds|| / ||T - B_0 A_0||


def average(
    mode: Mode, vector: Tensor, rows: Tensor, weights: Tensor, products: Products, fresh: Tensor | None = None
) -> Averaged:
    """The mean product of rows (n, d) with weights (n,), given to factors and base weights.

    `vector` (d,) has what was averaged apart: it stands for everything beside the factors.
    - exact (FedEx-LoRA, Singhal et al. 2025): A' and B' are the averages, the base weight gains T - B' A'.
    - stack (FLoRA, Wang et al. 2024): the base gains T, and A and B begin again as they were in `fresh` (d,), whose
      product, 0 but for pissa and olora, is taken off again.
    - svd (FlexLoRA, Bai et al. 2024): A' and B' are the best of rank r for T, the singular values shared out evenly.
    - pad (HetLoRA, Cho et al. 2024): A' and B' are the averages with weights w_i ||B_i A_i||, where what a client of
      lower rank does not have counts as 0. Its pruning of ranks in training is left out.
    """
    made, gains, missed, change = vector.clone(), list[Factors](), 0.0, 0.0
    if mode == "pad":
        weights = by_length(rows, weights, products)
    for pair in products.pairs:
        mean = mean_product(pair, rows, weights, products.start)
        if mode == "stack":
            assert fresh is not None
            for place in (pair.a, pair.b):
                made[place] = fresh[place].to(made)
        if mode == "pad":
            used = weights.nonzero().flatten().tolist()
            for place in (pair.a, pair.b):
                moved = weights[used].to(rows.device) @ rows[used, place].double()
                made[place] = (products.start[place].to(moved) + moved).to(made)
        if mode == "svd":
            tall, wide = best_factors(mean, pair.rank)
            made[pair.a], made[pair.b] = wide.flatten().to(made), tall.flatten().to(made)
        now = own_factors(pair, made)
        left = minus(mean, now)
        gains.append((pair.scale * left[0], left[1]))  # in the layer a product counts s times
        if mode in WITHIN:
            missed += pair.scale**2 * max(0.0, square_of_inner(*left))
            change += pair.scale**2 * max(0.0, square_of_inner(*minus(mean, own_factors(pair, products.start))))
    gap = (missed / change) ** 0.5 if change > 0 else 0.0
    return Averaged(made, None if mode in WITHIN else gains, gap)


def by_length(rows: Tensor, weights: Tensor, products: Products) -> Tensor:
    """The weights (n,) times the length of each row's product over all layers, of the same sum as before.

    A length above LONGEST times the median of the rows that count at all is taken as that: it is the client's claim.
    """
    used = weights.nonzero().flatten()
    squares = torch.zeros(len(used), dtype=torch.float64)
    for pair in products.pairs:
        b0, a0 = own_factors(pair, products.start.to(rows.device))
        for i, row in enumerate(used.tolist()):
            tall, wide = b0 + pair.tall(rows[row][None])[0], a0 + pair.wide(rows[row][None])[0]
            squares[i] += pair.scale**2 * square_of_inner(tall, wide)
    lengths = squares.clamp_min(0).sqrt()
    if not bool(lengths.any()):  # as before the first round
        return weights
    middle = float(lengths.quantile(0.5))
    if middle > 0:
        lengths = lengths.clamp(max=LONGEST * middle)
    made = weights.clone()
    made[used] = weights[used] * lengths.to(weights)
    return made * (weights.sum() / made.sum())


def cut(pairs: Sequence[Pair], vector: Tensor, rank: int) -> Tensor:
    """A vector (d,) whose products have no more than this rank: of each A the first rows, of each B the first columns.

    What was left out is 0 in both, and stays so in training: neither has a gradient where the other is 0.
    """
    made = vector.clone()
    for pair in pairs:
        made[pair.a].view(pair.rank, -1)[rank:] = 0
        made[pair.b].view(-1, pair.rank)[:, rank:] = 0
    return made


def own_factors(pair: Pair, vector: Tensor) -> Factors:
    """B and A of a vector (d,)."""
    return pair.tall(vector[None])[0], pair.wide(vector[None])[0]


def mean_product(pair: Pair, rows: Tensor, weights: Tensor, start: Tensor) -> Factors:
    """T of one layer, of rank (n + 1) r: rows of weight 0 do not count, whatever they hold."""
    used = weights.nonzero().flatten().tolist()
    b0, a0 = own_factors(pair, start)
    b, a = b0 + pair.tall(rows)[used].to(b0), a0 + pair.wide(rows)[used].to(a0)
    w = weights[used].to(b)
    return torch.cat([(1 - w.sum()) * b0, *(w[:, None, None] * b)], 1), torch.cat([a0, *a])


def minus(one: Factors, other: Factors) -> Factors:
    """The difference of two products."""
    return torch.cat([one[0], -other[0]], 1), torch.cat([one[1], other[1]])


def best_factors(factors: Factors, rank: int) -> Factors:
    """The best approximation of a product by factors of this rank, each with the roots of the singular values."""
    left, upper = torch.linalg.qr(factors[0])
    right, lower = torch.linalg.qr(factors[1].T)
    u, sizes, v = torch.linalg.svd(upper @ lower.T)
    root = sizes[:rank].sqrt()
    tall, wide = (left @ u[:, :rank]) * root, root[:, None] * (v[:rank] @ right.T)
    if (short := rank - len(root)) > 0:
        return torch.nn.functional.pad(tall, (0, short)), torch.nn.functional.pad(wide, (0, 0, 0, short))
    return tall, wide


# ---------------------------------------------------------------- one factor at a time


@dataclass(frozen=True)
class Alternate:
    """Odd rounds train B, even rounds A (RoLoRA, Chen et al. 2025): then a mean of factors is a mean of products.

    As a local rule it holds the other factor still; `frozen` says where it lies, which the server does not take
    either.
    """

    pairs: Sequence[Pair]

    def frozen(self, round: int) -> list[slice]:
        return [pair.a if round % 2 else pair.b for pair in self.pairs]

    def before_step(self, parameters: torch.nn.Parameter, step: int, ctx: LocalContext) -> None:
        assert parameters.grad is not None
        for place in self.frozen(ctx.round):
            parameters.grad[place] = 0

    def after_step(self, parameters: torch.nn.Parameter, step: int, ctx: LocalContext) -> None:
        with torch.no_grad():  # weight decay moves what has no gradient
            for place in self.frozen(ctx.round):
                parameters[place] = ctx.start[place]
