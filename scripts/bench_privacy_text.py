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
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("ACCELERATE_USE_CPU", "true")

import numpy as np
import torch
import yaml

from fedllm_sec.attacks.privacy.membership import Membership
from fedllm_sec.attacks.privacy.reading import loss_of, trained_on
from fedllm_sec.attacks.privacy.seen import Observation, Row
from fedllm_sec.attacks.privacy.sequences import dager
from fedllm_sec.attacks.privacy.spans import spans_of
from fedllm_sec.attacks.privacy.tokens import inputs_of_tokens, token_set, value_layers
from fedllm_sec.build.members import lineup, rows_of
from fedllm_sec.build.observing import observation, truth
from fedllm_sec.build.recovered import Written
from fedllm_sec.errors import AttackError
from fedllm_sec.evaluation.membership import auc, tpr_at
from fedllm_sec.protocols import LocalTraining
from fedllm_sec.records.history import read_history
from fedllm_sec.records.observed import read_found
from fedllm_sec.train import main as train

Line = dict[str, Any]
SMALL = "minillama-1m"
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
        "model": {"name": f"{options.models}/{SMALL}", "lora": {"r": 16, "alpha": 32}},
        "data": {**data, "name": data["name"].format(data=options.data)},
        "clients": {"total": 10, "local_steps": 10, "batch_size": 8, "lr": lr},
        "evaluate": {"rows": 16, "answer_rows": 0, "every": 100}, "compute": {"threads": 1}, **more,
    }  # fmt: skip


def observed(recipe: dict[str, Any], kept: str | None = None) -> list[dict[str, Any]]:
    """What the privacy attacks of a run learnt, as its privacy.json has it; the run is left where it is `kept`."""
    if kept is None:
        with tempfile.TemporaryDirectory() as folder:
            return observed(recipe, folder)
    path = Path(kept) / "recipe.yaml"
    path.write_text(yaml.safe_dump({**recipe, "output": {"folder": f"{kept}/run"}}))
    with contextlib.redirect_stdout(sys.stderr):
        if train([str(path)]) != 0:
            sys.exit("the run failed")
    found = read_found(Path(kept) / "run")
    assert found is not None
    return list(found["attacks"])


def assembled(raw: dict[str, Any]) -> tuple[Any, Any]:
    """The recipe, and its federation before the first round."""
    from accelerate import Accelerator

    from fedllm_sec.build.federation import assemble
    from fedllm_sec.build.names import checked
    from fedllm_sec.build.plan import planned
    from fedllm_sec.rounds.compute import Machine

    recipe = checked(raw)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return recipe, assemble(planned(recipe), Machine(Accelerator(), recipe.compute.placement))


def kept_of(raw: dict[str, Any], kept: str) -> Iterator[tuple[Observation, Callable[[Any], Any]]]:
    """What was kept of client 0 in each round of such a run, with its line-up, and who judges what is made of it."""
    recipe, made = assembled(raw)
    for record in read_history(Path(kept) / "run"):
        seen, client = observation(recipe, made, Path(kept) / "run", record, made.clients[0].id, record.round)
        rows = lineup(recipe, made, client, truth(made, client, seen, record.round))
        yield rows.shown(seen), rows.judged


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


def of_guarded(options: Any) -> Iterator[Line]:
    """Membership by the drop of losses, as above, of a row that is shortened to 1.0, with noise of a length or none."""
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for seed in range(options.tries or 2):
        attack = {
            "privacy": [{"name": "membership"}, {"name": "membership", "model": "global"}],
            "observe": {"rounds": [1, 2], "clients": [0], "others": 300},
        }
        raw = recipe_of(options, seed, ALPACA, 3e-3, enable_attack=True, attack=attack)
        with tempfile.TemporaryDirectory() as folder:
            made = observed(raw, folder)
            for one in (one for attack in made for one in attack["observations"]):
                guard = "none" if one in made[0]["observations"] else "none, final global adapter"
                found.setdefault((guard, one["round"]), []).append((one["auc"]["value"], one["tpr"]["value"]))
            for seen, judge in kept_of(raw, folder):
                short = seen.sent * min(1.0, 1.0 / float(seen.sent.norm()))
                noise = torch.randn(len(short), generator=torch.Generator().manual_seed(seed))
                for length in (0.0, 0.1, 1.0, 10.0):
                    sent = short + noise * (length / float(noise.norm()))
                    told = judge(Membership()(replace(seen, sent=sent))).told
                    guard = f"clipped to 1.0, noise of length {length:g}"
                    found.setdefault((guard, seen.round), []).append((told.auc, told.tpr))
        print(f"  seed {seed}: {found}", file=sys.stderr, flush=True)
    for (guard, r), pairs in found.items():
        areas, hits = zip(*pairs, strict=True)
        yield {
            "attack": "membership, drop", "model": guard, "round": r, "tries": len(pairs),
            "auc_mean": statistics.fmean(areas), "auc_least": min(areas), "auc_most": max(areas),
            "tpr_mean": statistics.fmean(hits),
        }  # fmt: skip


def _defended(**block: Any) -> dict[str, Any]:
    return {"enable_defense": True, "defense": block}


CANARIES: dict[str, dict[str, Any]] = {  # what differs from r = 16 and the mean of 10 clients after 2 rounds
    "r = 16, mean": {},
    "r = 4": {"model": {"lora": {"r": 4, "alpha": 8}}},
    "r = 64": {"model": {"lora": {"r": 64, "alpha": 128}}},
    "median": _defended(rule={"name": "median"}),
    "multi_krum, f = 3": _defended(rule={"name": "multi_krum", "f": 3}),
    "norm_clipping": _defended(before=[{"name": "norm_clipping"}], rule={"name": "mean"}),
    "dp_sgd, epsilon 8": _defended(client=[{"name": "dp_sgd", "epsilon": 8.0}]),
    "dp_sgd, epsilon 50": _defended(client=[{"name": "dp_sgd", "epsilon": 50.0}]),
}


def of_canary(options: Any) -> Iterator[Line]:
    """Secrets in 1, 4 and 16 of 80 rows of one client of 10, two of each; Alpaca rows up to 96 tokens, 2 rounds."""
    data = {
        **ALPACA, "max_length": 96, "too_long": "drop",
        "canaries": {"client": 0, "repetitions": [1, 1, 4, 4, 16, 16]},
    }  # fmt: skip
    models = ("client", "received", "global")
    for name, changed in CANARIES.items():
        found: dict[tuple[str, int], list[tuple[float, bool]]] = {}
        tries = options.tries or 2
        for seed in range(tries):
            raw = recipe_of(options, seed, data, 3e-3)
            raw |= {key: {**raw[key], **value} if key == "model" else value for key, value in changed.items()}
            raw["enable_attack"] = True
            raw["attack"] = {
                "privacy": [{"name": "canary", "model": model} for model in models],
                "observe": {"rounds": [raw["rounds"]], "clients": [0]},
            }
            for made, model in zip(observed(raw), models, strict=True):
                for secret in made["observations"][0]["secrets"]:
                    place = (model, secret["repetitions"])
                    found.setdefault(place, []).append((secret["exposure"], secret["extracted"]))
        print(f"  {name}: {found}", file=sys.stderr, flush=True)
        for (model, times), pairs in found.items():
            bits, said = zip(*pairs, strict=True)
            yield {
                "attack": "canary", "what": name, "model": model, "repetitions": times,
                "bits_mean": statistics.fmean(bits), "bits_least": min(bits), "bits_most": max(bits),
                "said": statistics.fmean(said), "secrets": len(bits), "tries": tries,
            }  # fmt: skip


# ---------------------------------------------------------------- one client's steps, by hand


@functools.cache
def victim(models: str, data: str, kind: str, lora: int | None, name: str = SMALL) -> tuple[Any, list[Row]]:
    """A task with a fresh adapter of this rank (None: the whole model), and rows of at most 64 tokens."""
    raw = recipe_of(argparse.Namespace(models=models, data=data), 0, KINDS[kind], 1e-3)
    raw["data"] |= {"max_length": 64, "too_long": "drop", "train_rows": 4000}
    raw["model"]["lora"] = None if lora is None else {"r": lora, "alpha": 2 * lora}
    raw["model"]["name"] = f"{models}/{name}"
    _, made = assembled(raw)
    rows = rows_of(made.evaluation.fitted.encoded, "response")  # type: ignore[union-attr]
    rows += [row for client in made.clients for row in rows_of(client.shard, "response")]
    return made.task, list(dict.fromkeys(rows))


SST2 = {
    "name": "{data}/sst2", "train": "train.jsonl", "test": "test.jsonl",
    "columns": {"text": "text", "response": "label_text"}, "template": "{text}\nSentiment:", "answer": " {response}",
    "train_rows": 800,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {"alpaca": ALPACA, "sst2": SST2}


def delta_seen(
    task: Any, rows: list[Row], batch: int, optimizer: str, lr: float, number: int, clip: float | None = None
) -> Observation:
    """The delta of one epoch over these rows."""
    training = LocalTraining(batch, steps=len(rows) // batch, optimizer=optimizer, lr=lr, max_grad_norm=clip)
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


def gradient_seen(task: Any, rows: list[Row]) -> Observation:
    """The gradient of the mean loss of this batch at the fresh model."""
    blank = Observation(task.initial * 0, "gradient", task.initial, task.layout, task.model, rows=len(rows))
    vector = task.initial.clone().requires_grad_()
    loss_of(blank, task.layout.split(vector), rows).backward()
    return replace(blank, sent=vector.grad)


SENT: dict[str, Callable[[Any, list[Row]], Observation]] = {
    "gradient": gradient_seen,
    "sgd delta": lambda task, rows: delta_seen(task, rows, len(rows), "sgd", 0.1, 0),
    "adamw delta": lambda task, rows: delta_seen(task, rows, len(rows), "adamw", 1e-3, 0),
}


def of_dager(options: Any) -> Iterator[Line]:
    """SST-2 rows of at most 64 tokens, one batch a victim: what one gradient, or the delta of one step, gives away."""
    cells = [("gradient", rank, batch) for rank in (8, 16, 64, 128, None) for batch in (1, 2, 4)]
    for what, rank, batch in [*cells, ("sgd delta", 64, 1), ("sgd delta", 128, 2), ("adamw delta", 128, 1)]:
        yield _dager(options, what, rank, batch)


def of_smollm2(options: Any) -> Iterator[Line]:
    """The same of a model that people use, in small: 48 times as many embeddings, 576 dimensions."""
    for what, rank, batch in (("gradient", 64, 1), ("gradient", 128, 2), ("adamw delta", 64, 1)):
        yield _dager(options, what, rank, batch, "smollm2-135m-instruct")


def _dager(options: Any, what: str, rank: int | None, batch: int, name: str = SMALL) -> Line:
    """Means over all victims; where the span is full nothing is read, and that counts as 0."""
    task, rows = victim("models" if name != SMALL else options.models, options.data, "sst2", rank, name)
    found: list[tuple[float, float, float, float, float]] = []
    refused, prefixes, begun = 0, [], time.process_time()
    for number in range(options.tries or 10):
        mine = [rows[i] for i in np.random.default_rng(number).permutation(len(rows))[:batch]]
        seen = SENT[what](task, mine)
        prefixes.append(len({row.ids[:k] for row in mine for k in range(1, len(row.ids))}))
        try:
            tokens = Written(mine).judged(token_set(seen)).recall
        except AttackError:
            tokens = 0.0
        try:
            read = Written(mine).judged(made := dager(seen))
            right = {row.ids[:-1] for row in mine} & set(made.rows or ())
            share = len(right) / max(1, len(made.rows or ()))
            found.append((tokens, read.exact or 0.0, share, read.rouge_1 or 0.0, read.rouge_2 or 0.0))
        except AttackError:
            refused += 1
            found.append((tokens, 0.0, 0.0, 0.0, 0.0))
    recall, exact, right_rows, one, two = (statistics.fmean(values) for values in zip(*found, strict=True))
    print(f"  {what} r={rank} batch {batch}: {recall:.3f} {exact:.3f}", file=sys.stderr, flush=True)
    return {
        "attack": "dager", "model": name, "what": what, "r": rank or "whole model", "batch": batch,
        "prefixes_least": min(prefixes), "prefixes_most": max(prefixes), "recall": recall, "exact": exact,
        "right": right_rows, "rouge_1": one, "rouge_2": two, "refused": refused, "tries": len(found),
        "seconds": (time.process_time() - begun) / len(found),
    }  # fmt: skip


def of_adam(options: Any) -> Iterator[Line]:
    """What the first step of AdamW on a fresh adapter still tells of the tokens, by what is made of it and by clipping.

    Tokens are read by token_set, from the gradient behind the step (attacks.privacy.adam). signs: the delta as it is,
    how its longest directions in the first layer's v_proj tell tokens that were fed from the rest of the vocabulary.
    layers: the same, the shares that lie outside multiplied over v_proj, q_proj and k_proj.
    """
    for rank, batch, clip in ((64, 1, None), (64, 1, 1.0), (128, 1, 1.0), (128, 2, 1.0), (128, 4, 1.0), (16, 1, 1.0)):
        yield _adam(options, rank, batch, clip)


def _adam(options: Any, rank: int, batch: int, clip: float | None) -> Line:
    task, rows = victim(options.models, options.data, "sst2", rank)
    found, precision, areas, tokens, begun = [], [], {"signs": [], "layers": []}, [], time.process_time()
    refused = 0
    for number in range(100, 100 + (options.tries or 5)):  # its threshold was chosen on 0 to 4
        mine = [rows[i] for i in np.random.default_rng(number).permutation(len(rows))[:batch]]
        seen = delta_seen(task, mine, batch, "adamw", 1e-3, 0, clip)
        fed = {token for row in mine for token in row.ids[:-1]}
        tokens.append(len(fed))
        first = value_layers(seen, "adam")[0]
        inputs = inputs_of_tokens(seen, first)
        member = np.isin(np.arange(len(inputs)), list(fed))
        shares = [
            spans_of(seen, [first.replace("v_proj", name)])[0].residual(inputs).clamp_min(1e-12).log().numpy()
            for name in ("v_proj", "q_proj", "k_proj")
        ]
        areas["signs"].append(auc(-shares[0][member], -shares[0][~member]))
        areas["layers"].append(auc(-sum(shares)[member], -sum(shares)[~member]))
        try:
            read = Written(mine).judged(token_set(seen))
            found.append(read.recall)
            precision.append(read.precision or 0.0)
        except AttackError:
            refused += 1
            found.append(0.0)
    print(f"  r={rank} batch {batch} clip {clip}: {found} {precision} {areas}", file=sys.stderr, flush=True)
    return {
        "attack": "token_set, adamw undone", "r": rank, "batch": batch, "clip": clip or "none",
        "tokens_least": min(tokens), "tokens_most": max(tokens), "recall": statistics.fmean(found),
        "precision": statistics.fmean(precision) if precision else None, "refused": refused,
        **{f"auc_{name}": statistics.fmean(values) for name, values in areas.items()}, "tries": len(found),
        "seconds": (time.process_time() - begun) / len(found),
    }  # fmt: skip


# ---------------------------------------------------------------- tables

PARTS: dict[str, Callable[[Any], Iterator[Line]]] = {
    "membership": of_membership,
    "guarded": of_guarded,
    "canary": of_canary,
    "residual": of_residual,
    "dager": of_dager,
    "smollm2": of_smollm2,
    "adam": of_adam,
}
COLUMNS: dict[str, dict[str, str]] = {
    "membership": {
        "attack": "{attack}", "model": "{model}", "lr": "{lr}", "round": "{round}", "AUC": "{auc_mean:.2f}",
        "least to most": "{auc_least:.2f} to {auc_most:.2f}", "TPR at 1 % FPR": "{tpr_mean:.2f}",
        "updates": "{updates}", "s": "{seconds:.1f}",
    },
    "guarded": {
        "guard": "{model}", "round": "{round}", "AUC": "{auc_mean:.2f}",
        "least to most": "{auc_least:.2f} to {auc_most:.2f}", "TPR at 1 % FPR": "{tpr_mean:.2f}", "tries": "{tries}",
    },
    "canary": {
        "run": "{what}", "model": "{model}", "rows with it": "{repetitions}",
        "bits of 10": "{bits_mean:.1f}", "least to most": "{bits_least:.1f} to {bits_most:.1f}", "said": "{said:.2f}",
        "secrets": "{secrets}", "tries": "{tries}",
    },
    "residual": {
        "r": "{r}", "optimizer": "{optimizer}", "steps": "{steps}", "prefixes": "{prefixes:.0f}",
        "AUC": "{auc_mean:.3f}", "least": "{auc_least:.2f}", "TPR at 1 % FPR": "{tpr_mean:.2f}", "tries": "{tries}",
        "s": "{seconds:.1f}",
    },
    "adam": {
        "r": "{r}", "batch": "{batch}", "clipped to": "{clip}", "tokens": "{tokens_least} to {tokens_most}",
        "tokens read": "{recall:.2f}", "n/a": "{refused}", "AUC of signs": "{auc_signs:.2f}",
        "over layers": "{auc_layers:.2f}", "tries": "{tries}", "s": "{seconds:.1f}",
    },
    "dager": {
        "sent": "{what}", "r": "{r}", "batch": "{batch}", "prefixes": "{prefixes_least} to {prefixes_most}",
        "tokens read": "{recall:.2f}", "rows exact": "{exact:.2f}", "ROUGE-1": "{rouge_1:.2f}",
        "ROUGE-2": "{rouge_2:.2f}", "of what is said, right": "{right:.2f}",
        "n/a": "{refused}", "tries": "{tries}", "s": "{seconds:.1f}",
    },
}  # fmt: skip
NAMED = (
    "attack",
    "model",
    "lr",
    "round",
    "what",
    "repetitions",
    "r",
    "optimizer",
    "steps",
    "batch",
    "clip",
)  # tells lines apart


def table(part: str, lines: list[Line]) -> str:
    columns = COLUMNS["dager" if part == "smollm2" else part]
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
        known, lines = {name: line for name, line in known.items() if line["part"] != part}, []
        for line in PARTS[part](options):
            lines.append(line)
            known[", ".join(str(line[k]) for k in NAMED if k in line)] = {"part": part, **line}
            if options.json:  # as it goes: a part takes minutes
                options.json.write_text(json.dumps(known, indent=1) + "\n")
        print(table(part, lines), flush=True)


if __name__ == "__main__":
    main()
