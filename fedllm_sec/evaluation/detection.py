"""How well a rule told malicious clients from honest ones. Only evaluation may read the true set."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence


def auc(scores: Sequence[float], positive: Sequence[bool]) -> float | None:
    """Chance that a positive outscores a negative, ties counting one half; None where either side is empty.

    This is the area under the ROC curve (Mann and Whitney 1947). Infinite scores are ordered as they stand;
    a NaN score has no order and makes the result None.
    """
    if any(math.isnan(score) for score in scores):
        return None
    yes = [score for score, is_positive in zip(scores, positive, strict=True) if is_positive]
    no = [score for score, is_positive in zip(scores, positive, strict=True) if not is_positive]
    if not yes or not no:
        return None
    wins = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a in yes for b in no)
    return wins / (len(yes) * len(no))


def detection(
    kept: Collection[str] | None,
    scores: Mapping[str, float] | None,
    ids: Sequence[str],
    malicious: Collection[str],
    weights: Mapping[str, float] | None = None,
) -> dict[str, float | None]:
    """What a rule's decision was worth: {tpr, weight_share, fpr, auc}, each None where it was not measured.

    `ids` are the clients whose rows the rule saw. `tpr` is the share of their malicious ones that it dropped,
    `fpr` the share of their honest ones that it dropped, `auc` the chance that a malicious one has the higher
    score, `weight_share` what the malicious ones' rows weigh in the update, of what all clients' rows do. A rule that
    does not select has no `tpr` and `fpr`, one without scores has no `auc`, one without weights has no
    `weight_share`, and a round without malicious clients has `fpr` alone.
    """
    bad = [i for i in ids if i in malicious]
    good = [i for i in ids if i not in malicious]
    tpr = fpr = area = None
    if kept is not None:
        tpr = sum(i not in kept for i in bad) / len(bad) if bad else None
        fpr = sum(i not in kept for i in good) / len(good) if good else None
    if scores is not None:
        scored = [i for i in ids if i in scores]
        area = auc([scores[i] for i in scored], [i in malicious for i in scored])
    return {"tpr": tpr, "weight_share": _weight_share(weights, bad, ids), "fpr": fpr, "auc": area}


def _weight_share(weights: Mapping[str, float] | None, bad: Sequence[str], ids: Sequence[str]) -> float | None:
    """sum |w_i| over the malicious / sum |w_i| over all: a clipped row counts as what is left of it."""
    if weights is None or not bad:
        return None
    total = math.fsum(abs(weights[i]) for i in ids)
    return math.fsum(abs(weights[i]) for i in bad) / total if 0 < total < math.inf else None
