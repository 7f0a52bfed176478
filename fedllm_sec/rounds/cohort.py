"""Who takes part in a round. `build` foresees attackers and cohorts with it, so nothing else may decide that."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import torch

from fedllm_sec.protocols import Client
from fedllm_sec.seeds import generator_for

ONE_ROUND = 400  # what making the generators of a round costs, in clients drawn
MOST = 10_000_000  # clients drawn beforehand, over all rounds: about a second


Sure = tuple[Collection[int], int]  # places of clients, and how many of these take part: no more and no fewer


def places(total: int, per_round: int | None, rng: torch.Generator, sure: Sure | None = None) -> list[int]:
    """The cohort of a round as places among all `total` clients, ascending.

    Of `sure` clients and of the others those take part who are drawn first.
    """
    if per_round is None or per_round >= total:
        return list(range(total))
    order = torch.randperm(total, generator=rng)
    if sure is None:
        return sorted(order[:per_round].tolist())
    among, count = sure
    first = [i for i in order.tolist() if i in among][:count]
    return sorted(first + [i for i in order.tolist() if i not in among][: per_round - len(first)])


def sample(
    clients: Sequence[Client],
    per_round: int | None,
    rng: torch.Generator,
    sure: tuple[Collection[str], int] | None = None,
) -> list[Client]:
    """The cohort of a round: `per_round` clients without replacement, in the clients' own order; `sure` by their id."""
    known = None if sure is None else ({i for i, client in enumerate(clients) if client.id in sure[0]}, sure[1])
    return [clients[i] for i in places(len(clients), per_round, rng, known)]


def foreseen(rounds: range, total: int) -> range:
    """The first of `rounds` whose draws from `total` clients are looked at beforehand: as many as take a second.

    All of them in most runs: 24,000 rounds of ten clients, 7,000 of a thousand, 99 of 100,000.
    """
    return rounds[: max(1, MOST // (ONE_ROUND + total))]


def cohorts(
    seed: int,
    rounds: range,
    total: int,
    per_round: int | None,
    before: int = 0,
    sure: Callable[[int], Sure | None] = lambda round: None,
) -> Iterator[tuple[int, list[int]]]:
    """Each of the `rounds` with the places of its cohort, as a run with so many rounds before it will draw them."""
    for r in rounds:
        yield r, places(total, per_round, generator_for(seed, before + r, "cohort"), sure(r))
