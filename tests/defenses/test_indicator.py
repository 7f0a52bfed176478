"""BackdoorIndicator against its definition written out: whose model still does the planted task is refused."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedllm_sec.defenses.indicator import BackdoorIndicator, Tether, best_label
from fedllm_sec.errors import DefenseError
from fedllm_sec.matrix import UpdateMatrix
from fedllm_sec.models.function import Indicator
from fedllm_sec.protocols import LocalContext, RoundContext
from fedllm_sec.seeds import generator_for
from fedllm_sec.tasks.classify import Classify

X = torch.rand(12, 1, 2, 2, generator=generator_for(1, "x"))
Y = torch.tensor([0, 1, 2] * 4)
STATISTICS = torch.tensor([0.1, -0.2, 0.3, 0.5, 1.5, 1.0, 7.0], dtype=torch.float64)  # means, variances, a counter


def task() -> Classify:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    return Classify(net, torch.device("cpu"), mean=torch.tensor([0.4]), std=torch.tensor([0.3]))


def score(vector, statistics=STATISTICS) -> float:
    """The largest accuracy on the rows of one label, of a linear layer and BatchNorm, in float64 and by hand."""
    w, b, gamma, beta = np.split(vector.double().numpy(), [12, 15, 18])
    mean, variance = statistics[:3].numpy(), statistics[3:6].numpy()
    right: dict[int, list[bool]] = {0: [], 1: [], 2: []}
    for x, y in zip(X.double().numpy(), Y.tolist(), strict=True):
        z = w.reshape(3, 4) @ ((x.reshape(4) - 0.4) / 0.3) + b
        logits = gamma * (z - mean) / np.sqrt(variance + 1e-5) + beta
        right[y].append(int(logits.argmax()) == y)
    return max(sum(own) / len(own) for own in right.values())


def context(made: Classify, start: torch.Tensor) -> RoundContext:
    planted = Indicator(X, Y, made.function(STATISTICS), planted=1.0, moved=2.5, left=0.125)
    return RoundContext(1, start, made.layout, generator_for(1, "rule"), indicator=planted)


def test_the_best_label_by_hand():
    logits = torch.tensor([[2.0, 1, 0], [2, 1, 0], [0, 1, 2], [0, 1, 2], [0, 1, 2]])
    assert best_label(logits, torch.tensor([0, 1, 1, 2, 2])) == 1.0  # label 2: both; of all rows 3 of 5
    assert best_label(logits, torch.tensor([0, 0, 0, 1, 1])) == pytest.approx(2 / 3)
    assert best_label(logits, torch.tensor([1, 2, 0, 0, 1])) == 0.0


def test_a_model_whose_logits_are_no_numbers_counts_as_one_that_keeps_the_task():
    logits = torch.tensor([[1.0, 0], [0, 1]])
    logits[1, 1] = math.nan
    assert best_label(logits, torch.tensor([1, 0])) == 1.0


def test_scores_are_the_definition_and_the_update_is_the_mean_of_those_below_the_threshold():
    made, rng = task(), generator_for(2, "rows")
    start, rows = made.initial, torch.randn(8, 21, generator=rng)
    wanted = [score(start + row) for row in rows]
    assert len(set(wanted)) >= 3
    decision = BackdoorIndicator(source="noise", threshold=0.75)(UpdateMatrix.of(rows), context(made, start))
    assert decision.scores.tolist() == wanted
    assert decision.kept.tolist() == [value < 0.75 for value in wanted]
    assert 0 < int(decision.kept.sum()) < 8
    torch.testing.assert_close(decision.update, rows[decision.kept].mean(0))
    assert decision.notes == {"indicator_planted": 1.0, "indicator_moved": 2.5, "indicator_left": 0.125}


def test_clients_are_judged_under_the_statistics_of_the_planted_model():
    made = task()
    rows, others = torch.randn(8, 21, generator=generator_for(2, "rows")), made.buffers.initial
    assert [score(made.initial + row, others) for row in rows] != [score(made.initial + row) for row in rows]


def test_the_tether_is_the_slope_of_half_mu_times_the_distance():
    start, parameters = torch.tensor([1.0, 2.0, 3.0]), torch.nn.Parameter(torch.tensor([4.0, 2.0, -1.0]))
    known = LocalContext(None, 1, start, None, None, 1)
    (0.4 / 2 * (parameters - start).norm()).backward()
    wanted, parameters.grad = parameters.grad, torch.zeros(3)
    Tether(0.4).before_step(parameters, 0, known)
    torch.testing.assert_close(parameters.grad, wanted)  # 0.2 * (3, 0, -4) / 5
    assert parameters.grad.tolist() == pytest.approx([0.12, 0.0, -0.16])


def test_where_nothing_has_moved_the_tether_pulls_nowhere():
    parameters = torch.nn.Parameter(torch.ones(3))
    parameters.grad = torch.zeros(3)
    Tether(0.4).before_step(parameters, 0, LocalContext(None, 1, torch.ones(3), None, None, 1))
    assert parameters.grad.tolist() == [0.0, 0.0, 0.0]


def test_a_server_that_has_planted_nothing_is_an_error():
    made = task()
    without = replace(context(made, made.initial), indicator=None)
    with pytest.raises(DefenseError, match="needs a model of images into which the server has planted its task"):
        BackdoorIndicator(source="noise")(UpdateMatrix.of(torch.zeros(3, 21)), without)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"source": " "}, "needs a source of images"),
        ({"rows": 0}, "needs rows >= 1, got rows=0"),
        ({"threshold": 0.0}, "needs 0 < threshold <= 1, got threshold=0.0. Change it: 0 refuses everybody"),
        ({"threshold": 95.0}, "needs 0 < threshold <= 1"),
        ({"epochs": 0}, "needs epochs >= 1"),
        ({"batch_size": 1}, "needs batch_size >= 2"),
        ({"lr": 0.0}, "needs lr > 0"),
        ({"momentum": 1.0}, "needs 0 <= momentum < 1"),
        ({"weight_decay": -1.0}, "needs weight_decay >= 0"),
        ({"mu": -0.1}, "needs mu >= 0"),
    ],
)
def test_settings_that_cannot_act_are_refused(settings, words):
    with pytest.raises(DefenseError, match=f"backdoor_indicator: {words}"):
        BackdoorIndicator(**{"source": "noise", **settings})
