"""Pictures of a comparison and of one run, as inline SVG with a text that says what they show.

Colours are Okabe and Ito's, which people with colour-blindness can tell apart; every series also has its own
marker and line style. Lines, text and grid are written as CSS variables, so that a page can be light or dark.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fedllm_sec.report.measures import Kind, Measure, defense_name, plural, series, written
from fedllm_sec.report.runs import Run
from fedllm_sec.report.thin import thin, thinned

BLUE, VERMILLION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY, YELLOW = "#E69F00", "#56B4E9", "#F0E442"
# Stand-ins that become CSS variables on the page; as colours they are those of the light page.
INK, MUTED, GRID = "#1b1c1f", "#5f6369", "#dcdfe3"
VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--line)"}

STYLE: Any = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlepad": 9.0,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
    "text.parse_math": False,  # names come from files: "$" is a dollar sign
    "legend.frameon": False,
    "lines.linewidth": 2.0,
    "lines.markersize": 5.0,
    "svg.fonttype": "none",  # real text: sharp, small, and it can be selected
}


@dataclass(frozen=True)
class Picture:
    """An SVG element, its finding in words (its text alternative), a caption, and an id for the page."""

    id: str
    svg: str
    alt: str
    caption: str = ""


def figure(width: float = 5.2, height: float = 3.3) -> tuple[Figure, Axes]:
    """A figure (inches) without pyplot's global state, and its axes."""
    fig = Figure(figsize=(width, height), layout="constrained")
    fig.patch.set_alpha(0.0)
    axes = fig.add_subplot()
    axes.patch.set_alpha(0.0)
    return fig, axes


def to_svg(fig: Figure, salt: str) -> str:
    """The figure as an <svg> element whose ids start from `salt`: several can stand on one page."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the browser has letters that matplotlib lacks
        with matplotlib.rc_context({"svg.hashsalt": salt}):
            no_metadata = {"Date": None, "Creator": None, "Format": None}
            fig.savefig(buffer, format="svg", dpi=200, metadata=no_metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # matplotlib numbers its groups alike in every figure; ids must be unique on a page.
    prefix = re.sub(r"\W+", "-", salt)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r'((?:xlink:)?href="#)([^"]+)"', rf'\1{prefix}-\2"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", svg)
    svg = re.sub(r'<svg ([^>]*?)height="[^"]*" ?', r"<svg \1", svg, count=1)
    svg = re.sub(r'<svg ([^>]*?)width="[^"]*" ?', r"<svg \1", svg, count=1)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, variable)
    # Graphics inside a labelled figure are one image to a screen reader.
    return svg.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1).strip()


def label(text: str, longest: int = 44) -> str:
    """A name from a file as a label: printable, of bounded length, not hidden by a leading underscore."""
    shown = "".join(c if c.isprintable() else "?" for c in text)
    shown = shown if len(shown) <= longest else shown[: longest - 1] + "…"
    return f" {shown}" if shown.startswith("_") else shown


# ---------------------------------------------------------------- curves of several runs


@dataclass(frozen=True)
class Stroke:
    colour: str
    marker: str
    dashes: Any


UNNAMED = Stroke(MUTED, "", (0, (1, 2)))  # runs for which no colour is left share this


def strokes(runs: Sequence[Run]) -> dict[str, Stroke]:
    """Attack-free: blue circles; attacked without a defense: vermillion triangles; the others after them."""
    others = iter(
        [
            Stroke(GREEN, "s", (0, (6, 1.5))),
            Stroke(PURPLE, "D", (0, (4, 1, 1, 1))),
            Stroke(ORANGE, "v", (0, (2, 1))),
            Stroke(SKY, "P", (0, (1, 1))),
            Stroke(YELLOW, "*", (0, (8, 1, 1, 1, 1, 1))),
        ]
    )
    chosen: dict[str, Stroke] = {}
    taken: set[str] = set()
    for run in runs:
        first = Stroke(VERMILLION, "^", "-") if run.attacked else Stroke(BLUE, "o", "-")
        if (run.attacked and run.defended) or first.colour in taken:
            first = next(others, UNNAMED)
        taken.add(first.colour)
        chosen[run.name] = first
    return chosen


def described(run: Run) -> str:
    """A run in a legend: its name, and its defense where the name does not say it."""
    name = defense_name(run)
    return label(run.name if name == "none" or name in run.name else f"{run.name} ({name})")


def line(
    axes: Axes, points: Sequence[Measure], stroke: Stroke, *, opacity: float, markers: int, name: str | None = None
) -> None:
    """A measure over the rounds, its interval as a band of this opacity, about so many markers, a name for the legend.

    Where it stops being a number the line ends, and a cross at the top says so.
    """
    drawn = thin(points)
    band = [(m.round, m.low, m.high) for m in drawn if m.low is not None and m.high is not None]
    if band and stroke != UNNAMED:
        x, low, high = zip(*band, strict=True)
        axes.fill_between(x, low, high, color=stroke.colour, alpha=opacity, linewidth=0)
    axes.plot(
        [m.round for m in drawn],
        [m.value if finite(m.value) else math.nan for m in drawn],
        color=stroke.colour,
        marker=stroke.marker,
        linestyle=stroke.dashes,
        markevery=max(1, len(drawn) // markers),
        linewidth=1.0 if stroke == UNNAMED else 2.0,
        label=name,
        clip_on=False,
    )
    lost = lost_at(points)
    if lost is not None:
        top = axes.get_xaxis_transform()
        axes.plot([lost], [0.965], transform=top, ls="", marker="X", ms=8, color=stroke.colour, label="_")


def lost_at(points: Sequence[Measure]) -> int | None:
    """The first round in which the measure is not a finite number."""
    return next((m.round for m in points if not finite(m.value)), None)


def ends(points: Sequence[Measure], unit: str) -> str:
    """Its first and its last value in words, and from which round it is no number."""
    lost = lost_at(points)
    text = f"{written(points[0].value, unit)} → {written(points[-1].value, unit)}"
    return text if lost is None else f"{text} (not finite in round {lost})"


def caption_of(lines: Sequence[Sequence[Measure]], first: str = "") -> str:
    """What bands and crosses mean, where there are any."""
    banded = any(m.low is not None and m.high is not None for points in lines for m in points)
    lost = any(lost_at(points) is not None for points in lines)
    parts = [first + "bands are 95 % intervals." if banded else "", "A cross: not a finite number." if lost else ""]
    text = " ".join(filter(None, parts))
    return text[:1].upper() + text[1:]


def curves(runs: Sequence[Run], kind: Kind) -> Picture | None:
    """A measure over the rounds, one line a run, with its interval as a band."""
    drawn = [(run, points) for run in runs if (points := series(run, kind.key))]
    if not drawn:
        return None
    chosen = strokes(runs)
    with matplotlib.rc_context(STYLE):
        fig, axes = figure()
        for run, points in drawn:
            stroke = chosen[run.name]
            line(axes, points, stroke, opacity=0.14, markers=10, name="_" if stroke == UNNAMED else described(run))
        unnamed = sum(chosen[run.name] == UNNAMED for run, _ in drawn)
        if unnamed:
            axes.plot([], [], color=MUTED, linestyle=UNNAMED.dashes, linewidth=1, label=plural(unnamed, "other run"))
        round_axis(axes, [r for run, _ in drawn for r in run.records])
        value_axis(axes, [m.value for _, points in drawn for m in points], kind.unit)
        axes.set_title(_titled(kind))
        mark_attack(axes, [run for run, _ in drawn])
        if len(drawn) > 1:
            columns = 1 if len(drawn) < 5 else 2
            fig.legend(loc="outside lower left", ncols=columns, fontsize=10, handlelength=3.2)
        salt = f"curve-{re.sub(r'[^a-z0-9]+', '-', kind.key)}"
        svg = to_svg(fig, salt)
    left_out = thinned(max(len(points) for _, points in drawn))
    return Picture(salt, svg, _curve_alt(drawn, kind), caption_of([points for _, points in drawn]) + left_out)


def value_axis(axes: Axes, values: Sequence[float], unit: str) -> None:
    """From 0 to 1 for a rate, lower where a difference of rates is; a number is logarithmic where it spreads widely."""
    if unit in ("percent", "rate"):
        axes.set_ylim(min([0.0, *filter(finite, values)]), 1)
    elif spread([v for v in values if finite(v)]) > 50:
        log_scale(axes)
    if unit == "percent":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.0f} %"))


def _titled(kind: Kind) -> str:
    better = {True: "higher is better", False: "lower is better", None: ""}[kind.higher_is_better]
    if kind.key in ("asr", "false_trigger"):
        better = "lower is safer"
    title = kind.title[0].upper() + kind.title[1:]
    return f"{title} ({better})" if better else title


def _curve_alt(drawn: Sequence[tuple[Run, list[Any]]], kind: Kind) -> str:
    spans = {(points[0].round, points[-1].round) for _, points in drawn}
    shared = spans.pop() if len(spans) == 1 else None
    parts = []
    for run, points in drawn[:12]:
        first, last = points[0], points[-1]
        when = "" if shared else f" (round {first.round} to {last.round})"
        parts.append(f"{run.name} {ends(points, kind.unit)}{when}")
    more = f"; and {len(drawn) - 12} more runs" if len(drawn) > 12 else ""
    head = f"{kind.title[0].upper()}{kind.title[1:]}"
    head += f" from round {shared[0]} to {shared[1]}" if shared else " over the rounds"
    return f"{head}: {'; '.join(parts)}{more}."


def finite(value: float) -> bool:
    return abs(value) < float("inf")


def spread(values: Sequence[float]) -> float:
    """Largest over smallest positive value."""
    positive = [v for v in values if v > 0 and finite(v)]
    return max(positive) / min(positive) if positive and len(positive) == len(values) else 1.0


def log_scale(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda v, _: ""))


def round_axis(axes: Axes, records: Sequence[Any]) -> None:
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    numbers = [record.round for record in records]
    axes.set_xlim(min(numbers) - 0.4, max(numbers) + 0.4)


def mark_attack(axes: Axes, runs: Sequence[Run]) -> None:
    """A line where an attack starts or stops inside the run, named between the picture and its title.

    From the recipe: a round in which the attackers pause, or draw not to attack, is neither.
    """
    edges: dict[float, str] = {}
    for run in runs:
        start, stop = run.attack.get("start"), run.attack.get("stop")
        last = run.records[-1].round
        if isinstance(start, int) and 1 < start <= last:
            edges[start - 0.5] = "attack starts"
        if isinstance(stop, int) and 1 <= stop < last:
            edges[stop + 0.5] = "attack stops"
    for x, text in edges.items():
        axes.axvline(x, color=MUTED, linewidth=1, linestyle=(0, (2, 2)))
        axes.text(
            x,
            1.01,
            text,
            transform=axes.get_xaxis_transform(),
            fontsize=9,
            color=MUTED,
            va="bottom",
            ha="center",
        )
    if edges:
        axes.set_title(axes.get_title(loc="left"), pad=18)
