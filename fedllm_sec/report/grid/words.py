"""A grid in plain sentences: what it found, who attacks and what each side knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedllm_sec.report.grid.folder import DONE, FAILED, NONE, PARTIAL, UNREADABLE, WAITING, Cell, Grid
from fedllm_sec.report.grid.numbers import Slice, View, Worst, common, harm, met, worst
from fedllm_sec.report.measures import Measure, interval, listed, plural, written
from fedllm_sec.report.runs import Run
from fedllm_sec.report.words import attack_card, defense_steps


def finding(grid: Grid, parts: Sequence[Slice], shown: Sequence[View]) -> list[str]:
    """Which defense has the best worst case, by quality and by attack success, and how complete the grid is."""
    attacks = [name for name in parts[0].attacks if name != NONE]
    defenses = [name for name in parts[0].defenses if name != NONE]
    judged = [view for view in shown if view.key not in ("lost", "gained")]
    head = f"{plural(len(attacks), 'attack')} against {plural(len(defenses), 'defense')}"
    if not judged:
        return [f"{head}: nothing was measured yet.", *_completeness(grid)]
    sentences = [text for view in judged for text in _worst_sentences(parts, view)]
    first = f"{head}: {sentences[0]}" if sentences else f"{head}."
    rest = [text if text.split()[0] in parts[0].defenses else f"{text[0].upper()}{text[1:]}" for text in sentences[1:]]
    return [first, *rest, *_completeness(grid)]


def _worst_sentences(parts: Sequence[Slice], view: View) -> list[str]:
    """The defense with the best worst case over the attacks that lack no result, and what to compare it with."""
    rows = met(parts, view)
    shared = common(rows, view)
    cases = {name: case for name in parts[0].defenses if (case := worst(shared, view, name)) is not None}
    defended = {name: case for name, case in cases.items() if name != NONE}
    texts = []
    if defended:
        name = min(defended, key=lambda key: harm(defended[key].measure.value, view))
        over = (
            ""
            if len(shared) == len(rows)
            else f"over the {len(shared)} of {len(rows)} attacks for which no result is missing, "
        )
        texts.append(f"{over}{name} has the best worst case in {view.title}: {_case(defended[name], view, parts)}")
    others = []
    bare = worst(rows, view, NONE)
    if bare is not None:
        others.append(f"without a defense {view.title} is at worst {_case(bare, view, parts)}")
    free = view.of(parts[0].twins) if len(parts) == 1 else None
    if free is not None:
        others.append(f"attack-free and undefended {'it' if others else view.title} is {_number(free, view)}")
    return [f"{text}." for text in (*texts, "; ".join(others)) if text]


def _case(case: Worst, view: View, parts: Sequence[Slice]) -> str:
    where = f", {case.slice.title}" if len(parts) > 1 and case.slice.title else ""
    return f"{_number(case.measure, view)} under {case.attack}{where}"


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
    knowledge = str(run.attack.get("knowledge", "own"))
    return {
        "their own data and updates": True,
        "the global model": True,
        "each other's updates": run.attack.get("collude", True) is not False,
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
