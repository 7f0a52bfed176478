"""Up to how many attackers each rule holds, on synthetic rows: a table of rules x attacks.

    python scripts/measure_breakdown.py
    python scripts/measure_breakdown.py --n 20 --d 1000 --trials 3 --rules median krum --attacks alie ipm

A cell is the smallest number m of attackers of n at which ||aggregate - honest mean||^2 exceeds `--limit` times the
honest variance. Where no m below n / 2 does it is "held" and the largest ratio of the sweep; "held to m" where the rule
gives no answer for more than m, because it needs more clients. The rules are told the true m where they ask for f.
Honest rows are a common direction plus noise, both standard normal in each coordinate, times 1e-3; what attackers
trained is the honest mean.
"""

from __future__ import annotations

import argparse
import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fedllm_sec
from fedllm_sec.evaluation.robustness import Breakdown, breakdown
from fedllm_sec.seeds import generator_for

# name in the table -> (rule, settings, stages before), where F stands for the number of attackers
F: Any = object()
RULES: dict[str, tuple[str, dict[str, Any], list[Any]]] = {
    "mean": ("mean", {}, []),
    "norm_clipping, mean": ("mean", {}, ["norm_clipping"]),
    "median": ("median", {}, []),
    "trimmed_mean": ("trimmed_mean", {"f": F}, []),
    "meamed": ("meamed", {"f": F}, []),
    "geometric_median": ("geometric_median", {}, []),
    "centered_clipping": ("centered_clipping", {}, []),
    "krum": ("krum", {"f": F}, []),
    "multi_krum": ("multi_krum", {"f": F}, []),
    "bulyan": ("bulyan", {"f": F}, []),
    "mda": ("mda", {"f": F}, []),
    "nnm, trimmed_mean": ("trimmed_mean", {"f": F}, [("nnm", {"f": F})]),
    "nnm, geometric_median": ("geometric_median", {}, [("nnm", {"f": F})]),
    "dnc": ("dnc", {"f": F}, []),
    "foolsgold": ("foolsgold", {}, []),
    "flame": ("flame", {}, []),
}
ATTACKS: dict[str, tuple[str, dict[str, Any]]] = {
    "flip x10": ("byzantine_flip", {"scale": 10.0}),
    "random x10": ("byzantine_random", {}),
    "ipm": ("ipm", {}),
    "alie": ("alie", {}),
    "min_max": ("min_max", {}),
    "min_sum": ("min_sum", {}),
    "fang krum": ("fang", {"against": "krum"}),
    "fang trim": ("fang", {"against": "trimmed_mean"}),
    "mimic": ("mimic", {}),
    "tailored": ("tailored", {}),
}


def told(settings: dict[str, Any], m: int) -> dict[str, Any]:
    """The settings with the number of attackers in its places."""
    return {key: m if value is F else value for key, value in settings.items()}


def ask(rule: str, rows: Any, m: int) -> Any:
    """The rule's decision on rows, m of which are malicious."""
    name, settings, before = RULES[rule]
    stages = [(stage[0], told(stage[1], m)) if isinstance(stage, tuple) else stage for stage in before]
    return fedllm_sec.aggregate(rows, name, before=stages, **told(settings, m))


def forged(rule: str, attack: str, honest: Tensor, m: int) -> Tensor:
    """The rows of m attackers who know the honest rows, and the rule where the attack tries it."""
    name, settings = ATTACKS[attack]
    knows = {"defense": lambda updates: ask(rule, updates, m)} if name == "tailored" else {}
    rows: Tensor = fedllm_sec.forge(honest, name, m=m, **settings, **knows)
    return rows


def written(found: Breakdown) -> str:
    if found.point is not None:
        return str(found.point)
    if not found.ratios:
        return "no answer"
    end = f" to {found.refused - 1}" if found.refused is not None else ""
    return f"held{end} {max(found.ratios.values()):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=20)
    parser.add_argument("--d", type=int, default=1000)
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--limit", type=float, default=1.0)
    parser.add_argument("--rules", nargs="*", choices=RULES, default=list(RULES))
    parser.add_argument("--attacks", nargs="*", choices=ATTACKS, default=list(ATTACKS))
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # attacks that find no room say so for every m

    trials = []
    for seed in range(options.trials):
        shared = torch.randn(options.d, generator=generator_for(seed, "shared"))
        noise = torch.randn(options.n, options.d, generator=generator_for(seed, "rows"))
        trials.append((shared + noise) * 1e-3)

    print("| rule | " + " | ".join(options.attacks) + " |\n|---" + "|---" * len(options.attacks) + "|")
    for rule in options.rules:
        cells = []
        for attack in options.attacks:
            found = breakdown(
                lambda rows, m, rule=rule: ask(rule, rows, m).update,
                partial(forged, rule, attack),
                trials,
                limit=options.limit,
            )
            cells.append(written(found))
        print(f"| {rule} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
