"""What is special about LoRA vectors: two factors make one product, and averages of factors are not its average."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedllm_sec.matrix import Layout, UpdateMatrix
from fedllm_sec.matrix.factors import product_pairs

MOST_FLOPS = 2e11  # of one round's product_gap: some ten seconds on two cores
BLOCK = 2**23  # values of a block of a product: 64 MB


def gap_flops(layout: Layout, n: int) -> float:
    """What `product_gap` of n rows costs, in additions and multiplications."""
    shapes = dict(zip(layout.names, layout.shapes, strict=True))
    return float(sum(2 * min(_costs(n, shapes[a], shapes[b])) for a, b in product_pairs(layout)))


def _costs(n: int, a: Sequence[int], b: Sequence[int]) -> tuple[int, int]:
    """Of inner products of m = (n + 2) r factors, and of the product itself: factors are (r, in) and (out, r)."""
    (r, wide), tall = a, b[0]
    m = (n + 2) * r
    return m * m * (wide + tall), m * wide * tall


def product_gap(
    updates: UpdateMatrix, weights: Tensor, start: Tensor, scales: Mapping[str, float] | None = None
) -> float | None:
    """How far averaging A and B apart is from averaging the products B A; None where one factor is frozen.

    ||sum w_i B_i A_i - B' A'|| / ||sum w_i B_i A_i - B_0 A_0||, Frobenius norms over all adapted layers, with A' and
    B' the averaged factors and (A_0, B_0) the start. A layer counts as its product does: `scales` has alpha / r by the
    name of A, where it is not the same for all. Parameters beside the factors (DoRA's lengths, modules that are trained
    whole) average as they are, and fused experts are left out.

    Stacked over the clients both are products of (out, m) and (m, in) with m = (n + 2) r. Where m is small no product
    is formed: <B1 A1, B2 A2> = sum((B1^T B2) * (A1 A2^T)); where it is large the (out, in) products are, block by
    block. Rows of weight 0 are left out.
    """
    pairs = product_pairs(updates.layout)
    used = torch.nonzero(weights).flatten().tolist()
    if not pairs or not used or updates.mixing is not None:
        return None
    w = (weights[used] / weights[used].sum()).to(torch.float64)
    places, shapes = updates.layout.slices(), dict(zip(updates.layout.names, updates.layout.shapes, strict=True))
    error = change = 0.0
    for a_name, b_name in pairs:

        def factors(name: str) -> tuple[Tensor, Tensor]:
            origin = start[places[name]].double().cpu().view(shapes[name])
            rows = updates.rows[used, places[name]].double().cpu().view(len(used), *shapes[name])
            return origin, origin + rows

        a0, a = factors(a_name)  # (r, in), (n, r, in)
        b0, b = factors(b_name)  # (out, r), (n, out, r)
        mean_a, mean_b = torch.einsum("n,nri->ri", w, a), torch.einsum("n,nor->or", w, b)
        products, product = _costs(len(used), shapes[a_name], shapes[b_name])
        square = square_of_inner if products <= product else _square_of_product
        clients_b, clients_a = torch.cat([*(b * w[:, None, None])], dim=1), torch.cat([*a])  # (out, n r), (n r, in)
        times = (scales or {}).get(a_name, 1.0) ** 2
        error += times * square(torch.cat([clients_b, -mean_b], dim=1), torch.cat([clients_a, mean_a]))
        change += times * square(torch.cat([clients_b, -b0], dim=1), torch.cat([clients_a, a0]))
    return (max(error, 0.0) / change) ** 0.5 if change > 0 else None


def square_of_inner(tall: Tensor, wide: Tensor) -> float:
    """||tall wide||^2 of (out, m) and (m, in), by inner products of the factors."""
    return float(((tall.T @ tall) * (wide @ wide.T)).sum())


def _square_of_product(tall: Tensor, wide: Tensor) -> float:
    """The same by the product, block by block."""
    return sum(float((part @ wide).square().sum()) for part in tall.split(max(1, BLOCK // wide.shape[1])))


def singular_values(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """Those of scale * B A, from A (r, in) and B (out, r): (r,) float64, the largest first, zeros at the end.

    With B = Q R and A^T = P S they are those of R S^T, at most r x r: no (out, in) matrix is formed.
    """
    r = len(a)
    tall, wide = (torch.linalg.qr(factor.double(), mode="r")[1] for factor in (b, a.T))
    found = abs(scale) * torch.linalg.svdvals(tall @ wide.T)
    return torch.cat([found, found.new_zeros(r - len(found))])


def with_spectrum(a: Tensor, b: Tensor, values: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Factors of the product whose singular vectors are those of scale B A and whose singular values are `values` (r,).

    What an attacker does who knows `spectral_scan`. Directions of scale B A that it does not have get nothing. The
    square roots of the values go to either factor; the types are those of A and B.
    """
    (q, tall), (p, wide) = (torch.linalg.qr(factor.double()) for factor in (b, a.T))
    u, own, v = torch.linalg.svd(tall @ wide.T, full_matrices=False)
    roots = torch.where(own > 0, (values.double()[: len(own)] / abs(scale)).sqrt(), 0.0)
    made_a, made_b = torch.zeros_like(a.double()), torch.zeros_like(b.double())
    made_a[: len(own)], made_b[:, : len(own)] = roots[:, None] * (v @ p.T), (q @ u) * roots
    return made_a.to(a), made_b.to(b)
