"""Small helpers of the tests in this folder: rows from lists, and a context to run a rule in."""

import torch

from fedllm_sec.matrix import Layout, UpdateMatrix
from fedllm_sec.protocols import RoundContext
from fedllm_sec.seeds import generator_for


def matrix(rows, **given):
    return UpdateMatrix.of(torch.tensor(rows, dtype=torch.float32), **given)


def context(d, *, round=1, rounds=None, start=None, seed=0):
    vector = torch.zeros(d) if start is None else torch.tensor(start, dtype=torch.float32)
    return RoundContext(round, vector, Layout.single(d), generator_for(11, round, seed), rounds=rounds)


def formed(updates):
    """The (n, d) rows a lazy matrix stands for."""
    return torch.cat([block for _, block in updates.blocks()], dim=1)
