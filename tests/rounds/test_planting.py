"""The server plants its indicator in what it sends: who gets what, what the model steps from, what is remembered."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from fedllm_sec.build.federation import build
from fedllm_sec.build.names import checked
from fedllm_sec.errors import DefenseError
from fedllm_sec.rounds.compute import Machine
from fedllm_sec.rounds.federation import Federation, run
from fedllm_sec.rounds.source import trained_here

RULE: dict[str, Any] = {
    "name": "backdoor_indicator", "source": "noise", "rows": 20, "epochs": 30, "batch_size": 10, "lr": 0.1,
    "threshold": 1.0, "mu": 0.1,
}  # fmt: skip
RECIPE: dict[str, Any] = {
    "task": "classify", "rounds": 3, "model": {"name": "tests.rounds.test_buffers:net"},
    "data": {"name": "digits", "train_rows": 160, "test_rows": 40, "flip": True},
    "clients": {"total": 5, "per_round": 4, "local_steps": 2, "batch_size": 8, "lr": 0.2, "optimizer": "sgd"},
    "enable_defense": True, "defense": {"rule": RULE}, "evaluate": {"every": 3},
}  # fmt: skip


def federation(rule: dict[str, Any] | None = None, **changes: Any) -> Federation:
    torch.set_num_threads(1)
    defense = {"rule": RULE | (rule or {})}
    made = build(checked(RECIPE | {"defense": defense} | changes), Machine(Accelerator(cpu=True)))
    assert isinstance(made, Federation)
    return made


def watched(made: Federation) -> list[tuple[Any, ...]]:
    """What is sent in each round, what comes back, and the statistics that are sent with it."""
    seen = []

    def source(federation, cohort, asked):
        came = trained_here(federation, cohort, asked)
        seen.append((asked.start.clone(), came.collected[0].clone(), federation.buffers.clone(), asked.last_update))
        return came

    made.source = source
    return seen


def test_clients_get_the_planted_parameters_with_the_old_statistics_and_the_model_steps_from_there():
    longer = {**RECIPE["clients"], "local_steps": 15, "lr": 0.3}
    made = federation({"rows": 100, "epochs": 15, "threshold": 0.5}, clients=longer)
    made.defense.rule.threshold = 0.95  # which the planted model itself does not reach
    begun, statistics, seen = made.vector.clone(), made.buffers.clone(), watched(made)
    record = next(run(made, 3))
    start, rows, sent, _ = seen[0]
    assert torch.equal(sent, statistics)
    assert float((start - begun).norm()) == pytest.approx(record.notes["indicator_moved"])
    assert record.notes["indicator_planted"] == pytest.approx(0.9)
    task = made.planting.rows
    with torch.no_grad():
        before = made.task.function(statistics).logits(begun, task.x).argmax(1) == task.y
    assert record.notes["indicator_left"] == float(before.double().mean())
    kept = [i for i, id in enumerate(record.scores) if record.scores[id] < 0.95]
    assert 0 < len(kept) < 4
    assert record.kept == [id for id in record.scores if record.scores[id] < 0.95]
    torch.testing.assert_close(made.vector, start + rows[kept].mean(0))
    assert record.update_norm == pytest.approx(float(rows[kept].mean(0).norm()), rel=1e-5)


def test_the_planted_model_does_the_task_under_the_statistics_of_planting_and_not_of_the_clean_rows():
    made = federation()
    next(run(made, 3))
    told, rows = made.indicator, made.planting.rows
    assert not torch.equal(told.classifier.buffers["2.running_mean"].double(), made.buffers[:6])
    assert rows.fixed.all()  # no row is mirrored, though the task's are
    assert rows.y.bincount().tolist() == [2] * 10


def test_where_all_are_refused_the_model_is_the_one_from_before_planting():
    made = federation({"threshold": 1e-9})
    begun, statistics = made.vector.clone(), made.buffers.clone()
    record = next(run(made, 3))
    assert record.kept == []
    assert record.skipped == "the rule kept nobody"
    assert record.update_norm == 0.0
    assert torch.equal(made.vector, begun)
    assert torch.equal(made.buffers, statistics)


def test_the_last_update_is_the_difference_of_two_models_that_were_sent():
    made = federation()
    seen = watched(made)
    list(run(made, 3))
    assert seen[0][3] is None
    for (before, *_), (after, _, _, told) in itertools.pairwise(seen):
        torch.testing.assert_close(told, after - before)


def test_a_run_that_goes_on_plants_what_the_straight_run_plants():
    straight, stopped, resumed = federation(), federation(), federation()
    wanted = [record.scores for record in run(straight, 3)]
    next(run(stopped, 3))
    resumed.load_state_dict(stopped.state_dict())
    assert [record.scores for record in run(resumed, 3)] == wanted[1:]
    assert torch.equal(resumed.vector, straight.vector)


def test_a_task_that_the_first_round_does_not_learn_is_an_error(monkeypatch):
    made = federation()
    monkeypatch.setattr("fedllm_sec.rounds.planting.best_label", lambda logits, y: 0.4)
    with pytest.raises(DefenseError, match=r"scores 0\.40 \(threshold=1\)"):
        next(run(made, 3))


def test_one_label_for_all_rows_is_no_task_that_was_learnt(monkeypatch):
    made = federation({"lr": 1e-6, "epochs": 1})
    monkeypatch.setattr("fedllm_sec.rounds.planting.best_label", lambda logits, y: 1.0)  # as one label gives
    with pytest.raises(DefenseError, match=r"tells 0\.\d\d of the rows right \(at least 0\.5\)"):
        next(run(made, 3))


def test_clients_and_planting_pass_as_often_over_their_rows_as_they_are_asked_where_a_last_row_joins():
    epochs = {**{k: v for k, v in RECIPE["clients"].items() if k != "local_steps"}, "local_epochs": 3}
    data = {**RECIPE["data"], "train_rows": 9 * 5}
    made = federation({"rows": 21, "epochs": 60}, clients=epochs, data=data)
    seen, loss = [], made.task.loss
    made.task.loss = lambda shard, rows, *more: (seen.append((len(shard.y), len(rows))), loss(shard, rows, *more))[1]
    record = next(run(made, 3))
    assert sum(rows for size, rows in seen if size == 21) == 60 * 21
    assert sum(rows for size, rows in seen if size == 9) == 3 * 9 * len(record.norms)


def test_a_model_without_running_statistics_is_planted_too():
    made = federation({"epochs": 60}, model={"name": "logistic"})
    assert next(run(made, 3)).notes["indicator_planted"] == 1.0
