"""`check_attack`: what every attack must keep to, for the menu and for outside code.

A broken rule is an AssertionError that says which. Nothing here trains a model; the whole menu takes seconds.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedllm_sec.attacks import MENU, NOT_FINITE
from fedllm_sec.matrix import Layout, UpdateMatrix
from fedllm_sec.protocols import (
    TEXT_COLUMNS,
    Client,
    Decision,
    Labelled,
    LocalContext,
    ThreatView,
)
from fedllm_sec.recipe.resolve import resolve
from fedllm_sec.seeds import generator_for

LABELS = ("World", "Sports", "Business", "Tech")
UPDATE, LOCAL, TEXT, IMAGE = "update", "local", "data_text", "data_image"


def check_attack(
    attack: str | Callable[..., Any],
    *,
    kind: str | None = None,
    finite: bool | None = None,
    strength: tuple[str, float, float] | None = None,
    **settings: Any,
) -> None:
    """Check one attack: `check_attack("alie")`, `check_attack("my_lab.attacks:drift", kind="update", scale=2.0)`.

    `attack` is a menu name, "package.module:name", or a callable that takes the settings as keywords (a function for
    kind update, else a class). `kind` is update, local, data, data_text or data_image; menu names know theirs.
    `finite` False allows rows that are not finite. `strength` (setting, low, high) says that a higher setting must
    move the mean (update), or change more rows (data), or change training more (local).
    """
    known = MENU.get(attack) if isinstance(attack, str) else None
    kind = kind or (known.kind if known is not None else None)
    assert kind is not None, f"check_attack: {attack!r} is not on the menu: say its kind."
    finite = attack not in NOT_FINITE if finite is None else finite

    def make(**changed: Any) -> Any:
        merged = {**settings, **changed}
        if isinstance(attack, str):
            return resolve(attack, merged, MENU, "check_attack")
        if isinstance(attack, type):
            return attack(**merged)
        return lambda view: attack(view, **merged)

    strong = None if strength is None else [{strength[0]: value} for value in strength[1:]]
    if kind == UPDATE:
        _check_update(make, finite, strong)
    elif kind == LOCAL:
        _check_local(make, strong)
    else:
        if kind in (TEXT, "data"):
            _check_data(make, text_rows(60), text_rows(40), strong, answer=_said)
        if kind in (IMAGE, "data") and not (kind == "data" and _is_text_only(settings)):
            _check_data(make, images(60), images(40), strong, answer=int)


def _is_text_only(settings: Mapping[str, Any]) -> bool:
    """Whether settings of an attack for both kinds name text classes."""
    words = [settings.get("target"), *dict(settings.get("mapping") or {})]
    return any(isinstance(word, str) and not word.isdigit() for word in words)


# ---------------------------------------------------------------- update attacks


def example_view(h: int = 8, m: int = 4, *, scale: float = 1.0, round: int = 2) -> ThreatView:
    """h honest and m own rows of a small LoRA layout around a common direction, with all knowledge granted."""
    rng = generator_for(7, "example view", round)
    layout = Layout(("layer.lora_A.default.weight", "layer.lora_B.default.weight"), ((4, 24), (16, 4)))
    d = layout.size
    common = torch.randn(d, generator=rng)
    rows = (common + torch.randn(h + m, d, generator=rng)) * scale

    def rule(updates: UpdateMatrix) -> Decision:
        return Decision.weighted(updates, torch.full((updates.n,), 1.0 / updates.n))

    return ThreatView(
        own=rows[h:],
        others=rows[:h],
        global_vector=torch.randn(d, generator=rng),
        last_update=common * scale,
        defense=rule,
        layout=layout,
        own_counts=(10.0,) * m,
        cohort_size=h + m,
        round=round,
        rng=generator_for(7, "draws", round),
        own_ids=tuple(f"bad{i}" for i in range(m)),
        other_ids=tuple(f"good{i}" for i in range(h)),
    )


def _again(view: ThreatView) -> ThreatView:
    return replace(view, rng=generator_for(7, "draws", view.round))


def _forged(attack: Any, view: ThreatView) -> Tensor:
    """The rows, from a view that must come out unchanged; rows that change nothing come with a warning."""
    others = None if view.others is None else view.others.clone()
    before = (view.own.clone(), view.global_vector.clone(), others)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        rows: Tensor = attack(view)
    assert torch.equal(view.own, before[0]), "the attack wrote into the attackers' own rows"
    assert torch.equal(view.global_vector, before[1]), "the attack wrote into the global vector"
    if view.others is not None and before[2] is not None:
        assert torch.equal(view.others, before[2]), "the attack wrote into the honest rows"
    assert said or not _changes_nothing(rows, view), (
        "the rows are the attackers' own or the honest mean: a silent no-op. Warn where a setting cannot act"
    )
    return rows


def _changes_nothing(rows: Tensor, view: ThreatView) -> bool:
    """Whether forged rows (m, d) are what the attackers trained, or all the mean of the honest rows."""
    if tuple(rows.shape) != tuple(view.own.shape):
        return False
    if torch.equal(rows.to(view.own), view.own):
        return True
    if view.others is None or len(view.others) == 0:
        return False
    mean = view.others.double().mean(0)
    return float((rows.double() - mean).norm(dim=1).max()) <= 1e-6 * float(mean.norm())


def _check_update(make: Callable[..., Any], finite: bool, strong: list[dict[str, float]] | None) -> None:
    for m, scale in ((1, 1.0), (2, 1e-3), (4, 1e3)):
        view = example_view(m=m, scale=scale)
        rows = _forged(make(), view)
        assert tuple(rows.shape) == tuple(view.own.shape), f"shape {tuple(rows.shape)}, must be {tuple(view.own.shape)}"
        assert rows.dtype.is_floating_point, f"dtype {rows.dtype}: must be floating"
        assert rows.data_ptr() not in (view.own.data_ptr(), view.others.data_ptr() if view.others is not None else 0), (
            "the forged rows share memory with rows the attack was given"
        )
        if finite:
            assert torch.isfinite(rows).all(), f"rows are not finite (m={m}, scale={scale})"
        again = _forged(make(), _again(view))
        assert torch.equal(rows.nan_to_num(7.0), again.nan_to_num(7.0)), "the same seed gives other rows"
    half = example_view()
    low = replace(half, own=half.own.bfloat16(), others=half.others.bfloat16() if half.others is not None else None)
    assert tuple(_forged(make(), low).shape) == tuple(half.own.shape), "bfloat16 rows are not handled"
    if strong is not None:
        view = example_view()
        honest = torch.zeros_like(view.own[0]) if view.others is None else view.others.mean(0)
        moved = [float((_forged(make(**s), _again(view)) - honest).norm(dim=1).mean()) for s in strong]
        assert moved[0] < moved[1], f"strength does not grow: {strong} move the rows by {moved}"


# ---------------------------------------------------------------- local attacks


def train_with(rule: Any, *, round: int = 2, steps: int = 5, lr: float = 0.5) -> tuple[Tensor, LocalContext]:
    """The delta (d,) of a few plain steps towards a fixed point with the rule around each, and the context."""
    rng = generator_for(7, "local", round)
    d = 40
    start, last, goal = (torch.randn(d, generator=rng) for _ in range(3))
    context = LocalContext(Client("bad", None), round, start.clone(), last.clone(), Layout.single(d), steps)
    parameters = torch.nn.Parameter(start.clone())
    for step in range(steps):
        parameters.grad = parameters.detach() - goal
        rule.before_step(parameters, step, context)
        with torch.no_grad():
            parameters.sub_(lr * parameters.grad)
        rule.after_step(parameters, step, context)
    assert torch.equal(context.start, start), "the rule wrote into the received model"
    assert context.last_update is not None
    assert torch.equal(context.last_update, last), "the rule wrote into the last global step"
    return parameters.detach() - start, context


class _Plain:
    """Honest training."""

    def before_step(self, parameters: torch.nn.Parameter, step: int, ctx: LocalContext) -> None:
        """Nothing."""

    def after_step(self, parameters: torch.nn.Parameter, step: int, ctx: LocalContext) -> None:
        """Nothing."""


def _check_local(make: Callable[..., Any], strong: list[dict[str, float]] | None) -> None:
    plain = train_with(_Plain())[0]
    delta = train_with(make())[0]
    assert torch.isfinite(delta).all(), "training is not finite"
    assert not torch.equal(delta, plain), "the rule changes nothing: a silent no-op"
    assert torch.equal(delta, train_with(make())[0]), "the same seed gives another update"
    rule = make()
    train_with(rule, round=2)
    assert torch.equal(train_with(rule, round=3)[0], train_with(make(), round=3)[0]), (
        "an earlier round leaks into a later"
    )
    if strong is not None:
        moved = [float((train_with(make(**s))[0] - plain).norm()) for s in strong]
        assert moved[0] < moved[1], f"strength does not grow: {strong} change training by {moved}"


# ---------------------------------------------------------------- data attacks


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


def images(size: int) -> Labelled:
    """Small random images of four classes."""
    x = torch.rand(size, 3, 12, 12, generator=generator_for(7, "images", size))
    return Labelled(x, torch.arange(size) % 4, 4, torch.zeros(size, dtype=torch.bool))


def _said(value: Any) -> str:
    return str(value)


def _columns(rows: Any) -> dict[str, Any]:
    """A table's columns as plain lists, for comparing."""
    if isinstance(rows, Labelled):
        named = {"x": rows.x.tolist(), "y": rows.y.tolist(), "poisoned": rows.poisoned.tolist()}
        return named
    return {name: rows[name][:] for name in TEXT_COLUMNS}


def _changed(before: dict[str, Any], after: dict[str, Any]) -> list[int]:
    return [
        i
        for i in range(len(before["poisoned"]))
        if any(before[name][i] != after[name][i] for name in before if name != "poisoned")
    ]


def _check_data(
    make: Callable[..., Any],
    shard: Any,
    test: Any,
    strong: list[dict[str, float]] | None,
    answer: Callable[[Any], Any],
) -> None:
    clean, held_out = copy.deepcopy(_columns(shard)), copy.deepcopy(_columns(test))
    attack = make()
    first = attack.poison(shard, generator_for(7, "poison"))
    after = _columns(first)
    assert len(after["poisoned"]) == len(clean["poisoned"]), "poisoning changed the number of rows"
    changed = _changed(clean, after)
    assert changed, "poisoning changed no row: a silent no-op"
    marked = [i for i, mark in enumerate(after["poisoned"]) if mark]
    assert set(changed) <= set(marked), "a changed row is not marked as poisoned"
    assert _columns(make().poison(shard, generator_for(7, "poison"))) == after, "the same seed poisons other rows"
    assert _columns(shard) == clean, "the clean shard was changed"

    attack = make()
    for number in range(8):  # split triggers need all their parts taught
        attack.poison(shard, generator_for(7, "poison", number))
    triggered = attack.probe(test)
    assert _columns(test) == held_out, "the clean test set was changed"
    probe = _columns(triggered)
    assert len(probe["poisoned"]) > 0, "the probe has no row"
    assert all(probe["poisoned"]), "a probe row is not marked as poisoned"
    assert _columns(attack.probe(test)) == probe, "the probe differs from call to call"
    if isinstance(triggered, Labelled):
        wanted = list(range(len(triggered.y)))
        judged = [attack.success(answer(triggered.y[i]), int(test.y[i])) for i in wanted]
        assert all(isinstance(hit, bool) for hit in judged), "success must answer with a bool"
    else:
        for row in triggered:
            assert attack.success(row["response"], row), f"the wanted answer is no success: {row}"
            assert not attack.success("", row), "an empty answer is a success"
        hits = [attack.success(row["response"], row) for row in test]
        assert not all(hits), "every clean answer is a success: nothing could be measured"
    if strong is not None:
        counts = [len(_changed(clean, _columns(make(**s).poison(shard, generator_for(7, "poison"))))) for s in strong]
        assert counts[0] < counts[1], f"strength does not grow: {strong} change {counts} rows"
        assert not any(math.isnan(c) for c in counts)
