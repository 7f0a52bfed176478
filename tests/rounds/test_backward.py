"""`Machine.backward`: however a batch is cut, into micro-batches or over ranks, the gradient is the whole batch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import GradientState
from datasets import Dataset
from torch import nn

from fedllm_sec.algorithms.gkt import KnowledgeTransfer
from fedllm_sec.build.names import checked
from fedllm_sec.build.text import load_task
from fedllm_sec.data.characters import cut
from fedllm_sec.models.darts import darts
from fedllm_sec.models.gan import mlp_gan
from fedllm_sec.models.lenet import lenet
from fedllm_sec.models.rnn import lstm
from fedllm_sec.protocols import Labelled
from fedllm_sec.rounds.compute import Machine
from fedllm_sec.rounds.distillation import Lesson, Pupil
from fedllm_sec.tasks.classify import Classify
from fedllm_sec.tasks.gan import Gan
from fedllm_sec.tasks.nas import Nas
from fedllm_sec.tasks.next_char import NextChar
from tests.conftest import SMALL

CPU = torch.device("cpu")
ROWS = [0, 2, 4, 6, 1, 8, 3]  # five even and two odd: a search's two means are over unequal halves


def images(n: int = 9) -> Labelled:
    x = torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return Labelled(x, torch.arange(n) % 3, 3, torch.zeros(n, dtype=torch.bool))


def language_model() -> tuple[Any, Any]:
    task = load_task(checked(SMALL), Machine(Accelerator(cpu=True)))
    texts = ["Ann baked bread.", "He saved it.", "The keeper saved the last penalty of the long game.", "Rain."]
    rows = [{"text": t, "context": "", "response": "Sports" * (1 + i % 3)} for i, t in enumerate(texts * 3)]
    blank = [{**row, "label": "", "poisoned": False} for row in rows]
    return task, task.encode(Dataset.from_list(blank), "here")


def pupil() -> tuple[Any, Any]:
    method = KnowledgeTransfer(temperature=2.0, alpha=1.0, server_epochs=1, server_lr=None, channels=4)
    taught = torch.randn(9, 3, generator=torch.Generator().manual_seed(1))
    return Pupil(lenet((1, 8, 8), 3), method, CPU), Lesson(images().x, images().y, taught)


TASKS = {
    "classify": lambda: (Classify(lenet((1, 8, 8), 3), CPU, flip=True, crop=2), images()),
    "next_char": lambda: (NextChar(lstm((3,), 3, hidden=4), CPU), cut("abcabbcabca" * 4, 3, 0.3, False, "x").train),
    "gan": lambda: (Gan(mlp_gan((1, 8, 8), 3, noise=4, hidden=8), CPU), images()),
    "nas": lambda: (Nas(darts((1, 8, 8), 3, width=4), CPU, flip=True, crop=1), images()),
    "fedgkt": pupil,
    "causal_lm": language_model,
}


def gradient(task: Any, shard: Any, micro: int, ranks: int = 1, monkeypatch: Any = None) -> tuple[torch.Tensor, float]:
    """Gradient (d,) and loss of ROWS in `micro` micro-batches on each of so many ranks, played one after the other."""
    task.model.train()
    total, loss = torch.zeros_like(task.parameters), 0.0
    for rank in range(ranks):
        GradientState._reset_state()
        machine = Machine(Accelerator(cpu=True, gradient_accumulation_steps=micro), "data")
        assert machine.accelerator.gradient_accumulation_steps == micro
        machine.rank, machine.world = rank, ranks
        if monkeypatch is not None:
            monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
        torch.manual_seed(5)  # train_locally seeds all ranks alike
        task.parameters.grad.zero_()
        loss += float(machine.backward(task, shard, torch.tensor(ROWS) if isinstance(shard, Labelled) else ROWS))
        total += task.parameters.grad
    GradientState._reset_state()
    return total, loss


@pytest.mark.parametrize("name", TASKS)
def test_micro_batches_add_up_to_the_whole_batch(name):
    task, shard = TASKS[name]()
    torch.manual_seed(5)
    task.parameters.grad.zero_()
    task.model.train()
    plain = task.loss(shard, ROWS)
    plain.backward()
    expected = task.parameters.grad.clone()
    assert expected.norm() > 0
    for micro in (1, 2, 3, 7):
        found, loss = gradient(task, shard, micro)
        assert (found - expected).norm() <= 1e-5 * expected.norm(), micro
        assert loss == pytest.approx(plain.item(), rel=1e-5)


@pytest.mark.parametrize("name", TASKS)
def test_the_parts_of_all_ranks_add_up_to_the_whole_batch(name, monkeypatch):
    task, shard = TASKS[name]()
    expected, whole = gradient(task, shard, 1)
    for ranks, micro in ((2, 1), (3, 2), (9, 1)):  # nine ranks: two of them have no row
        found, loss = gradient(task, shard, micro, ranks, monkeypatch)
        assert (found - expected).norm() <= 1e-5 * expected.norm(), (ranks, micro)
        assert loss == pytest.approx(whole, rel=1e-5)


def test_ranks_draw_their_own_dropout_and_stay_in_step(monkeypatch):
    """Six equal images: with equal masks the two ranks' parts would have equal gradients."""
    x = torch.ones(6, 1, 8, 8)
    shard = Labelled(x, torch.zeros(6, dtype=torch.long), 3, torch.zeros(6, dtype=torch.bool))
    task = Classify(nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 3)), CPU)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    seen, after = [], []
    for rank in range(2):
        machine = Machine(Accelerator(cpu=True), "data")
        machine.rank, machine.world = rank, 2
        torch.manual_seed(5)
        for _ in range(2):
            task.parameters.grad.zero_()
            machine.backward(task, shard, torch.arange(6))
            seen.append(task.parameters.grad.clone())
        after.append(torch.get_rng_state())
    assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])
    assert torch.equal(*after)
