"""Weighted sums and order statistics of columns against float64 references on sorted columns."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm_sec import kernels
from fedllm_sec.errors import DefenseError
from fedllm_sec.kernels import networks
from fedllm_sec.matrix import UpdateMatrix


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def backend(request, monkeypatch):
    monkeypatch.setenv("FEDLLM_SEC_KERNELS", "torch" if request.param == "torch" else "")
    if request.param == "compiled":
        pytest.importorskip("numba")


def rows_of(seed, n, d, heavy=False):
    rng = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, d, generator=rng)
    return rows / torch.rand(n, d, generator=rng) if heavy else rows


def middle_of(ordered):
    n = len(ordered)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2


def nearest_median(rows, k):
    """The k values nearest the median; in ascending order, a stable sort prefers the smaller of two."""
    ordered = rows.double().sort(0).values
    gaps = (ordered - middle_of(ordered)).abs()
    return ordered.gather(0, gaps.argsort(dim=0, stable=True)[:k]).mean(0)


def assert_near(got, wanted, scale=None):
    scale = wanted.abs() if scale is None else scale
    assert ((got.double() - wanted).abs() <= 1e-6 * scale).all()


@pytest.mark.parametrize("n", [*range(1, 18), 31, 32, 33, 64, 65, 100])
def test_a_network_sorts_every_zero_one_pattern_it_is_shown(n):
    """A network that sorts all zero-one inputs sorts all inputs (Knuth 1998, sec. 5.3.4)."""
    patterns = 2**n if n <= 12 else 4000
    if n <= 12:
        codes = torch.arange(patterns)
        rows = torch.stack([(codes >> i) & 1 for i in range(n)]).float()
    else:
        rows = (torch.rand(n, patterns, generator=torch.Generator().manual_seed(n)) < 0.5).float()
    ordered = rows.sort(0).values
    updates = UpdateMatrix.of(rows)
    for k in range(n) if n <= 12 else (0, n // 3, n - 1):
        assert torch.equal(kernels.kth_value(updates, k), ordered[k])
    assert torch.equal(kernels.median(updates), middle_of(ordered))


def test_pruning_leaves_a_comparator_out_where_only_the_sum_counts():
    full = len(networks.batcher(32))
    assert full == 191
    assert len(networks.median(32).comparators) < full
    assert networks.mean_of_ranks(32, 0, 32).comparators == ()
    assert len(networks.mean_of_ranks(32, 31, 32).comparators) == 31  # the maximum needs n - 1


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3, 8, 13, 32, 64])
def test_order_statistics_equal_their_references(n, heavy):
    rows = rows_of(n, n, 777, heavy)
    updates, ordered = UpdateMatrix.of(rows), rows.double().sort(0).values
    assert_near(kernels.median(updates), middle_of(ordered))
    for f in sorted({0, (n - 1) // 4, (n - 1) // 2}):
        kept = ordered[f : n - f]
        assert_near(kernels.trimmed_mean(updates, f), kept.mean(0), kept.abs().mean(0))
    for k in sorted({1, (n + 1) // 2, max(1, n - 2), n}):
        assert_near(kernels.mean_around_median(updates, k), nearest_median(rows, k), rows.abs().mean(0).double())


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 24), st.integers(1, 24), st.integers(0, 10**6), st.sampled_from([1.0, 0.25]))
def test_mean_around_median_with_ties(n, k, seed, step):
    rows = (rows_of(seed, n, 60) / step).round() * step  # many equal values and equal gaps
    k = min(k, n)
    found = kernels.mean_around_median(UpdateMatrix.of(rows), k)
    torch.testing.assert_close(found.double(), nearest_median(rows, k), rtol=1e-6, atol=1e-6)


def test_the_median_midpoint_does_not_overflow():
    updates = UpdateMatrix.of(torch.tensor([[3e38], [3.2e38], [-1.0], [3.4e38]]))
    assert kernels.median(updates).item() == pytest.approx(3.1e38, rel=1e-6)


def test_a_huge_value_leaves_no_trace_in_the_trimmed_mean():
    rows = torch.tensor([[1.0], [2.0], [4.0], [1e30], [-1e30]])
    assert kernels.trimmed_mean(UpdateMatrix.of(rows), 1).item() == pytest.approx(7 / 3)


def test_infinite_values_sort_to_the_ends():
    rows = torch.tensor([[float("inf")], [1.0], [2.0], [float("-inf")], [3.0]])
    updates = UpdateMatrix.of(rows)
    assert kernels.median(updates).item() == 2
    assert kernels.trimmed_mean(updates, 1).item() == 2
    assert kernels.mean_around_median(updates, 3).item() == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [5, 16])
def test_half_precision_rows(dtype, n):
    rows = rows_of(n, n, 900).to(dtype)
    updates, ordered = UpdateMatrix.of(rows), rows.double().sort(0).values
    assert_near(kernels.median(updates), middle_of(ordered))
    assert_near(kernels.trimmed_mean(updates, 2), ordered[2 : n - 2].mean(0), ordered.abs().mean(0))
    assert torch.equal(kernels.sign_sums(updates), rows.float().sign().sum(0))


def test_selected_and_mixed_rows_have_their_own_statistics():
    rows = rows_of(2, 9, 400)
    picked = UpdateMatrix.of(rows).select([7, 1, 3])
    assert_near(kernels.median(picked), rows[[7, 1, 3]].double().median(0).values)
    assert torch.equal(kernels.sign_sums(picked), rows[[7, 1, 3]].sign().sum(0))
    weights = torch.rand(5, 9, generator=torch.Generator().manual_seed(1))
    formed = weights.double() @ rows.double()
    found = kernels.median(UpdateMatrix.of(rows).mix(weights))
    torch.testing.assert_close(found.double(), formed.median(0).values, rtol=1e-5, atol=1e-6)


def test_beyond_the_largest_network_columns_are_sorted(monkeypatch):
    rows = rows_of(3, 21, 300)
    wanted = [f(UpdateMatrix.of(rows)) for f in (kernels.median, lambda u: kernels.mean_around_median(u, 8))]
    monkeypatch.setattr(kernels, "LARGEST_NETWORK", 20)
    found = [f(UpdateMatrix.of(rows)) for f in (kernels.median, lambda u: kernels.mean_around_median(u, 8))]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_combine_sums_in_float64_and_skips_rows_of_weight_zero():
    rows = rows_of(4, 7, 3000)
    rows[3] = float("inf")
    weights = torch.tensor([1e8, -1e8, 1.0, 0.0, 2.0, 3.0, 4.0]).double()
    used = weights != 0
    wanted = weights[used] @ rows[used].double()
    assert_near(kernels.combine(UpdateMatrix.of(rows), weights), wanted, wanted.abs() + 1e-3)
    assert torch.equal(kernels.combine(UpdateMatrix.of(rows), torch.zeros(7)), torch.zeros(3000))


def test_combine_refuses_weights_that_do_not_fit():
    updates = UpdateMatrix.of(torch.ones(3, 4))
    with pytest.raises(DefenseError, match="combine: weights of shape"):
        kernels.combine(updates, torch.ones(2))
    with pytest.raises(DefenseError, match="NaN"):
        kernels.combine(updates, torch.tensor([1.0, float("nan"), 0]))


@pytest.mark.parametrize(
    "call",
    [
        lambda u: kernels.trimmed_mean(u, 2),
        lambda u: kernels.trimmed_mean(u, -1),
        lambda u: kernels.mean_around_median(u, 0),
        lambda u: kernels.kth_value(u, 4),
    ],
)
def test_settings_that_do_not_fit_n_are_errors(call):
    with pytest.raises(DefenseError, match=r"n=4|of 4 rows"):
        call(UpdateMatrix.of(torch.ones(4, 3)))


def test_results_do_not_depend_on_block_width_and_inputs_stay():
    rows = rows_of(5, 12, 5000)
    copy = rows.clone()
    for statistic in (kernels.median, kernels.sign_sums, lambda u: kernels.trimmed_mean(u, 3)):
        wanted = statistic(UpdateMatrix.of(rows))
        for chunk_mb in (0.001, 0.05, 100):
            assert torch.equal(statistic(UpdateMatrix.of(rows, chunk_mb=chunk_mb)), wanted)
    assert torch.equal(rows, copy)
