"""Inner products and distances against direct float64 differences."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm_sec import kernels
from fedllm_sec.errors import DefenseError
from fedllm_sec.kernels import torch_backend
from fedllm_sec.kernels.sums import new_sums, plain_rows
from fedllm_sec.matrix import UpdateMatrix


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def backend(request, monkeypatch):
    """Every test runs on both backends, and with the float64 shortcut for small matrices turned off."""
    monkeypatch.setenv("FEDLLM_SEC_KERNELS", "torch" if request.param == "torch" else "")
    monkeypatch.setattr(torch_backend, "WIDE", 0)
    if request.param == "compiled":
        monkeypatch.setattr(pytest.importorskip("fedllm_sec.kernels.cpu_backend"), "WIDE", 0)


def direct(rows):
    x = rows.double()
    distances = torch.stack([(x - row).square().sum(1) for row in x])
    return x @ x.T, distances


def rows_of(seed, n, d, scale=1.0):
    return scale * torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def assert_near(got, wanted, tolerance=1e-5):
    assert ((got - wanted).abs() <= tolerance * wanted.abs()).all(), ((got - wanted) / wanted).abs().max()


def test_a_hand_worked_case():
    updates = UpdateMatrix.of(torch.tensor([[3.0, 4.0], [0.0, 0.0], [3.0, 0.0]]))
    assert kernels.gram(updates).tolist() == [[25, 0, 9], [0, 0, 0], [9, 0, 9]]
    assert kernels.sq_distances(updates).tolist() == [[0, 25, 16], [25, 0, 9], [16, 9, 0]]
    assert kernels.row_norms(updates).tolist() == [5, 0, 3]


@pytest.mark.parametrize("n", [1, 2, 7, 32, 64])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e3, 1e-20])
def test_distances_are_right_at_every_scale(n, scale):
    rows = rows_of(n, n, 1003, scale)
    gram, distances = direct(rows)
    found = kernels.geometry(UpdateMatrix.of(rows))
    assert_near(found.sq_distances, distances)
    assert_near(found.norms, gram.diagonal().sqrt())
    size = gram.diagonal().sqrt()
    assert ((found.gram - gram).abs() <= 1e-6 * size[:, None] * size).all()


def test_a_common_part_ten_thousand_times_larger_than_the_differences_does_not_cancel():
    rows = rows_of(1, 12, 20_000) + 1e4 * rows_of(2, 1, 20_000)
    assert_near(kernels.sq_distances(UpdateMatrix.of(rows)), direct(rows)[1])


@pytest.mark.parametrize("size", [1e18, 1e30])
@pytest.mark.parametrize("hostile", [[0], [5], [0, 3, 4, 9]])
@pytest.mark.parametrize("common", [0.0, 1e4])
def test_huge_rows_leave_all_distances_right(size, hostile, common):
    rows = rows_of(3, 12, 3000) + common * rows_of(4, 1, 3000)
    for i in hostile:
        rows[i] = size * rows_of(5 + i, 1, 3000)[0]
    assert_near(kernels.sq_distances(UpdateMatrix.of(rows)), direct(rows)[1])


def test_copies_are_at_distance_zero_even_when_huge():
    rows = rows_of(6, 8, 3000)
    rows[2] = rows[3] = rows[4] = torch.full((3000,), 1e30)
    rows[6] = rows[7]
    distances = kernels.sq_distances(UpdateMatrix.of(rows))
    assert (distances[2:5, 2:5] == 0).all()
    assert distances[6, 7] == 0
    assert distances[0, 1] > 0


def test_two_far_clusters_of_close_rows():
    rows = rows_of(7, 10, 4000, 1e-2)
    rows[:5] += 100.0
    rows[5:] += 1000.0
    assert_near(kernels.sq_distances(UpdateMatrix.of(rows)), direct(rows)[1])


def test_an_infinite_row_leaves_the_other_distances_right():
    rows = rows_of(8, 6, 500)
    rows[1] = float("inf")
    others = [0, 2, 3, 4, 5]
    found = kernels.sq_distances(UpdateMatrix.of(rows))[others][:, others]
    assert_near(found, direct(rows[others])[1])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 700), st.integers(0, 10**6), st.floats(-20, 30), st.floats(0, 4))
def test_any_row_sizes_and_common_parts(n, d, seed, exponent, common):
    rows = rows_of(seed, n, d) + 10**common * rows_of(seed + 1, 1, d)
    rows[seed % n] *= 10**exponent
    wanted = direct(rows)[1]
    found = kernels.sq_distances(UpdateMatrix.of(rows))
    assert torch.equal(found, found.T)
    assert_near(found, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows_count_exactly(dtype):
    rows = rows_of(9, 9, 2000).to(dtype)
    rows[0, :4] = torch.tensor([2.0**-24, -(2.0**-20), 0.0, 1.0]).to(dtype)  # the first is subnormal in float16
    assert_near(kernels.sq_distances(UpdateMatrix.of(rows)), direct(rows)[1])
    single = torch.zeros(1, 300, dtype=dtype)
    single[0, 7] = 2.0**-24
    assert kernels.row_norms(UpdateMatrix.of(single)).item() == 2.0**-24


def test_an_extra_vector_counts_as_one_more_row():
    rows, vector = rows_of(10, 5, 900), rows_of(11, 1, 900)[0]
    _, distances = direct(torch.cat([rows, vector[None]]))
    found = kernels.geometry(UpdateMatrix.of(rows), extra=vector)
    assert found.gram.shape == (6, 6)
    assert_near(found.sq_distances, distances)
    weights = torch.tensor([0.5, 0, 0, 1, 2, -3]).double()
    combined = kernels.combine(UpdateMatrix.of(rows), weights, extra=vector)
    wanted = weights @ torch.cat([rows, vector[None]]).double()
    torch.testing.assert_close(combined.double(), wanted, rtol=1e-6, atol=1e-6)
    with pytest.raises(DefenseError, match="extra rows"):
        kernels.gram(UpdateMatrix.of(rows), extra=vector[:5])


def test_the_order_of_the_rows_changes_no_bit():
    rows = rows_of(12, 11, 5000) + 30 * rows_of(13, 1, 5000)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    plain = kernels.gram(UpdateMatrix.of(rows))[order][:, order]
    torch.testing.assert_close(kernels.gram(UpdateMatrix.of(rows[order])), plain, rtol=1e-6, atol=1e-9)


def test_threads_and_block_widths_change_no_bit():
    rows = rows_of(14, 16, 150_000)
    plain = kernels.geometry(UpdateMatrix.of(rows))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = kernels.geometry(UpdateMatrix.of(rows, chunk_mb=3))
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(single.gram, plain.gram, rtol=1e-7, atol=1e-4)
    if not kernels.os.environ["FEDLLM_SEC_KERNELS"]:
        assert torch.equal(single.gram, plain.gram)
        assert torch.equal(single.sq_distances, plain.sq_distances)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_mb", [None, 0.01])
@pytest.mark.parametrize("n", [1, 5, 32])
def test_running_sums_and_their_inner_products_come_from_one_pass(n, chunk_mb, dtype):
    rows, d = rows_of(19, n, 1500).to(dtype), 1500
    places = torch.randperm(n + 2, generator=torch.Generator().manual_seed(0))[:n].tolist()
    sums, wanted = new_sums(n + 2, d), torch.zeros(n + 2, d)
    mixed = torch.eye(n, dtype=torch.float64) * 2  # formed a block at a time, wherever blocks begin
    for updates, added in (
        (UpdateMatrix.of(rows, chunk_mb=chunk_mb), rows.float()),
        (UpdateMatrix.of(rows, chunk_mb=chunk_mb).mix(mixed), 2 * rows.float()),
    ):
        wanted[places] += added
        gram = kernels.accumulate(sums, places, updates)
        assert torch.equal(plain_rows(sums, d), wanted)
        torch.testing.assert_close(gram, direct(wanted[places])[0], rtol=1e-5, atol=1e-3)
    with pytest.raises(DefenseError, match="one of its own"):
        kernels.accumulate(sums, [0] * (n + 1), UpdateMatrix.of(rows))
    with pytest.raises(DefenseError, match="new_sums"):
        kernels.accumulate(torch.zeros(n + 2, d), places, UpdateMatrix.of(rows))


# ---------------------------------------------------------------- mixed rows


@pytest.mark.parametrize("kind", ["average", "scale", "neighbours", "centred"])
def test_mixed_rows_have_the_geometry_of_the_formed_ones(kind):
    n, rng = 10, torch.Generator().manual_seed(3)
    rows = rows_of(15, n, 2500) + 100 * rows_of(16, 1, 2500)
    if kind == "average":
        weights = torch.rand(4, n, generator=rng)
        weights /= weights.sum(1, keepdim=True)
    elif kind == "scale":
        weights = torch.diag(torch.rand(n, generator=rng))
    elif kind == "neighbours":
        weights = (torch.rand(n, n, generator=rng) < 0.7).float()
        weights[:, 0] = 1
        weights /= weights.sum(1, keepdim=True)
    else:
        weights = torch.eye(n) - 1 / n
    formed = weights.double() @ rows.double()
    gram, distances = direct(formed)
    found = kernels.geometry(UpdateMatrix.of(rows).mix(weights))
    size = gram.diagonal().sqrt()
    assert ((found.gram - gram).abs() <= 1e-5 * size[:, None] * size).all()
    assert ((found.sq_distances - distances).abs() <= 1e-5 * distances + 1e-12).all()
    w = torch.rand(len(weights), generator=rng).double()
    combined = kernels.combine(UpdateMatrix.of(rows).mix(weights), w)
    torch.testing.assert_close(combined.double(), w @ formed, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("size", [1e30, float("inf")])
def test_a_mixed_away_row_is_gone(size):
    rows = rows_of(17, 6, 400)
    rows[2] = size
    weights = torch.full((6, 6), 0.2, dtype=torch.float64)
    weights[:, 2] = 0
    weights[5] = 0
    weights[5, 2] = 1  # one mixed row is the huge one itself
    updates = UpdateMatrix.of(rows).mix(weights)
    honest = rows[[0, 1, 3, 4, 5]].double().sum(0) / 5
    found = kernels.geometry(updates)
    assert (found.sq_distances[:5, :5] == 0).all()
    assert_near(found.gram[:5, :5], honest.square().sum().expand(5, 5))
    block = torch.cat([block for _, block in updates.blocks()], 1)
    torch.testing.assert_close(block[:5].double(), honest.expand(5, -1), rtol=1e-6, atol=1e-6)
    kept = kernels.combine(updates, torch.tensor([0.5, 0.5, 0, 0, 0, 0]).double())
    torch.testing.assert_close(kept.double(), honest, rtol=1e-6, atol=1e-6)


def test_mixing_twice_is_mixing_by_the_product_and_leaves_no_residue():
    rows = rows_of(18, 3, 50)
    rows[2] = 1e30
    first = torch.tensor([[1.0, 0, 0.1], [0, 1.0, 0.3], [0, 0, 1.0]])
    second = torch.tensor([[1.0, 0, -0.1], [0, 1.0, -0.3]])  # takes the third row out again
    undone = UpdateMatrix.of(rows).mix(first).mix(second)
    assert_near(kernels.sq_distances(undone), direct(rows[:2])[1])
    torch.testing.assert_close(kernels.combine(undone, torch.tensor([1.0, 1.0])), rows[0] + rows[1])
