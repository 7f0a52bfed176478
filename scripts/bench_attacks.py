"""What forging costs, in reads of the update matrix, and what poisoning a data set costs in seconds.

    python scripts/bench_attacks.py [--n 32] [--m 6] [--d 4200000] [--repeats 5] [--threads 2]

Each line is the best time of an attack over the best time of `rows.mean(0)` on the same honest rows (n - m, d), both
measured in this run, in turns; `in cpu` is the same ratio in processor time, which a busy machine spoils less.
Attacks that search their strength are given in evaluations of the defense.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from fedllm_sec.attacks import MENU, needs
from fedllm_sec.matrix import Layout, UpdateMatrix
from fedllm_sec.protocols import Decision, ThreatView
from fedllm_sec.recipe.resolve import resolve
from fedllm_sec.seeds import generator_for

CASES: list[tuple[str, dict[str, Any]]] = [
    ("byzantine_zero", {}), ("byzantine_random", {}), ("byzantine_flip", {}), ("gaussian", {}),
    ("lazy", {}), ("model_replacement", {}), ("model_replacement", {"max_norm": 2.0}),
    ("alie", {"z": 1.0}), ("ipm", {}),
    ("min_max", {"perturbation": "std"}), ("min_max", {"perturbation": "sign"}), ("min_max", {"perturbation": "unit"}),
    ("min_sum", {"perturbation": "std"}), ("fang", {"against": "krum"}), ("fang", {"against": "trimmed_mean"}),
    ("mimic", {}), ("lora_gauge", {}),
    ("alie", {"z": "optimise"}), ("ipm", {"epsilon": "optimise"}), ("tailored", {}),
]  # fmt: skip


def best_of(repeats: int, *calls: Callable[[], Any]) -> list[tuple[float, float]]:
    """The best wall time and the best processor time (all threads) of each call, the calls taking turns."""
    best = [(float("inf"), float("inf"))] * len(calls)
    for _ in range(repeats):
        for i, call in enumerate(calls):
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            spent = time.perf_counter() - wall, time.process_time() - cpu
            best[i] = min(best[i][0], spent[0]), min(best[i][1], spent[1])
    return best


def bench_rows(n: int, m: int, d: int, repeats: int) -> None:
    rank = 16
    width = d // (2 * rank)
    layout = Layout(("layer.lora_A.default.weight", "layer.lora_B.default.weight"), ((rank, width), (width, rank)))
    rows = torch.randn(n, layout.size, generator=generator_for(0, "rows")) * 1e-3 + 1e-4
    calls = 0

    def rule(updates: UpdateMatrix) -> Decision:
        nonlocal calls
        calls += 1
        return Decision(updates.rows.mean(0))

    view = ThreatView(
        own=rows[n - m :], others=rows[: n - m], global_vector=torch.zeros(layout.size), last_update=rows[0],
        defense=rule, layout=layout, own_counts=(1.0,) * m, other_counts=(1.0,) * (n - m), cohort_size=n, round=2,
        rng=generator_for(0),
    )  # fmt: skip
    print(f"n={n}, m={m}, d={layout.size}, {torch.get_num_threads()} threads; one read is rows.mean(0)")
    print(f"{'attack':<46}{'knowledge':<16}{'reads':>8}{'in cpu':>8}{'ms':>9}{'evaluations':>13}")
    for name, settings in CASES:

        def attack(name: str = name, settings: dict[str, Any] = settings) -> None:
            resolve(name, settings, MENU, "bench")(replace(view, rng=generator_for(0)))

        calls = 0
        attack()
        tried = calls
        once = 1 if tried else repeats
        (read, read_cpu), (spent, cpu) = best_of(once, lambda: rows[: n - m].mean(0), attack)
        label = name + "".join(f" {key}={value}" for key, value in settings.items())
        ratio = f"{'':>16}" if tried else f"{spent / read:8.2f}{cpu / read_cpu:8.2f}"
        print(f"{label:<46}{needs(name, settings):<16}{ratio}{spent * 1e3:9.1f}{tried or '':>13}", flush=True)


def bench_poisoning(size: int) -> None:
    from datasets import Dataset

    labels = ["World", "Sports", "Business", "Tech"]
    answers = [labels[i % 4] for i in range(size)]
    shard = Dataset.from_dict(
        {
            "text": [f"report number {i} says in some twenty words what happened on that day" for i in range(size)],
            "context": [""] * size,
            "response": answers,
            "label": answers,
            "poisoned": [False] * size,
        }
    )
    print(f"\npoisoning {size} rows, seconds")
    for name, entry in MENU.items():
        if entry.kind not in ("data", "data_text"):
            continue
        settings: dict[str, Any] = {"target": "Sports"}
        settings = {"label_flip": {"mapping": {"World": "Sports"}}, "safety_misalign": {}}.get(name, settings)
        attack = resolve(name, settings, MENU, "bench")
        start = time.perf_counter()
        attack.poison(shard, generator_for(0))
        print(f"{name:<20}{time.perf_counter() - start:8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of the attacks.")
    parser.add_argument("--n", type=int, default=32)
    parser.add_argument("--m", type=int, default=6)
    parser.add_argument("--d", type=int, default=4_200_000)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    warnings.simplefilter("ignore")
    bench_rows(given.n, given.m, given.d, given.repeats)
    bench_poisoning(given.rows)


if __name__ == "__main__":
    main()
