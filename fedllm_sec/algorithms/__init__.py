"""The algorithm menu: an FL method is local rules, factors for the rows before the defense, and a server rule."""

from __future__ import annotations

import functools
from typing import Literal

from fedllm_sec.algorithms.fitting import countable_steps, equal_sgd_steps, one_full_batch_step, step_factors
from fedllm_sec.algorithms.gkt import KnowledgeTransfer
from fedllm_sec.algorithms.local import DriftCorrection, DynamicRegularizer, FedProx
from fedllm_sec.algorithms.server import Adaptive, ControlledSgd, DynamicServer, EffectiveSteps, Sgd
from fedllm_sec.errors import RecipeError
from fedllm_sec.protocols import Algorithm
from fedllm_sec.recipe.resolve import Entry


def fedavg(*, server_lr: float = 1.0, server_momentum: float = 0.0) -> Algorithm:
    """Add the defended mean update (McMahan et al. 2017); with momentum this is FedAvgM (Hsu et al. 2019)."""
    return Algorithm(server=Sgd(lr=server_lr, momentum=server_momentum), server_lr=server_lr)


def fedsgd(*, server_lr: float = 1.0) -> Algorithm:
    """One full-batch SGD step in each client, so rows are -clients.lr times gradients (McMahan et al. 2017, sec. 2).

    Weighted by counts, as the default rule does, a round is one step of gradient descent on all the clients' data,
    where no shard is larger than the rule's cap of 3 times the median shard.
    Needs optimizer: sgd, max_grad_norm: null and one local step; batch_size has no effect. A shard too large for one
    pass is split by compute.gradient_accumulation.
    """
    return Algorithm(server=Sgd(lr=server_lr, momentum=0.0), prepare=one_full_batch_step, server_lr=server_lr)


def fedprox(*, mu: float = 0.01, server_lr: float = 1.0) -> Algorithm:
    """FedAvg whose clients also minimise mu/2 ||w - w0||^2 (Li et al. 2020, MLSys)."""
    return Algorithm(local=(FedProx(mu=mu),), server=Sgd(lr=server_lr, momentum=0.0), server_lr=server_lr)


def fedopt(
    *,
    optimizer: Literal["sgd", "adam", "yogi", "adagrad"] = "adam",
    server_lr: float | None = None,
    beta1: float = 0.9,
    beta2: float = 0.99,
    tau: float = 1e-3,
) -> Algorithm:
    """A server optimizer on the defended update: sgd with momentum beta1, adam, yogi, adagrad (Reddi et al. 2021).

    x += lr * m / (sqrt(v) + tau), algorithm 2, without bias correction; v starts at tau^2. sgd is x += lr * m with
    m = beta1 m + update (Hsu et al. 2019). server_lr is 1 for sgd and 0.01 for the others where it is not set.
    """
    if optimizer == "sgd":
        lr = 1.0 if server_lr is None else server_lr
        return Algorithm(server=Sgd(lr=lr, momentum=beta1), server_lr=lr)
    lr = 0.01 if server_lr is None else server_lr
    return Algorithm(server=Adaptive(kind=optimizer, lr=lr, beta1=beta1, beta2=beta2, tau=tau))


def fednova(*, server_lr: float = 1.0, cap: float = 10.0) -> Algorithm:
    """Rows divided by their local steps, the step multiplied by the effective number of them (Wang et al. 2020).

    So clients that take more local steps do not pull the optimum towards theirs. Steps are claims: one counts for at
    most `cap` times the median claim, and for no less than a cap-th of it; the paper trusts them. For SGD in the
    clients; with momentum rows are divided by the sum of what each gradient counts (sec. 4). With clients.local_steps
    all steps are equal and fednova equals fedavg.
    """
    if not cap >= 1:
        raise RecipeError(f"fednova: cap must be at least 1 (times the median claim), got {cap}.")
    return Algorithm(
        server=EffectiveSteps(lr=server_lr),
        prepare=countable_steps,
        factors=functools.partial(step_factors, cap=cap),
        server_lr=server_lr,
    )


def scaffold(*, server_lr: float = 1.0) -> Algorithm:
    """Control variates against client drift: grad += c - c_i, option II (Karimireddy et al. 2020, alg. 1).

    Clients remember c_i between rounds; c is made of defended updates. Needs optimizer: sgd, max_grad_norm: null and
    equal local steps.

    The paper's mean is uniform. Here c stays the mean of all c_i under whatever weights the rule gives, so that the run
    ends at the optimum of the uniform mean, or of that by (capped) counts where the rule weighs by counts: |S| / N is
    the cohort's share of all in that mean, and a client remembers the part of its row that was taken (taken.py). A
    uniform mean by default would be right without a defense only. median and trimmed_mean give no weights: behind them
    c is near that mean, not equal to it.
    """
    rule, server = DriftCorrection(), ControlledSgd(lr=server_lr)
    return Algorithm(
        server=server,
        local=(rule,),
        prepare=equal_sgd_steps,
        control=server.control,
        remember=rule.remember,
        server_lr=server_lr,
    )


def feddyn(*, alpha: float = 0.01) -> Algorithm:
    """A regulariser that moves with the clients' last gradients, so that their optima agree (Acar et al. 2021).

    The theory asks clients to train to a stationary point; how they get there is free, so any local optimizer may
    stand. The server's h is made of defended updates, and stays the mean of what clients remember under whatever
    weights the rule gives, as scaffold's c does. A small alpha lets clients go far and makes the server's step,
    update - h / alpha, large.
    """
    rule = DynamicRegularizer(alpha=alpha)
    return Algorithm(server=DynamicServer(alpha=alpha), local=(rule,), remember=rule.remember)


def fedgan(*, server_lr: float = 1.0) -> Algorithm:
    """FedAvg of generator and discriminator, one vector of both (Rasouli et al. 2020). Needs task: gan."""
    return Algorithm(server=Sgd(lr=server_lr, momentum=0.0), task="gan", server_lr=server_lr)


def fednas(*, server_lr: float = 1.0) -> Algorithm:
    """FedAvg of weights and architecture parameters, one vector of both (He et al. 2020, FedNAS). Needs task: nas."""
    return Algorithm(server=Sgd(lr=server_lr, momentum=0.0), task="nas", server_lr=server_lr)


def fedgkt(
    *,
    temperature: float = 3.0,
    alpha: float = 1.0,
    server_epochs: int = 1,
    server_lr: float | None = None,
    channels: int = 16,
) -> KnowledgeTransfer:
    """Group knowledge transfer: clients send features and logits, the server answers with logits (He et al. 2020).

    Both sides minimise CE + alpha T^2 KL(other's softmax || own) at temperature T. The recipe's `model` is the
    server's net, on features of `channels` maps that the clients' small nets make; clients keep their nets to
    themselves, so a defense on update rows is an error. The server trains `server_epochs` a round, at clients.lr where
    server_lr is not set. Needs task: classify and one process.
    """
    return KnowledgeTransfer(temperature, alpha, server_epochs, server_lr, channels)


MENU: dict[str, Entry] = {
    "fedavg": Entry(fedavg, "McMahan et al. 2017"),
    "fedsgd": Entry(fedsgd, "McMahan et al. 2017"),
    "fedprox": Entry(fedprox, "Li et al. 2020"),
    "fedopt": Entry(fedopt, "Reddi et al. 2021"),
    "fednova": Entry(fednova, "Wang et al. 2020"),
    "scaffold": Entry(scaffold, "Karimireddy et al. 2020"),
    "feddyn": Entry(feddyn, "Acar et al. 2021"),
    "fedgkt": Entry(fedgkt, "He et al. 2020 (FedGKT)"),
    "fedgan": Entry(fedgan, "Rasouli et al. 2020"),
    "fednas": Entry(fednas, "He et al. 2020 (FedNAS)"),
}
