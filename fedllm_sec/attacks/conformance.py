"""`check_attack`: what every attack must keep to, for the menu and for outside code.

A broken rule is an AssertionError that says which. Nothing here trains a model; the whole menu takes seconds.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedllm_sec.attacks import MENU, NOT_FINITE, received
from fedllm_sec.attacks.conformance_data import check_data
from fedllm_sec.attacks.subject import classifier, example_view, images, text_rows
from fedllm_sec.errors import AttackError, FedError, RecipeError
from fedllm_sec.matrix import Layout, UpdateMatrix
from fedllm_sec.protocols import Client, Decision, LocalContext, ThreatView
from fedllm_sec.recipe.resolve import did_you_mean, resolve
from fedllm_sec.seeds import generator_for

UPDATE, LOCAL, TEXT, IMAGE = "update", "local", "data_text", "data_image"
METHODS = {  # kind -> what such an attack is called by
    **{UPDATE: ("__call__",), LOCAL: ("before_step", "after_step")},
    **dict.fromkeys((TEXT, IMAGE, "data"), ("poison",)),
}


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
    if not (isinstance(attack, str) or callable(attack)):
        raise RecipeError(
            f'check_attack: {attack!r} is no attack. Give a name of the menu, "package.module:name", a function or a '
            "class."
        )
    known = MENU.get(attack) if isinstance(attack, str) else None
    kind = kind or (known.kind if known is not None else None)
    assert kind is not None, f"check_attack: {attack!r} is not on the menu: say its kind."
    if not isinstance(kind, str) or kind not in METHODS:
        raise RecipeError(f"check_attack: kind={kind!r}.{did_you_mean(str(kind), METHODS)}")
    if strength is not None and not (isinstance(strength, (tuple, list)) and len(strength) == 3):
        raise RecipeError(f"check_attack: strength={strength!r}: must be a setting with a low and a high value of it.")
    finite = attack not in NOT_FINITE if finite is None else finite

    def make(**changed: Any) -> Any:
        merged = {**settings, **changed}
        if isinstance(attack, str):
            return resolve(attack, merged, MENU, "check_attack")
        if isinstance(attack, type):
            return attack(**merged)
        return lambda view: attack(view, **merged)

    made = _made(attack, make) if isinstance(attack, (str, type)) else attack
    if missing := [name for name in METHODS[kind] if not callable(getattr(made, name, None))]:
        raise RecipeError(f"check_attack: {attack!r} has no {missing[0]}, which an attack of kind {kind} needs.")
    strong = None if strength is None else [{strength[0]: value} for value in strength[1:]]
    try:
        if kind == UPDATE:
            _check_update(make, finite, strong)
        elif kind == LOCAL:
            _check_local(make, strong)
        else:
            if kind in (TEXT, "data"):
                check_data(make, text_rows(60), text_rows(40), strong)
            if kind in (IMAGE, "data") and not (kind == "data" and _is_text_only(settings)):
                check_data(make, images(60), images(40), strong)
    except (AssertionError, FedError):
        raise
    except Exception as error:  # code from outside may raise anything, and give back anything
        *_, last = traceback.extract_tb(error.__traceback__)
        raise AssertionError(
            f"check_attack: {attack!r}: raised {type(error).__name__}: {str(error)[:300]} ({last.filename}, line "
            f"{last.lineno})"
        ) from error


def _made(attack: Any, make: Callable[..., Any]) -> Any:
    """The attack with its settings: a name or a setting that is wrong is told as such."""
    try:
        return make()
    except FedError:
        raise
    except Exception as error:
        raise RecipeError(
            f"check_attack: {attack!r} cannot be made with these settings ({type(error).__name__}: {error})."
        ) from error


def _is_text_only(settings: Mapping[str, Any]) -> bool:
    """Whether settings of an attack for both kinds name text classes."""
    words = [settings.get("target"), *dict(settings.get("mapping") or {})]
    return any(isinstance(word, str) and not word.isdigit() for word in words)


# ---------------------------------------------------------------- update attacks


def _again(view: ThreatView) -> ThreatView:
    return replace(view, rng=generator_for(7, "draws", view.round))


def _forged(attack: Any, view: ThreatView) -> Tensor:
    """The rows, from a view that must come out unchanged; rows that change nothing come with a warning.

    The defense is tried on the round as the server gets it: its memory goes by client id, its weights by count.
    """
    shown = {
        "the attackers' own rows": view.own,
        "the global vector": view.global_vector,
        "the last global step": view.last_update,
        "the honest rows": view.others,
    }
    before = {name: tensor.clone() for name, tensor in shown.items() if tensor is not None}
    rule, tried = view.defense, []

    def watched(updates: UpdateMatrix) -> Decision:
        assert rule is not None
        tried.append((updates.ids, updates.counts))
        return rule(updates)

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        rows = _rows(attack(replace(view, defense=watched) if rule is not None else view))
    for name, tensor in before.items():
        assert torch.equal(shown[name], tensor), f"the attack wrote into {name}"
    if tried:
        sent = received(view, view.own)
        assert all(guess == (sent.ids, sent.counts) for guess in tried), (
            "the defense was tried with other ids, counts or another order than the server's: make the rows with "
            "fedllm_sec.attacks.received(view, forged)"
        )
    if hasattr(attack, "forge_buffers"):
        own = torch.tensor([[0.5, 2.0, 3.0]] * len(view.own), dtype=torch.float64)
        forged = attack.forge_buffers(own, Layout(("bn.running_mean", "bn.running_var"), ((1,), (1,))))
        assert own.tolist() == [[0.5, 2.0, 3.0]] * len(own), "the attack wrote into the buffers"
        assert forged.shape == own.shape, f"gives buffers of shape {tuple(forged.shape)}"
        assert not torch.equal(forged, own), "the buffers are the attackers' own"
        return rows
    assert said or not _changes_nothing(rows, view), (
        "the rows are the attackers' own or the honest mean: a silent no-op. Warn where a setting cannot act"
    )
    return rows


def _rows(given: Any) -> Tensor:
    assert isinstance(given, Tensor), f"gives {type(given).__name__}, must give the rows as a tensor"
    return given


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


def _in_first_round(what: str, act: Callable[[], Any]) -> Any:
    """What the attack does in round 1, None where it refuses that round by an AttackError, which says the way out."""
    try:
        return act()
    except (AttackError, AssertionError) as error:
        if isinstance(error, AssertionError):
            raise
        return None
    except Exception as error:  # an attack from outside may raise anything
        raise AssertionError(
            f"it fails in the first round, in which {what} is None, for no step was taken yet: "
            f"{type(error).__name__}: {error}. Send something else in that round, or raise an AttackError that says "
            "to set attack.start: 2"
        ) from error


def _check_update(make: Callable[..., Any], finite: bool, strong: list[dict[str, float]] | None) -> None:
    first = replace(example_view(round=1), last_update=None)
    sent = _in_first_round("view.last_update", lambda: _rows(make()(first)))
    if sent is not None:
        assert tuple(sent.shape) == tuple(first.own.shape), f"shape {tuple(sent.shape)} in the first round"
        assert not finite or torch.isfinite(sent).all(), "rows are not finite in the first round"
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
    """The delta (d,) of a few plain steps towards a fixed point with the rule around each, and the context.

    In round 1 there is no last global step.
    """
    rng = generator_for(7, "local", round)
    d = 40
    start, last, goal = (torch.randn(d, generator=rng) for _ in range(3))
    shown = {"received model": start.clone(), "last global step": last.clone(), "second vector": goal.clone()}
    received, step_before, second = shown.values()
    before = None if round == 1 else step_before
    shard, function = images(60), classifier()
    poisoned = replace(shard, x=shard.x.clone(), poisoned=torch.arange(60) < 20)
    poisoned.x[:20, :, -3:, -3:] = 1.0
    if hasattr(rule, "brief"):
        rule.brief(10, {"bad": shard}, {"bad": poisoned})
    parameters = torch.nn.Parameter(start.clone())
    context = LocalContext(
        Client("bad", poisoned), round, received, before, function.layout, steps, second, function,
        lambda shard, batches: batches * (parameters.detach() - goal),
    )  # fmt: skip
    for step in range(steps):
        parameters.grad = parameters.detach() - goal
        rule.before_step(parameters, step, context)
        with torch.no_grad():
            parameters.sub_(lr * parameters.grad)
        rule.after_step(parameters, step, context)
    for (name, seen), sent in zip(shown.items(), (start, last, goal), strict=True):
        assert torch.equal(seen, sent), f"the rule wrote into the {name} it was sent"
    return parameters.detach() - start, context


class _Plain:
    """Honest training."""

    def before_step(self, parameters: torch.nn.Parameter, step: int, ctx: LocalContext) -> None:
        """Nothing."""

    def after_step(self, parameters: torch.nn.Parameter, step: int, ctx: LocalContext) -> None:
        """Nothing."""


def _check_local(make: Callable[..., Any], strong: list[dict[str, float]] | None) -> None:
    first = _in_first_round("ctx.last_update", lambda: train_with(make(), round=1)[0])
    assert first is None or torch.isfinite(first).all(), "training is not finite in the first round"
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
