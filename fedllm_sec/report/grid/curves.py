"""Quality and attack success over the rounds, one picture an attack, one line a defense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.ticker import MaxNLocator

from fedllm_sec.report.grid.folder import NONE
from fedllm_sec.report.grid.numbers import Slice
from fedllm_sec.report.grid.views import Parts, View, judged
from fedllm_sec.report.measures import Measure, plural
from fedllm_sec.report.plots import (
    BLUE,
    GREEN,
    MUTED,
    ORANGE,
    PURPLE,
    SKY,
    STYLE,
    UNNAMED,
    VERMILLION,
    YELLOW,
    Picture,
    Stroke,
    caption_of,
    ends,
    figure,
    label,
    line,
    to_svg,
    value_axis,
)

PICTURES = 16  # a page draws so many; the other curves open with their run
OTHERS = (
    Stroke(BLUE, "o", "-"),
    Stroke(GREEN, "s", (0, (6, 1.5))),
    Stroke(PURPLE, "D", (0, (4, 1, 1, 1))),
    Stroke(ORANGE, "v", (0, (2, 1))),
    Stroke(SKY, "P", (0, (1, 1))),
    Stroke(YELLOW, "*", (0, (8, 1, 1, 1, 1, 1))),
)


def strokes(best_first: Sequence[str]) -> dict[str, Stroke]:
    """No defense: vermillion triangles; the best six have a colour and a marker each; the others share one line."""
    named = [name for name in best_first if name != NONE]
    chosen = dict(zip(named, OTHERS, strict=False))
    return {name: Stroke(VERMILLION, "^", "-") if name == NONE else chosen.get(name, UNNAMED) for name in best_first}


def pictures(parts: Sequence[Slice], shown: Sequence[View], best_first: Sequence[str]) -> tuple[list[Picture], int]:
    """Up to PICTURES pictures in the order of slices and attacks, and how many were left out."""
    wanted = [(part, attack, view) for part in parts for attack in part.attacks for view in judged(shown)[::-1]]
    drawable = [
        (part, attack, view, lines)
        for part, attack, view in wanted
        if (lines := _lines(part, attack, view)) and any(len(points) > 1 for points in lines.values())
    ]
    drawn = [
        _picture(lines, _titled(part, attack, view), view, strokes(best_first), f"curve-{place}")
        for place, (part, attack, view, lines) in enumerate(drawable[:PICTURES], 1)
    ]
    return drawn, len(drawable) - len(drawn)


def _titled(part: Slice, attack: str, view: View) -> str:
    under = "no attack" if attack == NONE else attack
    return f"{view.title[0].upper()}{view.title[1:]} under {under}" + (f" ({part.title})" if part.title else "")


def _lines(part: Slice, attack: str, view: View) -> dict[str, list[Measure]]:
    """The mean over seeds in every round in which all finished seeds of a defense were measured."""
    lines: dict[str, list[Measure]] = {}
    for defense in part.defenses:
        runs = [cell.run for cell in part.cells if (cell.attack, cell.defense) == (attack, defense) and cell.finished]
        taken: dict[int, list[Parts]] = {}
        for run in runs:
            for record in run.records if run else ():
                row = view.at(record) if view.at is not None else None
                if row is not None:
                    taken.setdefault(record.round, []).append(row)
        points = []
        for round in sorted(taken):
            m = view.mean(taken[round])
            if m is not None and len(taken[round]) == len(runs):
                points.append(Measure(m.value, m.low, m.high, m.n, round))
        if points:
            lines[defense] = points
    return lines


def _picture(
    lines: Mapping[str, list[Measure]], title: str, view: View, chosen: Mapping[str, Stroke], salt: str
) -> Picture:
    order = sorted(lines, key=list(chosen).index)
    with matplotlib.rc_context(STYLE):
        fig, axes = figure(height=3.5)
        for name in reversed(order):
            line(axes, lines[name], chosen[name], opacity=0.12, markers=8)
        named = [name for name in order if chosen[name] != UNNAMED]
        handles = [
            axes.plot([], [], color=s.colour, marker=s.marker, linestyle=s.dashes, label=label(_called(name), 26))[0]
            for name in named
            if (s := chosen[name])
        ]
        if len(order) > len(named):
            text = plural(len(order) - len(named), "other defense")
            handles += axes.plot([], [], color=MUTED, linestyle=UNNAMED.dashes, linewidth=1, label=text)
        axes.set_xlabel("round")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
        value_axis(axes, [m.value for points in lines.values() for m in points], view.unit)
        axes.set_title(label(title, 58))
        fig.legend(handles=handles, loc="outside lower left", ncols=2, fontsize=10, handlelength=3.2)
        svg = to_svg(fig, salt)
    spans = {(points[0].round, points[-1].round) for points in lines.values()}
    shared = spans.pop() if len(spans) == 1 else None
    texts = []
    for name in order:
        points = lines[name]
        when = "" if shared else f" (round {points[0].round} to {points[-1].round})"
        texts.append(f"{_called(name)} {ends(points, view.unit)}{when}")
    head = f"{title}, from round {shared[0]} to {shared[1]}" if shared else f"{title}, over the rounds"
    several = any((m.n or 0) > 1 for points in lines.values() for m in points)
    caption = caption_of([*lines.values()], "means over seeds; " if several else "")
    return Picture(salt, svg, f"{head}: {'; '.join(texts)}.", caption)


def _called(name: str) -> str:
    return "no defense" if name == NONE else name
