"""What a recipe may say of who attacks and of who listens."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedllm_sec.recipe.section import Count, Section


class Malicious(Section):
    """Who is malicious: a number or a share of all clients, drawn by the seed, or a list of client numbers."""

    count: Count | None = None  # so many clients; give one of the three
    share: float | None = Field(None, gt=0.0, lt=1.0)  # this share of all clients
    ids: list[int] | None = None  # these clients, counted from 0
    redraw: bool = False  # draw so many anew for each round; else the same clients for the whole run
    present: Count | None = None  # so many take part in each round of the attack; None: who is drawn


class Spread(Section):
    """Rows that somebody has poisoned before honest clients got them: nobody is malicious, and everybody is honest."""

    clients: float = Field(1.0, gt=0.0, le=1.0)  # this share of all clients holds such rows, drawn by the seed


class Observe(Section):
    """What a curious server, or whoever listens on the wire, keeps: rows before any screening; it changes nothing."""

    rounds: list[Count] = [1]  # in these rounds
    clients: list[int] = [0]  # of these clients, counted from 0, where they take part
    what: Literal["delta", "gradient"] = "delta"  # what clients send, or the gradient of their first local step
    own_rows: int = Field(0, ge=0)  # rows of the same kind, with labels, that it owns, drawn from the held-out ones
    others: Count | None = None  # of text: held-out rows that are to be told from those trained on; None: 300
