"""Inner products and distances of products B A against those of products that are formed, in float64."""

from dataclasses import replace

import pytest
import torch

from fedllm_sec.kernels import products as kernel
from fedllm_sec.matrix import Layout, UpdateMatrix
from fedllm_sec.matrix.factors import Products
from fedllm_sec.seeds import generator_for

N, R, WIDTH = 16, 8, 128
LAYOUT = Layout(("q.lora_A", "q.lora_B"), ((R, WIDTH), (WIDTH, R)))


@pytest.fixture(autouse=True)
def as_if_rows_were_large(monkeypatch):
    monkeypatch.setattr(kernel, "WIDE", 0)


def formed(rows, start):
    """Gram and squared distances of the (128, 128) products."""
    (pair,) = Products.of(LAYOUT, start).pairs
    a0, b0 = pair.wide(start[None])[0], pair.tall(start[None])[0]
    d = torch.stack([
        ((b0 + pair.tall(row[None])[0]) @ (a0 + pair.wide(row[None])[0]) - b0 @ a0).flatten() for row in rows
    ])  # fmt: skip
    return d @ d.T, torch.stack([(d - one).square().sum(1) for one in d])


def sent(seed=0, start_scale=1.0):
    rng = generator_for(seed, "products")
    start = torch.cat([torch.randn(R * WIDTH, generator=rng), start_scale * torch.randn(R * WIDTH, generator=rng)])
    return 0.05 * start, 0.01 * torch.randn(N, LAYOUT.size, generator=rng)


def turned(row, start, condition, seed=1):
    """The same product in another gauge, as float32."""
    (pair,) = Products.of(LAYOUT, start).pairs
    q = torch.linalg.qr(torch.randn(R, R, generator=generator_for(seed, "turn"), dtype=torch.float64))[0]
    m = q @ torch.diag(torch.logspace(0, torch.tensor(condition).log10(), R, dtype=torch.float64)) @ q.T
    a0, b0 = pair.wide(start[None])[0], pair.tall(start[None])[0]
    made = row.clone()
    made[pair.a] = (m @ (a0 + pair.wide(row[None])[0]) - a0).flatten().float()
    made[pair.b] = ((b0 + pair.tall(row[None])[0]) @ m.inverse() - b0).flatten().float()
    return made


def close(rows, start):
    gram, apart = formed(rows, start)
    found, sizes = kernel.stored_gram(rows, Products.of(LAYOUT, start))
    assert sizes is not None  # that is, in float32
    lengths = gram.diagonal().sqrt()
    assert ((found - gram).abs() / (lengths * lengths[:, None]).clamp_min(1e-300)).max() <= 2e-6
    torch.testing.assert_close(kernel.product_distances(found), apart, rtol=1e-5, atol=0)
    return found


@pytest.mark.parametrize("start_scale", [1.0, 0.0])
def test_many_float32_rows_have_the_distances_of_their_products_to_a_hundred_thousandth(start_scale):
    start, rows = sent(start_scale=start_scale)
    close(rows, start)


def test_what_cancels_is_taken_again_in_float64_and_only_that(monkeypatch):
    start, rows = sent()
    rows[3] = rows[2] + 1e-4 * rows[4]  # nearly one
    rows[6] = rows[5]  # one
    rows[7] *= 1e9  # far outside
    rows[8] *= 1e-9
    rows[9] = 0.0
    blocks = []
    by_blocks = kernel._by_blocks
    monkeypatch.setattr(
        kernel, "_by_blocks", lambda rows, *rest: blocks.append((len(rows), *rest[1:])) or by_blocks(rows, *rest)
    )
    found = close(rows, start)
    assert kernel.product_distances(found)[5, 6] == 0
    (_, first, _), (_, second, (asked, *_)) = blocks
    assert (first, second) == (torch.float32, torch.float64)
    assert asked[0] == slice(0, 5)  # one of 2 and 3, one of 5 and 6, and 7, 8, 9 with all


def test_a_gauge_of_condition_a_hundred_changes_no_inner_product_of_float32_rows_by_a_ten_thousandth():
    start, rows = sent()
    before, _ = kernel.stored_gram(rows, Products.of(LAYOUT, start))
    for i in (0, 5, 11):
        rows[i] = turned(rows[i], start, 100.0, seed=i)
    found = close(rows, start)
    lengths = before.diagonal().sqrt()
    assert ((found - before).abs() / (lengths * lengths[:, None])).max() <= 1e-4


def test_mixed_rows_whose_products_cancel_are_mixed_in_float64():
    start, rows = sent()
    rows += 3 * rows[:1]  # a large common part, which differences of mixes do not have
    w = torch.full((2, N), 1.0 / N, dtype=torch.float64)
    w[1, 1] += 1e-4
    w[1, 2] -= 1e-4
    updates = replace(UpdateMatrix.of(rows, layout=LAYOUT), products=Products.of(LAYOUT, start)).mix(w)
    gram, _ = formed(rows, start)
    u = w[1] - w[0]
    torch.testing.assert_close(
        kernel.product_distances(kernel.product_gram(updates))[0, 1], u @ gram @ u, rtol=1e-5, atol=0
    )
