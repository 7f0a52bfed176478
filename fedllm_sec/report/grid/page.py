"""The page of a grid: heat-maps, ranking, curves, who knows what, cost, and every run on demand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from fedllm_sec.report import tables as text_tables
from fedllm_sec.report.grid import curves, details, heat, tables, words
from fedllm_sec.report.grid.folder import ATTACK, DEFENSE, DONE, SEED, Grid
from fedllm_sec.report.grid.numbers import Slice, slices
from fedllm_sec.report.grid.ranks import order_of
from fedllm_sec.report.grid.views import View, judged, views
from fedllm_sec.report.markup import environment_of, facts_of, fill
from fedllm_sec.report.measures import plural
from fedllm_sec.report.terms import terms

WARNINGS_SHOWN = 8
SLICES_OPEN = 4  # with more, the page shows one at first


def render(grid: Grid) -> str:
    """The page as one string."""
    parts, shown = slices(grid), views(grid)
    places = {cell.folder: place for place, cell in enumerate(grid.cells)}
    drawn, left_out = curves.pictures(parts, shown, order_of(parts, shown))
    first = next((cell.run for cell in grid.cells if cell.run is not None), None)
    meant = {view.title: view.explained for view in shown} | terms(grid.runs)
    varied = [axis for axis, labels in grid.axes.items() if len(labels) > 1 or axis in (ATTACK, DEFENSE)]
    return fill(
        "grid/page.html",
        styles=["page.css", "grid/page.css"],
        scripts=["page.js", "grid/page.js"],
        title=grid.name,
        folders=str(grid.folder),
        finding=words.finding(grid, parts, shown),
        facts=_facts(grid),
        warnings=_warnings(grid),
        levels=Markup(heat.style()),
        steps=range(heat.LEVELS),
        slices=_drawn_slices(parts, shown, places),
        split=_split(parts),
        all_open=len(parts) <= SLICES_OPEN,
        overall=tables.ranking(parts, shown) if len(parts) > 1 else None,
        intervals=tables.INTERVALS,
        open_cells=[(places[cell.folder], cell) for cell in tables.states(grid)],
        curves=drawn,
        curves_left_out=left_out,
        threats=words.threats(grid),
        servers=words.servers(grid),
        cost=tables.cost(parts),
        runs=tables.all_runs(grid, shown, varied),
        command=grid.command,
        recipe=first.recipe_text.rstrip() if first else "",
        recipe_of=first.name if first else "",
        environment=environment_of(first) if first else [],
        terms=meant,
        data=as_data(
            {"name": grid.name, "seed_axis": SEED, "terms": meant, "runs": details.details(grid, shown)},
        ),
    )


def as_data(value: Any) -> Markup:
    """JSON for a script element that is never run: no "<" in it, so nothing can close the element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))


def _facts(grid: Grid) -> list[tuple[str, str]]:
    done = len(grid.in_state(DONE))
    facts = [("runs", f"{done} of {len(grid.cells)} done" if done < len(grid.cells) else str(done))]
    facts += [] if grid.shared is None else grid.shared.in_words("other runs").items()
    facts += [
        (axis, ", ".join(labels) if len(labels) < 5 else plural(len(labels), "value"))
        for axis, labels in grid.axes.items()
        if axis not in (ATTACK, DEFENSE)
    ]
    known = {name for name, _ in facts}
    return facts + [fact for fact in facts_of(grid.runs) if fact[0] not in known]


def _warnings(grid: Grid) -> list[str]:
    """Some warnings; those of single runs stand with their run too."""
    more = len(grid.warnings) - WARNINGS_SHOWN
    return [*grid.warnings[:WARNINGS_SHOWN], *([f"and {more} more notes, with their runs."] if more > 0 else [])]


def _drawn_slices(parts: Sequence[Slice], shown: Sequence[View], places: dict[str, int]) -> list[dict[str, Any]]:
    scales = {view.key: heat.scale_of(parts, view) for view in shown}
    return [
        {
            "key": f"slice-{number}",
            "title": part.title,
            "fixed": dict(part.fixed),
            "maps": [heat.heat_map(part, view, scales[view.key], places, f"map-{number}") for view in shown],
            "ranking": tables.ranking([part], shown),
        }
        for number, part in enumerate(parts, 1)
    ]


def _split(parts: Sequence[Slice]) -> list[tuple[str, list[str]]]:
    """The further axes by which the maps are split, with their labels."""
    axes = [axis for axis, _ in parts[0].fixed] if parts else []
    return [(axis, list(dict.fromkeys(dict(part.fixed)[axis] for part in parts))) for axis in axes]


def summary_text(grid: Grid) -> str:
    """The finding, the ranking and the notes, as plain text."""
    parts, shown = slices(grid), views(grid)
    ranked = judged(shown)
    text = [" ".join(words.finding(grid, parts, shown))]
    text += [text_tables.as_text(tables.ranking(parts, ranked).table)] if ranked else []
    reasons: dict[str, list[str]] = {}
    for cell in tables.states(grid):
        reasons.setdefault(f"{cell.state}: {cell.reason}", []).append(cell.slug)
    text += [f"{_some(slugs)} {reason}" for reason, slugs in reasons.items()]
    text += [f"note: {warning}" for warning in _warnings(grid)]
    return text_tables.printable("\n\n".join(text))


def _some(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def paper_text(grid: Grid, *, latex: bool) -> str:
    """The matrices attack x defense and the ranking as Markdown or LaTeX."""
    return tables.as_papers(grid, slices(grid), views(grid), latex=latex)
