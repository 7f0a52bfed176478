"""DeepSight: clusters clients by how the output layer of the model moved."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace

import torch
from torch import Tensor

from fedllm_sec import kernels
from fedllm_sec.defenses.before import clip_factors
from fedllm_sec.defenses.checks import need
from fedllm_sec.defenses.cluster import cosine_distances, hdbscan_labels
from fedllm_sec.defenses.filters import by_id
from fedllm_sec.kernels.claims import midpoint
from fedllm_sec.matrix import Layout, UpdateMatrix
from fedllm_sec.protocols import Decision, RoundContext

INNER = re.compile(r"(^|\.)(layers?|h|blocks?)\.\d+\.")  # a weight of one of a language model's blocks


def output_layer(layout: Layout, layer: str | None) -> str:
    """The name of the output layer's weight: the parameter whose name ends in `layer`.

    By default the last one with two dimensions that is not a LoRA A factor, or else the last of all.
    """
    if layer is not None:
        found = [name for name in layout.names if name.endswith(layer)]
        need(
            len(found) == 1,
            "deepsight",
            f'one parameter that ends in "{layer}"',
            "Change layer.",
            found=found,
        )
        return found[0]
    matrices = [n for n, shape in zip(layout.names, layout.shapes, strict=True) if len(shape) >= 2]
    outward = [name for name in matrices if "lora_A" not in name]
    return (outward or matrices or list(layout.names))[-1]


def neuron_energies(rows: Tensor, bias: Tensor | None) -> Tensor:
    """NEUP: squared energy of each output neuron, |b| + sum |w|, as a share of the row's: (n, P).

    `rows` (n, P, h) are the output layer's deltas, `bias` (n, P). A row of zeros has zero shares.
    """
    energy = rows.abs().sum(dim=2)
    if bias is not None:
        energy = energy + bias.abs()
    top = energy.amax(dim=1, keepdim=True)
    squares = (energy / torch.where(top > 0, top, 1.0)).square()
    return squares / squares.sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)


def exceedings(shares: Tensor) -> Tensor:
    """How many neurons have more than max(0.01, 1 / P) of the largest neuron's share: (n,)."""
    bar = max(0.01, 1.0 / shares.shape[1]) * shares.amax(dim=1, keepdim=True)
    return (shares > bar).sum(dim=1).double()


def same_cluster(labels: Tensor) -> Tensor:
    """0 for a pair in one cluster, 1 otherwise; noise is in a cluster of its own: (n, n)."""
    together = (labels[:, None] == labels[None]) & (labels[:, None] >= 0)
    return (~together).double().fill_diagonal_(0.0)


def deepsight_accepts(features: list[Tensor], te: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Which rows are accepted, and which look suspicious by themselves, both (n,) bool.

    `features` are distance matrices. Each is clustered, the 0/1 matrices of "same cluster" are averaged and
    clustered again; a cluster is accepted if less than `tau` of its rows are suspicious, that is, have at
    most half the median number of threshold exceedings.
    """
    half = midpoint(te) / 2
    suspicious = (te <= half) & (half > 0)
    votes = torch.stack([same_cluster(hdbscan_labels(feature, 3, 3)) for feature in features])
    labels = hdbscan_labels(votes.mean(0), 3, 3)
    accepted = ~suspicious
    for label in range(int(labels.max()) + 1):
        members = labels == label
        accepted[members] = float(suspicious[members].double().mean()) < tau
    return accepted, suspicious


def layer_deltas(updates: UpdateMatrix, place: slice) -> Tensor:
    """The columns of one parameter: (n, size) float64 on the CPU."""
    updates.need_columns()
    part = replace(updates, rows=updates.rows[:, place], layout=Layout.single(place.stop - place.start), file=None)
    return torch.cat([block.double().cpu() for _, block in part.blocks()], dim=1)


def deepsight(updates: UpdateMatrix, ctx: RoundContext, *, layer: str | None = None, tau: float = 1 / 3) -> Decision:
    """Cluster by how the output layer moved, drop clusters of concentrated updates, clip, average.

    Rieger et al. 2022, algorithm 2, on deltas. The output layer is the parameter whose name ends in `layer`
    (default: the last matrix that is no LoRA A factor); a neuron is a row of it. Where only adapters of inner layers
    train, that is the last B factor, whose rows are hidden units and no classes: energies and exceedings then mean
    little, and with the division differences left out one feature of the paper's three remains, which a warning in
    round 1 says. NEUPs are the shares of squared energy by neuron, threshold exceedings count neurons above
    max(0.01, 1/P) of the largest share, and rows with at most half the median count are suspicious. Clients are
    clustered (HDBSCAN, 3 rows at least, `min_samples` = 3 as the hdbscan library counts it) by NEUP and by the cosine
    of the layer's bias delta, or of the layer's own delta where it has no bias; the two results are averaged and
    clustered again; clusters with a share `tau` or more of suspicious rows are dropped. Kept rows are clipped to the
    median norm of all rows and averaged.

    Left out: the division differences (DDifs), which need the local models' outputs on random inputs, while a
    rule here sees deltas only. Rows that no cluster takes stand for themselves, as in the paper. If
    everything is dropped, the rows that are not suspicious are taken; there always are some (note `fallback`
    = 1). The output layer of all rows is held at once.
    """
    need(0 < tau <= 1, "deepsight", "0 < tau <= 1", "Change it.", tau=tau)
    name = output_layer(updates.layout, layer)
    inner = "lora_" in name or INNER.search(name) is not None
    if layer is None and ctx.round == 1 and inner and "head" not in name:
        warnings.warn(
            f"deepsight: {name} is no output layer but part of an inner layer: its rows are hidden units, not "
            "classes, so what is left of DeepSight is little more than a clustering of this layer. Train the head too "
            "(lm_head in model.lora.modules_to_save), or name the output layer in `layer` (an embedding that is the "
            "output too), or choose another rule.",
            stacklevel=2,
        )
    places = updates.layout.slices()
    stem = name.removesuffix("weight")
    bias_name = stem + "bias" if stem != name and stem + "bias" in places else None
    order = by_id(updates.ids)
    shape = updates.layout.shapes[updates.layout.names.index(name)]
    weights_of = layer_deltas(updates, places[name])[order]
    bias = None if bias_name is None else layer_deltas(updates, places[bias_name])[order]
    neup = neuron_energies(weights_of.view(updates.n, shape[0] if shape else 1, -1), bias)
    direction = weights_of if bias is None else bias
    features = [
        torch.cdist(neup, neup, compute_mode="donot_use_mm_for_euclid_dist"),
        cosine_distances(direction @ direction.T),
    ]
    te = exceedings(neup)
    accepted, suspicious = deepsight_accepts(features, te, tau)
    fallback = not bool(accepted.any())
    kept = torch.empty(updates.n, dtype=torch.bool)
    kept[order] = ~suspicious if fallback else accepted
    scores = torch.empty(updates.n, dtype=torch.float64)
    scores[order] = 1 - te / te.max().clamp_min(1.0)
    norms = kernels.row_norms(updates).double()
    weights = clip_factors(norms, midpoint(norms)) * kept / int(kept.sum())
    notes = {"suspicious": float(suspicious.sum()), "fallback": float(fallback)}
    return Decision.weighted(updates, weights, kept=kept, scores=scores, notes=notes)
