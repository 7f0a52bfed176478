"""A deployment without processes: real devices behind a Grid of functions, beside the simulation of the same recipe."""

from __future__ import annotations

import copy
import threading
from pathlib import Path

import pytest
import torch

pytest.importorskip("flwr", reason="needs flwr, the extra `edge`")

from flwr.app import ConfigRecord, RecordDict

from fedllm_sec.build.federation import assemble, build, run
from fedllm_sec.build.loaded import Loaded
from fedllm_sec.build.names import checked
from fedllm_sec.build.plan import planned
from fedllm_sec.build.running import make_machine
from fedllm_sec.deploy.device import Device
from fedllm_sec.deploy.devices import Devices
from fedllm_sec.deploy.problems import deploy_problems
from fedllm_sec.deploy.records import read_ask, reply_records
from fedllm_sec.deploy.server import AtServer
from fedllm_sec.records.history import record_line
from tests.deploy.nodes import Nodes

DIGITS = {
    "seed": 3, "rounds": 3, "task": "classify", "model": {"name": "logistic"},
    "data": {"name": "digits", "train_rows": 120, "test_rows": 40},
    "clients": {
        "total": 3, "local_steps": 2, "batch_size": 8, "optimizer": "sgd", "lr": 0.1, "max_grad_norm": None,
        "partition": {"name": "dirichlet", "alpha": 1.0},
    },
    "evaluate": {"every": 3}, "compute": {"threads": 1}, "deploy": {"timeout_s": 20.0},
}  # fmt: skip
NET = {"model": {"name": "resnet", "depth": 8, "norm": "batch"}, "rounds": 2, "evaluate": {"every": 2}}
TEXT = {
    "task": "causal_lm", "rounds": 2,
    "model": {"name": "tiny", "lora": {"r": 2, "alpha": 4}},
    "data": {"name": "builtin:topic", "columns": {"text": "text", "response": "response", "label": "label"},
             "template": "{text}\nTopic:", "max_length": 48, "train_rows": 30, "test_rows": 8},
    "evaluate": {"every": 2, "rows": 4, "max_new_tokens": 2},
}  # fmt: skip
ONE = threading.Lock()  # devices have a process each, and torch's random numbers are a process's
MALICIOUS = {"malicious": {"ids": [1]}, "collude": False}
PATCH = [{"name": "pixel_trigger", "target": 0, "rate": 0.5}]


def raw(**changes):
    made = copy.deepcopy(DIGITS)
    for key, value in changes.items():
        deep = isinstance(value, dict) and isinstance(made.get(key), dict) and key not in ("model", "data")
        made[key] = {**made[key], **value} if deep else value
    return made


def answers(device: Device, times: int = 1):
    """A node whose device trains each question so often, and sends what the last time gave."""

    def answer(message):
        if message.metadata.message_type == "query":
            return RecordDict({"hello": ConfigRecord(device.introduction())})
        for _ in range(times):
            vectors, of = read_ask(message.content, device.federation.task.layout.size)
            with ONE:
                result = device.train(vectors, of["round"], of["rounds"])
            before = device.lost_before(of["round"])
            made, after = reply_records(result, of, before)
            device.lost = (of["round"], before, after)
        return made

    return answer


def deployed(recipe, folder: Path, monkeypatch, times: int = 1) -> list[str]:
    """The history over devices; those that the recipe calls malicious attack."""
    monkeypatch.setattr("fedllm_sec.deploy.devices.limited", lambda *sizes: "no limit in a test")
    plan = planned(recipe)
    bad = plan.attackers()
    nodes = {i + 1: answers(Device(recipe, id, attack=id in bad), times) for i, id in enumerate(plan.ids)}
    made = assemble(AtServer(**vars(plan)), make_machine(recipe, folder), Loaded())
    made.source = Devices(Nodes(nodes, dict(zip(nodes, plan.ids, strict=True))), recipe, lambda line: None)
    return [record_line(record) for record in run(made, recipe.rounds)]


def simulated(recipe, folder: Path) -> list[str]:
    return [record_line(record) for record in run(build(recipe, make_machine(recipe, folder)), recipe.rounds)]


SAME = {
    "server momentum": {"algorithm": {"name": "fedavg", "server_momentum": 0.9}},
    "fednova": {"algorithm": {"name": "fednova"}, "clients": {"local_steps": None, "local_epochs": 1}},
    "scaffold, two of three a round": {"algorithm": {"name": "scaffold"}, "clients": {"per_round": 2}},
    "feddyn and a falling rate": {"algorithm": {"name": "feddyn"}, "clients": {"lr_schedule": "cosine"}},
    "each client's own statistics": {**NET, "model": {**NET["model"], "buffers": "local"}},
    "averaged statistics": {**NET, "model": {**NET["model"], "buffers": "average"}},
    "a guard": {"enable_defense": True, "defense": {"client": [{"name": "wbc"}], "rule": {"name": "median"}}},
    "a root update": {"enable_defense": True, "defense": {"rule": {"name": "fltrust"}, "root_rows": 10}},
    "a planted indicator": {
        **NET,
        "enable_defense": True,
        "defense": {"rule": {"name": "backdoor_indicator", "source": "noise", "rows": 20, "epochs": 20, "lr": 0.1}},
    },
    "a poisoner that is projected and scaled up": {
        "enable_attack": True,
        "attack": {**MALICIOUS, "start": 2, "data": PATCH, "local": [{"name": "pgd"}],
                   "update": [{"name": "model_replacement"}]},
        "enable_defense": True,
        "defense": {"rule": {"name": "multi_krum", "f": 0}},
    },
    "B and A in turn": {
        **TEXT,
        "clients": {"total": 2},
        "model": {"name": "tiny", "lora": {"r": 2, "alpha": 4, "average": "alternate"}},
    },
    "factors of the mean product, and a client of rank 1": {
        **TEXT,
        "clients": {"total": 2, "ranks": {1: 1, 2: 1}},
        "model": {"name": "tiny", "lora": {"r": 2, "alpha": 4, "average": "svd"}},
    },
}  # fmt: skip


@pytest.mark.parametrize("case", SAME)
def test_devices_have_the_simulation_s_history(case, tmp_path, monkeypatch):
    recipe = checked(raw(**SAME[case], output={"folder": str(tmp_path)}))
    assert deployed(recipe, tmp_path, monkeypatch) == simulated(recipe, tmp_path)


LAZY = {"enable_attack": True, "attack": {**MALICIOUS, "update": [{"name": "lazy"}]}}


@pytest.mark.parametrize(
    "changes",
    [SAME["a poisoner that is projected and scaled up"], LAZY, {"deploy": {"wire": "int8", "timeout_s": 20.0}}],
    ids=["pgd", "lazy", "int8"],
)
def test_a_round_that_is_asked_twice_is_trained_the_same_twice(changes, tmp_path, monkeypatch):
    recipe = checked(raw(**changes, output={"folder": str(tmp_path)}))
    once, twice = (deployed(recipe, tmp_path, monkeypatch, times) for times in (1, 2))
    assert once == twice


@pytest.mark.parametrize("buffers", ["local", "average"])
def test_rounds_without_any_row_are_skipped_whatever_clients_remember(buffers, tmp_path, monkeypatch):
    monkeypatch.setattr("fedllm_sec.deploy.devices.limited", lambda *sizes: "no limit in a test")
    monkeypatch.setattr("fedllm_sec.deploy.devices.FIRST", 0.0)
    changes = {
        **NET, "model": {**NET["model"], "buffers": buffers}, "algorithm": {"name": "feddyn"}, "evaluate": {"every": 9},
        "enable_defense": True, "defense": {"rule": {"name": "fltrust"}, "root_rows": 10},
        "deploy": {"timeout_s": 0.1},
    }  # fmt: skip
    recipe = checked(raw(**changes, output={"folder": str(tmp_path)}))
    made = assemble(AtServer(**vars(planned(recipe))), make_machine(recipe, tmp_path), Loaded())
    made.evaluation, start = None, made.vector.clone()
    made.source = Devices(Nodes({}), recipe, lambda line: None, begun=True)  # all have gone after an earlier round
    records = list(run(made, 2))
    assert [r.skipped for r in records] == ["0 of 3 clients sent a usable reply; deploy.min_replies: 1"] * 2
    assert torch.equal(made.vector, start)


def test_the_tracker_of_a_recipe_is_the_server_s(tmp_path):
    recipe = checked(raw(output={"folder": str(tmp_path), "tracker": "mlflow"}))  # not installed here
    assert Device(recipe, "c00").introduction()["client"] == "c00"


@pytest.mark.parametrize("way", ["exact", "stack"])
def test_adapters_whose_base_gains_cannot_be_deployed_and_the_ways_that_can_are_named(way):
    lora = {"r": 2, "alpha": 4, "average": way}
    (problem,) = deploy_problems(checked(raw(**{**TEXT, "model": {"name": "tiny", "lora": lora}})))
    assert problem.startswith(f"model.lora.average: {way}: what the base gains at the server does not travel")
    (problem,) = deploy_problems(
        checked(raw(**{**TEXT, "model": {"name": "tiny", "lora": {**lora, "average": "core"}}}))
    )
    assert "other machines find with other rounding" in problem
    (kept,) = deploy_problems(
        checked(raw(**{**TEXT, "model": {"name": "tiny", "lora": {**lora, "average": "share_a"}}}))
    )
    assert kept.startswith("model.lora.average: share_a: devices send whole rows, B too")
    for other in ("factors", "freeze_a", "alternate", "svd", "pad"):
        assert other in problem
        fine = checked(raw(**{**TEXT, "model": {"name": "tiny", "lora": {**lora, "average": other}}}))
        assert deploy_problems(fine) == []


def test_dp_sgd_cannot_be_deployed_and_other_guards_can():
    private = {"enable_defense": True, "defense": {"client": [{"name": "dp_sgd", "noise": 1.0, "clip": 1.0}]}}
    (problem,) = deploy_problems(checked(raw(**private)))
    assert problem.startswith("defense.client: dp_sgd: the server counts epsilon by the rows of each client")
    assert "fedllm-sec train" in problem
    assert deploy_problems(checked(raw(**{**private, "enable_defense": False}))) == []
    assert deploy_problems(checked(raw(enable_defense=True, defense={"client": [{"name": "wbc"}]}))) == []


def test_a_device_reads_the_columns_of_its_format_as_the_recipe_s_author_did(tmp_path):
    from fedllm_sec.deploy.folder import Deployment

    rows = [f'{{"instruction": "Say {n}.", "input": "", "output": "{n}"}}\n' for n in range(30)]
    (tmp_path / "train.jsonl").write_text("".join(rows[:20]))
    (tmp_path / "test.jsonl").write_text("".join(rows[20:]))
    data = {"name": str(tmp_path), "train": "train.jsonl", "test": "test.jsonl", "format": "alpaca"}
    given = {**raw(**TEXT), "data": {**data, "template": "{text}\n", "max_length": 32}}
    made = Deployment.init(tmp_path / "d", checked(given), "up")
    assert Device(made.recipe(), "c00").federation.clients[0].id == "c00"
