"""What each rule makes of synthetic rounds under each attack: `scripts/measure_rules.py [--csv FILE] [rule ...]`.

20 clients, 5 of them malicious, 4,096 parameters in 8 LoRA-like layers, 6 rounds, 3 seeds. An honest row is a common
step, a personal drift that stays the same over the rounds and fresh noise, of equal length, so two honest rows have
a cosine of 1/3 and a client's rows of two rounds one of 2/3. A number is the distance of the rule's update from the
mean of the honest rows, in lengths of that mean, averaged over the last three rounds: 0 is perfect, 1 is as bad as
no update at all. In brackets, for rules that select, how many of the 15 honest and the 5 malicious rows were kept;
without an attack all 20 are honest. `--csv docs/results/rules.csv` keeps the table for scripts/check_docs.py.
"""

from __future__ import annotations

import argparse
import csv
import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fedllm_sec
from fedllm_sec.defenses import MENU
from fedllm_sec.matrix import Layout, UpdateMatrix
from fedllm_sec.protocols import RoundContext
from fedllm_sec.recipe.resolve import settings_of
from fedllm_sec.seeds import generator_for

HONEST, BAD, D, ROUNDS, SEEDS = 15, 5, 4096, 6, 3
LAYOUT = Layout(tuple(f"layers.{i // 2}.lora_{'AB'[i % 2]}" for i in range(8)), ((8, 64), (64, 8)) * 4)
ATTACKS: dict[str, dict[str, Any]] = {
    "none": {},
    "byzantine_flip": {},
    "byzantine_random": {"scale": 5.0},
    "ipm": {},
    "alie": {},
    "min_max": {},
    "mimic": {},
}
SETTINGS = {"robust_learning_rate": {"theta": 8}, "trimmed_mean": {"f": BAD}, "slsgd": {"f": BAD, "alpha": 1.0}}
WITH_A_MODEL = {"flare", "backdoor_indicator"}  # which these rows are not of
SETTINGS["flame"] = {"noise": 0.0}
SETTINGS["signguard"] = {"similarity": "cosine"}


def make(name: str) -> Callable[[UpdateMatrix, RoundContext], Any]:
    entry = MENU[name].make
    settings = dict(SETTINGS.get(name, {}))
    f = settings_of(entry).get("f")
    if f is not None and f.default is inspect.Parameter.empty:
        settings["f"] = min(BAD, (HONEST + BAD - 3) // 4) if name == "bulyan" else BAD
    return entry(**settings) if inspect.isclass(entry) else partial(entry, **settings)


def honest_rows(seed: int, round: int) -> Tensor:
    """As many as the cohort has; under attack the last ones are replaced."""
    n = HONEST + BAD
    parts = [
        torch.randn(D, generator=generator_for(seed, "step")).expand(n, D),
        torch.randn(n, D, generator=generator_for(seed, "drift")),
        torch.randn(n, D, generator=generator_for(seed, round, "noise")),
    ]
    return 1e-3 * sum(parts[1:], parts[0])


def measure(name: str, attack: str) -> str:
    errors, kept = [], []
    for seed in range(SEEDS):
        rule, last = make(name), None
        start = torch.zeros(D)
        for round in range(1, ROUNDS + 1):
            rows = honest_rows(seed, round)
            if attack != "none":
                known = {"last_update": last} if last is not None else {}
                settings = {"m": BAD, "seed": seed, "round": round, **known, **ATTACKS[attack]}
                rows[HONEST:] = fedllm_sec.forge(rows[:HONEST], attack, **settings)
            middle = (rows if attack == "none" else rows[:HONEST]).mean(0)
            root = rows[:3].mean(0) + 1e-3 * torch.randn(D, generator=generator_for(seed, round, "root"))
            updates = UpdateMatrix.of(rows, layout=LAYOUT)
            ctx = RoundContext(round, start, LAYOUT, generator_for(seed, round), ROUNDS, last, root_update=root)
            decision = rule(updates, ctx)
            if round > ROUNDS - 3:
                errors.append(float((decision.update - middle).norm() / middle.norm()))
                if decision.kept is not None:
                    kept.append([float(decision.kept[:HONEST].sum()), float(decision.kept[HONEST:].sum())])
            last = middle
            start = start + middle
    shares = torch.tensor(kept).mean(0).tolist() if kept else None
    return f"{sum(errors) / len(errors):.2f}" + (f" ({shares[0]:.0f}, {shares[1]:.0f})" if shares else "")


def main() -> None:
    parser = argparse.ArgumentParser(description="What each rule makes of synthetic rounds under each attack.")
    parser.add_argument("rules", nargs="*", metavar="rule")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table to this file too")
    options = parser.parse_args()
    names = options.rules or [name for name, entry in MENU.items() if entry.kind == "rule" and name not in WITH_A_MODEL]
    print("| rule | " + " | ".join(ATTACKS) + " |")
    print("|---" * (len(ATTACKS) + 1) + "|")
    table = [["rule", *ATTACKS]]
    for name in names:
        table.append([name, *(measure(name, attack) for attack in ATTACKS)])
        print("| " + " | ".join(table[-1]) + " |", flush=True)
    if options.csv is not None:
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(table)


if __name__ == "__main__":
    main()
