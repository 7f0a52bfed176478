"""A grid in plain sentences: what it found, who attacks and what each side knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedllm_sec.report.grid.folder import DONE, FAILED, NONE, PARTIAL, UNREADABLE, WAITING, Cell, Grid
from fedllm_sec.report.grid.numbers import Slice, Worst, best_worst, common, excluded, met, planned, worst
from fedllm_sec.report.grid.views import View, judged
from fedllm_sec.report.measures import Measure, interval, listed, plural, written
from fedllm_sec.report.runs import Run
from fedllm_sec.report.threat import attack_card, defense_steps, spread
from fedllm_sec.report.words import diverged, starts


def finding(grid: Grid, parts: Sequence[Slice], shown: Sequence[View]) -> list[str]:
    """Which defense has the best worst case, by quality and by attack success, and how complete the grid is."""
    attacks, defenses = planned(parts)
    ranked = judged(shown)
    head = f"{plural(len(attacks), 'attack')} against {plural(len(defenses), 'defense')}"
    if not ranked:
        return [f"{head}: nothing was measured yet.", *_completeness(grid)]
    sentences = [text for view in ranked for text in _worst_sentences(parts, view)]
    first = f"{head}: {sentences[0]}" if sentences else f"{head}."
    rest = [text if text.startswith(parts[0].defenses) else f"{text[0].upper()}{text[1:]}" for text in sentences[1:]]
    return [first, *rest, *diverged(grid.runs), *_starts(grid), *_completeness(grid)]


def _starts(grid: Grid) -> list[str]:
    """What all runs of the grid started from; where they differ an axis shows it."""
    places = {run.start for run in grid.runs}
    return starts(grid.runs) if len(places) == 1 else []


def _worst_sentences(parts: Sequence[Slice], view: View) -> list[str]:
    """The defenses with the best worst case over the attacks that all of them met, and what to compare them with."""
    rows = met(parts, view)
    shared = common(rows, view)
    found = {name: worst(shared, view, name) for name in parts[0].defenses if name != NONE}
    cases = {name: case for name, case in found.items() if case is not None}
    over = ""
    if len(shared) < len(rows):
        things = "attacks" if len(parts) == 1 else "attacks in their settings"
        which = "that all defenses met" if excluded(rows, view) else "for which no result is missing"
        over = f"over the {len(shared)} of {len(rows)} {things} {which}, "
    texts = []
    if cases:
        texts.append(over + _best(cases, view, parts))
    elif rows and len(found) > 1:
        texts.append(f"no attack was met by all defenses with a result in {view.title}, so none is best")
    others = []
    bare = worst(rows, view, NONE)
    if bare is not None:
        others.append(f"without a defense {view.title} is at worst {_case(bare, view, parts)}")
    free = view.of(parts[0].twins) if len(parts) == 1 else None
    if free is not None:
        what = "it" if others else view.title
        others.append(f"attack-free and undefended {what} is {_number(free, view)}{_rates(view, parts[0].twins)}")
    return [f"{text}." for text in (*texts, "; ".join(others)) if text]


def _best(cases: Mapping[str, Worst], view: View, parts: Sequence[Slice]) -> str:
    """Who has the best worst case: together where it is the same, and with those that cannot be told apart from it."""
    best, near = best_worst(cases, view)
    case = cases[best[0]]
    if len(cases) == 1:
        return f"with {best[0]} {view.title} is at worst {_case(case, view, parts)}"
    verb = "has" if len(best) == 1 else "share"
    value = _number(case.measure, view) if len(best) > 1 else _case(case, view, parts)
    text = f"{listed(best)} {verb} the best worst case in {view.title}: {value}"
    if not near:
        return text
    if len(best) + len(near) == len(cases):
        others = [f"{name} {_case(cases[name], view, parts)}" for name in near[:3]]
        more = f" and {len(near) - 3} more" if len(near) > 3 else ""
        head = f"no other defense can be told apart from the best worst case in {view.title}"
        return f"{head}, that of {listed(best)}, {value}: {'; '.join(others)}{more}"
    return f"{text}; {_some(near)} cannot be told apart from {'it' if len(best) == 1 else 'them'}"


def _some(names: Sequence[str], most: int = 4) -> str:
    more = len(names) - most
    return listed([*names[:most], *([f"{more} more"] if more > 0 else [])])


def _case(case: Worst, view: View, parts: Sequence[Slice]) -> str:
    several = len(parts) > 1
    names = [f"{attack}, {part.title}" if several and part.title else attack for part, attack in case.rows]
    rates = _rates(view, case.slot.cells) if len(case.rows) == 1 else ""  # others have the value, not the rates
    return f"{_number(case.measure, view)}{rates} under {_some(names, 3)}"


def _rates(view: View, cells: Sequence[Cell]) -> str:
    text = view.in_words(cells)
    return f" {text}" if text else ""


def _number(m: Measure, view: View) -> str:
    return f"{written(m.value, view.unit)} {interval(m, view.unit)}".rstrip()


def _completeness(grid: Grid) -> list[str]:
    counts = {state: len(grid.in_state(state)) for state in (FAILED, PARTIAL, UNREADABLE, WAITING)}
    ways = {
        FAILED: "failed",
        PARTIAL: "stopped before the last round",
        UNREADABLE: "cannot be read",
        WAITING: "not run yet",
    }
    open_ = [f"{count} {ways[state]}" for state, count in counts.items() if count]
    if not open_:
        return []
    done = len(grid.in_state(DONE))
    return [f"{done} of {len(grid.cells)} runs are done: {listed(open_)}. They are marked below, with the reason."]


# ---------------------------------------------------------------- who knows what


def seen_by(run: Run) -> dict[str, bool]:
    """What the attackers of a run are shown, by what there is to see."""
    knowledge, there = str(run.attack.get("knowledge", "own")), spread(run) is None  # whoever spread rows is gone
    return {
        "their own data and updates": there,
        "the global model": there,
        "each other's updates": there and run.attack.get("collude", True) is not False,
        "the updates of honest clients": knowledge.startswith("cohort"),
        "the defense and its settings": knowledge == "cohort+defense",
    }


def threats(grid: Grid) -> list[dict[str, Any]]:
    """One card per attack and threat model: the cells' attack card, and what the attackers see."""
    found: list[dict[str, Any]] = []
    for cell in grid.cells:
        if cell.run is None or not cell.run.attack:
            continue
        card = [(question, answers) for question, answers in attack_card(cell.run, took_part=False)]
        for known in found:
            if known["name"] == cell.attack and known["card"] == card:
                break
        else:
            found.append({"name": cell.attack, "card": card, "sees": seen_by(cell.run)})
    return found


def servers(grid: Grid) -> list[tuple[str, list[list[str]]]]:
    """(defense, the different ways in which it was set) over the cells: what the server does, and what it was told."""
    found: dict[str, list[list[str]]] = {}
    for cell in grid.cells:
        if cell.run is not None:
            steps = defense_steps(cell.run)
            ways = found.setdefault(cell.defense, [])
            if steps not in ways:
                ways.append(steps)
    return list(found.items())


def named(cell: Cell) -> str:
    """A cell as people say it: attack against defense."""
    attack = "no attack" if cell.attack == NONE else cell.attack
    defense = "no defense" if cell.defense == NONE else cell.defense
    return f"{attack} against {defense}"
