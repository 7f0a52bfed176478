"""FLARE: what the clients' models make of the server's rows one layer before the answer."""

from __future__ import annotations

import torch
from torch import Tensor

from fedllm_sec import kernels
from fedllm_sec.defenses.checks import need
from fedllm_sec.defenses.filters import by_id
from fedllm_sec.errors import DefenseError
from fedllm_sec.matrix import UpdateMatrix
from fedllm_sec.models.function import Classifier
from fedllm_sec.protocols import Decision, RoundContext

FARTHEST = 2.0  # the squared mean discrepancy of two sets under a kernel in [0, 1] is less


def classifier_of(ctx: RoundContext, rule: str) -> Classifier:
    """The server's model as a function, or the reason why the rule cannot act."""
    if ctx.classifier is None:
        raise DefenseError(f"{rule}: needs the server's model, an image classifier that it can try a vector on, and "
                           "there is none here. Choose another rule where task is not classify.")  # fmt: skip
    return ctx.classifier


def vector_of(updates: UpdateMatrix, row: int, start: Tensor) -> Tensor:
    """The model (d,) that a client has sent: the one it started from, and its row."""
    return start + kernels.combine(updates, torch.eye(updates.n, dtype=torch.float64)[row]).to(start)


def kernel(a: Tensor, b: Tensor, width: float) -> Tensor:
    """exp(-|x - y|^2 / (2 width)) of all pairs."""
    return (torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square() / (-2 * width)).exp()


def discrepancies(features: Tensor) -> Tensor:
    """The squared maximum mean discrepancy of each pair of sets (n, k, h), unbiased, at least 0: (n, n) float64.

    The Gaussian kernel's width is the median squared distance within a set, over all sets. A set that is not finite is
    as far from every other as can be.
    """
    n, k, _ = features.shape
    sound = features.isfinite().flatten(1).all(1)
    found = torch.full((n, n), FARTHEST, dtype=torch.float64).fill_diagonal_(0.0)
    good = sound.nonzero().flatten().tolist()
    if not good:
        return found
    top = features[sound].double().abs().amax((1, 2)).median().clamp_min(torch.finfo(torch.float64).tiny)
    sets = features.double() / top
    pairs = torch.triu_indices(k, k, 1)
    within = torch.cdist(sets[sound], sets[sound], compute_mode="donot_use_mm_for_euclid_dist").square()
    width = max(float(within[:, pairs[0], pairs[1]].median()), 1e-12)
    own = {i: (float(kernel(sets[i], sets[i], width).sum()) - k) / (k * (k - 1)) for i in good}
    for a, i in enumerate(good):
        for j in good[a + 1 :]:
            between = own[i] + own[j] - 2 * float(kernel(sets[i], sets[j], width).mean())
            found[i, j] = found[j, i] = max(0.0, between)
    return found


def neighbour_counts(distances: Tensor) -> Tensor:
    """How many others have each among their nearest half: (n,) float64; equally near ones count by their place."""
    n = len(distances)
    ranked = distances.clone().fill_diagonal_(torch.inf).argsort(dim=1, stable=True)[:, : n // 2]
    return torch.bincount(ranked.flatten(), minlength=n).double()


def need_views(classifier: Classifier, start: Tensor, x: Tensor) -> None:
    """A DefenseError where the model's last layer reads the images themselves."""
    if torch.equal(classifier.features(start, x), classifier.features(start + 1, x)):
        raise DefenseError(
            "flare: what the model's last layer reads is the same for every vector: there is no representation to "
            "compare. Choose a model with two layers or more, or another rule."
        )


def flare(updates: UpdateMatrix, ctx: RoundContext, *, tau: float = 1.0) -> Decision:
    """Weigh clients by how often their model's view of the server's rows is among the nearest half of others' views.

    Wang et al. 2022 (FLARE, AsiaCCS), sec. 4: the penultimate representations (k, h) of the server's clean rows by
    each client's model; the maximum mean discrepancy of each pair of clients; c_i, how many clients have i among their
    nearest half; trust S_i = exp(c_i / tau) / sum_j exp(c_j / tau); the update is sum_i S_i x_i.

    Stated here: the unbiased discrepancy under a Gaussian kernel and the nearest half are as reimplemented in BackFed
    (flare_server.py), whose width is 1 and here the median squared distance within a set; c_i is counted in means over
    the clients, so that tau does not hang on how many there are. Rows are not clipped: a far model gets less
    trust, never none, so put norm_clipping before it. Running statistics of BatchNorm are the server's. It costs n
    forward passes over `defense.root_rows` rows and n^2 / 2 kernels. Scores are 1 - S_i / max S.
    """
    need(tau > 0, "flare", "tau > 0", "Raise it.", tau=tau)
    classifier = classifier_of(ctx, "flare")
    if ctx.root_rows is None or len(ctx.root_rows.y) < 2:
        raise DefenseError("flare: needs two clean rows or more on the server. Set defense.root_rows.")
    order, x = by_id(updates.ids), ctx.root_rows.x
    start = ctx.global_vector
    with torch.no_grad():
        need_views(classifier, start, x)
        seen = [classifier.features(vector_of(updates, i, start), x).flatten(1).cpu() for i in order.tolist()]
    counts = torch.empty(updates.n, dtype=torch.float64)
    counts[order] = neighbour_counts(discrepancies(torch.stack(seen)))
    trust = (counts / max(1.0, float(counts.mean())) / tau).softmax(0)
    return Decision.weighted(updates, trust, scores=1 - trust / trust.max())
