"""Pictures of what single clients sent in one run, and what the rule made of it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from fedllm_sec.records.outcomes import judged_rounds
from fedllm_sec.report.decided import clients_of, kept_says, malicious_of, redrawn, share_of, weights_says, who_first
from fedllm_sec.report.measures import plain, plural
from fedllm_sec.report.plots import (
    BLUE,
    INK,
    SKY,
    STYLE,
    VERMILLION,
    Picture,
    figure,
    finite,
    label,
    log_scale,
    mark_attack,
    round_axis,
    spread,
    to_svg,
)
from fedllm_sec.report.runs import Run
from fedllm_sec.report.thin import thin, thinned

GREY = "#8a8f97"
MOST_ROUNDS = 300  # of which single updates are drawn
NAMED_CLIENTS = 30  # up to so many clients, each row of the decision picture has its id


def _blank(run: Run) -> str:
    skipped = sum(record.skipped is not None and record.kept is None and not record.weights for record in run.rounds)
    return f" Blank where the round was skipped ({skipped} of {len(run.rounds)})." if skipped else ""


# ---------------------------------------------------------------- update norms


def norms(run: Run, salt: str) -> Picture | None:
    """Length of every submitted update by round; filled if the rule kept it, hollow if not."""
    ever, selects = malicious_of(run), any(record.kept is not None for record in run.rounds)
    order = {i: place for place, i in enumerate(clients_of(run))}
    dots: dict[tuple[bool, bool], list[tuple[float, float]]] = {}
    screened: list[float] = []
    for record in thin(run.rounds, MOST_ROUNDS):
        for i, norm in record.norms.items():
            x = record.round + _nudge(order.get(i, 0), i in ever, len(order) - len(ever), len(ever))
            if i in record.quarantined:
                screened.append(x)
            elif finite(norm) and norm == norm:
                kept = record.kept is None or i in record.kept
                dots.setdefault((i in record.malicious, kept), []).append((x, norm))
    if not dots and not screened:
        return None
    count = sum(len(group) for group in dots.values())
    size = 26 if count <= 300 else 14 if count <= 1000 else 7
    with matplotlib.rc_context(STYLE):
        fig, axes = figure(height=3.5)
        round_axis(axes, run.rounds)
        for (is_bad, kept), group in sorted(dots.items()):
            colour = VERMILLION if is_bad else BLUE
            axes.scatter(
                [x for x, _ in group],
                [norm for _, norm in group],
                s=size,
                marker="^" if is_bad else "o",
                facecolor=colour if kept else "none",
                edgecolor=colour,
                linewidth=0.9 if count <= 1000 else 0.6,
                alpha=0.9 if count <= 300 or is_bad else 0.55,
                zorder=3 if is_bad else 2,
                rasterized=count > 400,
                clip_on=False,
            )
        values = [norm for group in dots.values() for _, norm in group]
        if spread(values) > 20:
            log_scale(axes)
        elif values:
            axes.set_ylim(0, 1.12 * max(values) or 1.0)
        if screened:
            axes.plot(
                screened,
                [0.965] * len(screened),
                transform=axes.get_xaxis_transform(),
                linestyle="",
                marker="X",
                markersize=8,
                color=INK,
                zorder=4,
            )
        axes.set_title("Length of each client's update")
        mark_attack(axes, [run])
        fig.legend(
            handles=_norm_keys(dots, selects, bool(screened)),
            loc="outside lower left",
            ncols=2,
            fontsize=9.5,
            handletextpad=0.2,
            columnspacing=1.2,
        )
        svg = to_svg(fig, salt)
    said = "Euclidean norm of what was sent, one mark per client and round."
    return Picture(salt, svg, _norms_alt(run), said + thinned(len(run.rounds), MOST_ROUNDS))


def _nudge(place: int, is_bad: bool, honest: int, bad: int) -> float:
    """Honest clients stand a little left of their round, malicious ones a little right."""
    if is_bad:
        return 0.1 + 0.2 * (place + 0.5) / max(1, bad)
    return -0.3 + 0.3 * (place - bad + 0.5) / max(1, honest)


def _norm_keys(dots: dict[tuple[bool, bool], Any], selects: bool, screened: bool) -> list[Line2D]:
    keys = []
    for is_bad, kept in sorted(dots, key=lambda pair: (pair[0], not pair[1])):
        who, colour = ("malicious", VERMILLION) if is_bad else ("honest", BLUE)
        text = who + ((", kept" if kept else ", dropped") if selects else "")
        fill, marker = colour if kept else "none", "^" if is_bad else "o"
        keys.append(Line2D([], [], ls="", marker=marker, mfc=fill, mec=colour, ms=6, label=text))
    if screened:
        keys.append(Line2D([], [], ls="", marker="X", color=INK, ms=7, label="quarantined (at the top)"))
    return keys


def _norms_alt(run: Run) -> str:
    under = judged_rounds(run.rounds, run.attacked)
    sent = [(i in r.malicious, n) for r in under for i, n in r.norms.items() if i not in r.quarantined and finite(n)]
    bad, good = ([n for is_bad, n in sent if is_bad is side] for side in (True, False))
    if bad and good:
        b, g = median(bad), median(good)
        ratio = b / g if g > 0 else 0.0
        far = f"{ratio:.{0 if ratio >= 10 else 1}f}" if ratio < 1e5 else f"{ratio:.0e}"
        times = f", {far} times as long" if ratio else ""
        text = f"Median update length under attack: malicious {plain(b)}, honest {plain(g)}{times}."
    elif bad or good:
        who = "malicious" if bad else "honest"
        text = f"Median update length of the {who} clients: {plain(median(bad or good))}."
    else:
        text = "No update had a usable length." if under else "No round was under attack."
    screened = sum(len(record.quarantined) for record in run.rounds)
    return text + (f" {plural(screened, 'row')} quarantined." if screened else "")


# ---------------------------------------------------------------- decisions


def decisions(run: Run, salt: str) -> Picture | None:
    """Who was kept (rules that select), or how much each client weighed (rules that weigh), client by round.

    None where the rule gave neither, or gave every row the same weight in every round.
    """
    if any(record.kept is not None for record in run.rounds):
        return _kept_map(run, salt)
    weights = [list(record.weights.values()) for record in run.rounds if record.weights]
    if any(max(row) - min(row) > 1e-9 * max(1e-300, abs(max(row))) for row in weights):
        return _weight_map(run, salt)
    return None


def _canvas(run: Run, ids: Sequence[str]) -> tuple[Any, Axes]:
    per_row = 0.2 if len(ids) <= NAMED_CLIENTS else max(0.03, min(0.055, 5.5 / len(ids)))
    fig, axes = figure(height=1.5 + per_row * len(ids))
    return fig, axes


def _dress(axes: Axes, run: Run, ids: Sequence[str]) -> None:
    """Rounds below, clients at the left: by name while they fit, else as two groups."""
    bad = len(malicious_of(run))
    axes.grid(visible=False)
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    if 0 < bad < len(ids):
        axes.axhline(bad - 0.5, color=INK, linewidth=1.2)
    if len(ids) <= NAMED_CLIENTS:
        axes.set_yticks(range(len(ids)), [label(i, 14) for i in ids], fontsize=9)
        for tick, i in zip(axes.get_yticklabels(), ids, strict=True):
            if i in malicious_of(run):
                tick.set_color(VERMILLION)
                tick.set_fontweight("bold")
        who = who_first(run).replace(" in ", "\nin ")
        axes.set_ylabel(f"client\n(bold: {who})" if bad else "client")
    else:
        groups = [(0, bad, who_first(run).replace(" in ", "\nin ")), (bad, len(ids), "honest")]
        shown = [(start, stop, name) for start, stop, name in groups if stop > start]
        axes.set_yticks([(a + b - 1) / 2 for a, b, _ in shown], [f"{b - a}\n{name}" for a, b, name in shown])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _grid(run: Run, ids: Sequence[str], value: Any, width: int) -> Any:
    """An array (clients, rounds, width) of value(record, id); empty where a client took no part."""
    first, last = run.rounds[0].round, run.rounds[-1].round
    cells = np.full((len(ids), last - first + 1, width), 0.0 if width > 1 else np.nan)
    place = {i: row for row, i in enumerate(ids)}
    for record in run.rounds:
        for i in record.cohort:
            found = value(record, i)
            if found is not None:
                cells[place[i], record.round - first] = found
    return cells


def _extent(run: Run, ids: Sequence[str]) -> tuple[float, float, float, float]:
    return run.rounds[0].round - 0.5, run.rounds[-1].round + 0.5, len(ids) - 0.5, -0.5


def _kept_map(run: Run, salt: str) -> Picture:
    ids = clients_of(run)
    colours = {"kept": to_rgba(SKY), "dropped": to_rgba(VERMILLION), "quarantined": to_rgba(GREY)}

    def cell(record: Any, i: str) -> Any:
        if i in record.quarantined:
            return colours["quarantined"]
        return None if record.kept is None else colours["kept" if i in record.kept else "dropped"]

    with matplotlib.rc_context(STYLE):
        fig, axes = _canvas(run, ids)
        cells = _grid(run, ids, cell, 4)
        axes.imshow(cells, aspect="auto", interpolation="nearest", extent=_extent(run, ids))
        out = [(r.round, ids.index(i)) for r in run.rounds for i in r.quarantined if i in r.cohort]
        axes.plot([x for x, _ in out], [y for _, y in out], "X", color=INK, markersize=5)
        _mark_malicious(axes, run, ids, INK)
        _dress(axes, run, ids)
        axes.set_title("Whom the rule kept")
        used = ["kept", "dropped"] + (["quarantined"] if any(r.quarantined for r in run.rounds) else [])
        keys = [Patch(facecolor=colours[name], label=name) for name in used]
        fig.legend(handles=keys, loc="outside lower left", ncols=3, fontsize=9.5, columnspacing=1.2)
        svg = to_svg(fig, salt)
    return Picture(salt, svg, kept_says(run), f"One cell per client and round.{_marked(run)}{_blank(run)}")


def _mark_malicious(axes: Axes, run: Run, ids: Sequence[str], colour: str) -> None:
    """A triangle on the rows of a round's attackers, where they are others in each round."""
    if redrawn(run):
        spots = [(r.round, ids.index(i)) for r in run.rounds if r.attacking for i in r.malicious]
        axes.plot([x for x, _ in spots], [y for _, y in spots], ls="", marker="^", color=colour, markersize=3)


def _marked(run: Run) -> str:
    return " A triangle: attacks in that round." if redrawn(run) else ""


def _weight_map(run: Run, salt: str) -> Picture:
    ids = clients_of(run)
    with matplotlib.rc_context(STYLE):
        fig, axes = _canvas(run, ids)
        cells = _grid(run, ids, share_of, 1)[:, :, 0]
        top = max(2.0, float(np.nanquantile(cells, 0.98)))
        image = axes.imshow(
            cells,
            aspect="auto",
            interpolation="nearest",
            extent=_extent(run, ids),
            cmap="cividis",
            vmin=0,
            vmax=top,
        )
        _mark_malicious(axes, run, ids, "white")
        _dress(axes, run, ids)
        axes.set_title("How much each client weighed")
        bar = fig.colorbar(image, ax=axes, pad=0.02, aspect=25, extend="max")
        bar.set_label("weight (1 = equal share)")
        bar.outline.set_visible(False)
        svg = to_svg(fig, salt)
    return Picture(salt, svg, weights_says(run), f"One cell per client and round.{_marked(run)}{_blank(run)}")
