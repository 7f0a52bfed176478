"""What every defense must hold, one property after another. The public door is `fedllm_sec.testing`."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedllm_sec.defenses.elsewhere import any_place, sizes, state_from_elsewhere
from fedllm_sec.defenses.screen import screen
from fedllm_sec.defenses.subject import Subject, subject_of
from fedllm_sec.errors import DefenseError
from fedllm_sec.matrix import UpdateMatrix
from fedllm_sec.protocols import Decision
from fedllm_sec.seeds import generator_for


def check_defense(
    defense: str | Callable[..., Any],
    settings: Mapping[str, Any] | None = None,
    *,
    kind: str = "rule",
    scale: bool = True,
    translation: bool = False,
    robust: bool = False,
    exact: bool = True,
    large: bool = True,
    clients: int = 16,
) -> None:
    """Check one defense: a menu name, "package.module:name", or a function or class, with its `settings`.

    `kind` is rule, before or after (read from the menu for menu names). `scale`: c times the rows gives c
    times the update. `translation`: rows + t give update + t. `robust`: two hostile rows of any size move
    the update by no more than the honest rows differ. `exact=False` for a defense whose noise or random
    sample depends on the rows' numbers: then equality is checked between identical inputs only. `large`: with the same
    settings a model of a million values comes out as well as one of a thousand.
    """
    subject = subject_of(defense, settings, kind, clients)
    kind = subject.kind
    checks: list[Callable[[Subject], None]] = [
        _inputs_unchanged, _shapes, _deterministic, _bad_rows, _degenerate_rows, _few_clients, _memory,
    ]  # fmt: skip
    if exact:
        checks += [_chunks, _on_disk, _order, _half_precision]
    if scale:
        checks += [_scale, _zeros]
    if translation:
        checks.append(_translation)
    if robust:
        checks.append(_hostile)
    if large:
        checks.append(sizes)
    if kind == "before":
        checks.append(_own_rows)
    if kind == "rule":
        checks.append(any_place)
    for check in checks:
        try:
            check(subject)
        except AssertionError:
            raise
        except Exception as error:  # code from outside may raise anything
            what = check.__name__.strip("_").replace("_", " ")
            raise subject.fail(what, f"raised {type(error).__name__}: {str(error)[:300]}") from error


def _sound(subject: Subject, decision: Decision, updates: UpdateMatrix, what: str) -> None:
    """Right shapes and types, nothing that is not a number."""
    n, d = updates.n, updates.d
    update = decision.update
    subject.expect(tuple(update.shape) == (d,), what, f"update has shape {tuple(update.shape)}, needs ({d},)")
    subject.expect(update.is_floating_point(), what, f"update has dtype {update.dtype}")
    subject.expect(bool(torch.isfinite(update).all()), what, "update has values that are not finite")
    for name in ("weights", "kept", "scores"):
        value = getattr(decision, name)
        if value is not None:
            subject.expect(tuple(value.shape) == (n,), what, f"{name} has shape {tuple(value.shape)}, needs ({n},)")
            subject.expect(not bool(value.isnan().any()), what, f"{name} has NaN")
    if decision.kept is not None:
        subject.expect(decision.kept.dtype == torch.bool, what, f"kept has dtype {decision.kept.dtype}")
    for key, number in decision.notes.items():
        subject.expect(isinstance(number, (int, float)), what, f"note {key} is a {type(number).__name__}")


def _shapes(subject: Subject) -> None:
    updates = subject.data()
    _sound(subject, subject.run(updates), updates, "shapes")


def _inputs_unchanged(subject: Subject) -> None:
    for poison in (None, math.nan, math.inf):
        updates = subject.data()
        if poison is not None:
            updates.rows[3, 5] = poison
        before = updates.rows.clone()
        ctx, fresh = subject.context(), subject.context()
        try:
            pipeline = subject.make()
            pipeline.finish(fresh.global_vector + pipeline.decide(updates, ctx).update, ctx)
        except Exception as error:  # a rule from outside raises anything, and an unscreened NaN may stop one of ours
            told = f"raised on plain rows: {type(error).__name__}: {str(error)[:300]}"
            subject.expect(poison is not None, "inputs unchanged", told)
        same = torch.equal(before.nan_to_num(7.5, 8.5), updates.rows.nan_to_num(7.5, 8.5))
        subject.expect(same, "inputs unchanged", f"the rows were written to (with {poison} among them)")
        for name in ("global_vector", "last_update", "root_update"):  # also through .data or numpy
            same = torch.equal(getattr(ctx, name), getattr(fresh, name))
            subject.expect(same, "inputs unchanged", f"the {name.replace('_', ' ')} was written to")


def _deterministic(subject: Subject) -> None:
    torch.manual_seed(1)
    first = subject.run(subject.data())
    torch.manual_seed(2)
    second = subject.run(subject.data())
    subject.expect(torch.equal(first.update, second.update), "determinism", "the same inputs gave another update")


def _bad_rows(subject: Subject) -> None:
    """Screened rows do not count, whatever they hold."""
    clean = subject.data()
    wanted = subject.run(clean)
    for poison in (math.nan, math.inf, 1e37):
        extra = torch.full((1, clean.d), poison)
        updates = replace(
            clean,
            rows=torch.cat([clean.rows, extra]),
            ids=(*clean.ids, "bad"),
            counts=(*clean.counts, 10.0),
        )
        screened, reasons = screen(updates)
        subject.expect(list(reasons) == ["bad"], "screening", f"a row of {poison} was not the one set aside: {reasons}")
        subject.same(f"a row of {poison}", subject.run(screened).update, wanted.update)
    huge = replace(clean, rows=torch.cat([clean.rows[:-1], torch.full((1, clean.d), 1e30)]))
    _sound(subject, subject.run(huge), huge, "one row of 1e30")


def _degenerate_rows(subject: Subject) -> None:
    clean = subject.data()
    half = clean.n // 2
    for what, rows in (
        ("all rows equal", clean.rows[:1].expand_as(clean.rows).clone()),
        ("duplicate rows", torch.cat([clean.rows[:1].expand(half, -1), clean.rows[half:]])),
        ("all rows zero", torch.zeros_like(clean.rows)),
        ("one row zero", torch.cat([torch.zeros_like(clean.rows[:1]), clean.rows[1:]])),
        ("opposite rows", torch.cat([clean.rows[:half], -clean.rows[:half]])),
    ):
        updates = replace(clean, rows=rows, ids=clean.ids[: len(rows)], counts=clean.counts[: len(rows)])
        _sound(subject, subject.run(updates), updates, what)


def _few_clients(subject: Subject) -> None:
    """Any number of clients gives an answer or a DefenseError that says what is needed."""
    for n in (1, 2, 3, 5):
        for changed in ({}, {"f": 0}) if subject.has("f") else ({},):
            updates = subject.data(n)
            try:
                decision = subject.run(updates, subject.make(**changed))
            except DefenseError as error:
                subject.expect(
                    "needs" in str(error), f"{n} clients", f'the error does not say what is needed: "{error}"'
                )
                continue
            _sound(subject, decision, updates, f"{n} clients, {changed or 'settings as given'}")
    if subject.has("f") and subject.kind == "rule":
        try:
            subject.run(subject.data(4), subject.make(f=4))
        except DefenseError:
            return
        raise subject.fail("f too large", "f = n = 4 gave an answer, not a DefenseError")


def _plain(value: Any) -> bool:
    """Whether a state is made of tensors, numbers, strings, lists and dicts with text keys only."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    return value is None or isinstance(value, (Tensor, int, float, str, bool))


def _memory(subject: Subject) -> None:
    """A restored state goes on as the straight run does; memory belongs to client ids, not to positions."""
    rounds = [subject.data(round=r) for r in (1, 2, 3)]
    rounds[1] = rounds[1].select(list(range(2, rounds[1].n)))  # two clients sit out
    straight = subject.make()
    decisions = [subject.run(u, straight, round=r) for r, u in enumerate(rounds, 1)]
    stopped = subject.make()
    for r, updates in enumerate(rounds[:2], 1):
        subject.run(updates, stopped, round=r)
    state = stopped.state_dict()
    subject.expect(_plain(state), "state_dict", "holds more than tensors, numbers, strings, lists and dicts")
    resumed = subject.make()
    resumed.load_state_dict(state)
    again = subject.run(rounds[2], resumed, round=3)
    subject.expect(torch.equal(again.update, decisions[2].update), "state_dict", "a resumed run gave another update")
    state_from_elsewhere(subject, state, rounds[2], decisions[2], round=3)
    shuffled = subject.make()
    for r, updates in enumerate(rounds, 1):
        order = list(range(updates.n))[:: -1 if r == 2 else 1]
        last = subject.run(_reordered(updates, order), shuffled, round=r)
    subject.same("memory by client id", last.update, decisions[2].update)


def _reordered(updates: UpdateMatrix, order: Sequence[int]) -> UpdateMatrix:
    return replace(
        updates.select(list(order)),
        ids=tuple(updates.ids[i] for i in order),
        counts=tuple(updates.counts[i] for i in order),
    )


def _chunks(subject: Subject) -> None:
    updates = subject.data()
    wanted = subject.run(updates)
    for width in (1, 7):
        narrow = replace(updates, chunk_mb=(width + 0.5) * 4 * updates.n / 2**20)
        subject.same(f"blocks of {width} columns", subject.run(narrow).update, wanted.update)


def _on_disk(subject: Subject) -> None:
    updates = subject.data()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.safetensors"
        updates.save(path)
        got = subject.run(UpdateMatrix.open(path))
    subject.same("rows in a file", got.update, subject.run(updates).update)


def _order(subject: Subject) -> None:
    updates = subject.data()
    wanted = subject.run(updates)
    order = torch.randperm(updates.n, generator=generator_for(7, "order"))
    got = subject.run(_reordered(updates, order.tolist()))
    subject.same("permutation", got.update, wanted.update)
    for name in ("weights", "kept", "scores"):
        old, new = getattr(wanted, name), getattr(got, name)
        if old is not None:
            close = torch.allclose(new.double(), old[order].double(), rtol=1e-4, atol=1e-6)
            subject.expect(close, "permutation", f"{name} did not follow the rows")


def _half_precision(subject: Subject) -> None:
    updates = subject.data()
    half = replace(updates, rows=updates.rows.bfloat16())
    wanted = subject.run(replace(updates, rows=half.rows.float()))
    subject.same("bfloat16 rows", subject.run(half).update.float(), wanted.update)


def _scale(subject: Subject) -> None:
    updates = subject.data()
    wanted = subject.run(updates).update
    for factor in (2.0**-10, 2.0**10):
        got = subject.run(replace(updates, rows=updates.rows * factor), factor=factor).update
        subject.same(f"rows times {factor:g}", got / factor, wanted)


def _zeros(subject: Subject) -> None:
    clean = subject.data()
    decision = subject.run(replace(clean, rows=torch.zeros_like(clean.rows)), factor=0.0)
    subject.expect(float(decision.update.norm()) == 0.0, "all rows zero", "the update is not zero")


def _translation(subject: Subject) -> None:
    updates = subject.data()
    shift = torch.randn(updates.d, generator=generator_for(7, "shift"))
    got = subject.run(replace(updates, rows=updates.rows + shift)).update
    subject.same("rows plus a constant row", got, subject.run(updates).update + shift)


def _own_rows(subject: Subject) -> None:
    """Another row of the same length from one client turns no other client's row, unless the mix says so."""
    one = subject.data()
    rows = one.rows.clone()
    rows[-1] = rows[-1].flip(0)
    two = replace(one, rows=rows)
    (stage,) = subject.make().before
    made = [stage(updates, subject.context()) for updates in (one, two)]
    if made[0].rows is one.rows:
        return  # a lazy mix, which is followed as it is
    blocks = [torch.cat([block for _, block in m.blocks()], dim=1).double() for m in made]
    for id in set(made[0].ids) & set(made[1].ids) & set(one.ids[:-1]):
        a, b = (block[m.ids.index(id)] for block, m in zip(blocks, made, strict=True))
        turned = float(a.norm() * b.norm() - (a @ b).abs()) > 1e-6 * float(a.norm() * b.norm())
        told = f'the row with the id "{id}" holds another client\'s too. Use updates.mix, or other ids.'
        subject.expect(not turned, "own rows", told)


def _hostile(subject: Subject) -> None:
    clean = subject.data()
    honest = clean.rows[:-2]
    centre = honest.mean(0)
    spread = float((honest - centre).norm(dim=1).max())
    for size in (10.0, 1e6, 1e18, 1e30):
        for sign in (1.0, -1.0, torch.tensor([[1.0], [-1.0]])):  # the last two rows cancel
            bad = (sign * size * torch.ones(clean.d)).expand(2, -1)
            update = subject.run(replace(clean, rows=torch.cat([honest, bad]))).update
            gap = float((update - centre).norm())
            told = f"update is {gap:.3g} from the honest mean, honest rows at most {spread:.3g}"
            what = f"two rows of size {size:g}, signs {torch.as_tensor(sign).flatten().tolist()}"
            subject.expect(gap <= spread, what, told)
