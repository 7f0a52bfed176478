"""Measure what adapters and gradients of text give away, and print Markdown tables: `bench_privacy_text.py`.

Runs and victims are drawn by their number. Seconds are those of this process' processor.

    python scripts/bench_privacy_text.py                          everything
    python scripts/bench_privacy_text.py residual --tries 3       some parts, in small
    python scripts/bench_privacy_text.py --json docs/results/privacy_text.json

A part that is measured replaces its lines in an existing JSON file and leaves the others.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("ACCELERATE_USE_CPU", "true")

import numpy as np
import torch
import yaml

from fedllm_sec.attacks.privacy.membership import Membership
from fedllm_sec.attacks.privacy.reading import trained_on
from fedllm_sec.attacks.privacy.seen import Observation, Row
from fedllm_sec.build.members import rows_of
from fedllm_sec.evaluation.membership import auc, tpr_at
from fedllm_sec.protocols import LocalTraining
from fedllm_sec.records.observed import read_found
from fedllm_sec.train import main as train

Line = dict[str, Any]
ALPACA = {
    "name": "{data}/alpaca", "train": "train.jsonl", "test": "eval.jsonl",
    "columns": {"text": "instruction", "context": "input", "response": "output"},
    "template": "### Instruction:\n{text}\n\n### Response:\n",
    "template_with_context": "### Instruction:\n{text}\n\n### Input:\n{context}\n\n### Response:\n",
    "answer": "{response}", "max_length": 256, "train_rows": 800,
}  # fmt: skip


def recipe_of(options: Any, seed: int, data: dict[str, Any], lr: float, **more: Any) -> dict[str, Any]:
    """Ordinary local training: 10 clients of 80 rows, 10 steps of AdamW on 8 rows, LoRA r = 16 on all linear layers."""
    return {
        "seed": seed, "rounds": 2, "task": "causal_lm",
        "model": {"name": f"{options.models}/minillama-1m", "lora": {"r": 16, "alpha": 32}},
        "data": {**data, "name": data["name"].format(data=options.data)},
        "clients": {"total": 10, "local_steps": 10, "batch_size": 8, "lr": lr},
        "evaluate": {"rows": 16, "answer_rows": 0, "every": 100}, "compute": {"threads": 1}, **more,
    }  # fmt: skip


def observed(recipe: dict[str, Any]) -> list[dict[str, Any]]:
    """What the privacy attacks of a run learnt, as its privacy.json has it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(yaml.safe_dump({**recipe, "output": {"folder": f"{folder}/run"}}))
        with contextlib.redirect_stdout(sys.stderr):
            if train([str(path)]) != 0:
                sys.exit("the run failed")
        found = read_found(Path(folder) / "run")
    assert found is not None
    return list(found["attacks"])


SCORES: list[dict[str, Any]] = [
    {"score": "loss", "model": "received"}, {"score": "loss"}, {"score": "min_k"}, {"score": "drop"},
    {"score": "reference"}, {"score": "residual"},
    {"score": "loss", "model": "global"}, {"score": "drop", "model": "global"},
    {"score": "reference", "model": "global"},
]  # fmt: skip


def of_membership(options: Any) -> Iterator[Line]:
    """Alpaca, one client of 10, 80 members and 300 others, by round."""
    for lr, tries in ((1e-3, 2), (3e-3, 3)):
        yield from _membership(options, lr, options.tries or tries)


def _membership(options: Any, lr: float, tries: int) -> Iterator[Line]:
    found: dict[tuple[str, str, int], list[tuple[float, float]]] = {}
    seconds: dict[tuple[str, str], float] = {}
    for seed in range(tries):
        attack = {
            "privacy": [{"name": "membership", **score} for score in SCORES],
            "observe": {"rounds": [1, 2], "clients": [0], "own_rows": 200, "others": 300},
        }
        for made in observed(recipe_of(options, seed, ALPACA, lr, enable_attack=True, attack=attack)):
            score, model = made["settings"]["score"], made["settings"].get("model", "client")
            seconds[score, model] = seconds.get((score, model), 0) + made["seconds"] / len(made["observations"]) / tries
            for one in made["observations"]:
                place = (score, model, one["round"])
                found.setdefault(place, []).append((one["auc"]["value"], one["tpr"]["value"]))
    for (score, model, r), pairs in found.items():
        yield {
            "attack": f"membership, {score}", "model": model, "lr": lr, "round": r, "updates": len(pairs),
            **{f"{name}_{what}": of(x) for name, x in zip(("auc", "tpr"), zip(*pairs, strict=True), strict=True)
               for what, of in (("mean", statistics.fmean), ("least", min), ("most", max))},
            "seconds": seconds[score, model],
        }  # fmt: skip


# ---------------------------------------------------------------- one client's steps, by hand


@functools.cache
def victim(models: str, data: str, kind: str, lora: int | None, targets: str = "all-linear") -> tuple[Any, list[Row]]:
    """A task with a fresh adapter of this rank (None: the whole model), and rows of at most 64 tokens."""
    from accelerate import Accelerator

    from fedllm_sec.build.federation import assemble
    from fedllm_sec.build.names import checked
    from fedllm_sec.build.plan import planned
    from fedllm_sec.rounds.compute import Machine

    raw = recipe_of(argparse.Namespace(models=models, data=data), 0, KINDS[kind], 1e-3)
    raw["data"] |= {"max_length": 64, "too_long": "drop", "train_rows": 4000}
    lists = targets if targets == "all-linear" else targets.split()
    raw["model"]["lora"] = None if lora is None else {"r": lora, "alpha": 2 * lora, "target_modules": lists}
    recipe = checked(raw)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = assemble(planned(recipe), Machine(Accelerator(), recipe.compute.placement))
    rows = rows_of(made.evaluation.fitted.encoded, "response")  # type: ignore[union-attr]
    rows += [row for client in made.clients for row in rows_of(client.shard, "response")]
    return made.task, list(dict.fromkeys(rows))


KINDS = {"alpaca": ALPACA}


def delta_seen(task: Any, rows: list[Row], batch: int, optimizer: str, lr: float, number: int) -> Observation:
    """The delta of one epoch over these rows."""
    training = LocalTraining(batch, steps=len(rows) // batch, optimizer=optimizer, lr=lr, max_grad_norm=None)
    seen = Observation(
        task.initial * 0, "delta", task.initial, task.layout, task.model, rows=batch, steps=len(rows) // batch,
        size=len(rows), training=training,
    )  # fmt: skip
    sent = trained_on(seen, rows, 0, number) - task.initial
    return functools.partial(Observation, **{**vars(seen), "sent": sent})()


def of_residual(options: Any) -> Iterator[Line]:
    """Alpaca rows of at most 64 tokens, one a step, against 300 others; scores of all victims pooled."""
    for rank in (64, 128):
        for optimizer, lr in (("sgd", 0.1), ("adamw", 1e-3)):
            for steps in (1, 2, 4, 8, 16):
                yield _residual(options, rank, optimizer, lr, steps)


def _residual(options: Any, rank: int, optimizer: str, lr: float, steps: int) -> Line:
    task, rows = victim(options.models, options.data, "alpaca", rank)
    found, hits, prefixes, begun = [], [], [], time.process_time()
    for number in range(options.tries or 10):
        order = np.random.default_rng(number).permutation(len(rows))
        members, others = ([rows[i] for i in part] for part in (order[:steps], order[steps : steps + 300]))
        seen = delta_seen(task, members, 1, optimizer, lr, number)
        seen = functools.partial(Observation, **{**vars(seen), "candidates": members + others})()
        scores = Membership(score="residual")(seen).scores.numpy()
        found.append(auc(scores[:steps], scores[steps:]))
        hits.append(tpr_at(scores[:steps], scores[steps:]))
        prefixes.append(len({row.ids[:k] for row in members for k in range(1, len(row.ids))}))
    print(f"  r={rank} {optimizer} {steps}: {np.mean(found):.3f} {min(found):.3f}", file=sys.stderr, flush=True)
    return {
        "attack": "membership, residual", "r": rank, "optimizer": optimizer, "steps": steps,
        "prefixes": statistics.fmean(prefixes), "auc_mean": statistics.fmean(found), "auc_least": min(found),
        "tpr_mean": statistics.fmean(hits), "tries": len(found),
        "seconds": (time.process_time() - begun) / len(found),
    }  # fmt: skip


# ---------------------------------------------------------------- tables

PARTS: dict[str, Callable[[Any], Iterator[Line]]] = {"membership": of_membership, "residual": of_residual}
COLUMNS: dict[str, dict[str, str]] = {
    "membership": {
        "attack": "{attack}", "model": "{model}", "lr": "{lr}", "round": "{round}", "AUC": "{auc_mean:.2f}",
        "least to most": "{auc_least:.2f} to {auc_most:.2f}", "TPR at 1 % FPR": "{tpr_mean:.2f}",
        "updates": "{updates}", "s": "{seconds:.1f}",
    },
    "residual": {
        "r": "{r}", "optimizer": "{optimizer}", "steps": "{steps}", "prefixes": "{prefixes:.0f}",
        "AUC": "{auc_mean:.3f}", "least": "{auc_least:.2f}", "TPR at 1 % FPR": "{tpr_mean:.2f}", "tries": "{tries}",
        "s": "{seconds:.1f}",
    },
}  # fmt: skip
NAMED = ("attack", "model", "lr", "round", "r", "optimizer", "steps")  # what tells a line from all others


def table(part: str, lines: list[Line]) -> str:
    columns = COLUMNS[part]
    out = [" | ".join(columns), " | ".join("---" for _ in columns)]
    out += [" | ".join(form.format(**line) for form in columns.values()) for line in lines]
    return "\n".join(f"| {text} |" for text in out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), choices=[*PARTS, []], help="of the measurement")
    parser.add_argument("--tries", type=int, help="runs or victims of a line; without it, as in docs/privacy.md")
    parser.add_argument("--data", default="../shared/data", help="folder of the data sets")
    parser.add_argument("--models", default="../shared/models", help="folder of the models")
    parser.add_argument("--json", type=Path, help="write the lines there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    known = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    for part in options.parts:
        lines = list(PARTS[part](options))
        print(table(part, lines), flush=True)
        known = {name: line for name, line in known.items() if line["part"] != part}
        known |= {", ".join(str(line[k]) for k in NAMED if k in line): {"part": part, **line} for line in lines}
        if options.json:
            options.json.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
