"""A federation of adapters whose base weights gain what an average of factors leaves out."""

import itertools

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model

from fedllm_sec import algorithms
from fedllm_sec.defenses.columns import mean
from fedllm_sec.defenses.pipeline import Pipeline
from fedllm_sec.matrix import Layout, UpdateMatrix
from fedllm_sec.matrix.factors import Products
from fedllm_sec.models.lora import scales
from fedllm_sec.models.shifted import Shifted
from fedllm_sec.protocols import Client, LocalTraining
from fedllm_sec.rounds.averaging import Averaging, without
from fedllm_sec.rounds.compute import Machine
from fedllm_sec.rounds.federation import Federation, run
from fedllm_sec.tasks.flat import flatten


class Fit:
    """One adapted linear layer that learns a client's (x, y) by least squares."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = get_peft_model(
            torch.nn.Sequential(torch.nn.Linear(6, 5)), LoraConfig(r=2, lora_alpha=4, target_modules=["0"])
        )
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        self.layout, self.parameters = Layout.of(trained), flatten([p for _, p in trained])
        self.initial, self.scales = self.parameters.detach().clone(), scales(self.model)

    def size(self, shard):
        return len(shard[0])

    def batches(self, shard, size, rng):
        yield list(range(len(shard[0])))

    def weight(self, shard, rows):
        return float(len(rows))

    def loss(self, shard, rows):
        return (self.model(shard[0][rows]) - shard[1][rows]).square().mean()

    def whole(self):
        """The layer's weight with all that was added to it: (5, 6)."""
        with torch.no_grad():
            return (self.model(torch.eye(6)) - self.model(torch.zeros(1, 6))).T.double()


def federation(mode, seen, ranks=None):
    task = Fit()
    products = Products.of(task.layout, task.initial, task.scales)
    shifted = Shifted(task.model, [products.pairs[0].name]) if mode in ("exact", "stack") else None

    def rule(updates, ctx):
        decision = mean(updates, ctx, weights="uniform")
        seen.append((ctx.global_vector, updates.rows.clone(), decision.weights))
        return decision

    torch.manual_seed(1)
    clients = [Client(str(i), (torch.randn(8, 6), torch.randn(8, 5))) for i in range(3)]
    training = LocalTraining(batch_size=8, steps=5, optimizer="sgd", lr=0.5, max_grad_norm=None)
    return Federation(
        task=task, clients=clients, training=training, machine=Machine(Accelerator(cpu=True)),
        algorithm=algorithms.fedavg(), defense=Pipeline([], rule), threat=None, evaluation=None,
        vector=task.initial.clone(),
        averaging=Averaging(mode, products.pairs, ((5, 6),), (), task.initial, shifted, ranks or {}),
    )  # fmt: skip


def product(fed, vector):
    (pair,) = fed.averaging.pairs
    return 2.0 * pair.tall(vector[None])[0] @ pair.wide(vector[None])[0]  # alpha / r = 2


@pytest.mark.parametrize("mode", ["exact", "stack"])
def test_after_each_round_the_layer_is_the_mean_of_the_clients_layers_and_a_resumed_run_is_the_same(mode):
    seen = []
    fed = federation(mode, seen)
    before = fed.task.whole()
    records, kept = [], None
    for record in run(fed, 3):
        with torch.no_grad():
            fed.task.parameters.copy_(fed.vector)
        start, rows, weights = seen[-1]
        change = sum(
            w * (product(fed, start + row) - product(fed, start)) for w, row in zip(weights, rows, strict=True)
        )
        assert (fed.task.whole() - before - change).norm() <= 2e-6 * before.norm()
        assert change.norm() > 0.05 * before.norm()
        before = fed.task.whole()
        records.append(record)
        if record.round == 1:
            kept = {**fed.state_dict(), "vector": fed.vector.clone()}
    assert [record.lora_gap for record in records] == [0.0, 0.0, 0.0]
    again = federation(mode, [])
    again.load_state_dict(kept)
    assert [record.round for record in run(again, 3)] == [2, 3]
    assert torch.equal(again.vector, fed.vector)
    (one,), (other,) = again.shifted.parts.values(), fed.shifted.parts.values()
    assert all(map(torch.equal, one, other))


def test_alternate_rounds_leave_one_factor_and_miss_nothing_and_svd_says_what_it_misses():
    seen = []
    fed = federation("alternate", seen)
    (pair,) = fed.averaging.pairs
    vectors = [fed.vector, *(fed.vector for _ in run(fed, 2))]
    assert [torch.equal(x[pair.a], y[pair.a]) for x, y in itertools.pairwise(vectors)] == [True, False]
    assert [torch.equal(x[pair.b], y[pair.b]) for x, y in itertools.pairwise(vectors)] == [False, True]
    gaps = [record.lora_gap for record in run(federation("svd", []), 2)]
    assert all(0 < gap < 1 for gap in gaps)


@pytest.mark.parametrize("mode", ["pad", "svd"])
def test_a_client_of_lower_rank_trains_its_rank_alone_and_its_row_says_what_it_has_not(mode):
    seen, ranks = [], {"0": 1}
    fed = federation(mode, seen, ranks)
    (pair,) = fed.averaging.pairs
    vectors = [fed.vector, *(fed.vector for _ in run(fed, 2))]
    for start, rows, _ in seen:
        own = start + rows
        a, b = own[:, pair.a].view(3, 2, 6), own[:, pair.b].view(3, 5, 2)
        assert not a[0, 1].any()
        assert not b[0, :, 1].any()
        assert b[0, :, 0].all()
        assert a[1:].all()
    if mode == "svd":  # the mean of the clients' own products, cut to rank 2
        start, rows, weights = seen[-1]
        mean = sum(w * product(fed, start.double() + row) for w, row in zip(weights, rows, strict=True))
        u, s, v = torch.linalg.svd(mean)
        torch.testing.assert_close(product(fed, vectors[-1]), (u[:, :2] * s[:2]) @ v[:2], rtol=1e-4, atol=1e-5)


class Heard:
    """Whoever measures: which model it was shown."""

    def __init__(self, fed):
        self.fed, self.layers = fed, []

    def quality(self, task, spread):
        self.layers.append(task.whole())
        return {"loss": 1.0, "accuracy": {"value": float(len(self.layers)), "low": 0.0, "high": 9.0, "n": 1}}

    def attack(self, task, spread):
        return None


def test_share_a_averages_a_alone_and_each_client_goes_on_with_its_own_b_also_after_a_restart():
    seen = []
    fed = federation("share_a", seen)
    fed.evaluation = heard = Heard(fed)
    (pair,) = fed.averaging.pairs
    base = fed.task.whole()
    begun, trained, kept, records = fed.vector, {}, None, []
    for record in run(fed, 2):
        start, rows, _ = seen[-1]
        assert not rows[:, pair.b].any()  # no B arrives, nor is shown to a rule
        torch.testing.assert_close(fed.vector[pair.a], start[pair.a] + rows[:, pair.a].mean(0))
        assert torch.equal(fed.vector[pair.b], begun[pair.b])
        last, trained = trained, {client.id: client.memory["own_b"].clone() for client in fed.clients}
        assert all(trained[id].any() and not torch.equal(trained[id], last.get(id)) for id in trained if last)
        records.append(record)
        if record.round == 1:
            kept = {
                **fed.state_dict(),
                "vector": fed.vector.clone(),
                "memory": {i: {"own_b": b} for i, b in trained.items()},
            }
    assert [record.lora_gap for record in records] == [None, None]
    assert list(records[-1].quality["per_client"]) == ["0", "1", "2"]
    assert records[-1].quality["client_accuracy"] == 4.0  # of the measures 3, 4 and 5, after one in each round
    a = fed.vector[pair.a].view(2, 6).double()
    own = [base + 2.0 * trained[id].view(5, 2).double() @ a for id in "012"]
    for found, wanted in zip(heard.layers[1:], [sum(own) / 3, *own], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    again = federation("share_a", [])
    again.load_state_dict(kept)
    assert [record.round for record in run(again, 2)] == [2]
    assert torch.equal(again.vector, fed.vector)
    assert all(torch.equal(client.memory["own_b"], trained[client.id]) for client in again.clients)


def test_a_b_that_is_not_finite_is_forgotten_and_the_servers_own_b_stays_with_the_server():
    fed = federation("share_a", [])
    (pair,) = fed.averaging.pairs
    row = torch.full((fed.vector.numel(),), 2.0)
    row[pair.b.start] = torch.nan
    client, server = fed.clients[0], Client("server", fed.clients[1].shard)
    fed.averaging.keep([(client, row)], fed.vector)
    assert client.memory == {}
    assert not row[pair.b].any()
    fed.root = server
    list(run(fed, 1))
    assert server.memory["own_b"].any()
    assert fed.averaging.start_of(server, fed.vector)[pair.b].any()


def test_a_factor_that_is_frozen_in_a_round_is_not_taken_from_a_row_that_holds_one():
    rows = UpdateMatrix.of(torch.arange(6.0).view(2, 3) + 1)
    assert without(rows, [slice(1, 3)]).rows.tolist() == [[1, 0, 0], [4, 0, 0]]
    assert rows.rows.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert without(rows, []) is rows
