"""What a round of `model.lora.average: exact` costs beside one of `factors`, on a real model: prints the ratio.

    OMP_NUM_THREADS=2 python scripts/bench_averaging.py recipes/llm/smollm2_alpaca_chat.yaml

A round is put together from its parts, each the best of `--repeats`: one step of one client, times the steps and the
clients of the recipe; what the server does with as many rows (random ones, of the length of that step), and the
checkpoint's state in bytes. Steps of both ways take turns on one model, without and with what the base has gained.
Evaluation costs the same in both and is left out, which makes the ratio larger than a run's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from fedllm_sec import kernels
from fedllm_sec.build.federation import build
from fedllm_sec.matrix import UpdateMatrix
from fedllm_sec.protocols import Decision
from fedllm_sec.records.checkpoint import pack
from fedllm_sec.rounds.client import make_optimizer, train_locally
from fedllm_sec.rounds.compute import Machine
from fedllm_sec.train import load


def seconds(call: Callable[[], Any], now: Callable[[], float]) -> float:
    start = now()
    call()
    return now() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: of all threads, beside others")
    args = parser.parse_args()
    now = time.perf_counter if args.clock == "wall" else time.process_time
    own = ["model.lora.average=exact", "enable_attack=false", "enable_defense=false"]
    recipe = next(iter(load(args.recipe, [*args.overrides, *own]).values())).recipe
    fed = build(recipe, Machine(Accelerator(), recipe.compute.placement))
    task, averaging, client = fed.task, fed.averaging, fed.clients[0]
    assert averaging is not None
    assert averaging.shifted is not None
    n = recipe.clients.per_round or recipe.clients.total
    steps = fed.training.steps_of(task.size(client.shard))
    once = fed.training.__class__(**{**fed.training.__dict__, "steps": 1, "epochs": None})
    optimizer = make_optimizer(task, once)

    def step() -> Any:
        return train_locally(
            task, client, fed.vector, optimizer=optimizer, stepper=fed.machine, training=once, round=1, rounds=1,
            seed=recipe.seed,
        )  # fmt: skip

    delta = step().delta
    drawn = torch.randn(n, task.layout.size, generator=torch.Generator().manual_seed(0))
    updates = UpdateMatrix.of(drawn * (delta.norm() / drawn[0].norm()), layout=task.layout)
    weights = torch.full((n,), 1.0 / n, dtype=torch.float64)

    def factors() -> None:
        fed.vector + kernels.combine(updates, weights)

    def exact() -> None:
        vector = fed.vector + kernels.combine(updates, weights)
        made = averaging.take(vector, updates, Decision(vector - fed.vector, weights), fed.vector, 1.0)
        assert made is not None
        assert made.gains is not None
        averaging.gain(averaging.packed(made.gains, n), n)

    best: dict[str, list[float]] = {"step of factors": [], "step of exact": [], "server of factors": [],
                                    "server of exact": [], "state of factors": [], "state of exact": []}  # fmt: skip
    for _ in range(args.repeats):
        averaging.shifted.load_state_dict({})
        for way, server in (("factors", factors), ("exact", exact)):
            best[f"server of {way}"].append(seconds(server, now))
            best[f"step of {way}"].append(seconds(step, now))
            best[f"state of {way}"].append(seconds(lambda: pack(fed.state_dict()), now))
    found = {name: min(values) for name, values in best.items()}
    shared = {}
    for way in ("factors", "exact"):
        shared[way] = n * steps * found[f"step of {way}"] + found[f"server of {way}"] + found[f"state of {way}"]
        parts = ", ".join(f"{part} {found[f'{part} of {way}']:.3f} s" for part in ("step", "server", "state"))
        print(f"{way}: {n} clients x {steps} steps: {shared[way]:.2f} s a round ({parts})")
    print(f"exact / factors: {shared['exact'] / shared['factors']:.3f}")


if __name__ == "__main__":
    main()
