"""Rows and contexts that the tests of the second half of the rules share."""

import numpy as np
import torch

from fedllm_sec.matrix import Layout, UpdateMatrix
from fedllm_sec.protocols import RoundContext
from fedllm_sec.seeds import generator_for

ON_ADAPTERS = {"horus"}  # rules that need factors of adapters in the layout
KINDS = ("random", "heavy_tailed", "tiny", "huge")


def rows_of(kind, n, d=43, seed=0):
    """n honest-looking float32 rows around a common step."""
    rng = generator_for(9, kind, n, d, seed)
    rows = torch.randn(d, generator=rng) + torch.randn(n, d, generator=rng)
    if kind == "heavy_tailed":
        rows = rows / torch.randn(n, d, generator=rng).abs().clamp_min(1e-3)
    return rows * {"tiny": 1e-3, "huge": 1e3}.get(kind, 1.0)


def both(kind, n, d=43, seed=0):
    """The update matrix and the same rows as a float64 array."""
    rows = rows_of(kind, n, d, seed)
    return UpdateMatrix.of(rows, ids=[f"c{i:02d}" for i in range(n)]), rows.double().numpy()


def matrix(rows, ids=None, layout=None):
    return UpdateMatrix.of(torch.tensor(rows, dtype=torch.float32), ids=ids, layout=layout)


def context(d=43, **given):
    layout = given.pop("layout", Layout.single(d))
    given.setdefault("round", 1)
    given.setdefault("global_vector", torch.zeros(d))
    return RoundContext(layout=layout, rng=generator_for(9, "rule"), **given)


def assert_close(got, wanted, tolerance=1e-6):
    gap = np.linalg.norm(got.double().numpy() - wanted)
    assert gap <= tolerance * np.linalg.norm(wanted), f"relative gap {gap / np.linalg.norm(wanted):.2e}"


def attacked(size=10.0, honest=10, bad=3, d=43):
    """Ten honest rows and, last, three copies of a far-off row that pushes against them."""
    rows = rows_of("random", honest, d) * 0.3 + 1.0
    push = -size * torch.ones(bad, d)
    return UpdateMatrix.of(torch.cat([rows, push]), ids=[f"c{i:02d}" for i in range(honest + bad)]), rows


def assert_repaired(update, honest):
    """The update is no farther from the honest mean than the farthest honest row, and points its way."""
    centre = honest.mean(0)
    spread = float((honest - centre).norm(dim=1).max())
    assert float((update - centre).norm()) <= spread
    assert float(update @ centre) > 0
