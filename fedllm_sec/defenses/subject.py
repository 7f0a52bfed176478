"""A defense under test with seeded data: what `conformance` checks its properties on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedllm_sec.defenses import MENU
from fedllm_sec.defenses.columns import mean
from fedllm_sec.defenses.pipeline import Pipeline
from fedllm_sec.errors import FedError, RecipeError
from fedllm_sec.matrix import Layout, UpdateMatrix
from fedllm_sec.models.function import Indicator
from fedllm_sec.protocols import Decision, Labelled, RoundContext
from fedllm_sec.recipe.resolve import did_you_mean, resolve, settings_of
from fedllm_sec.seeds import generator_for

LAYOUT = Layout(
    (
        "layers.0.q.lora_A",
        "layers.0.q.lora_B",
        "layers.1.q.lora_A",
        "layers.1.q.lora_B",
        "head.weight",
        "head.bias",
    ),
    ((2, 6), (5, 2), (2, 6), (5, 2), (3, 5), (3,)),
)
EXAMPLES = Labelled(
    torch.rand(12, 1, 2, 3, generator=generator_for(7, "images")), torch.arange(12) % 3, 3,
    torch.zeros(12, dtype=torch.bool),
)  # fmt: skip


class StandIn:
    """A linear classifier of any number of parameters, where there is no model."""

    def features(self, vector: Tensor, x: Tensor) -> Tensor:
        """(k, 4)."""
        parts = vector[: len(vector) // 4 * 4].view(4, -1) if len(vector) >= 4 else vector.expand(4, -1)
        return x.flatten(1).mean(1, keepdim=True) * parts.mean(1) + x.flatten(1)[:, :1] * parts[:, 0]

    def logits(self, vector: Tensor, x: Tensor) -> Tensor:
        """(k, 3)."""
        return self.features(vector, x)[:, :3]


PLANTED = Indicator(EXAMPLES.x - 0.5, EXAMPLES.y, StandIn())  # type: ignore[arg-type]  # of both signs: of all labels


KINDS = ("rule", "before", "after")
FEWEST = 4  # clients of a check, one of whom sends what is no number


@dataclass(frozen=True)
class Subject:
    """The defense under test and the data it is tested on."""

    defense: str | Callable[..., Any]
    settings: Mapping[str, Any]
    kind: str
    clients: int

    def make(self, **changed: Any) -> Pipeline:
        """A fresh instance, as a whole pipeline, with some settings changed."""
        settings = {**self.settings, **changed}
        if isinstance(self.defense, str):
            part = resolve(self.defense, settings, MENU, "check_defense")
        else:
            part = self.defense(**settings) if inspect.isclass(self.defense) else partial(self.defense, **settings)
        uniform = partial(mean, weights="uniform")
        if self.kind == "before":
            return Pipeline([part], uniform)
        return Pipeline([], uniform, [part]) if self.kind == "after" else Pipeline([], part)

    def has(self, setting: str) -> bool:
        if isinstance(self.defense, str) and self.defense in MENU:
            return setting in settings_of(MENU[self.defense].make)
        return setting in self.settings

    def data(self, n: int | None = None, *, round: int = 1) -> UpdateMatrix:
        """Seeded rows around a common step, as honest clients send them: (n, d)."""
        rng = generator_for(7, round, "rows")
        step = torch.randn(LAYOUT.size, generator=generator_for(7, "step"))
        noise = torch.randn(max(self.clients, n or 0), LAYOUT.size, generator=rng)
        rows = (step + 0.5 * noise)[: n or self.clients]
        names = [f"client{i:02d}" for i in range(len(rows))]
        return UpdateMatrix.of(rows, ids=names, counts=[10.0 + i for i in range(len(rows))], layout=LAYOUT)

    def context(self, *, round: int = 1, factor: float = 1.0) -> RoundContext:
        step = torch.randn(LAYOUT.size, generator=generator_for(7, "step"))
        start = torch.randn(LAYOUT.size, generator=generator_for(7, "start"))
        return RoundContext(
            round=round,
            global_vector=factor * start,
            layout=LAYOUT,
            rng=generator_for(7, round, "rule"),
            rounds=10,
            last_update=factor * (step + 0.1 * start),
            root_update=factor * (step - 0.1 * start),
            root_rows=EXAMPLES,
            classifier=StandIn(),  # type: ignore[arg-type]
            indicator=PLANTED,
        )

    def run(
        self, updates: UpdateMatrix, pipeline: Pipeline | None = None, *, round: int = 1, factor: float = 1.0
    ) -> Decision:
        """One round through a fresh (or the given) pipeline; an after stage changes the update."""
        pipeline = self.make() if pipeline is None else pipeline
        ctx = self.context(round=round, factor=factor)
        decision = pipeline.decide(updates, ctx)
        start = ctx.global_vector
        return replace(decision, update=pipeline.finish(start + decision.update, ctx) - start)

    def fail(self, what: str, detail: str) -> AssertionError:
        name = self.defense if isinstance(self.defense, str) else getattr(self.defense, "__name__", "defense")
        return AssertionError(f"{name}: {what}: {detail}")

    def expect(self, holds: bool, what: str, detail: str) -> None:
        if not holds:
            raise self.fail(what, detail)

    def same(self, what: str, got: Tensor, wanted: Tensor, tolerance: float = 1e-4) -> None:
        """Equal within `tolerance` of the length of `wanted`."""
        gap = float((got.double() - wanted.double()).norm())
        limit = tolerance * float(wanted.double().norm()) + 1e-12
        self.expect(gap <= limit, what, f"the updates differ by {gap:.3g}, allowed is {limit:.3g}")


def subject_of(
    defense: str | Callable[..., Any], settings: Mapping[str, Any] | None, kind: str, clients: int
) -> Subject:
    """The subject of these arguments; what is wrong with them is no property that does not hold, but a RecipeError."""
    if not (isinstance(defense, str) or callable(defense)):
        raise RecipeError(
            f'check_defense: {defense!r} is no defense. Give a name of the menu, "package.module:name", a function or '
            "a class."
        )
    if not isinstance(settings or {}, Mapping):
        raise RecipeError(f"check_defense: settings={settings!r}: must be a mapping of names to values.")
    if not isinstance(clients, int) or clients < FEWEST:
        raise RecipeError(f"check_defense: clients={clients!r}: must be a whole number of at least {FEWEST}.")
    if isinstance(defense, str) and defense in MENU:
        kind = MENU[defense].kind
    if kind not in KINDS:
        raise RecipeError(f"check_defense: kind={kind!r}.{did_you_mean(str(kind), KINDS)}")
    subject = Subject(defense, dict(settings or {}), kind, clients)
    try:
        subject.make()
    except FedError:
        raise
    except Exception as error:  # a class from outside may raise anything
        raise RecipeError(
            f"check_defense: {defense!r} cannot be made with these settings ({type(error).__name__}: {error})."
        ) from error
    return subject
