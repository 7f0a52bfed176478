"""The gauge in which a row of adapter factors looks most like another row, while its products stay what they are."""

from __future__ import annotations

import torch
from torch import Tensor

from fedllm_sec.matrix.factors import Products

STEPS = 30  # of Gauss and Newton; most rows need fewer than ten
SHARES = (1.0, 0.5, 0.25, 0.1, 0.03)  # of a step that are tried


def hidden(rows: Tensor, target: Tensor, products: Products, condition: float) -> Tensor:
    """The rows (m, d), each layer in the gauge nearest to `target` (d,) that a condition of M allows, in float32."""
    made, start = rows.clone(), products.start[None].to(rows.device)
    for pair in products.pairs:
        a0, b0 = pair.wide(start), pair.tall(start)
        goal_a, goal_b = a0 + pair.wide(target[None]), b0 + pair.tall(target[None])
        a, b = nearest(a0 + pair.wide(rows), b0 + pair.tall(rows), goal_a, goal_b, condition)
        made[:, pair.a], made[:, pair.b] = (a - a0).flatten(1).float(), (b - b0).flatten(1).float()
    return made


def nearest(a: Tensor, b: Tensor, goal_a: Tensor, goal_b: Tensor, condition: float) -> tuple[Tensor, Tensor]:
    """(M A, B M^-1) that lessen ||M A - A_t||^2 + ||B M^-1 - B_t||^2, for A (m, r, in) and B (m, out, r), float64.

    M is moved to (1 + E) M, and to first order B M^-1 to B M^-1 (1 - E): the best E solves the Sylvester equation
    (B^T B) E + E (A A^T) = (A_t - A) A^T + B^T (B - B_t). A step, or a part of it, is taken where it lessens the sum
    and leaves M with at most this condition; a row that cannot come nearer stays.
    """
    m, r = a.shape[:2]
    eye = torch.eye(r, dtype=a.dtype, device=a.device)
    turn, best = eye.repeat(m, 1, 1), _apart(a, b, goal_a, goal_b)
    for _ in range(STEPS):
        q, u = torch.linalg.eigh(b.mT @ b)
        p, v = torch.linalg.eigh(a @ a.mT)
        wanted = (goal_a - a) @ a.mT + b.mT @ (b - goal_b)
        sums = q.clamp_min(0)[:, :, None] + p.clamp_min(0)[:, None]
        top = sums.amax((1, 2), keepdim=True).clamp_min(1e-300)
        step = u @ ((u.mT @ wanted @ v) / (sums + 1e-12 * top)) @ v.mT
        moved = torch.zeros(m, dtype=torch.bool, device=a.device)
        for share in SHARES:
            change = eye + share * step
            sizes, whole = torch.linalg.svdvals(change), torch.linalg.svdvals(change @ turn)
            good = ~moved & (sizes[:, -1] > 1e-6) & (whole[:, 0] <= condition * whole[:, -1])
            change = torch.where(good[:, None, None], change, eye)
            new_a, new_b = change @ a, b @ torch.linalg.inv(change)
            apart = _apart(new_a, new_b, goal_a, goal_b)
            good &= apart < best * (1 - 1e-9)
            a, b = torch.where(good[:, None, None], new_a, a), torch.where(good[:, None, None], new_b, b)
            turn = torch.where(good[:, None, None], change @ turn, turn)
            best, moved = torch.where(good, apart, best), moved | good
        if not bool(moved.any()):
            break
    return a, b


def _apart(a: Tensor, b: Tensor, goal_a: Tensor, goal_b: Tensor) -> Tensor:
    return (a - goal_a).square().sum((1, 2)) + (b - goal_b).square().sum((1, 2))
