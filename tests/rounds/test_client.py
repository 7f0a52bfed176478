"""The training loop, on a quadratic whose every step can be computed by hand."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator

from fedllm_sec.algorithms.local import FedProx
from fedllm_sec.protocols import Client
from fedllm_sec.rounds.client import LocalTraining, make_optimizer, train_locally
from fedllm_sec.rounds.compute import Machine
from tests.toy import Quadratic

TARGET = torch.tensor([[4.0, -2.0]])


def train(training: LocalTraining, *, start=(0.0, 0.0), shard=TARGET, rules=(), round=1, seed=0, id="c0"):
    task = Quadratic(2)
    return train_locally(
        task,
        Client(id, shard),
        torch.tensor(start),
        optimizer=make_optimizer(task, training),
        stepper=Machine(Accelerator(cpu=True)),
        training=training,
        rules=rules,
        round=round,
        rounds=10,
        seed=seed,
    )


def test_one_step_of_gradient_descent_moves_by_lr_times_the_gradient():
    result = train(LocalTraining(batch_size=1, steps=1, optimizer="sgd", lr=0.25, max_grad_norm=None))
    assert result.delta.tolist() == [1.0, -0.5]
    assert (result.count, result.steps) == (1.0, 1)
    assert result.loss == pytest.approx(10.0)


def test_the_gradient_is_clipped_to_its_joint_norm():
    result = train(LocalTraining(batch_size=1, steps=1, optimizer="sgd", lr=1.0, max_grad_norm=1.0))
    assert result.delta.norm().item() == pytest.approx(1.0, rel=1e-5)


def test_the_betas_are_those_of_adamw():
    training = LocalTraining(batch_size=1, steps=3, optimizer="adamw", lr=0.1, betas=(0.5, 0.9), max_grad_norm=None)
    w = torch.nn.Parameter(torch.zeros(2))
    plain = torch.optim.AdamW([w], lr=0.1, betas=(0.5, 0.9), weight_decay=0.0)
    for _ in range(3):
        plain.zero_grad()
        (0.5 * (w - TARGET[0]).square().sum()).backward()
        plain.step()
    torch.testing.assert_close(train(training).delta, w.detach())


@pytest.mark.parametrize(("size", "apart", "joined"), [(1, 3, 3), (15, 3, 3), (16, 3, 3), (17, 6, 3), (33, 9, 6)])
def test_an_epoch_whose_last_row_joins_the_batch_before_it_has_a_step_less(size, apart, joined):
    assert LocalTraining(batch_size=16, epochs=3).steps_of(size) == apart
    assert LocalTraining(batch_size=16, epochs=3, joins=True).steps_of(size) == joined


def test_epochs_count_whole_passes_with_the_last_short_batch():
    shard = torch.zeros(7, 2)
    assert train(LocalTraining(batch_size=3, epochs=2, optimizer="sgd"), shard=shard).steps == 6


def test_fedprox_pulls_towards_the_received_vector():
    training = LocalTraining(batch_size=1, steps=2, optimizer="sgd", lr=0.5, max_grad_norm=None)
    # by hand, mu = 1: w1 = 2; w2 = 2 - 0.5 ((2 - 4) + (2 - 0)) = 2 for the first coordinate
    assert train(training, rules=(FedProx(mu=1.0),)).delta.tolist() == [2.0, -1.0]
    assert torch.equal(train(training, rules=(FedProx(mu=0.0),)).delta, train(training).delta)


class Looks:
    """Asks for the gradient of rows in every step."""

    def before_step(self, parameters, step, ctx):
        self.found = ctx.gradient(TARGET, 3)

    def after_step(self, parameters, step, ctx):
        """Nothing."""


def test_a_rule_can_ask_for_the_gradient_of_rows_which_changes_nothing_else():
    training, looks = LocalTraining(batch_size=1, steps=2, optimizer="sgd", lr=0.5, max_grad_norm=None), Looks()
    assert torch.equal(train(training, rules=(looks,)).delta, train(training).delta)
    assert looks.found.tolist() == [-6.0, 3.0]  # three batches at w = (2, -1): 3 (2 - 4), 3 (-1 + 2)


def test_the_optimizer_starts_afresh_for_each_client():
    training = LocalTraining(batch_size=1, steps=3, optimizer="adamw", lr=0.1)
    task = Quadratic(2)
    optimizer = make_optimizer(task, training)

    def go(shard):
        return train_locally(
            task, Client("c", shard), torch.zeros(2), optimizer=optimizer,
            stepper=Machine(Accelerator(cpu=True)), training=training, round=1, rounds=1, seed=0,
        ).delta  # fmt: skip

    first = go(TARGET)
    go(-TARGET * 100)
    assert torch.equal(go(TARGET), first)


def test_batches_depend_on_seed_round_and_client_alone():
    training = LocalTraining(batch_size=1, steps=2, optimizer="sgd", lr=0.5)
    shard = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    base = train(training, shard=shard).delta
    assert torch.equal(base, train(training, shard=shard).delta)
    for change in ({"seed": 1}, {"round": 2}, {"id": "c1"}):
        assert not torch.equal(base, train(training, shard=shard, **change).delta)


def test_the_loss_counts_each_row_once_however_the_batches_fall():
    """101 rows, 100 of which lose 0 and one 5; batches of 100 and 1: the mean over the rows is 5 / 101."""
    shard = torch.zeros(101, 2)
    shard[100] = torch.tensor([3.0, 1.0])
    training = LocalTraining(batch_size=100, epochs=1, optimizer="sgd", lr=1e-12)
    assert train(training, shard=shard).loss == pytest.approx(5 / 101)


def test_the_received_vector_is_not_changed():
    start = torch.tensor([1.0, 1.0])
    task = Quadratic(2)
    training = LocalTraining(batch_size=1, steps=2)
    train_locally(
        task, Client("c", TARGET), start, optimizer=make_optimizer(task, training),
        stepper=Machine(Accelerator(cpu=True)), training=training, round=1, rounds=1, seed=0,
    )  # fmt: skip
    assert start.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(("schedule", "last"), [("constant", 1.0), ("linear", 0.1), ("cosine", 0.1)])
def test_the_learning_rate_goes_from_full_to_a_tenth(schedule, last):
    training = LocalTraining(batch_size=1, steps=1, lr=2.0, lr_schedule=schedule)
    assert training.lr_at(1, 20) == pytest.approx(2.0)
    assert training.lr_at(20, 20) == pytest.approx(2.0 * last)
    assert training.lr_at(1, 1) == pytest.approx(2.0)


@pytest.mark.parametrize(("falls", "moved"), [("constant", 6.0), ("linear", 3.3), ("cosine", 3.3)])
def test_the_learning_rate_of_a_round_falls_over_its_steps(falls: str, moved: float):
    training = LocalTraining(batch_size=1, steps=3, lr=2.0, lr_in_round=falls)
    assert [training.lr_at(5, 9, step, 3) for step in range(3)] == pytest.approx(
        {"constant": [2.0, 2.0, 2.0], "linear": [2.0, 1.1, 0.2], "cosine": [2.0, 1.1, 0.2]}[falls]
    )
    assert sum(training.lr_at(5, 9, step, 3) for step in range(3)) == pytest.approx(moved)
    assert training.lr_at(5, 9) == 2.0


def test_a_rate_that_falls_takes_the_steps_that_it_says():
    training = LocalTraining(batch_size=1, steps=3, optimizer="sgd", lr=0.5, lr_in_round="linear", max_grad_norm=None)
    left = (1 - 0.5) * (1 - 0.275) * (1 - 0.05)  # of the way to the target after three steps
    assert train(training).delta.tolist() == pytest.approx([(1 - left) * 4.0, (1 - left) * -2.0], rel=1e-6)
