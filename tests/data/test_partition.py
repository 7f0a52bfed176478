"""Every partition uses each row once; impossible ones say why."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm_sec.data.partition import MENU, dirichlet, quantity, shards, split_rows
from fedllm_sec.errors import DataError


@pytest.mark.parametrize("name", sorted(MENU))
@given(rows=st.integers(60, 300), clients=st.integers(1, 12), classes=st.integers(2, 5), seed=st.integers(0, 99))
def test_each_row_goes_to_exactly_one_client(name, rows, clients, classes, seed):
    rng = np.random.default_rng(seed)
    labels = np.arange(rows) % classes
    try:
        parts = split_rows(MENU[name].make, labels, clients, rng)
    except DataError:
        return  # a Dirichlet draw may leave a client empty; that it is refused is tested below
    assert len(parts) == clients
    assert sorted(np.concatenate(parts).tolist()) == list(range(rows))
    assert min(len(p) for p in parts) >= 1


def test_the_same_seed_gives_the_same_shards():
    labels = np.arange(100) % 4
    first, second = (dirichlet(labels, 5, np.random.default_rng(3), alpha=0.5) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_small_alpha_concentrates_classes():
    labels = np.arange(4000) % 4

    def largest_share(alpha: float) -> float:
        parts = dirichlet(labels, 10, np.random.default_rng(0), alpha=alpha)
        return float(np.mean([np.bincount(labels[p], minlength=4).max() / len(p) for p in parts]))

    assert largest_share(0.1) > 0.7
    assert largest_share(100.0) < 0.35


def test_two_shards_a_client_hold_at_most_a_few_classes():
    labels = np.repeat(np.arange(10), 100)
    for part in shards(labels, 10, np.random.default_rng(0), per_client=2):
        assert len(np.unique(labels[part])) <= 4


def test_quantity_gives_unequal_sizes():
    sizes = [len(p) for p in quantity(np.zeros(1000), 10, np.random.default_rng(0), alpha=0.3)]
    assert max(sizes) > 3 * min(sizes)


@pytest.mark.parametrize(
    ("labels", "clients", "rule", "words"),
    [
        (np.arange(3), 4, "iid", "3 training rows for 4 clients"),
        (np.zeros(50), 4, "dirichlet", "has 1 class"),
    ],
)
def test_what_cannot_be_partitioned_is_named(labels, clients, rule, words):
    with pytest.raises(DataError, match=words):
        split_rows(MENU[rule].make, labels, clients, np.random.default_rng(0))


def test_a_dirichlet_draw_that_leaves_a_client_short_is_an_error():
    with pytest.raises(DataError, match="left a client with"):
        dirichlet(np.arange(40) % 2, 10, np.random.default_rng(0), alpha=0.01, min_rows=3)


def test_a_partition_that_writes_into_the_labels_changes_no_data():
    def writes(labels: np.ndarray, clients: int, rng: np.random.Generator) -> list[np.ndarray]:
        labels[:] = 0
        return list(np.arange(len(labels)).reshape(clients, -1))

    labels = np.arange(6)
    split_rows(writes, labels, 2, np.random.default_rng(0))
    assert labels.tolist() == [0, 1, 2, 3, 4, 5]
