"""What a grid costs beyond its cells: its wall time against their training and evaluation run bare, and a warm start.

    python scripts/bench_grid.py

31 small cells on the model `tiny` (5 attacks x 6 defenses and the twin). Printed are (a) the wall time of the whole
command, from the start of Python to the written page, over the seconds that training and evaluation of its cells took,
these scaled by what the same cells take in a bare loop without folder, checkpoint or table; and (b) what a cell of a
warm process takes beside its rounds: to start, to save its adapter and to close its folder. About three minutes.
"""

from __future__ import annotations

import csv
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from fedllm_sec.build.federation import build, run
from fedllm_sec.build.loaded import Loaded
from fedllm_sec.build.running import make_machine
from fedllm_sec.grid import cells, grid
from fedllm_sec.records.history import read_history
from fedllm_sec.train import quiet

QUICK = Path(__file__).parents[1] / "recipes" / "grids" / "quick.yaml"
SMALL = {
    "rounds": 2,
    "clients": {"total": 6, "local_steps": 3},
    "attack": {"malicious": {"count": 1}},
    "evaluate": {"every": 2, "rows": 60, "attack_rows": 40},
}
AGAIN = 5  # cells run once more, warm and bare


def small_grid() -> dict[str, Any]:
    raw = yaml.safe_load(QUICK.read_text().replace("f: 3", "f: 1"))
    return {**raw, "base": str((QUICK.parent / raw["base"]).resolve()), "overrides": SMALL}


def working(folder: Path) -> float:
    """Seconds of training and evaluation that a run recorded."""
    return sum(r.seconds["train"] + r.seconds.get("evaluate", 0.0) for r in read_history(folder))


def bare(cell: grid.Cell, machine: Any, loaded: Loaded) -> float:
    """The rounds of a cell and nothing around them: seconds of training and evaluation."""
    federation = build(cell.recipe, machine, loaded)
    return sum(r.seconds["train"] + r.seconds.get("evaluate", 0.0) for r in run(federation, cell.recipe.rounds))


def main() -> None:
    quiet()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        path = folder / "small.yaml"
        path.write_text(yaml.safe_dump(small_grid(), sort_keys=False))
        command = [sys.executable, "-m", "fedllm_sec.benchmark", str(path), f"output.folder={folder / 'grid'}"]
        begun = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        wall = time.perf_counter() - begun
        with (folder / "grid" / "results.csv").open() as file:
            rows = list(csv.DictReader(file))
        spent = sum(float(row["train_seconds"]) + float(row["evaluate_seconds"]) for row in rows)

        again = grid.load(path, [f"output.folder={folder / 'warm'}"])
        chosen, beside = list(again.run_order())[: AGAIN + 1], []

        def tell(cell: grid.Cell, seconds: float) -> None:
            rounds = sum(sum(r.seconds.values()) for r in read_history(cell.folder))
            beside.append(seconds - rounds)

        cells.walk(again.folder, chosen, command="bench", started=time.time(), tell=tell)
        machine, loaded = make_machine(chosen[0].recipe, again.folder), Loaded()
        ratios = [bare(cell, machine, loaded) / working(cell.folder) for cell in chosen]
    alone = spent * statistics.median(ratios[1:])
    print(f"grid of {len(rows)} cells: {wall:.1f} s in all; training and evaluation of its cells {spent:.1f} s, ")
    print(f"run bare {alone:.1f} s (x {statistics.median(ratios[1:]):.3f}, median of {AGAIN} cells)")
    print(f"grid / bare: {wall / alone:.3f}")
    print(f"a warm cell beside its rounds: {statistics.median(beside[1:]):.3f} s (most {max(beside[1:]):.3f} s)")
    print(f"the first cell of a process beside its rounds: {beside[0]:.1f} s")


if __name__ == "__main__":
    main()
