"""How much of rows of tokens was read: ROUGE-N after the best matching of a batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from fedllm_sec.errors import FedError

Tokens = tuple[int, ...]


def rouge(made: Tokens, true: Tokens, n: int) -> float:
    """ROUGE-N as F1 (Lin 2004): runs of n tokens that both rows hold, each as often as in the row with fewer of it.

    Twice their number over the number of runs in both rows; 0 where there are none.
    """
    if n < 1:
        raise FedError(f"rouge: n={n}: a run has at least 1 token.")
    runs = [Counter(row[i : i + n] for i in range(len(row) - n + 1)) for row in (made, true)]
    total = sum(sum(counts.values()) for counts in runs)
    return 2 * sum((runs[0] & runs[1]).values()) / total if total else 0.0


def partners(made: Sequence[Tokens], true: Sequence[Tokens]) -> list[Tokens]:
    """For each true row the row that was read of it, () where there is none: the matching of most ROUGE-1 and ROUGE-2.

    One to one, as the order of a batch is not in its gradient.
    """
    from scipy.optimize import linear_sum_assignment  # a second to import, and no training needs it

    found: list[Tokens] = [()] * len(true)
    if made:
        table = np.array([[rouge(m, t, 1) + rouge(m, t, 2) for m in made] for t in true])
        for row, column in zip(*linear_sum_assignment(-table), strict=True):
            found[row] = made[column]
    return found
