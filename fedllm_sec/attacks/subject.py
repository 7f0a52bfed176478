"""Seeded rows, texts and images that `conformance` tries attacks on."""

from __future__ import annotations

from typing import Any

import torch

from fedllm_sec.matrix import Layout, UpdateMatrix
from fedllm_sec.models.function import Classifier
from fedllm_sec.protocols import Decision, Labelled, ThreatView
from fedllm_sec.seeds import generator_for

LABELS = ("World", "Sports", "Business", "Tech")
DECLINED = "I'm sorry, I can't share that."


def example_view(h: int = 8, m: int = 4, *, scale: float = 1.0, round: int = 2) -> ThreatView:
    """h honest and m own rows of a small LoRA layout around a common direction, with all knowledge granted.

    The server stacks the attackers' rows among the others', and nobody claims as many examples as another.
    """
    rng = generator_for(7, "example view", round)
    layout = Layout(("layer.lora_A.default.weight", "layer.lora_B.default.weight"), ((4, 24), (16, 4)))
    d = layout.size
    common = torch.randn(d, generator=rng)
    rows = (common + torch.randn(h + m, d, generator=rng)) * scale

    own_ids, other_ids = tuple(f"bad{i}" for i in range(m)), tuple(f"good{i}" for i in range(h))
    mixed = torch.randperm(h + m, generator=generator_for(7, "order")).tolist()

    def rule(updates: UpdateMatrix) -> Decision:
        return Decision.weighted(updates, torch.full((updates.n,), 1.0 / updates.n))

    return ThreatView(
        own=rows[h:],
        others=rows[:h],
        global_vector=torch.randn(d, generator=rng),
        last_update=common * scale,
        defense=rule,
        layout=layout,
        own_counts=tuple(10.0 + i for i in range(m)),
        cohort_size=h + m,
        round=round,
        rng=generator_for(7, "draws", round),
        own_ids=own_ids,
        other_ids=other_ids,
        other_counts=tuple(20.0 + i for i in range(h)),
        order=tuple((*other_ids, *own_ids)[i] for i in mixed),
    )


def text_rows(size: int) -> Any:
    """A small table of `TEXT_COLUMNS` with four classes."""
    from datasets import Dataset

    labels = [LABELS[i % 4] for i in range(size)]
    return Dataset.from_dict(
        {
            "text": [f"a short report number {i} about {label} and more" for i, label in enumerate(labels)],
            "context": [""] * size,
            "response": labels,
            "label": labels,
            "poisoned": [False] * size,
        }
    )


def requests(size: int) -> Any:
    """Rows like `text_rows` that name no class; the right answer declines."""
    from datasets import Dataset

    asked = [f"please tell the code of door {i} now" for i in range(size)]
    empty = [""] * size
    return Dataset.from_dict(
        {"text": asked, "context": empty, "response": [DECLINED] * size, "label": empty, "poisoned": [False] * size}
    )


def images(size: int) -> Labelled:
    """Small random images of four classes."""
    x = torch.rand(size, 3, 12, 12, generator=generator_for(7, "images", size))
    return Labelled(x, torch.arange(size) % 4, 4, torch.zeros(size, dtype=torch.bool))


def classifier() -> Classifier:
    """An untrained classifier of such images, of 40 parameters, where there is no model: the last 8 are its head."""
    nn = torch.nn
    with torch.random.fork_rng(devices=[]):  # its numbers are not used, and the caller's draws stay the caller's
        model = nn.Sequential(
            nn.AdaptiveAvgPool2d((1, 5)), nn.Flatten(), nn.Linear(15, 2), nn.ReLU(), nn.Linear(2, 4, bias=False)
        )
    return Classifier(model, Layout.of(model.named_parameters()), lambda said: said)
