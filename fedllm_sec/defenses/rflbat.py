"""RFLBAT: rows in their plane of largest variance, far ones out, and the cluster of the least alike kept."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fedllm_sec import kernels
from fedllm_sec.defenses.checks import need
from fedllm_sec.defenses.filters import by_id
from fedllm_sec.defenses.similarity import cosines
from fedllm_sec.defenses.spectral import centred_products, levelled
from fedllm_sec.kernels.claims import midpoint
from fedllm_sec.matrix import UpdateMatrix
from fedllm_sec.protocols import Decision, RoundContext

MOST_CLUSTERS = 9
SAMPLES = 5  # uniform point sets that a clustering is compared with
STARTS, STEPS = 5, 15  # of k-means
SAME = 1e-6  # of the widest extent: points nearer than that differ by rounding


def plane(sq_distances: Tensor) -> Tensor:
    """The rows' coordinates along their first two principal components, from squared distances: (n, 2)."""
    n = len(sq_distances)
    products = centred_products(sq_distances, torch.full((n,), 1.0 / n, dtype=torch.float64))
    values, vectors = torch.linalg.eigh(products)
    points = vectors[:, -2:].flip(1) * values[-2:].flip(0).clamp_min(0.0).sqrt()
    if points.shape[1] < 2:
        points = torch.cat([points, torch.zeros(n, 1, dtype=points.dtype)], 1)
    turned = points.gather(0, points.abs().argmax(0, keepdim=True)) < 0  # an eigenvector's sign is arbitrary
    return torch.where(turned, -points, points)


def far_sums(points: Tensor) -> Tensor:
    """Each point's distances to all others, added up: (n,)."""
    return torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").sum(1)


def near(points: Tensor, times: float) -> Tensor:
    """Which points are no more than `times` the median sum of distances away from the others: (n,) bool."""
    sums = levelled(far_sums(points))
    return sums <= times * midpoint(sums)


def k_means(sets: Tensor, k: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """The best of `STARTS` clusterings of each set of points (b, n, 2): labels (b, n), and squared distances to the
    centres, added up: (b,). Centres are drawn as in k-means++."""
    b, n, _ = sets.shape
    points = sets.repeat_interleave(STARTS, 0)
    draws = torch.rand(k, b * STARTS, 1, generator=rng, device=rng.device, dtype=torch.float64).cpu()
    squares = torch.ones(b * STARTS, n, dtype=torch.float64)
    centres = torch.empty(b * STARTS, 0, 2, dtype=torch.float64)
    for drawn in draws:
        mass = squares.cumsum(1)
        first = torch.searchsorted(mass, drawn * mass[:, -1:], right=True).clamp_max(n - 1)
        centres = torch.cat([centres, points.gather(1, first[..., None].expand(-1, -1, 2))], 1)
        squares = (points[:, :, None] - centres[:, None]).square().sum(-1).amin(-1)
    for _ in range(STEPS):
        labels = (points[:, :, None] - centres[:, None]).square().sum(-1).argmin(-1)
        member = nn.functional.one_hot(labels, k).double()  # (b starts, n, k)
        size = member.sum(1)[..., None]
        centres = torch.where(size > 0, member.mT @ points / size.clamp_min(1), centres)
    squares = (points[:, :, None] - centres[:, None]).square().sum(-1)
    spread, best = squares.amin(-1).sum(1).view(b, STARTS).min(1)
    return squares.argmin(-1).view(b, STARTS, n)[torch.arange(b), best], spread


def clusters(points: Tensor, rng: torch.Generator) -> Tensor:
    """k-means with as many clusters as the gap statistic finds (Tibshirani et al. 2001): a label for each, (n,).

    Points are scaled to [0, 1] in both directions. k is the smallest with gap(k) >= gap(k + 1) - s(k + 1).
    """
    extent = points.amax(0) - points.amin(0)
    found = torch.zeros(len(points), dtype=torch.long)
    if float(extent.max()) == 0.0:
        return found
    scaled = (points - points.amin(0)) / extent.clamp_min(SAME * float(extent.max()))
    drawn = torch.rand(SAMPLES, len(points), 2, generator=rng, device=rng.device, dtype=torch.float64).cpu()
    most, before = min(MOST_CLUSTERS, len({*map(tuple, scaled.div(SAME).round().tolist())}) - 1), -math.inf
    for k in range(1, most + 1):
        labels, spread = k_means(torch.cat([scaled[None], drawn]), k, rng)
        logs = spread.clamp_min(SAME**2).log()
        gap, s = float(logs[1:].mean() - logs[0]), float(logs[1:].std(correction=0)) * math.sqrt(1 + 1 / SAMPLES)
        if before >= gap - s:
            break
        before, found = gap, labels[0]
    return found


def least_alike(labels: Tensor, gram: Tensor) -> Tensor:
    """Members of the cluster whose median mean cosine is smallest, a cluster of one counting as 1: (n,) bool."""
    alike = []
    names = list(dict.fromkeys(labels.tolist()))  # by their first members: ties do not hang on k-means' numbers
    for name in names:
        members = labels == name
        inner = cosines(gram[members][:, members])
        alike.append(1.0 if len(inner) == 1 else midpoint(inner.mean(1)))
    chosen: Tensor = labels == names[alike.index(min(alike))]
    return chosen


def rflbat(updates: UpdateMatrix, ctx: RoundContext, *, far: float = 10.0, farther: float = 4.0) -> Decision:
    """Keep, in the plane of the first two principal components, the cluster whose rows are least alike, without
    outliers.

    Wang et al. 2022 (RFLBAT), algorithm 1: rows whose distances to all others add up to more than `far` times the
    median sum are dropped; k-means, its number of clusters by the gap statistic; of the clusters the one with the
    smallest median of mean cosines is kept, since attackers are more alike than honest clients; again rows beyond
    `farther` median sums are dropped; the mean of the rest. Scores are the sums of distances in the plane.

    Stated here: principal components and cosines are those of updates and come from the (n, n) Gram matrix; no code of
    the authors' was found, and the bounds (10 and 4) are taken from three reimplementations (BackFed, rflbat_server.py;
    3DFed, defenses/rflbat.py; Li and Dai 2024, RflbatServer.py); five uniform point sets, at most nine clusters and 1
    for a cluster of one are BackFed's, where a cluster of one is never kept; sums equal to a bound are kept; there are
    fewer clusters than different points; of equally alike clusters the one with the smallest client id is kept.
    """
    need(far >= 1 and farther >= 1, "rflbat", "far >= 1 and farther >= 1", "Raise them.", far=far, farther=farther)
    order = by_id(updates.ids)
    gram = kernels.gram(updates)[order][:, order]
    points = plane(kernels.sq_distances(updates)[order][:, order])
    left = near(points, far).nonzero().flatten()
    chosen = left[least_alike(clusters(points[left], ctx.rng), gram[left][:, left])]
    last = chosen[near(points[chosen], farther)]
    kept, scores = torch.zeros(updates.n, dtype=torch.bool), torch.empty(updates.n, dtype=torch.float64)
    kept[order[last]] = True
    scores[order] = far_sums(points)
    weights = kept.double() / int(kept.sum())
    notes = {"near": float(len(left)), "in_cluster": float(len(chosen))}
    return Decision.weighted(updates, weights, kept=kept, scores=scores, notes=notes)
