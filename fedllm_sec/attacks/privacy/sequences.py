"""Whole rows of text from one update: the tokens by the first layer, their order by the second."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fedllm_sec.attacks.privacy.reading import MOST_TOKENS
from fedllm_sec.attacks.privacy.seen import Observation, Recovered
from fedllm_sec.attacks.privacy.spans import fed_to
from fedllm_sec.attacks.privacy.tokens import (
    OUTSIDE,
    directions_of,
    nearest,
    roomy,
    share_outside,
    token_set,
    undecayed,
    value_layers,
)
from fedllm_sec.errors import AttackError

Prefix = tuple[int, ...]


def dager(seen: Observation, *, outside: Annotated[float, Field(gt=0, lt=1)] = OUTSIDE) -> Recovered:
    """The rows that were fed to the model, token by token (Petrov et al. 2024, DAGER for decoders).

    The second layer's `v_proj` is fed a vector for each prefix of a row, and only those of the batch lie in the span of
    what was sent of that layer, all but a share `outside` of their squared length. So prefixes begin with each token of
    `token_set` and grow by one of them, as long as they lie inside; one that cannot grow is a row. There are no more
    distinct prefixes than directions, which bounds the search; where they fill the span, nothing can be told, and
    where they leave one dimension free a wrong prefix may lie inside by chance.
    A row that another begins with is not told from it, nor how often a row was there; the last token is not fed. A
    token repeated from the start on gives the vector that it gives once (attention averages equal values), so no row is
    said to begin with the same token twice.
    """
    tokens, layers = token_set(seen, outside=outside).tokens, value_layers(seen, "dager")
    if len(layers) < 2:
        raise AttackError("dager: the model has one layer, and orders are told by the second. Ask token_set.")
    spans = roomy(undecayed(seen), layers[1], "dager")
    left = directions_of(spans)
    rows: list[Prefix] = []
    grown: list[Prefix] = [()]
    while grown:
        tried = [(*prefix, token) for prefix in grown for token in tokens if len(prefix) != 1 or prefix[0] != token]
        if not tried:
            rows += grown
            break
        shares = share_outside(spans, inputs_of_prefixes(seen, layers[1], tried))
        longer = [tried[i] for i in nearest(shares, outside, left)]
        begun = {prefix[:-1] for prefix in longer}
        rows += [prefix for prefix in grown if prefix and prefix not in begun]
        grown, left = longer, left - len(longer)
    return Recovered(tokens, sorted(filter(None, rows)))


def inputs_of_prefixes(seen: Observation, layer: str, prefixes: Sequence[Prefix]) -> Tensor:
    """What a layer is fed at the end of each prefix, all of one length: (prefixes, in)."""
    ids = torch.tensor(prefixes)
    parts = torch.split(ids, max(1, MOST_TOKENS // ids.shape[1]))
    return torch.cat([fed_to(seen, [layer], part)[layer][:, -1] for part in parts])
