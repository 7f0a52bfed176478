"""Quality and attack success over the rounds, one picture an attack, one line a defense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fedllm_sec.report.grid.folder import NONE
from fedllm_sec.report.grid.intervals import over_seeds
from fedllm_sec.report.grid.numbers import Slice, View
from fedllm_sec.report.measures import Measure, measure, plural, written
from fedllm_sec.report.plots import (
    BLUE,
    GREEN,
    MUTED,
    ORANGE,
    PURPLE,
    SKY,
    STYLE,
    VERMILLION,
    YELLOW,
    Picture,
    Stroke,
    figure,
    finite,
    label,
    log_scale,
    spread,
    to_svg,
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
UNNAMED = Stroke(MUTED, "", (0, (1, 2)))


def strokes(best_first: Sequence[str]) -> dict[str, Stroke]:
    """No defense: vermillion triangles; the best six have a colour and a marker each; the others share one line."""
    named = [name for name in best_first if name != NONE]
    chosen = dict(zip(named, OTHERS, strict=False))
    return {name: Stroke(VERMILLION, "^", "-") if name == NONE else chosen.get(name, UNNAMED) for name in best_first}


def pictures(parts: Sequence[Slice], shown: Sequence[View], best_first: Sequence[str]) -> tuple[list[Picture], int]:
    """Up to PICTURES pictures in the order of slices and attacks, and how many were left out."""
    judged = [view for view in shown if view.key not in ("lost", "gained")]
    wanted = [(part, attack, view) for part in parts for attack in part.attacks for view in judged[::-1]]
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
        taken: dict[int, list[Measure]] = {}
        for run in runs:
            for record in run.records if run else ():
                m = measure(record, view.kind.key)
                if m is not None and finite(m.value):
                    taken.setdefault(record.round, []).append(m)
        points = []
        for round in sorted(taken):
            if len(taken[round]) == len(runs) and (m := over_seeds(taken[round], view.unit)) is not None:
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
            stroke, points = chosen[name], lines[name]
            band = [(m.round, m.low, m.high) for m in points if m.low is not None and m.high is not None]
            if band and stroke != UNNAMED:
                x, low, high = zip(*band, strict=True)
                axes.fill_between(x, low, high, color=stroke.colour, alpha=0.12, linewidth=0)
            axes.plot(
                [m.round for m in points],
                [m.value for m in points],
                color=stroke.colour,
                marker=stroke.marker,
                linestyle=stroke.dashes,
                markevery=max(1, len(points) // 8),
                linewidth=1.0 if stroke == UNNAMED else 2.0,
                clip_on=False,
            )
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
        if view.unit in ("percent", "rate"):
            axes.set_ylim(0, 1)
        elif spread([m.value for points in lines.values() for m in points]) > 50:
            log_scale(axes)
        if view.unit == "percent":
            axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.0f} %"))
        axes.set_title(label(title, 58))
        fig.legend(handles=handles, loc="outside lower left", ncols=2, fontsize=10, handlelength=3.2)
        svg = to_svg(fig, salt)
    ends = "; ".join(
        f"{_called(name)} {written(lines[name][0].value, view.unit)} → {written(lines[name][-1].value, view.unit)}"
        for name in order
    )
    first, last = (min(p[at].round for p in lines.values()) for at in (0, -1))
    caption = "Means over seeds; bands are 95 % intervals." if any(p[-1].low for p in lines.values()) else ""
    return Picture(salt, svg, f"{title}, from round {first} to {last}: {ends}.", caption)


def _called(name: str) -> str:
    return "no defense" if name == NONE else name
