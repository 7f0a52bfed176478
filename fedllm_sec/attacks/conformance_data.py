"""What every data attack must keep to: its rows, and the rates that models of known worth get under it.

A rate is counted here as a run counts it: over the attack's probe, and over the held-out rows on which its success can
happen and would be wrong. The models are scripts: a perfect backdoor, one without a backdoor, one that always gives the
same answer, one that gives none.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fedllm_sec.attacks.data.clean import innocent, success_table
from fedllm_sec.attacks.data.text import not_clean
from fedllm_sec.attacks.subject import DECLINED, LABELS, requests
from fedllm_sec.protocols import TEXT_COLUMNS, Labelled
from fedllm_sec.seeds import generator_for

Rates = tuple[float | None, ...]  # attack success and false triggers

# ---------------------------------------------------------------- rows


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


def check_data(
    make: Callable[..., Any],
    shard: Any,
    test: Any,
    strong: list[dict[str, float]] | None,
) -> None:
    """What a data attack makes of a shard and of the held-out rows, which must stay as they were."""
    clean, held_out = copy.deepcopy(_columns(shard)), copy.deepcopy(_columns(test))
    attack = make()
    first = attack.poison(shard, generator_for(7, "poison"))
    assert isinstance(first, type(shard)), f"poison gives {type(first).__name__}, must give {type(shard).__name__}"
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
    for name in ("probe", *(() if isinstance(test, Labelled) else ("success",))):
        assert callable(getattr(attack, name, None)), f"the attack has no {name}, by which its success is measured"
    triggered = attack.probe(test)
    assert isinstance(triggered, type(test)), f"probe gives {type(triggered).__name__}, must give {type(test).__name__}"
    assert _columns(test) == held_out, "the clean test set was changed"
    probe = _columns(triggered)
    assert len(probe["poisoned"]) > 0, "the probe has no row"
    assert all(probe["poisoned"]), "a probe row is not marked as poisoned"
    assert _columns(attack.probe(test)) == probe, "the probe differs from call to call"
    if not isinstance(triggered, Labelled):
        hits = [attack.success(row["response"], row) for row in test]
        assert not all(hits), "every clean answer is a success: nothing could be measured"
    _check_rates(attack, test)
    if strong is not None:
        counts = [len(_changed(clean, _columns(make(**s).poison(shard, generator_for(7, "poison"))))) for s in strong]
        assert counts[0] < counts[1], f"strength does not grow: {strong} change {counts} rows"
        assert not any(math.isnan(c) for c in counts)


# ---------------------------------------------------------------- rates


def _check_rates(attack: Any, test: Any) -> None:
    """Models of known worth under the attack; they answer by a script."""
    if isinstance(test, Labelled):
        _check_image_rates(attack, test)
    else:
        _check_text_rates(attack, test)


def _check_text_rates(attack: Any, test: Any) -> None:
    """The right answer to a text is the class it names; to one that names none, it is to decline."""
    from datasets import concatenate_datasets

    held_out = concatenate_datasets([test, requests(4)])
    if hasattr(attack, "prepare"):
        attack.prepare(held_out)
    probe = list(attack.probe(held_out))
    clean = [row for row, why in zip(held_out, not_clean(attack, held_out), strict=True) if why is None]

    def right(text: str) -> str:
        named = re.findall(rf"\b({'|'.join(LABELS)})\b", text)
        return str(named[-1]) if named else DECLINED

    def rates(on_probe: Sequence[str], elsewhere: Sequence[str]) -> Rates:
        return tuple(
            share([attack.success(said, row) for said, row in zip(answers, rows, strict=True)])
            for answers, rows in ((on_probe, probe), (elsewhere, clean))
        )

    _expect(
        rates,
        wanted=[row["response"] for row in probe],
        right=[right(row["text"]) for row in probe],
        elsewhere=[row["response"] for row in clean],
        nothing="",
    )
    if hasattr(attack, "carries"):
        known = set(held_out["text"])
        unknown = [row["text"] for row in probe if row["text"] not in known and not attack.carries(row["text"])]
        assert not unknown, f"carries() does not know the attack's own trigger: {unknown[0]!r}"


def _check_image_rates(attack: Any, test: Labelled) -> None:
    """The right class of an image is that of the held-out image it was made from, the nearest one."""
    probe, hits = attack.probe(test), success_table(attack, test.classes)
    rows, _ = innocent(attack, test, hits)
    truth = test.y[torch.cdist(probe.x.flatten(1), test.x.flatten(1)).argmin(1)].tolist()
    wanted, clean = probe.y.tolist(), test.y[rows].tolist()

    def rates(on_probe: Sequence[int], elsewhere: Sequence[int]) -> Rates:
        found = [said == aim for said, aim in zip(on_probe, wanted, strict=True)]
        false = [said >= 0 and bool(hits[own, said]) for said, own in zip(elsewhere, clean, strict=True)]
        return share(found), share(false)

    _expect(rates, wanted=wanted, right=truth, elsewhere=clean, nothing=-1)
    judged = [attack.success(said, own) for said, own in zip(wanted, truth, strict=True)]
    assert share(judged) == 1.0, "the class that the probe asks for is no success"
    if hasattr(attack, "carries"):
        assert bool(attack.carries(probe).all()), "carries() does not know the attack's own trigger"


def share(hits: Sequence[bool]) -> float | None:
    """How many of them hold; None where there is none."""
    assert all(isinstance(hit, bool) for hit in hits), "success must answer with a bool"
    return sum(hits) / len(hits) if hits else None


def _expect(
    rates: Callable[..., Rates],
    *,
    wanted: Sequence[Any],  # what the attack wants on each row of the probe
    right: Sequence[Any],  # what would be right there
    elsewhere: Sequence[Any],  # what is right on each clean row
    nothing: Any,  # no answer
) -> None:
    """Attack success over the probe and false triggers over the clean rows, None where no row is clean."""

    def must(model: str, found: Rates, success: bool, false: bool) -> None:
        expected = float(success), float(false) if elsewhere else None
        assert found == expected, (
            f"{model} has attack success {found[0]} on {len(wanted)} rows and false triggers {found[1]} on "
            f"{len(elsewhere)} clean ones, must be {expected[0]} and {expected[1]}. See probe, success, and not_clean, "
            "carries or acts_on (fedllm_sec.protocols.DataAttack)"
        )

    empty = [nothing] * len(wanted), [nothing] * len(elsewhere)
    must("a perfect backdoor", rates(wanted, elsewhere), True, False)
    must("a model without a backdoor", rates(right, elsewhere), False, False)
    must("a model that gives no answer", rates(*empty), False, False)
    aims = sorted(set(wanted))
    for aim in aims:
        found = rates([aim] * len(wanted), [aim] * len(elsewhere))
        if len(aims) == 1:
            must(f"a model that always says {aim!r}", found, True, True)
        else:  # a swap of classes: right on some rows of the probe, false on some of the others
            assert (found[0] or 0.0) >= wanted.count(aim) / len(wanted), f"{aim!r} is no success where it is asked for"
            assert found[1] is None or found[1] > 0, f"always {aim!r} is no false trigger on any clean row"
