"""Running statistics travel beside the vector: averaged by the rule's weights, kept by each client, or not at all."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from fedllm_sec import defenses
from fedllm_sec.build.federation import build
from fedllm_sec.build.names import checked
from fedllm_sec.defenses.buffers import combined, refused
from fedllm_sec.errors import DataError
from fedllm_sec.matrix import Layout
from fedllm_sec.protocols import Labelled
from fedllm_sec.rounds.compute import Machine
from fedllm_sec.rounds.federation import Federation, run
from fedllm_sec.tasks.buffers import Buffers, beside
from fedllm_sec.tasks.classify import Classify
from tests.defenses.defense_rows import ON_ADAPTERS

RECIPE: dict[str, Any] = {
    "task": "classify", "rounds": 2, "model": {"name": "tests.rounds.test_buffers:net"},
    "data": {"name": "digits", "train_rows": 160, "test_rows": 40},
    "clients": {"total": 4, "local_steps": 2, "batch_size": 8, "lr": 1e-2},
    "evaluate": {"every": 2}, "compute": {"threads": 1},
}  # fmt: skip


def net(shape: tuple[int, ...], classes: int) -> torch.nn.Module:
    """A stranger's network."""
    return torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(shape[0] * shape[1] * shape[2], 6), torch.nn.BatchNorm1d(6),
        torch.nn.ReLU(), torch.nn.Linear(6, classes),
    )  # fmt: skip


def federation(**changes: Any) -> Federation:
    made = build(checked(RECIPE | changes), Machine(Accelerator(cpu=True)))
    assert isinstance(made, Federation)
    return made


def statistics(values: list[list[float]], counters: list[int]) -> torch.Tensor:
    """Rows of mean, variance and counter."""
    return torch.tensor([[*row, k] for row, k in zip(values, counters, strict=True)], dtype=torch.float64)


ONE = Layout(("bn.running_mean", "bn.running_var"), ((1,), (1,)))


# ---------------------------------------------------------------- one vector beside the vector


def test_buffers_are_views_of_one_vector_and_counters_of_another():
    model = net((1, 8, 8), 10)
    found = Buffers(model)
    assert found.layout.names == ("2.running_mean", "2.running_var")
    assert found.counted.names == ("2.num_batches_tracked",)
    assert found.read().tolist() == [0.0] * 6 + [1.0] * 6 + [0.0]
    model(torch.rand(5, 1, 8, 8))
    assert found.read()[-1] == 1
    assert torch.equal(found.read()[:6].float(), model[2].running_mean)
    found.write(torch.arange(13).double())
    assert model[2].running_var.tolist() == [6, 7, 8, 9, 10, 11]
    assert int(model[2].num_batches_tracked) == 12
    assert {name: tuple(t.shape) for name, t in found.tensors().items()} == {
        "2.running_mean": (6,), "2.running_var": (6,), "2.num_batches_tracked": (),
    }  # fmt: skip


def test_a_buffer_that_two_modules_share_is_one_and_one_that_is_no_part_of_the_state_is_none():
    a, b = torch.nn.Module(), torch.nn.Module()
    a.register_buffer("table", torch.ones(2))
    b.table = a.table
    b._buffers["table"] = b.__dict__.pop("table", a.table)
    a.register_buffer("scratch", torch.ones(9), persistent=False)
    model = torch.nn.ModuleList([a, b])
    found = Buffers(model)
    assert len(found.read()) == 2
    found.write(torch.tensor([3.0, 4.0]))
    assert a.table.tolist() == b.table.tolist() == [3.0, 4.0]


def test_by_default_statistics_are_averaged_and_batch_keeps_none():
    assert beside(net((1, 8, 8), 10), None)[1] == "average"
    model = net((1, 8, 8), 10)
    assert beside(model, "batch") == (None, "batch")
    assert list(model.buffers()) == []
    assert beside(torch.nn.Linear(2, 2), None) == (None, None)
    with pytest.raises(DataError, match=r"model\.buffers: local: the model has no layer that keeps running statistics"):
        beside(torch.nn.Linear(2, 2), "local")


# ---------------------------------------------------------------- combined, and refused


def test_floats_are_the_mean_by_the_rules_weights_and_counters_the_middle_one_of_who_has_one():
    rows = statistics([[1.0, 2.0], [3.0, 6.0], [100.0, 100.0]], [5, 9, 50])
    assert combined(rows, 2, torch.tensor([0.25, 0.75, 0.0])).tolist() == [2.5, 5.0, 9.0]
    assert combined(rows, 2, torch.tensor([1.0, 3.0, 0.0])).tolist() == [2.5, 5.0, 9.0]  # weights need not sum to 1
    for weights in (None, torch.tensor([1.0, 1.0, -1.0]), torch.zeros(3)):
        assert combined(rows, 2, weights).tolist() == [3.0, 6.0, 9.0]  # 50 is what one of three says
    assert combined(rows[:2], 2, None).tolist() == [2.0, 4.0, 9.0]


@pytest.mark.parametrize(
    ("row", "counter", "why"),
    [
        ([float("nan"), 1.0], 3, "not all are finite"),
        ([0.0, float("inf")], 3, "not all are finite"),
        ([0.0, -1e-3], 3, r"bn\.running_var is negative"),
        ([0.0, 101.0], 3, r"bn\.running_var is more than 100 times the usual"),
        ([11.0, 1.0], 3, r"bn\.running_mean lies more than 10 deviations"),
        ([0.0, 1.0], -1, "a counter is negative"),
        ([0.0, 1.0], 2e9, r"a counter gains over 1e\+09"),
    ],
)
def test_buffers_of_an_attacker_are_refused_with_the_reason(row, counter, why):
    rows = statistics([[0.0, 1.0], [0.1, 1.1], row, [-0.1, 0.9], [0.0, 1.0]], [3, 3, counter, 3, 3])
    found = refused(rows, torch.zeros(3), ONE, ["a", "b", "evil", "d", "e"])
    assert list(found) == ["evil"]
    assert pytest.raises(AssertionError, match=why).matches(AssertionError(found["evil"])), found


def test_what_honest_clients_differ_by_is_not_refused():
    rng = torch.Generator().manual_seed(0)
    rows = torch.rand(20, 3, generator=rng, dtype=torch.float64)
    rows[:, 2] = 7
    assert refused(rows, torch.zeros(3), ONE, [str(i) for i in range(20)]) == {}
    dead = statistics([[0.0, 0.0]] * 4, [1] * 4)  # a unit that never fires
    assert refused(dead, torch.zeros(3), ONE, list("abcd")) == {}


# ---------------------------------------------------------------- a run


def trained_apart(made: Federation, client: int, start: torch.Tensor) -> torch.Tensor:
    """The buffers that one client's training in the first round gives, on a model of its own."""
    from fedllm_sec.rounds.client import make_optimizer, train_locally

    other = federation(model=RECIPE["model"])
    result = train_locally(
        other.task, other.clients[client], made.task.initial, optimizer=make_optimizer(other.task, other.training),
        stepper=other.machine, training=other.training, round=1, rounds=2, seed=0, buffers=start,
    )  # fmt: skip
    assert result.buffers is not None
    return result.buffers


def test_the_model_never_carries_one_clients_statistics_to_the_next():
    made = federation()
    start = made.buffers
    assert start is not None
    apart = torch.stack([trained_apart(made, i, start) for i in range(4)])
    next(run(made, 2))
    assert torch.allclose(made.buffers, torch.cat([apart[:, :-1].mean(0), apart[:, -1:].amax(0)]), atol=1e-9)
    assert made.buffers[-1] == 2  # batches of one client, not of four


RULES = [name for name, entry in defenses.MENU.items() if entry.kind == "rule" and name not in ON_ADAPTERS]


@pytest.mark.parametrize("name", RULES)
def test_buffers_are_combined_by_the_weights_of_every_rule(name: str, monkeypatch):
    from fedllm_sec.rounds import deciding

    seen: dict[str, Any] = {}

    def noted(buffers: torch.Tensor, floats: int, weights: torch.Tensor | None) -> torch.Tensor:
        seen.update(buffers=buffers.clone(), weights=weights, floats=floats)
        return combined(buffers, floats, weights)

    monkeypatch.setattr(deciding, "combined", noted)
    settings: dict[str, Any] = {
        "robust_learning_rate": {"theta": 2}, "monna": {"trusted": "c00"},
        "backdoor_indicator": {"source": "noise", "rows": 20, "epochs": 30, "lr": 0.1, "threshold": 1.0},
    }.get(name, {})  # fmt: skip
    if "f" in inspect.signature(defenses.MENU[name].make).parameters:
        settings = settings | {"f": 1}
    made = federation(
        rounds=9, clients=RECIPE["clients"] | {"total": 8}, enable_defense=True,
        defense={"rule": {"name": name, **settings}} | ({"root_rows": 16} if name in ("fltrust", "flare") else {}),
    )  # fmt: skip
    record = next(run(made, 9))
    if record.skipped:
        assert not seen
        return
    weights, buffers = seen["weights"], seen["buffers"]
    if weights is None or bool((weights < 0).any()) or not float(weights.sum()) > 0:
        wanted = buffers[:, :-1].quantile(0.5, dim=0)
    else:
        wanted = (weights.double() / weights.double().sum()) @ buffers[:, :-1]
    assert torch.allclose(made.buffers[:-1], wanted, atol=1e-12), name


def test_each_client_keeps_its_own_where_that_is_asked_for():
    made = federation(model=RECIPE["model"] | {"buffers": "local"})
    first = made.buffers.clone()
    rounds = run(made, 2)
    next(rounds)
    own = [client.memory["buffers"].clone() for client in made.clients]
    assert len({tuple(each.tolist()) for each in own}) == 4
    assert torch.allclose(made.buffers[:-1], torch.stack(own)[:, :-1].mean(0))
    assert all(int(each[-1]) == 2 for each in own)
    assert not torch.equal(made.buffers, first)
    next(rounds)
    assert all(int(client.memory["buffers"][-1]) == 4 for client in made.clients)  # went on from its own


def test_the_last_model_is_measured_with_each_clients_own_statistics_and_left_with_their_mean():
    attack = {"malicious": {"count": 1}, "data": [{"name": "pixel_trigger", "target": 0}]}
    made = federation(model=RECIPE["model"] | {"buffers": "local"}, enable_attack=True, attack=attack)
    early, last = run(made, 2)
    assert "per_client" not in (early.quality or {})
    accuracies, hits = [], []
    for client in made.clients:
        own = last.quality["per_client"][client.id]
        made.task.buffers.write(client.memory["buffers"])
        assert own["accuracy"] == made.evaluation.quality(made.task, made.machine.spread)["accuracy"]
        accuracies.append(own["accuracy"]["value"])
        hits.append(last.attack["per_client"][client.id]["asr"]["value"])
    assert len(accuracies) == 4
    assert last.quality["client_accuracy"] == pytest.approx(sum(accuracies) / 4)
    assert last.attack["client_asr"] == pytest.approx(sum(hits) / 4)
    again = federation(model=RECIPE["model"] | {"buffers": "local"}, enable_attack=True, attack=attack)
    list(run(again, 2))
    assert torch.equal(again.task.buffers.read(), again.buffers.float().double())
    assert "per_client" not in next(run(federation(), 1)).quality  # averaged ones are nobody's own


def test_the_state_has_the_buffers_and_a_run_goes_on_from_them(tmp_path: Path):
    whole = federation()
    list(run(whole, 2))
    made = federation()
    next(run(made, 2))
    state = made.state_dict()
    again = federation()
    again.load_state_dict(state)
    list(run(again, 2))
    assert torch.equal(again.buffers, whole.buffers)
    assert torch.equal(again.vector, whole.vector)
    from fedllm_sec.build.arrays import save_model

    save_model(whole.task, tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    fresh = net((1, 8, 8), 10)
    fresh.load_state_dict(found)  # every key, also the counter
    assert torch.allclose(fresh[2].running_mean, whole.buffers[:6].float())


def test_an_attackers_statistics_are_refused_and_said_and_undefended_they_ruin_the_model():
    attack = {"malicious": {"count": 1}, "update": [{"name": "bn_statistics", "mean": 0.0, "variance": -1.0}]}
    made = federation(enable_attack=True, attack=attack)
    record = next(run(made, 2))
    (evil,) = record.malicious
    assert list(record.buffers_refused) == [evil]
    assert "2.running_var is negative" in record.buffers_refused[evil]
    assert json.dumps(record.buffers_refused)
    assert float(made.buffers[6:12].min()) > 0
    attack["update"] = [{"name": "bn_statistics", "mean": 1.0, "variance": 90.0}]  # within the bound
    clean, spoilt = federation(rounds=1), federation(rounds=1, enable_attack=True, attack=attack)
    next(run(clean, 1))
    record = next(run(spoilt, 1))
    assert record.buffers_refused == {}
    assert torch.equal(spoilt.vector, clean.vector)  # the row is its own
    assert float((spoilt.buffers[6:12] / clean.buffers[6:12]).min()) > 10
    held = federation(
        rounds=1, enable_attack=True, attack=attack, enable_defense=True, defense={"rule": {"name": "median"}}
    )
    next(run(held, 1))
    assert float((held.buffers[6:12] / clean.buffers[6:12]).max()) < 3


def test_an_attack_on_statistics_that_a_model_does_not_keep_is_an_error():
    attack = {"malicious": {"count": 1}, "update": [{"name": "bn_statistics"}]}
    for model in ({"name": "logistic"}, RECIPE["model"] | {"buffers": "batch"}):
        with pytest.raises(Exception, match="bn_statistics: the model keeps no running statistics"):
            federation(model=model, enable_attack=True, attack=attack)


def test_a_last_batch_of_one_row_joins_the_one_before_it():
    task = Classify(net((1, 8, 8), 10), torch.device("cpu"))
    shard = Labelled(torch.rand(9, 1, 8, 8), torch.zeros(9, dtype=torch.long), 10, torch.zeros(9, dtype=torch.bool))
    sizes = [len(rows) for rows in task.batches(shard, 4, torch.Generator().manual_seed(0))]
    assert sizes == [4, 5]
    plain = Classify(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)), torch.device("cpu"))
    assert [len(rows) for rows in plain.batches(shard, 4, torch.Generator().manual_seed(0))] == [4, 4, 1]
