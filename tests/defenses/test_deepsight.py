"""DeepSight on deltas: its measures by hand, its ensemble, and whom it drops."""

import warnings

import numpy as np
import pytest
import torch

from fedllm_sec.defenses.cluster import hdbscan_labels
from fedllm_sec.defenses.deepsight import (
    deepsight,
    deepsight_accepts,
    exceedings,
    neuron_energies,
    output_layer,
    same_cluster,
)
from fedllm_sec.errors import DefenseError
from fedllm_sec.matrix import Layout, UpdateMatrix
from tests.defenses.defense_rows import KINDS, context, matrix, rows_of

LORA = Layout(("l.0.lora_A.weight", "l.0.lora_B.weight"), ((2, 4), (20, 2)))
HEAD = Layout(("body.weight", "head.weight", "head.bias"), ((3, 5), (8, 3), (8,)))


def test_the_output_layer_is_found_in_adapters_and_in_whole_models():
    assert output_layer(LORA, None) == "l.0.lora_B.weight"
    assert output_layer(HEAD, None) == "head.weight"
    assert output_layer(HEAD, "body.weight") == "body.weight"
    assert output_layer(Layout.single(5), None) == "vector"


def test_a_layer_that_is_missing_or_ambiguous_is_refused():
    for layer in ("tail.weight", "weight"):
        with pytest.raises(DefenseError, match=f'one parameter that ends in "{layer}"'):
            output_layer(HEAD, layer)


def neup_reference(w, b):
    """Rieger et al., normalized update energies and threshold exceedings, one client at a time."""
    shares, counts = [], []
    for wk, bk in zip(w, b, strict=True):
        energy = [(abs(bk[i]) + sum(abs(v) for v in wk[i])) ** 2 for i in range(len(bk))]
        c = [e / sum(energy) for e in energy]
        shares.append(c)
        counts.append(sum(v > max(0.01, 1 / len(c)) * max(c) for v in c))
    return np.array(shares), counts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 9, 64])
def test_neuron_energies_equal_their_reference(kind, n):
    w, b = rows_of(kind, n, 24).double().view(n, 8, 3), rows_of(kind, n, 8, seed=1).double()
    shares = neuron_energies(w, b)
    wanted, counts = neup_reference(w.numpy(), b.numpy())
    assert np.allclose(shares.numpy(), wanted, rtol=1e-9, atol=0)
    assert exceedings(shares).tolist() == counts


def test_neuron_energies_by_hand():
    # energies 1, 1, 2, 0 (|b| + sum |w|), squares 1, 1, 4, 0 of 6; the bar is 1/4 of 2/3
    w = torch.tensor([[[0.5, -0.5], [1.0, 0.0], [1.0, 0.5], [0.0, 0.0]]], dtype=torch.float64)
    b = torch.tensor([[0.0, 0.0, -0.5, 0.0]], dtype=torch.float64)
    shares = neuron_energies(w, b)
    assert shares.flatten().tolist() == pytest.approx([1 / 6, 1 / 6, 2 / 3, 0.0])
    assert exceedings(shares).tolist() == [1.0]
    assert exceedings(torch.tensor([[0.3, 0.3, 0.4]], dtype=torch.float64)).tolist() == [3.0]


def test_a_row_of_zeros_or_of_huge_values_has_defined_energies():
    w = torch.zeros(2, 3, 1, dtype=torch.float64)
    w[1] = 1e200
    assert neuron_energies(w, None).tolist() == [[0.0] * 3, pytest.approx([1 / 3] * 3)]


def test_noise_is_in_a_cluster_of_its_own():
    labels = torch.tensor([0, 0, -1, -1])
    assert same_cluster(labels).tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 0, 1], [1, 1, 1, 0]]


def blocks_of(*sizes):
    """Distances 0.1 within groups of these sizes and 1 between them."""
    groups = torch.tensor([g for g, size in enumerate(sizes) for _ in range(size)])
    distances = torch.where(groups[:, None] == groups[None], 0.1, 1.0).double()
    return distances.fill_diagonal_(0.0)


def test_a_cluster_with_a_third_of_suspicious_rows_is_dropped_whole():
    # 6 and 4 clients; the median count is 10, so 5 or less is suspicious: 2 of the second group of 4
    te = torch.tensor([10.0, 10, 10, 10, 10, 9, 5, 4, 10, 10])
    accepted, suspicious = deepsight_accepts([blocks_of(6, 4)] * 2, te.double(), 1 / 3)
    assert suspicious.tolist() == [False] * 6 + [True, True, False, False]
    assert accepted.tolist() == [True] * 6 + [False] * 4


def test_min_samples_counts_neighbours_as_the_hdbscan_library_does():
    # three neighbours at 0.1 each: in a group of four all have them, in a group of three nobody has
    assert hdbscan_labels(blocks_of(4, 4), 3, 3).unique().tolist() == [0, 1]
    assert hdbscan_labels(blocks_of(4, 3), 3, 3)[4:].tolist() == [hdbscan_labels(blocks_of(4, 3), 3, 3)[4]] * 3
    assert hdbscan_labels(blocks_of(4, 3), 3, 2).unique().tolist() == [0, 1]


def test_an_inner_adapter_taken_for_the_output_layer_is_said_once():
    rows = rows_of("random", 5, LORA.size)
    with pytest.warns(UserWarning, match=r"l\.0\.lora_B\.weight is no output layer but part of an inner layer"):
        deepsight(UpdateMatrix.of(rows, layout=LORA), context(layout=LORA, d=LORA.size))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        deepsight(UpdateMatrix.of(rows, layout=LORA), context(layout=LORA, d=LORA.size, round=2))
        whole = rows_of("random", 5, HEAD.size)
        deepsight(UpdateMatrix.of(whole, layout=HEAD), context(layout=HEAD, d=HEAD.size))


def test_a_large_cluster_is_kept_for_one_suspicious_row():
    te = torch.tensor([10.0] * 8 + [1.0], dtype=torch.float64)
    accepted, _ = deepsight_accepts([blocks_of(9)], te, 1 / 3)
    assert accepted.tolist() == [True] * 9


def one_target_rows(layout, honest=9, bad=4):
    """Honest clients move all output neurons, backdoored ones nearly one neuron only, in the same way."""
    rows = rows_of("random", honest + bad, layout.size)
    name = output_layer(layout, None)
    place, shape = layout.slices()[name], layout.shapes[layout.names.index(name)]
    part = 0.001 * rows[honest:, place].view(bad, *shape)
    part[:, 2] += 4.0
    rows[honest:, place] = part.view(bad, -1)
    return UpdateMatrix.of(rows, layout=layout)


@pytest.mark.filterwarnings("ignore:deepsight")
@pytest.mark.parametrize("layout", [LORA, HEAD])
def test_clients_that_move_one_output_neuron_are_dropped(layout):
    updates = one_target_rows(layout)
    if layout is HEAD:
        updates.rows[9:, layout.slices()["head.bias"]] = torch.eye(8)[2] * 4.0
    decision = deepsight(updates, context(layout=layout, d=layout.size))
    assert decision.kept[9:].tolist() == [False] * 4
    assert int(decision.kept[:9].sum()) >= 7
    assert float(decision.scores[9:].min()) > float(decision.scores[:9].max())


def test_the_kept_rows_are_clipped_to_the_median_norm():
    updates = UpdateMatrix.of(torch.tensor([[1.0], [2.0], [8.0]]).expand(3, 4).contiguous())
    decision = deepsight(updates, context(4))
    assert decision.kept.all()
    assert decision.weights.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 12])


@pytest.mark.filterwarnings("ignore:deepsight")
@pytest.mark.parametrize("size", [10.0, 1e18])
def test_far_rows_are_bounded_by_the_median_norm(size):
    updates = one_target_rows(LORA)
    updates.rows[9:] *= size
    decision = deepsight(updates, context(layout=LORA, d=LORA.size))
    assert float(decision.update.norm()) <= 1.001 * float(updates.rows.norm(dim=1).median())


def test_one_zero_row_is_fine():
    assert deepsight(matrix([[0.0, 0.0]]), context(2)).update.tolist() == [0.0, 0.0]
