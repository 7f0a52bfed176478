"""What a grid costs beyond its cells: its wall time against their training and evaluation run bare, and a warm start.

    python scripts/bench_grid.py
    python scripts/bench_grid.py --sharing late|quick [--cells 20] [KEY=VALUE ...]

31 small cells on the model `tiny` (5 attacks x 6 defenses and the twin). Printed are (a) the wall time of the whole
command, from the start of Python to the written page, over the seconds that training and evaluation of its cells took,
these scaled by what the same cells take in a bare loop without folder, checkpoint or table; and (b) what a cell of a
warm process takes beside its rounds: to start, to save its adapter and to close its folder. About three minutes.

With --sharing: the processor time of the whole command, in one process, over that with --no-share, where every cell
makes all of its rows and passes over held-out rows by itself. `late` is 5 attacks x 6 defenses on scikit-learn's digits
(LeNet, 10 clients, 6 rounds, evaluated after each) whose attacks begin in round 4, `quick` recipes/grids/quick.yaml.
`--cells` runs the first so many, KEY=VALUE changes the recipe. `late` takes some eight minutes of a core.
"""

from __future__ import annotations

import argparse
import csv
import resource
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
from fedllm_sec.report.grid.folder import read_shared
from fedllm_sec.train import quiet

QUICK = Path(__file__).parents[1] / "recipes" / "grids" / "quick.yaml"
SMALL = {
    "rounds": 2,
    "clients": {"total": 6, "local_steps": 3},
    "attack": {"malicious": {"count": 1}},
    "evaluate": {"every": 2, "rows": 60, "attack_rows": 40},
}
STAMP = [{"name": "pixel_trigger", "target": 0, "rate": 0.5, "size": 3}]
LATE: dict[str, Any] = {
    "base": {
        "rounds": 6,
        "task": "classify",
        "model": {"name": "lenet"},
        "data": {"name": "digits"},
        "clients": {"total": 10, "local_epochs": 2, "batch_size": 16, "lr": 2e-3, "partition": {"name": "iid"}},
        "attack": {"malicious": {"count": 3}, "start": 4, "data": STAMP, "update": []},
        "compute": {"threads": 1},
    },
    "axes": {
        "attack": {
            "trigger": {},
            "replacement": {"update": [{"name": "model_replacement", "gamma": 3.0}]},
            "flip": {"data": [], "update": [{"name": "byzantine_flip", "scale": 3.0}]},
            "random": {"data": [], "update": [{"name": "byzantine_random", "scale": 10.0}]},
            "alie": {"data": [], "update": [{"name": "alie", "z": 1.5}], "knowledge": "cohort"},
        },
        "defense": {
            "none": None,
            "norm_clipping": {"before": [{"name": "norm_clipping"}], "rule": {"name": "mean"}},
            "median": {"rule": {"name": "median"}},
            "trimmed_mean": {"rule": {"name": "trimmed_mean", "f": 3}},
            "multi_krum": {"rule": {"name": "multi_krum", "f": 3}},
            "geometric_median": {"rule": {"name": "geometric_median"}},
        },
    },
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


def spent_on(command: list[str]) -> float:
    """Seconds of processor time of a command and of what it starts."""

    def now() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before = now()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return now() - before


def sharing(which: str, cells_run: int | None, changes: list[str]) -> None:
    """Processor time with and without sharing, and what was shared."""
    with tempfile.TemporaryDirectory() as place:
        folder, path = Path(place), QUICK
        if which == "late":
            path = folder / "late.yaml"
            path.write_text(yaml.safe_dump(LATE, sort_keys=False))
        order = list(grid.load(path, changes).run_order())[:cells_run]
        some = [word for cell in order for word in ("--only", cell.slug)] if cells_run else []
        command = [sys.executable, "-m", "fedllm_sec.benchmark", str(path), *changes, *some]
        shared = spent_on([*command, f"output.folder={folder / 'shared'}"])
        told = read_shared(folder / "shared")
        print(f"{which}, {len(order)} cells: {shared:.1f} s of processor time; {told}", flush=True)
        apart = spent_on([*command, f"output.folder={folder / 'apart'}", "--no-share"])
    print(f"with --no-share: {apart:.1f} s; shared / not shared: {shared / apart:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sharing", choices=("late", "quick"))
    parser.add_argument("--cells", type=int)
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()
    if options.sharing is not None:
        sharing(options.sharing, options.cells, options.changes)
    else:
        beyond_its_cells()


def beyond_its_cells() -> None:
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
