"""FLARE against its formulas written out, and what it needs."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedllm_sec.defenses.latent import discrepancies, flare, neighbour_counts
from fedllm_sec.defenses.subject import EXAMPLES
from fedllm_sec.errors import DefenseError
from fedllm_sec.matrix import UpdateMatrix
from fedllm_sec.models.logistic import logistic
from fedllm_sec.models.resnet import resnet
from fedllm_sec.protocols import RoundContext
from fedllm_sec.seeds import generator_for
from fedllm_sec.tasks.classify import Classify

CPU = torch.device("cpu")


def mmd(a, b, width):
    """Gretton et al. 2012, eq. 3: unbiased."""
    k = len(a)

    def g(x, y):
        return math.exp(-float(((x - y) ** 2).sum()) / (2 * width))

    within = sum(g(s[i], s[j]) for s in (a, b) for i in range(k) for j in range(k) if i != j) / (k * (k - 1))
    return within - 2 * sum(g(x, y) for x in a for y in b) / (k * k)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_discrepancies_equal_their_formula_at_every_scale(scale):
    sets = torch.randn(4, 5, 3, generator=generator_for(1, "sets"), dtype=torch.float64)
    sets[3] += 2.0
    x = sets.numpy()
    squares = [((s[i] - s[j]) ** 2).sum() for s in x for i in range(5) for j in range(i)]
    found = discrepancies(scale * sets)
    width = sorted(squares)[(len(squares) - 1) // 2]  # the lower median
    for i in range(4):
        for j in range(4):
            wanted = max(0.0, mmd(x[i], x[j], width)) if i != j else 0.0
            assert float(found[i, j]) == pytest.approx(wanted, abs=1e-9)


def test_a_view_that_is_no_number_is_as_far_as_can_be():
    sets = torch.randn(3, 4, 2, generator=generator_for(2, "sets"))
    sets[1, 0, 0] = math.inf
    assert discrepancies(sets)[1].tolist() == [2.0, 0.0, 2.0]


def test_trust_by_hand():
    # nearest half (two of four others): 0: {1, 2}, 1: {0, 2}, 2: {1, 0}, 3: {2, 1}, 4: {2, 3}
    d = torch.tensor([[0, 1, 2, 5, 9], [1, 0, 1.5, 4, 9], [2, 1.5, 0, 3, 8], [5, 4, 3, 0, 8.5], [9, 9, 8, 8.5, 0]])
    counts = neighbour_counts(d.double())
    assert counts.tolist() == [2.0, 3.0, 4.0, 1.0, 0.0]
    trust = np.exp(counts.numpy() / 2.0 / 0.5)  # in means of 2, tau 0.5
    assert (trust / trust.sum())[2] == pytest.approx(0.6364, abs=1e-3)


def trained(model):
    rows = replace(EXAMPLES, x=torch.rand(12, 1, 8, 8, generator=generator_for(3, "x")))
    torch.manual_seed(0)
    task = Classify(model((1, 8, 8), 3), CPU, mean=torch.tensor([0.4]), std=torch.tensor([0.3]))
    start = task.initial
    return task, rows, RoundContext(1, start, task.layout, generator_for(1, "rule"), root_rows=rows,
                                    classifier=task.function())  # fmt: skip


def test_features_are_what_the_last_layer_reads_and_the_model_in_memory_stays_as_it_is():
    task, rows, _ = trained(resnet)
    held, other = task.parameters.detach().clone(), task.initial + 0.01
    f = task.function()
    features, logits = f.features(other, rows.x), f.logits(other, rows.x)
    assert torch.equal(task.parameters, held)
    with torch.no_grad():
        task.parameters.copy_(other)
    task.model.eval()
    torch.testing.assert_close(task.logits(task.images_of(rows)), logits)
    *_, weight, bias = task.layout.split(other).values()
    torch.testing.assert_close(features @ weight.T + bias, logits)


def test_clients_whose_view_differs_get_little_weight_and_the_update_is_the_weighted_sum():
    task, _, ctx = trained(resnet)
    rows = 0.01 * torch.randn(10, task.layout.size, generator=generator_for(4, "rows"))
    rows[:3] = 30 * rows[:3]
    decision = flare(UpdateMatrix.of(rows, layout=task.layout), ctx)
    assert float(decision.weights.sum()) == pytest.approx(1.0)
    assert float(decision.weights[:3].max()) < 0.5 * float(decision.weights[3:].min())
    assert set(decision.scores.topk(3).indices.tolist()) == {0, 1, 2}
    torch.testing.assert_close(decision.update, (decision.weights.float() @ rows), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"classifier": None}, "flare: needs the server's model"),
        ({"root_rows": None}, r"flare: needs two clean rows or more on the server. Set defense.root_rows"),
    ],
)
def test_what_flare_lacks_is_said(changes, words):
    task, _, ctx = trained(resnet)
    with pytest.raises(DefenseError, match=words):
        flare(UpdateMatrix.of(torch.zeros(3, task.layout.size)), replace(ctx, **changes))


def test_a_model_without_a_representation_is_refused():
    task, _, ctx = trained(logistic)
    with pytest.raises(DefenseError, match="is the same for every vector"):
        flare(UpdateMatrix.of(torch.zeros(3, task.layout.size)), ctx)
