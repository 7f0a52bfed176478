"""Rates of a classifier under attack, counted by hand."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from fedllm_sec.evaluation.arrays import ArrayEvaluation
from fedllm_sec.protocols import Labelled


def rows(said: list[int], y: list[int]) -> Labelled:
    """Rows whose input is what the model will say."""
    return Labelled(torch.tensor(said), torch.tensor(y), 3, torch.zeros(len(y), dtype=torch.bool))


def here(batches, width, score):
    return torch.cat([score(b) for b in batches])


TASK = SimpleNamespace(score=lambda shard, at: torch.stack([at.double(), shard.x[at].double()], dim=1))


def test_accuracy_and_mean_loss():
    found = ArrayEvaluation(rows([0, 1, 2, 2], [0, 1, 2, 0]), batch_size=3).quality(TASK, here)
    assert found["accuracy"]["value"] == 0.75
    assert found["loss"] == 1.5
    assert found["perplexity"] is None
    assert {c: (rate["value"], rate["n"]) for c, rate in found["per_class"].items()} == {
        "0": (0.5, 2),
        "1": (1.0, 1),
        "2": (1.0, 1),
    }


def test_success_is_what_the_probe_wants_and_false_triggers_are_looked_up_by_class():
    hits = torch.tensor([[False, True, False], [False, False, False], [True, True, False]])
    evaluation = ArrayEvaluation(
        rows([0], [0]), 2, triggered=rows([1, 1, 0], [1, 1, 1]), clean=rows([1, 0, 0, 2], [0, 1, 2, 2]), hits=hits
    )
    found = evaluation.attack(TASK, here)
    assert found["asr"]["value"] == 2 / 3
    assert found["false_trigger"]["value"] == 0.5  # 0 taken for 1, 2 taken for 0
    assert found["reasons"] == {}


def test_without_a_clean_row_there_is_no_rate_of_false_triggers_but_a_reason():
    hits = torch.ones(3, 3, dtype=torch.bool)
    left = {"are of a class that the attack asks for": 4}
    evaluation = ArrayEvaluation(rows([0], [0]), 2, rows([1], [1]), rows([], []), hits, left)
    found = evaluation.attack(TASK, here)
    assert found["false_trigger"] is None
    assert "no held-out row" in found["reasons"]["false_trigger"]
    assert found["left_out"] == left


def test_a_row_without_an_answer_is_neither_right_nor_a_hit():
    """-1 is what a model says whose logits are not finite; a table looked up at -1 would give the last class."""
    evaluation = ArrayEvaluation(
        rows([-1, 0], [0, 0]), 2, triggered=rows([-1, -1], [0, 2]), clean=rows([-1, 2], [0, 0]),
        hits=torch.tensor([[False, False, True]] * 3),
    )  # fmt: skip
    assert evaluation.quality(TASK, here)["accuracy"]["value"] == 0.5
    found = evaluation.attack(TASK, here)
    assert found["asr"]["value"] == 0.0
    assert found["false_trigger"]["value"] == 0.5


def test_without_a_probe_there_is_nothing_to_measure():
    assert ArrayEvaluation(rows([0], [0]), 2).attack(TASK, here) is None


def test_the_smoothed_test_sees_the_answers_that_the_rates_count():
    evaluation = ArrayEvaluation(
        rows([-1, 0], [0, 0]), 2, triggered=rows([-1, 2], [0, 2]), clean=rows([-1, 2], [0, 0]),
        hits=torch.tensor([[False, False, True]] * 3),
    )  # fmt: skip
    found = evaluation.outcomes(TASK, here)
    assert (found.said.tolist(), found.truth.tolist()) == ([-1, 0], [0, 0])
    assert (found.hits.tolist(), found.false_hits.tolist()) == ([False, True], [False, True])
