"""A matrix as a heat-map: a colour level, a number and a link for every cell, and words where there is no number.

The colours are cividis, which people with colour-blindness see alike; bright is good for the defender, dark is bad, in
every map. The number stands in the cell, so no colour has to be read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import colormaps

from fedllm_sec.report.grid.folder import ABSENT, FAILED, NONE, PARTIAL, UNREADABLE, Cell
from fedllm_sec.report.grid.numbers import Slice, Slot, badness
from fedllm_sec.report.grid.tables import INTERVALS, called, measured, said, state_of, twin_measure
from fedllm_sec.report.grid.views import ASR, View
from fedllm_sec.report.measures import Measure, interval, written

LEVELS = 24  # colours from bad (0) to good (LEVELS - 1)
LONGEST_REASON = 160


@dataclass(frozen=True)
class Scale:
    """From a value to a colour level. The ends are the same for all slices of a view."""

    bad: float
    good: float
    logarithmic: bool = False

    def level(self, value: float) -> int:
        """0 is worst for the defender; what is not finite is worst."""
        if not math.isfinite(value):
            return LEVELS - 1 if value == math.copysign(math.inf, self.good - self.bad) else 0
        bad, good = self.bad, self.good
        if self.logarithmic:
            bad, good, value = math.log(bad), math.log(good), math.log(max(value, 1e-300))
        share = (value - bad) / (good - bad)
        return round(max(0.0, min(1.0, share)) * (LEVELS - 1))


def scale_of(parts: Sequence[Slice], view: View) -> Scale:
    """All of 0..1 for attack success (less than 0 is as good as 0); else the measured range, a rate's in tenths."""
    if view.kind == ASR:
        return Scale(1.0, 0.0)
    slots = [part.slot(view, attack, defense) for part in parts for attack in part.attacks for defense in part.defenses]
    values = [slot.mean.value for slot in slots if slot.mean is not None and math.isfinite(slot.mean.value)]
    low, high = min(values, default=0.0), max(values, default=1.0)
    if view.key == "lost":
        return Scale(max(high, 0.05), 0.0)
    if view.unit == "rate":
        low, high = math.floor(10 * low) / 10, math.ceil(10 * high) / 10
    if low >= high and view.unit == "rate":
        low, high = max(0.0, low - 0.1), min(1.0, high + 0.1)
    elif low >= high:
        low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
        low = max(low, view.kind.bounds[0])
    logarithmic = view.unit == "number" and low > 0 and high / low > 50
    return Scale(low, high, logarithmic) if view.higher_is_better else Scale(high, low, logarithmic)


def style() -> str:
    """One CSS class a level: its colour, and black or white text, whichever has the higher contrast.

    And one a weight of a client, from 0 to double an equal share, in the same colours.
    """
    rules = [f".w{weight}{{fill:{_hex(weight / 9)}}}" for weight in range(10)]
    for level in range(LEVELS):
        red, green, blue, _ = colormaps["cividis"](level / (LEVELS - 1))
        light = sum(weight * _linear(part) for weight, part in ((0.2126, red), (0.7152, green), (0.0722, blue)))
        ink = "#000" if (light + 0.05) / 0.05 > 1.05 / (light + 0.05) else "#fff"
        rules.append(f".h{level}{{background:{_hex(level / (LEVELS - 1))};--on:{ink}}}")
    return "\n".join(rules)


def _hex(share: float) -> str:
    return "#" + "".join(f"{round(255 * part):02x}" for part in colormaps["cividis"](share)[:3])


def _linear(part: float) -> float:
    return part / 12.92 if part <= 0.04045 else float(((part + 0.055) / 1.055) ** 2.4)


def heat_map(part: Slice, view: View, scale: Scale, places: Mapping[str, int], key: str) -> dict[str, Any]:
    """What the template needs to draw one map; `places` are the numbers of the cells' entries."""
    rows = [
        (called(name), [_square(part.slot(view, name, defense), view, scale, places) for defense in part.defenses])
        for name in part.attacks
    ]
    twin = twin_measure(part, view)
    return {
        "key": f"{key}-{view.key}",
        "title": view.title,
        "explained": view.explained,
        "defenses": part.defenses,
        "rows": rows,
        "twin": _twin(part, twin, view, places),
        "bad": written(scale.bad, view.unit),
        "good": written(scale.good, view.unit),
        "says": _says(part, view),
        "note": INTERVALS,
    }


def _square(slot: Slot, view: View, scale: Scale, places: Mapping[str, int]) -> dict[str, Any]:
    """One cell: kind is "value", "open" (no number, and why) or "absent" (not in the grid)."""
    if not slot.cells:
        return {"kind": "absent", "text": ABSENT}
    shown = next((cell for cell in slot.cells if cell.finished), slot.cells[0])
    square: dict[str, Any] = {
        "run": places[shown.folder],
        "where": f"{called(slot.cells[0].attack)}, {slot.cells[0].defense}",
        "beside": view.beside(slot.cells).strip("()"),
    }
    if slot.mean is None:
        reason = why(slot.cells)
        state = state_of(slot)
        return square | {
            "kind": "open",
            "state": state.replace(" ", "-") or "unmeasured",
            "text": said(slot, view).text,
            "small": _briefly(slot.cells),
            "some": "",
            "reason": reason,
            "level": None,
        }
    some = f"{slot.measured} of {len(slot.cells)} seeds" if slot.measured < len(slot.cells) else ""
    return square | {
        "kind": "value",
        "state": "",
        "level": scale.level(slot.mean.value),
        "text": written(slot.mean.value, view.unit),
        "small": interval(slot.mean, view.unit),
        "some": some,
        "reason": why(slot.cells),
    }


def why(cells: Sequence[Cell]) -> str:
    """The reasons of the cells that have no final result, each once."""
    reasons = dict.fromkeys(f"{cell.state}: {cell.reason}" for cell in cells if cell.reason)
    text = "; ".join(reasons)
    return text if len(text) <= LONGEST_REASON else text[: LONGEST_REASON - 1] + "…"


def _briefly(cells: Sequence[Cell]) -> str:
    """A word or two under "failed" or "stopped": the error's name, or how far it got."""
    cell = next((cell for cell in cells if cell.reason), None)
    if cell is None:
        return ""
    if cell.state == FAILED:
        return cell.reason.partition(":")[0][:24]
    if cell.state == PARTIAL and cell.run is not None:
        return f"{cell.run.records[-1].round} of {cell.run.recipe.get('rounds')} rounds"
    return "see below" if cell.state == UNREADABLE else ""


def _twin(part: Slice, m: Measure | None, view: View, places: Mapping[str, int]) -> dict[str, Any] | None:
    if m is None or not part.twins:
        return None
    return {"text": str(measured(view, part.twins)), "run": places[part.twins[0].folder]}


def _says(part: Slice, view: View) -> str:
    """The map in one sentence, as its text alternative: the best and the worst slot under attack."""
    found = [
        (slot.mean.value, attack, defense)
        for attack in part.attacks
        for defense in part.defenses
        if attack != NONE and (slot := part.slot(view, attack, defense)).mean is not None
    ]
    if not found:
        return "No slot under attack has a result."
    found.sort(key=lambda item: badness(item[0], view))
    texts = []
    for word, value in (("best", found[0][0]), ("worst", found[-1][0])):
        end = badness(value, view)
        same = [f"{attack}, {defense}" for other, attack, defense in found if badness(other, view) == end]
        where = "; ".join(same[:2]) + (f" and {len(same) - 2} more" if len(same) > 2 else "")
        texts.append(f"{word} {written(value, view.unit)} ({where})")
    return f"Under attack: {', '.join(texts)}."
