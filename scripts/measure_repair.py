"""What each repair after training does to a backdoored adapter: `python scripts/measure_repair.py --csv FILE`.

The quickstart's attacked run is trained once for each seed; every repair then begins from that same model. Columns:
seed, attack, repair, attack success, false triggers, accuracy and held-out loss of the model before and after, seconds.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from fedllm_sec import defenses  # noqa: E402
from fedllm_sec.build.federation import build, run  # noqa: E402
from fedllm_sec.build.names import checked, make  # noqa: E402
from fedllm_sec.build.running import make_machine  # noqa: E402
from fedllm_sec.recipe.reading import read  # noqa: E402
from fedllm_sec.rounds.clock import Clock  # noqa: E402
from fedllm_sec.rounds.federation import evaluate  # noqa: E402
from fedllm_sec.rounds.repairing import mend  # noqa: E402

REPAIRS: dict[str, dict[str, Any]] = {
    "fine_tune 25": {"name": "fine_tune", "steps": 25},
    "fine_tune 100": {"name": "fine_tune", "steps": 100},
    "own_answers 100": {"name": "own_answers", "steps": 100},
    "prune_directions 1": {"name": "prune_directions", "directions": 1},
    "prune_directions 2": {"name": "prune_directions", "directions": 2},
    "prune_directions 4": {"name": "prune_directions", "directions": 4},
}
ATTACKS: dict[str, dict[str, Any]] = {
    "model_replacement": {},
    "unscaled": {"update": []},
    "neurotoxin": {"local": [{"name": "neurotoxin"}]},
    "untrained": {},  # a fresh adapter that no client trained: what fine_tune does by the root rows alone
}
HEAD = ["seed", "attack", "repair", "asr", "false_trigger", "accuracy", "loss", "asr_after", "false_trigger_after",
        "accuracy_after", "loss_after", "repair_s"]  # fmt: skip


def numbers(quality: Any, attack: Any) -> list[str]:
    """Attack success, false triggers, accuracy, held-out loss."""
    rates = (attack["asr"], attack["false_trigger"], quality["accuracy"])
    return [f"{rate['value']:.4f}" for rate in rates] + [f"{quality['loss']:.4f}"]


def measured(seed: int, attack: str, root_rows: int, target: Path) -> None:
    raw = read(ROOT / "recipes" / "quickstart.yaml", [])
    raw.pop("variants")
    raw["output"] = {"folder": "runs/measure_repair"}
    raw |= {"seed": seed, "attack": {**raw["attack"], **ATTACKS[attack]}}
    raw["defense"] = {"rule": {"name": "mean"}, "root_rows": root_rows}
    raw["evaluate"] = {**raw["evaluate"], "start": False, "every": raw["rounds"]}
    recipe = checked(raw)
    federation: Any = build(recipe, make_machine(recipe, Path(".")))
    if attack == "untrained":
        before = numbers(*evaluate(federation)[:2])
    else:
        last = list(run(federation, recipe.rounds))[-1]
        before = numbers(last.quality, last.attack)
    begun = federation.vector.clone()
    for name, block in REPAIRS.items():
        if attack == "untrained" and block["name"] != "fine_tune":
            continue
        federation.vector = begun.clone()
        federation.repair = make(block, defenses.REPAIR_MENU, "defense.repair")
        federation.evaluation, kept = None, federation.evaluation
        if block["name"] == "own_answers":
            federation.evaluation = kept
        seconds: dict[str, float] = {}
        mend(federation, lambda _: (None, None), Clock(), seconds)
        federation.evaluation = kept
        after = numbers(*evaluate(federation)[:2])
        with target.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow(
                [seed, attack, name, *before, *after, f"{seconds['repair']:.1f}"]
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--attacks", nargs="+", choices=list(ATTACKS), default=["model_replacement"])
    parser.add_argument("--root-rows", type=int, default=100)
    options = parser.parse_args()
    if not options.csv.exists():
        options.csv.write_text(",".join(HEAD) + "\n", encoding="utf-8")
    for attack in options.attacks:
        for seed in options.seeds:
            measured(seed, attack, options.root_rows, options.csv)


if __name__ == "__main__":
    main()
