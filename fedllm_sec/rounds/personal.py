"""Models of which each client keeps a part to itself: its running statistics, or its B factors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedllm_sec.protocols import Client
from fedllm_sec.rounds.averaging import OWN_B
from fedllm_sec.rounds.remembering import OWN_BUFFERS

if TYPE_CHECKING:
    from fedllm_sec.rounds.federation import Federation


RATES = ("accuracy", "exact_match", "asr", "false_trigger")  # that are also measured of each client's own model


def kept_by_clients(federation: Federation) -> bool:
    """Whether clients keep a part of the model to themselves."""
    personal = federation.averaging is not None and federation.averaging.personal
    return personal or getattr(federation.task, "kept", None) == "local"


def measured(federation: Federation) -> Tensor:
    """The vector (d,) that is measured and saved: the global one, with the mean of the B that clients keep."""
    averaging = federation.averaging
    return averaging.shown(federation.clients, federation.vector) if averaging is not None else federation.vector


def hold(federation: Federation, client: Client | None = None) -> None:
    """Let the task hold the model of a client, with what it keeps as its own; by default the one that is measured."""
    task, averaging = federation.task, federation.averaging
    vector = measured(federation)
    if client is not None and averaging is not None:
        vector = averaging.start_of(client, federation.vector)
    with torch.no_grad():
        task.parameters.copy_(vector)
    if federation.buffers is not None:
        own = federation.buffers if client is None else client.memory.get(OWN_BUFFERS, federation.buffers)
        task.buffers.write(own)  # type: ignore[attr-defined]


def with_own(federation: Federation) -> tuple[dict[str, Any], dict[str, Any]]:
    """Each client's own model on the same held-out rows: quality and attack.

    Each holds `per_client`, rates by the id of every client that has taken part, and their means over these clients
    (client_accuracy, client_asr, client_false_trigger). The model in memory is the measured one afterwards.
    """
    known, task, spread = federation.evaluation, federation.task, federation.spread or federation.machine.spread
    assert known is not None
    found: tuple[dict[str, Any], dict[str, Any]] = {}, {}
    for client in federation.clients:
        if OWN_BUFFERS in client.memory or OWN_B in client.memory:
            hold(federation, client)
            for of, measured in zip(found, (known.quality(task, spread), known.attack(task, spread)), strict=True):
                of[client.id] = {name: measured[name] for name in RATES if (measured or {}).get(name) is not None}
    hold(federation)
    means = tuple(
        {
            f"client_{name}": math.fsum(rates) / len(rates)
            for name in RATES
            if (rates := [own[name]["value"] for own in of.values() if name in own])
        }
        for of in found
    )
    return {"per_client": found[0], **means[0]}, {"per_client": found[1], **means[1]}
