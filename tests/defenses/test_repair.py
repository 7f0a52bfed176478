"""Repairs of the last model, by hand: what they take out, what they need, what they leave as it is."""

from __future__ import annotations

import pytest
import torch

from fedllm_sec.defenses.repair import Trained, fine_tune, own_answers, prune_directions, without_leading
from fedllm_sec.errors import DefenseError
from fedllm_sec.matrix import Layout

PAIR = Layout(("layer.lora_A.weight", "layer.lora_B.weight", "head.weight"), ((2, 3), (2, 2), (2,)))


def adapter() -> torch.Tensor:
    """B A = diag(3, 1) in the first two inputs, by A = [[1, 0, 0], [0, 1, 0]] and B = diag(3, 1); a head of 5, 6."""
    return torch.tensor([1.0, 0, 0, 0, 1, 0, 3, 0, 0, 1, 5, 6])


def test_the_leading_direction_of_a_product_is_taken_out_and_the_rest_stays():
    a, b = torch.tensor([[1.0, 0, 0], [0, 1, 0]]), torch.diag(torch.tensor([3.0, 1.0]))
    new_a, new_b, gone = without_leading(a, b, 1)
    assert torch.allclose(new_b @ new_a, torch.tensor([[0.0, 0, 0], [0, 1, 0]]), atol=1e-6)
    assert gone == pytest.approx(9 / 10)


def test_pruning_does_not_depend_on_the_gauge_nor_on_alpha():
    gauge = torch.tensor([[2.0, 1.0], [0.5, 3.0]])
    a, b = torch.tensor([[1.0, 0, 0], [0, 1, 0]]), torch.diag(torch.tensor([3.0, 1.0]))
    turned_a, turned_b, gone = without_leading(gauge @ a, b @ torch.linalg.inv(gauge), 1, scale=4.0)
    assert torch.allclose(turned_b @ turned_a, torch.tensor([[0.0, 0, 0], [0, 1, 0]]), atol=1e-5)
    assert gone == pytest.approx(9 / 10)


def test_a_whole_adapter_is_pruned_layer_by_layer_and_what_is_no_factor_is_left_alone():
    trained = Trained(adapter(), PAIR, {})
    new = prune_directions(trained, directions=1)
    assert torch.allclose(new[6:10].view(2, 2) @ new[:6].view(2, 3), torch.tensor([[0.0, 0, 0], [0, 1, 0]]), atol=1e-6)
    assert new[10:].tolist() == [5, 6]
    assert trained.notes["energy"] == pytest.approx(0.9)
    assert torch.equal(trained.vector, adapter()), "the model it began from was written into"


def test_pruning_an_adapter_that_learnt_nothing_gives_nothing():
    a, b, gone = without_leading(torch.ones(2, 3), torch.zeros(2, 2), 1)
    assert (b @ a).abs().max() == 0
    assert gone == 0


def test_pruning_all_directions_is_refused():
    with pytest.raises(DefenseError, match="directions=2 of an adapter of rank 2 leave nothing"):
        prune_directions(Trained(adapter(), PAIR, {}), directions=2)


def test_fine_tuning_trains_on_the_root_rows_for_the_steps_it_is_given():
    asked = []

    def tune(rows, steps, lr):
        asked.append((rows, steps, lr))
        return torch.ones(12)

    assert fine_tune(Trained(adapter(), PAIR, {}, root="root", tune=tune), steps=7, lr=0.1).tolist() == [1.0] * 12
    assert asked == [("root", 7, 0.1)]


def test_a_repair_by_rows_says_what_to_set_where_there_are_none():
    with pytest.raises(DefenseError, match=r"Set defense\.root_rows"):
        fine_tune(Trained(adapter(), PAIR, {}))


def test_own_answers_are_learnt_and_where_none_is_safe_the_model_stays():
    learnt = []

    def tune(rows, steps, lr):
        learnt.append(rows)
        return torch.zeros(12)

    made = {"be safe": ["yes"], "": []}
    trained = Trained(adapter(), PAIR, {}, root=["row"], tune=tune, answered=lambda rows, reminder: made[reminder])
    assert own_answers(trained, reminder="be safe").tolist() == [0.0] * 12
    assert learnt == [["yes"]]
    assert trained.notes == {"rows": 1.0}
    assert torch.equal(own_answers(trained), adapter())
    assert trained.notes == {"rows": 0.0}
