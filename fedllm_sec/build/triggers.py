"""trigger.json: a few held-out images without and with the trigger, and what the trained model says to both."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fedllm_sec.build.parts import of_rows
from fedllm_sec.build.pictures import png
from fedllm_sec.data.arrays import subset
from fedllm_sec.errors import AttackError
from fedllm_sec.evaluation.arrays import ArrayEvaluation
from fedllm_sec.protocols import Labelled
from fedllm_sec.seeds import generator_for
from fedllm_sec.tasks.classify import Classify

NAME = "trigger.json"
SHOWN = 4  # images
TRIED = 40  # held-out rows that are looked at for them
TIMES = 10  # as bright the difference is drawn


def pairs(attack: Any, test: Labelled, seed: int) -> tuple[Labelled, Labelled] | None:
    """The same held-out rows, drawn by the seed, as they are and as the attack's probe has them.

    None where the attack changes no pixel of them, or its images cannot be drawn.
    """
    if test.x.ndim != 4 or test.x.shape[1] not in (1, 3):
        return None
    order = torch.randperm(len(test.y), generator=generator_for(seed, "shown triggers")).tolist()
    found: list[tuple[Labelled, Labelled]] = []
    for row in order[:TRIED]:
        one = subset(test, [row])
        try:
            made = attack.probe(one)
        except AttackError:  # some need more than a row to find theirs
            continue
        made = of_rows(made, one, "attack.data.0: probe")
        if len(made.y) == 1 and not torch.equal(made.x, one.x):
            found.append((one, made))
        if len(found) == SHOWN:
            break
    if not found:
        return None
    clean, triggered = (
        replace(parts[0], **{k: torch.cat([getattr(part, k) for part in parts]) for k in ("x", "y", "poisoned")},
                fixed=None)
        for parts in zip(*found, strict=True)
    )  # fmt: skip
    return clean, triggered


def shown(evaluation: Any, task: Any) -> dict[str, Any] | None:
    """Each pair as PNG files, with the right class, the wanted one and what the model says to both (-1: nothing).

    `learnt` is whether the trigger was learnt in this run, so that another run's is another.
    """
    if not isinstance(evaluation, ArrayEvaluation) or evaluation.pairs is None or not isinstance(task, Classify):
        return None
    clean, triggered = evaluation.pairs
    rows = range(len(clean.y))
    training = task.model.training
    task.model.eval()
    before, after = (task.score(part, rows)[:, 1].long().tolist() for part in evaluation.pairs)
    task.model.train(training)
    images = [
        {
            "right": int(clean.y[i]), "wanted": int(triggered.y[i]), "said": before[i], "said_triggered": after[i],
            "clean": png(clean.x[i]), "triggered": png(triggered.x[i]),
            "learnt": evaluation.learnt,
            "difference": png((0.5 + TIMES * (triggered.x[i] - clean.x[i])).clamp(0, 1)),
        }
        for i in rows
    ]  # fmt: skip
    return {"images": images}
