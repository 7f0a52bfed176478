"""What federation costs: local training of a run against the same steps in a bare loop, side by side in one process.

    python scripts/bench_overhead.py recipes/llm/ag_news_backdoor.yaml model.name=... data.name=...

The bare loop is what one would write without this project: the same peft model, the same batches, AdamW over the
list of adapter parameters, gradient clipping. Rounds of both alternate, and the order within a pair alternates too;
the table gives the best and the median ratio. Also printed: peak resident memory while 10 and 100 clients are
trained and stacked, which must grow by the rows of the update matrix and nothing else.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from fedllm_sec.build.federation import build
from fedllm_sec.build.text import load_task
from fedllm_sec.matrix import memory
from fedllm_sec.rounds.client import endless, make_optimizer, train_locally
from fedllm_sec.rounds.compute import Machine
from fedllm_sec.seeds import generator_for
from fedllm_sec.train import load, quiet


def bare_round(task, clients, training, r: int, seed: int) -> None:
    """The same clients and batches, with nothing federated but the start of each client."""
    parameters = [p for p in task.model.parameters() if p.requires_grad]
    with torch.no_grad():
        start = [p.clone() for p in parameters]
    for client in clients:
        with torch.no_grad():
            for p, s in zip(parameters, start, strict=True):
                p.copy_(s)
        optimizer = torch.optim.AdamW(parameters, lr=training.lr, weight_decay=training.weight_decay)
        batches = endless(task, client.shard, training.batch_size, generator_for(seed, r, client.id, "batches"))
        for _ in range(training.steps):
            optimizer.zero_grad()
            loss = task.loss(client.shard, next(batches))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
            optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    parser.add_argument("--pairs", type=int, default=4, help="rounds of each kind")
    options = parser.parse_args()
    quiet()
    recipe = next(iter(load(options.recipe, [*options.overrides, "enable_attack=false"]).values())).recipe
    machine = Machine(Accelerator(), recipe.compute.placement)
    federation = build(recipe, machine)
    plain = load_task(recipe, machine)  # its own model, so that neither loop sees the other's flat vector
    unflatten(plain)
    task, clients, training = federation.task, list(federation.clients), federation.training
    optimizer = make_optimizer(task, training)

    def federated_round(r: int, cohort) -> None:
        def train(client):
            return train_locally(
                task, client, federation.vector, optimizer=optimizer, stepper=machine, training=training,
                round=r, rounds=99, seed=recipe.seed,
            )  # fmt: skip

        machine.collect((train(c) for c in cohort), len(cohort), task.layout.size)

    def timed(work) -> float:
        begun = time.perf_counter()
        work()
        return time.perf_counter() - begun

    federated_round(0, clients[:1]), bare_round(plain, clients[:1], training, 0, recipe.seed)  # warm up
    ratios, best = [], {"federated": float("inf"), "bare": float("inf")}
    for r in range(1, options.pairs + 1):
        works = {
            "federated": lambda r=r: federated_round(r, clients),
            "bare": lambda r=r: bare_round(plain, clients, training, r, recipe.seed),
        }
        times = {name: timed(works[name]) for name in sorted(works, reverse=bool(r % 2))}
        ratios.append(times["federated"] / times["bare"])
        best = {name: min(best[name], times[name]) for name in best}
    print(
        f"| loop ({len(clients)} clients x {training.steps} steps of {training.batch_size}) "
        "| best seconds | ratio to bare |"
    )
    print("|---|---|---|")
    print(f"| bare loop | {best['bare']:.2f} | 1.00 |")
    print(
        f"| fedllm_sec | {best['federated']:.2f} | {best['federated'] / best['bare']:.2f} best, "
        f"{statistics.median(ratios):.2f} median of {options.pairs} |"
    )

    print(
        "\n| clients in the cohort | update matrix MiB | peak memory beyond what was held before, MiB |\n|---|---|---|"
    )
    short = training.__class__(**{**training.__dict__, "steps": 1})
    training = short
    for copies in (1, 10):
        taken = memory.watch(torch.device("cpu"))
        federated_round(50 + copies, clients * copies)
        matrix = len(clients) * copies * task.layout.size * 4 / 2**20
        print(f"| {len(clients) * copies} | {matrix:.0f} | {taken().get('defense', math.nan):.0f} |")


def unflatten(task) -> None:
    """Give the parameters of a task their own storage and no gradient, as peft makes them."""
    for p in task.model.parameters():
        if p.requires_grad:
            p.data, p.grad = p.data.clone(), None


if __name__ == "__main__":
    main()
