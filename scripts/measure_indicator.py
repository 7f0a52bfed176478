"""Whether backdoor_indicator tells attackers: `scripts/measure_indicator.py [--source NAME] [--csv FILE]`.

ResNet-8 with BatchNorm on eight classes of CIFAR-10 at 16 x 16 (0 to 7 of cifar10_jpeg_10k.npz, 8,000 images), made
by 6 epochs on all of them. Then 20 clients (Dirichlet 0.5, some 400 rows each), 8 a round, 2 of them poison 30 % of
their rows with a pixel pattern; 2 epochs of SGD with momentum, lr 0.1. Three seeds, two rounds each, all pooled.

The indicator: 200 images of `classes` (classes 8 and 9, which the task has not), of `fashion` (Fashion-MNIST) or of
`noise`, in 40 epochs, and the other settings as by default. Beside it the same score where nothing is
planted and the rule drops nobody: what the rows say by themselves. `auc` is attackers against honest clients, `tpr` and
`fpr` the shares refused at the threshold of 0.95, accuracy and attack success those after the second round.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from fedllm_sec.build.federation import build, run
from fedllm_sec.build.names import checked
from fedllm_sec.models.function import Indicator
from fedllm_sec.protocols import Decision
from fedllm_sec.rounds.compute import Machine
from fedllm_sec.rounds.federation import Federation

THRESHOLD, CLASSES = 0.95, 8
SOURCES = ("classes", "fashion", "noise")
TRAINING = {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 5e-4, "batch_size": 64, "max_grad_norm": None}
CLIENTS = {
    **TRAINING, "total": 20, "per_round": 8, "local_epochs": 2, "lr": 0.1,
    "partition": {"name": "dirichlet", "alpha": 0.5, "min_rows": 16},
}  # fmt: skip
ATTACK = {
    "malicious": {"count": 2, "present": 2},
    "data": [{"name": "pixel_trigger", "target": 0, "rate": 0.3}],
}
COLUMNS = ("source", "planted", "auc", "tpr", "fpr", "accuracy", "asr")


class Bench:
    """The two sets in a folder of their own, and the model that all runs begin with."""

    def __init__(self, data: Path, folder: Path) -> None:
        torch.set_num_threads(1)
        images, self.fashion = np.load(data / "cifar10_jpeg_10k.npz"), data / "fashion_mnist_10k.npz"
        for name, wanted in (("task", range(CLASSES)), ("classes", range(CLASSES, 10))):
            own = {part: np.isin(images[f"y_{part}"], wanted) for part in ("train", "test")}
            x = {f"x_{part}": images[f"x_{part}"][at] for part, at in own.items()}
            y = {f"y_{part}": images[f"y_{part}"][at] - wanted[0] for part, at in own.items()}
            np.savez(folder / f"{name}.npz", **x, **y)
        self.folder = folder
        self.warm = cache(self._warm)

    def made(self, seed: int, **changes: Any) -> Federation:
        recipe = {
            "seed": seed, "rounds": 6, "task": "classify", "model": {"name": "resnet", "depth": 8, "norm": "batch"},
            "data": {"name": str(self.folder / "task.npz"), "size": 16, "flip": True},
            "evaluate": {"rows": 800, "attack_rows": 400, "every": 100}, "compute": {"threads": 1}, **changes,
        }  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of classes without names
            made = build(checked(recipe), Machine(Accelerator(cpu=True)))
        assert isinstance(made, Federation)
        return made

    def _warm(self) -> tuple[Tensor, Tensor, float]:
        """Vector, running statistics and accuracy after 6 epochs on all rows."""
        made = self.made(1, clients={**TRAINING, "total": 1, "local_epochs": 1, "lr": 0.05})
        *_, last = run(made, 6)
        assert made.buffers is not None
        return made.vector.clone(), made.buffers.clone(), last.quality["accuracy"]["value"]

    def run(self, seed: int, source: str, planted: bool, rounds: int = 2) -> tuple[list[float], list[float], Any]:
        """The scores of attackers and of honest clients, and the last round's record."""
        name = {"classes": str(self.folder / "classes.npz"), "fashion": str(self.fashion)}.get(source, source)
        rule = {"name": "backdoor_indicator", "source": name, "rows": 200, "epochs": 40, "threshold": THRESHOLD}
        made = self.made(
            seed, rounds=rounds, clients=CLIENTS, enable_attack=True, attack=ATTACK, enable_defense=True,
            defense={"rule": rule},
        )  # fmt: skip
        made.vector, made.buffers, _ = (part.clone() if isinstance(part, Tensor) else part for part in self.warm())
        if not planted:
            self._without(made)
        bad, honest = [], []
        for record in run(made, rounds):
            for id, score in record.scores.items():
                (bad if id in record.malicious else honest).append(score)
        return bad, honest, record

    @staticmethod
    def _without(made: Federation) -> None:
        """Nothing is planted, the indicator is looked for all the same, and nobody is dropped."""
        known, judge = made.planting, made.defense.rule
        assert known is not None
        made.planting = None

        def mean(updates: Any, ctx: Any) -> Decision:
            seen = replace(ctx, indicator=Indicator(known.rows.x, known.rows.y, ctx.classifier))
            everybody = torch.full((updates.n,), 1 / updates.n)
            return Decision.weighted(updates, everybody, scores=judge(updates, seen).scores)

        made.defense.rule = mean

    def row(self, source: str, planted: bool, seeds: int = 3, rounds: int = 2) -> dict[str, Any]:
        """One line of the table."""
        runs = [self.run(seed, source, planted, rounds) for seed in range(1, seeds + 1)]
        bad, honest = (np.concatenate([one[part] for one in runs]) for part in (0, 1))
        above = np.subtract.outer(bad, honest)
        found = ((above > 0).mean() + (above == 0).mean() / 2, (bad >= THRESHOLD).mean(), (honest >= THRESHOLD).mean())
        last = [one[2] for one in runs]
        found += (
            fmean(one.quality["accuracy"]["value"] for one in last),
            fmean(one.attack["asr"]["value"] for one in last),
        )
        return dict(zip(COLUMNS, (source, planted, *(f"{value:.3f}" for value in found)), strict=True))


def table(bench: Bench, source: str, rounds: int) -> Iterator[dict[str, Any]]:
    for planted in (False, True):
        yield bench.row(source, planted, rounds=rounds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the two .npz files")
    parser.add_argument("--source", choices=SOURCES, default="classes", help="where the indicator's images are from")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--csv", type=Path, help="where the table is kept")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench, lines = Bench(options.data, Path(folder)), []
        print(f"begins with an accuracy of {bench.warm()[2]:.3f}", flush=True)
        for line in table(bench, options.source, options.rounds):
            print(", ".join(f"{key} {value}" for key, value in line.items()), flush=True)
            lines.append(line)
    if options.csv is not None:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines)
