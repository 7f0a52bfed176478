"""Four clients of a task that can be checked by hand, behind a Grid of functions."""

from __future__ import annotations

import time

import pytest
import torch
from accelerate import Accelerator
from flwr.app import ConfigRecord, RecordDict

from fedllm_sec.algorithms import MENU as ALGORITHMS
from fedllm_sec.build.names import checked
from fedllm_sec.defenses.columns import median
from fedllm_sec.defenses.pipeline import Pipeline
from fedllm_sec.deploy.devices import Devices
from fedllm_sec.deploy.records import read_ask, reply_records
from fedllm_sec.protocols import Client, LocalTraining
from fedllm_sec.rounds.client import make_optimizer
from fedllm_sec.rounds.compute import Machine
from fedllm_sec.rounds.federation import Federation, run, train_client
from tests.deploy.nodes import Nodes
from tests.toy import Quadratic

D, IDS = 4, ("c00", "c01", "c02", "c03")


def recipe(**deploy):
    return checked(
        {
            "task": "classify", "rounds": 2, "model": {"name": "logistic"}, "data": {"name": "digits"},
            "clients": {"total": 4, "local_steps": 2, "batch_size": 2, "optimizer": "sgd", "lr": 0.1},
            "deploy": {"timeout_s": 5.0, **deploy},
        }
    )  # fmt: skip


def federation(evaluation=None) -> Federation:
    torch.set_num_threads(1)
    return Federation(
        task=Quadratic(D),
        clients=[Client(id, torch.full((4, D), float(i + 1))) for i, id in enumerate(IDS)],
        training=LocalTraining(batch_size=2, steps=2, optimizer="sgd", lr=0.1, max_grad_norm=None),
        machine=Machine(Accelerator(cpu=True)),
        algorithm=ALGORITHMS["fedavg"].make(),
        defense=Pipeline([], median),
        threat=None,
        evaluation=evaluation,
        vector=torch.zeros(D),
    )


def honest(id: str, said, change=lambda content: content):
    """A node that trains client `id` as a device does; `change` makes something else of its reply's content."""
    own = federation()
    optimizer = make_optimizer(own.task, own.training)
    client = next(c for c in own.clients if c.id == id)

    def answer(message):
        if message.metadata.message_type == "query":
            return RecordDict(
                {"hello": ConfigRecord({**message.content.config_records["hello"], "client": said or id})}
            )
        vectors, of = read_ask(message.content, D)
        own.last_update = vectors.get("last_update")
        result = train_client(own, client, vectors["start"], optimizer, (), None, of["round"], of["rounds"])
        return change(reply_records(result, of, None)[0])

    return answer


def raising(error):
    def change(content):
        raise error

    return change


def over(nodes, names=None, **deploy):
    """Two rounds over nodes, what the server said, and the seconds it took."""
    made, said = federation(), []
    grid = Nodes(nodes, names)
    monkey = pytest.MonkeyPatch()
    monkey.setattr("fedllm_sec.deploy.devices.limited", lambda *sizes: "no limit in a test")
    monkey.setattr("fedllm_sec.deploy.devices.FIRST", 0.0)
    made.source = Devices(grid, recipe(**deploy), said.append)
    began = time.monotonic()
    try:
        records = list(run(made, 2))
    finally:
        monkey.undo()
    return records, said, time.monotonic() - began


def all_honest(**others):
    return {i + 1: others.get(id) or honest(id, None) for i, id in enumerate(IDS)}


def unlimited(devices, *given):
    devices.begun = True  # no memory limit on the tests' own process
    return devices(*given)
