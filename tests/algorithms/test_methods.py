"""Each FL method against its closed form or its paper's pseudo-code, on two clients that disagree."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fedllm_sec.algorithms import fedavg, feddyn, fednova, fedprox, fedsgd, scaffold
from fedllm_sec.algorithms.fitting import step_factors, way
from fedllm_sec.errors import RecipeError
from fedllm_sec.protocols import LocalTraining
from fedllm_sec.rounds.federation import run
from tests.algorithms.bowls import STEEP, bowl, federate, optimum, sgd


def end(federation, rounds: int) -> torch.Tensor:
    for _ in run(federation, rounds):
        pass
    return federation.vector


# ---------------------------------------------------------------- fedprox, fedsgd


def test_fedprox_with_mu_0_is_fedavg():
    assert torch.equal(end(federate(STEEP, fedprox(mu=0.0), sgd(5)), 3), end(federate(STEEP, fedavg(), sgd(5)), 3))


def test_fedprox_clients_stop_between_their_optimum_and_the_received_vector():
    fed = federate([bowl([1.0], [8.0]), bowl([3.0], [8.0])], fedprox(mu=1.0), sgd(400))
    # argmin a/2 (w - 8)^2 + 1/2 w^2 = 8 a / (a + 1): 4 and 6
    assert end(fed, 1).item() == pytest.approx(5.0, abs=1e-4)


def test_fedsgd_is_gradient_descent_on_the_union():
    shards = [torch.randn(rows, 2, 3, generator=torch.Generator().manual_seed(rows)).abs() for rows in (2, 5)]
    training = LocalTraining(batch_size=1, steps=1, optimizer="sgd", lr=0.3, max_grad_norm=None)
    federated = end(federate(shards, fedsgd(), training), 5)
    central = torch.zeros(3)
    a, t = torch.cat(shards).unbind(1)
    for _ in range(5):
        central = central - 0.3 * (a * (central - t)).mean(0)
    torch.testing.assert_close(federated, central)


# ---------------------------------------------------------------- fednova

UNEQUAL = [bowl([1.0], [0.0], rows=2), bowl([1.0], [1.0], rows=6)]  # 2 and 6 steps an epoch, weights 1/4 and 3/4


def one_row_steps(lr: float) -> LocalTraining:
    return LocalTraining(batch_size=1, epochs=1, optimizer="sgd", lr=lr, max_grad_norm=None)


def test_fednova_with_equal_steps_is_fedavg():
    assert torch.equal(end(federate(STEEP, fednova(), sgd(5)), 3), end(federate(STEEP, fedavg(), sgd(5)), 3))


def test_fednova_with_unequal_steps_removes_the_inconsistency_of_fedavg():
    lr = 0.02
    average = end(federate(UNEQUAL, fedavg(), one_row_steps(lr)), 200).item()
    nova = end(federate(UNEQUAL, fednova(), one_row_steps(lr)), 200).item()
    # a client moves by (1 - (1 - lr)^tau) of the way to its target; fixed points of the weighted means
    way = [1 - (1 - lr) ** 2, 1 - (1 - lr) ** 6]
    assert average == pytest.approx(0.75 * way[1] / (0.25 * way[0] + 0.75 * way[1]), abs=1e-4)  # about 0.9
    assert nova == pytest.approx(0.75 * way[1] / 6 / (0.25 * way[0] / 2 + 0.75 * way[1] / 6), abs=1e-4)
    assert abs(nova - 0.75) < abs(average - 0.75) / 15  # the optimum is 0.75; what is left vanishes with lr


def test_fednovas_round_is_the_papers():
    fed = federate(UNEQUAL, fednova(), one_row_steps(0.1))
    fed.vector = torch.tensor([3.0])
    moved = end(fed, 1).item()
    deltas, tau, p = [(1 - 0.9**2) * (0 - 3), (1 - 0.9**6) * (1 - 3)], [2, 6], [0.25, 0.75]
    effective = sum(w * k for w, k in zip(p, tau, strict=True))
    assert moved == pytest.approx(3 + effective * sum(w * x / k for w, x, k in zip(p, deltas, tau, strict=True)))


@pytest.mark.parametrize("falls", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("rho", "nesterov"), [(0.9, False), (0.9, True), (0.5, False), (0.0, False)])
def test_fednovas_round_with_momentum_is_the_sum_of_what_each_gradient_counts(rho: float, nesterov: bool, falls: str):
    lr, p, tau, targets = 0.1, [0.25, 0.75], [2, 6], [0.0, 1.0]
    training = replace(one_row_steps(lr), momentum=rho, nesterov=nesterov, lr_in_round=falls)
    fed = federate(UNEQUAL, fednova(), training)
    fed.vector = torch.tensor([3.0], dtype=fed.vector.dtype)
    moved = end(fed, 1).item()
    deltas, counted = [], []
    for target, steps in zip(targets, tau, strict=True):
        x, velocity, ones, total, moving = 3.0, 0.0, 0.0, 0.0, []
        done = [step / (steps - 1) for step in range(steps)]
        shares = {"constant": [1.0] * steps, "linear": [1 - 0.9 * at for at in done],
                  "cosine": [0.55 + 0.45 * math.cos(math.pi * at) for at in done]}  # fmt: skip
        for share in shares[falls]:  # the written-out sum: every gradient's weight in the row, by the recursion on ones
            slope = x - target
            velocity, ones = rho * velocity + slope, rho * ones + 1.0
            x -= lr * share * (slope + rho * velocity if nesterov else velocity)
            moving.append(share * (1.0 + rho * ones if nesterov else ones))
        total = sum(moving)
        deltas.append(x - 3.0)
        counted.append(total)
    effective = sum(w * a for w, a in zip(p, counted, strict=True))
    assert way(torch.tensor(tau).double(), fed.training).tolist() == pytest.approx(counted)
    expected = 3 + effective * sum(w * d / a for w, d, a in zip(p, deltas, counted, strict=True))
    assert moved == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("falls", ["linear", "cosine"])
def test_one_step_counts_once_and_many_about_eleven_twentieths_where_the_rate_falls(falls: str):
    training = replace(one_row_steps(0.1), lr_in_round=falls)
    assert way(torch.tensor([1.0, 2.0, 1e12]).double(), training).tolist() == pytest.approx([1.0, 1.1, 0.55e12])
    momentum = way(torch.tensor([1.0, 1e12]).double(), replace(training, momentum=0.9)).tolist()
    assert momentum == pytest.approx([1.0, 5.5e12])


def test_a_claim_of_steps_is_capped_and_nonsense_counts_as_the_median():
    claims = torch.tensor([10.0, 10.0, 20.0, 1e9, 1.0, float("nan"), -3.0, float("inf")]).double()
    assert step_factors(claims, one_row_steps(0.1), cap=5.0).tolist() == [1.0, 1.0, 0.5, 0.2, 5.0, 1.0, 1.0, 1.0]


# ---------------------------------------------------------------- scaffold


def test_scaffold_equals_its_pseudo_code():
    fed = federate(STEEP, scaffold(server_lr=0.7), sgd(4, 0.2), weights="uniform")
    x, c, ci = torch.zeros(2), torch.zeros(2), [torch.zeros(2), torch.zeros(2)]
    for _ in run(fed, 5):
        ys, new = [], []
        for i, shard in enumerate(STEEP):
            a, t = shard[0]
            y = x
            for _ in range(4):
                y = y - 0.2 * (a * (y - t) - ci[i] + c)
            new.append(ci[i] - c + (x - y) / (4 * 0.2))
            ys.append(y)
        c = c + torch.stack([n - o for n, o in zip(new, ci, strict=True)]).mean(0)
        x, ci = x + 0.7 * (torch.stack(ys).mean(0) - x), new
        torch.testing.assert_close(fed.vector, x)
        torch.testing.assert_close(fed.algorithm.server.c, c)
        for client, expected in zip(fed.clients, ci, strict=True):
            torch.testing.assert_close(client.memory["control"], expected)


def test_scaffold_reaches_the_optimum_that_fedavg_misses():
    best = optimum(STEEP)
    average = end(federate(STEEP, fedavg(), sgd(20)), 60)
    controlled = end(federate(STEEP, scaffold(), sgd(20)), 60)
    assert (average - best).norm() > 0.9
    assert (controlled - best).norm() < 1e-3


def test_the_controls_sum_right_when_only_some_clients_take_part():
    shards = [bowl([0.1 * i, 1.0], [float(i), -float(i)]) for i in range(1, 6)]
    fed = federate(shards, scaffold(), sgd(3), per_round=2, weights="uniform")
    for _ in run(fed, 12):
        known = [c.memory.get("control", torch.zeros(2)) for c in fed.clients]
        torch.testing.assert_close(fed.algorithm.server.c, torch.stack(known).mean(0), atol=1e-5, rtol=1e-5)


def test_scaffold_wants_equal_steps_of_plain_sgd_before_it_trains():
    training = LocalTraining(batch_size=1, epochs=1, optimizer="sgd", max_grad_norm=None)
    with pytest.raises(RecipeError, match="2 to 6 local steps"):
        end(federate(UNEQUAL, scaffold(), training), 1)
    with pytest.raises(RecipeError) as caught:
        scaffold().prepare(LocalTraining(batch_size=1, steps=1), None)
    assert [p.split(":")[0] for p in caught.value.problems] == ["clients.optimizer", "clients.max_grad_norm"]
    with pytest.raises(RecipeError, match="fednova divides"):
        fednova().prepare(LocalTraining(batch_size=1, steps=1), None)
    for method in (fedsgd, scaffold):
        with pytest.raises(RecipeError, match=r"clients\.momentum: 0\.9"):
            method().prepare(sgd(1, momentum=0.9), None)
    with pytest.raises(RecipeError, match="one step on the whole shard"):
        fedsgd().prepare(sgd(2), None)


# ---------------------------------------------------------------- feddyn


def test_feddyn_equals_its_pseudo_code():
    alpha, fed = 0.3, federate(STEEP, feddyn(alpha=0.3), sgd(4, 0.2), weights="uniform")
    x, h, g = torch.zeros(2), torch.zeros(2), [torch.zeros(2), torch.zeros(2)]
    for _ in run(fed, 5):
        ys = []
        for i, shard in enumerate(STEEP):
            a, t = shard[0]
            y = x
            for _ in range(4):
                y = y - 0.2 * (a * (y - t) - g[i] + alpha * (y - x))
            g[i] = g[i] - alpha * (y - x)
            ys.append(y)
        h = h - alpha * torch.stack([y - x for y in ys]).mean(0)
        x = torch.stack(ys).mean(0) - h / alpha
        torch.testing.assert_close(fed.vector, x)


def test_feddyn_reaches_the_global_optimum_and_its_clients_remember_their_gradients_there():
    best = optimum(STEEP)
    fed = federate(STEEP, feddyn(alpha=0.3), sgd(20, 0.4))
    assert (end(fed, 60) - best).norm() < 1e-3
    for client, shard in zip(fed.clients, STEEP, strict=True):
        a, t = shard[0]
        torch.testing.assert_close(client.memory["gradient"], a * (best - t), atol=1e-3, rtol=1e-3)
    with pytest.raises(RecipeError, match="alpha"):
        feddyn(alpha=0.0)
