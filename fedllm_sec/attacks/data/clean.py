"""Held-out images on which a false trigger can be seen; of texts it is `fedllm_sec.attacks.data.text.not_clean`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedllm_sec.protocols import Labelled


def success_table(attack: Any, classes: int) -> Tensor:
    """Whether the attack has succeeded where the model says the column's class to a row of the row's class: bool."""
    every = range(classes)
    return torch.tensor([[bool(attack.success(said, truth)) for said in every] for truth in every])


def innocent(attack: Any, test: Labelled, hits: Tensor) -> tuple[Tensor, dict[str, int]]:
    """Numbers of the clean rows on which the attack's success can happen and would be wrong.

    Not those on which the right answer is its success, nor those on which no answer is, nor those it `acts_on` as they
    are, which are its probe, nor those that carry its trigger by themselves, which are neither. Also how many rows are
    neither, by the reason.
    """
    possible = (hits.any(1) & ~hits.diagonal())[test.y]
    probe, carry = (
        getattr(attack, which)(test) if hasattr(attack, which) else torch.zeros(len(test.y), dtype=torch.bool)
        for which in ("acts_on", "carries")
    )
    counts = {  # a row has one reason, the first that holds, as a text has
        "are of a class that the attack asks for": int((~possible & ~probe).sum()),
        "carry the trigger by themselves": int((possible & ~probe & carry).sum()),
    }
    return (possible & ~probe & ~carry).nonzero().flatten(), {why: n for why, n in counts.items() if n}
