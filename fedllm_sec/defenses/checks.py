"""What the rules ask of their rows, and orders of rows that do not depend on how the rows are stacked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedllm_sec.errors import DefenseError
from fedllm_sec.matrix import UpdateMatrix


def need(holds: bool, rule: str, condition: str, way_out: str, **got: object) -> None:
    """Raise unless `holds`: "krum: needs n >= 2f + 3 clients, got n=8, f=3. Lower f or raise ..." """
    if not holds:
        values = ", ".join(f"{name}={value!r}" for name, value in got.items())
        raise DefenseError(f"{rule}: needs {condition}, got {values}. {way_out}")


def need_f(rule: str, n: int, f: int, holds: bool, condition: str) -> None:
    """The usual precondition: f >= 0 assumed attackers and enough rows left after screening."""
    need(f >= 0, rule, "f >= 0 assumed attackers", "Set f to 0 or more.", f=f)
    need(holds, rule, condition, "Lower f or raise clients.per_round.", n=n, f=f)


def random_order(updates: UpdateMatrix, rng: torch.Generator) -> list[int]:
    """The rows' positions in a random order that is drawn over client ids, not over positions."""
    by_id = sorted(range(updates.n), key=lambda i: updates.ids[i])
    return [by_id[j] for j in torch.randperm(updates.n, generator=rng, device=rng.device).tolist()]


def lowest(values: Tensor, m: int, ids: Sequence[str]) -> list[int]:
    """Positions of the m smallest values; equal values go to the smallest id (Blanchard et al. 2017)."""
    listed = values.tolist()
    # shorter ids first, so that 2 comes before 10
    return sorted(range(len(listed)), key=lambda i: (listed[i], len(ids[i]), ids[i]))[:m]


def bucket_matrix(order: Sequence[int], size: int) -> Tensor:
    """(k, n) float64 matrix whose rows average `size` consecutive clients of `order`, the last short."""
    n = len(order)
    groups = [order[start : start + size] for start in range(0, n, size)]
    matrix = torch.zeros(len(groups), n, dtype=torch.float64)
    for row, group in enumerate(groups):
        matrix[row, list(group)] = 1.0 / len(group)
    return matrix
