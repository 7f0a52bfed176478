"""Clients remember after the decision, by the part of their row that was taken."""

from __future__ import annotations

import torch

from fedllm_sec.algorithms import feddyn
from fedllm_sec.protocols import Client
from fedllm_sec.rounds.remembering import Trained, own_training, remember

INF = float("inf")


def test_each_memory_moves_by_its_part_and_that_of_one_who_forges_whole_or_not_at_all():
    clients = [Client(name, None) for name in "abcdefs"]
    rows = torch.tensor([[1.0], [1.0], [1.0], [1.0], [1.0], [INF]])
    claims = torch.tensor([[10.0, 3.0, 0.5]]).repeat(6, 1)
    trained = own_training(clients[:6], (rows, claims), forging={"d", "e"})
    rows[3:5] = 9.0  # the matrix is forged afterwards: what they trained stays theirs
    trained.append(Trained(clients[6], torch.tensor([1.0]), 3))  # the server's own, on clean data
    parts = torch.tensor([1.0, 0.5, 0.0, 0.25, 0.0, 1.0]).double()
    remember(feddyn(alpha=2.0), trained, parts, lr=0.1, control=None)
    moved = {c.id: c.memory["gradient"].tolist() for c in clients if c.memory}
    assert moved == {"a": [-2.0], "b": [-1.0], "d": [-2.0], "s": [-2.0]}


def test_rows_are_not_held_twice():
    rows = torch.ones(2, 3)
    a, b = own_training([Client("a", None), Client("b", None)], (rows, torch.ones(2, 3)), forging={"b"})
    assert a.row.data_ptr() == rows.data_ptr()
    assert b.row.data_ptr() != rows[1].data_ptr()
