"""What a client sends of its delta: the largest values, signs, or a byte a value."""

import pytest
import torch

from fedllm_sec.defenses.compression import Int8, PruneGradient, SignCompress, pruned, signs
from fedllm_sec.errors import DefenseError
from fedllm_sec.matrix import Layout
from fedllm_sec.protocols import Client, LocalContext


def test_the_smallest_values_are_dropped_and_of_equals_the_first():
    assert pruned(torch.tensor([1.0, -3, 0.5, 2]), 0.5).tolist() == [0, -3, 0, 2]
    assert pruned(torch.ones(4), 0.25).tolist() == [0, 1, 1, 1]


def test_signs_have_the_mean_size_of_their_own_parameter():
    layout = Layout(("a", "b"), ((2,), (2, 2)))
    assert signs(torch.tensor([1.0, -3, 0, 2, -2, 4]), layout).tolist() == [2, -2, 0, 2, -2, 2]


def sent(rule, steps=3, start=10.0):
    """The delta and the first gradient of a client whose three steps each move four values by 1, -3, 0.5 and 2."""
    move = torch.tensor([1.0, -3, 0.5, 2])
    parameters = torch.nn.Parameter(torch.full((4,), start))
    ctx = LocalContext(Client("a", None), 1, torch.full((4,), start), None, Layout.single(4), steps)
    first = None
    for step in range(steps):
        parameters.grad = move.clone()
        rule.before_step(parameters, step, ctx)
        with torch.no_grad():
            parameters += parameters.grad
        rule.after_step(parameters, step, ctx)
        first = parameters.grad.clone() if step == 0 else first
    return (parameters.detach() - start).tolist(), first.tolist()


@pytest.mark.parametrize(
    ("rule", "delta", "gradient"),
    [
        (PruneGradient(share=0.5), [0, -9, 0, 6], [0, -3, 0, 2]),
        (SignCompress(), [4.875, -4.875, 4.875, 4.875], [1.625, -1.625, 1.625, 1.625]),
        (Int8(block=2), [3 * 42 / 127 * 3 / 3 * 3, -9, 1.5, 6], [42 * 3 / 127, -3, 32 * 2 / 127, 2]),
    ],
)
def test_training_is_as_ever_and_what_is_sent_is_smaller(rule, delta, gradient):
    """1, -3, 0.5, 2 in blocks of two: scales 3 / 127 and 2 / 127, codes 42, -127, 32, 127."""
    found, first = sent(rule)
    assert found == pytest.approx(delta, abs=0.02)
    assert first == pytest.approx(gradient, abs=1e-6)


def test_a_row_that_is_not_finite_stays_so():
    parameters = torch.nn.Parameter(torch.tensor([1.0, float("nan")]))
    ctx = LocalContext(Client("a", None), 1, torch.zeros(2), None, Layout.single(2), 1)
    for rule in (PruneGradient(), SignCompress(), Int8()):
        rule.after_step(parameters, 0, ctx)
        assert not bool(parameters.isfinite().all())


def test_senseless_shares_and_blocks_are_refused():
    with pytest.raises(DefenseError, match=r"prune_gradient: needs 0 < share < 1, got share=1\.0"):
        PruneGradient(share=1.0)
    with pytest.raises(DefenseError, match="int8: needs block >= 1, got block=0"):
        Int8(block=0)
