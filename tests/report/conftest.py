"""Synthetic run folders with the shape of real ones: the variants of an attack, and odd cases on request."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedllm_sec.evaluation.detection import detection
from fedllm_sec.evaluation.intervals import wilson
from fedllm_sec.records.files import write_json
from fedllm_sec.records.history import RoundRecord, record_line, timing_line
from fedllm_sec.records.inventory import sealed
from fedllm_sec.report.page import render
from fedllm_sec.report.runs import read_runs


def recipe_of(*, rounds: int, clients: int, malicious: int, attack: bool, rule: str | None) -> dict[str, Any]:
    return {
        "seed": 0,
        "rounds": rounds,
        "model": {
            "name": "minillama-1m",
            "dtype": "float32",
            "lora": {"r": 16, "alpha": 32.0, "train": "both"},
        },
        "task": "causal_lm",
        "data": {"name": "ag_news", "template": "{text}\nTopic:", "answer": " {response}"},
        "clients": {"total": clients, "per_round": None, "local_steps": 12, "batch_size": 16, "lr": 0.003},
        "algorithm": {"name": "fedavg"},
        "enable_attack": attack,
        "attack": {
            "malicious": {"count": malicious, "share": None, "ids": None},
            "start": 3,
            "stop": None,
            "every": 1,
            "knowledge": "own",
            "data": [{"name": "text_trigger", "trigger": " cf", "target": " Sports", "rate": 0.5}],
            "local": [],
            "update": [{"name": "model_replacement"}],
        },
        "enable_defense": rule is not None,
        "defense": {"before": [], "rule": {"name": rule or "mean", "f": malicious}, "after": []},
        "evaluate": {"every": 2, "rows": 400, "attack_rows": 120},
        "output": {"folder": "runs/{name}"},
    }


def write_run(
    folder: Path,
    *,
    rounds: int = 20,
    clients: int = 10,
    malicious: int = 3,
    attack: bool = True,
    rule: str | None = None,
    asr: float = 0.97,
    accuracy: float = 0.71,
    label_data: bool = True,
    quarantine: bool = False,
    seed: int = 0,
    change: Callable[[dict[str, Any]], None] = lambda recipe: None,
) -> Path:
    """Write a whole run folder, its recipe changed by `change`, and return it."""
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    settings = recipe_of(rounds=rounds, clients=clients, malicious=malicious, attack=attack, rule=rule)
    change(settings)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    write_json(
        folder / "environment.json",
        {
            "fedllm_sec": version("fedllm_sec"),
            "packages": {"torch": "2.13.0"},
            "device": "cpu",
            "commit": "0123abc",
            "command": "accelerate launch -m fedllm_sec.train recipes/llm/ag_news_backdoor.yaml",
        },
    )
    ids = [str(i) for i in range(clients)]
    bad = set(ids[1 : 1 + malicious]) if attack else set()
    lines, times = [], []
    for r in range(0, rounds + 1):
        record = _round(rng, r, rounds, ids, bad, settings, rule, asr, accuracy, label_data, quarantine)
        if r:  # a history begins with round 1
            lines.append(record_line(record))
            times.append(timing_line(record))
    (folder / "history.jsonl").write_text("".join(lines))
    (folder / "timings.jsonl").write_text("".join(times))
    (folder / "summary.json").write_bytes(sealed({"rounds": rounds, "made": {}}))
    return folder


def _round(
    rng: random.Random,
    r: int,
    rounds: int,
    ids: list[str],
    bad: set[str],
    settings: dict[str, Any],
    rule: str | None,
    asr: float,
    accuracy: float,
    label_data: bool,
    quarantine: bool,
) -> RoundRecord:
    cohort = ids if r else []
    attacking = bool(bad) and r >= 3
    norms = {i: (9.5 if i in bad and attacking else 1.0) * 0.8 * math.exp(rng.gauss(-0.02 * r, 0.18)) for i in cohort}
    quarantined = {}
    if quarantine and r in (4, 9):
        victim = ids[-1 - r % 3]
        norms[victim] = math.nan if r == 4 else math.inf
        quarantined[victim] = "3 of 98304 values are not finite"
    seen = [i for i in cohort if i not in quarantined]
    kept = weights = scores = None
    if rule == "multi_krum" and r:
        scores = {i: norms[i] ** 2 * 6 for i in seen}
        kept = sorted(sorted(seen, key=lambda i: scores[i])[: len(ids) - max(1, len(ids) * 3 // 10)], key=ids.index)
        weights = {i: (1 / len(kept) if i in kept else 0.0) for i in seen}
    elif rule in (None, "mean") and r:
        weights = {i: 1 / len(seen) for i in seen}
    elif rule == "geometric_median" and r:
        inverse = {i: 1 / (0.2 + norms[i]) for i in seen}
        weights = {i: value / sum(inverse.values()) for i, value in inverse.items()}
    done = 1 - math.exp(-r / (rounds / 5))
    measured = r % 2 == 0 or r == rounds
    quality: dict[str, Any] | None = None
    success: dict[str, Any] | None = None
    if measured:
        right = round(400 * min(0.99, 0.25 + (accuracy - 0.25) * done + rng.uniform(-0.01, 0.01)))
        loss = 5.2 - 3.1 * done
        quality = {
            "loss": loss,
            "perplexity": math.exp(loss),
            "accuracy": wilson(right, 400) if label_data else None,
        }
        if bad:
            hit = 0.04 + (asr - 0.04) * (1 - math.exp(-max(0, r - 2) / 2.0))
            success = {
                "asr": wilson(round(120 * max(0.0, min(1.0, hit))), 120),
                "false_trigger": wilson(3 + rng.randrange(3), 120),
            }
    return RoundRecord(
        round=r,
        cohort=cohort,
        malicious=[i for i in cohort if i in bad],
        attacking=attacking,
        losses=dict.fromkeys(cohort, 2.0 - done),
        norms=norms,
        quarantined=quarantined,
        weights=weights,
        kept=kept,
        scores=scores,
        notes={},
        update_norm=0.4,
        skipped=None,
        lora_gap=0.03 if r else None,
        detection=detection(kept, scores, seen, bad) if bad and r else None,
        quality=quality,
        attack=success,
        seconds={"train": 8.0 + rng.random(), "attack": 0.01, "defense": 0.04, "evaluate": 2.0} if r else {},
    )


@pytest.fixture
def make_run() -> Callable[..., Path]:
    return write_run


@pytest.fixture(scope="session")
def whole_comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Attack-free, attacked, and two defenses of which one holds: to be read only."""
    folder = tmp_path_factory.mktemp("runs") / "ag_news_backdoor"
    write_run(folder / "attack-free", attack=False, seed=1)
    write_run(folder / "attacked", accuracy=0.70, seed=2)
    write_run(folder / "multi_krum", rule="multi_krum", asr=0.03, accuracy=0.70, quarantine=True, seed=3)
    write_run(folder / "geometric_median", rule="geometric_median", asr=0.62, accuracy=0.69, seed=4)
    names = ["attack-free", "attacked", "multi_krum", "geometric_median"]
    (folder / "comparison.json").write_text(json.dumps({"variants": names}))
    return folder


@pytest.fixture(scope="session")
def whole_page(whole_comparison: Path) -> str:
    """The page of that comparison, drawn once."""
    return render(read_runs([whole_comparison]), [whole_comparison])


@pytest.fixture
def comparison(whole_comparison: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(whole_comparison, tmp_path / whole_comparison.name))


# ---------------------------------------------------------------- grids


@pytest.fixture(scope="session")
def whole_grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three attacks, two defenses and none, two seeds, all done: to be read only."""
    from tests.report.fake_grid import write_grid

    return write_grid(tmp_path_factory.mktemp("grids") / "quick")


@pytest.fixture
def grid(whole_grid: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(whole_grid, tmp_path / "quick"))


@pytest.fixture(scope="session")
def broken_grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with one cell that failed, one that stopped and one that has not run: its page alone is written."""
    from tests.report.fake_grid import write_grid

    folder = tmp_path_factory.mktemp("grids") / "broken"
    return write_grid(folder, failed=["alie-multi_krum-0"], stopped=["ipm-median-1"], waiting=["ipm-multi_krum-1"])


@pytest.fixture(scope="session")
def split_grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two partitions, one seed."""
    from tests.report.fake_grid import write_grid

    folder = tmp_path_factory.mktemp("grids") / "split"
    return write_grid(folder, attacks=["text_trigger", "ipm"], more={"partition": ["iid", "dirichlet"], "seed": ["0"]})
