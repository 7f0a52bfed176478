"""The tables of a grid: matrices attack x defense, the ranking, the cost, and what has no result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean

from fedllm_sec.report.grid.folder import ABSENT, DONE, NONE, PARTIAL, Cell, Grid
from fedllm_sec.report.grid.numbers import Slice, Slot, Worst, met, worst
from fedllm_sec.report.grid.ranks import order_of, ranks
from fedllm_sec.report.grid.views import AGAINST_TWINS, ASR, View, judged
from fedllm_sec.report.measures import (
    Measure,
    duration,
    interval,
    listed,
    peak_memory,
    plural,
    seconds_per_round,
    total_seconds,
    written,
)
from fedllm_sec.report.tables import NOT_MEASURED, Column, Table, as_latex, as_markdown  # fmt: skip
from fedllm_sec.report.tables import Cell as Entry

RATES = "In round brackets: attack success / false triggers."
INTERVALS = (
    "Brackets are 95 % intervals: Wilson's for one seed; for several, the wider at each end of Student's t over the "
    "seeds and Wilson's for all their rows; for differences, of Student's t over the pairs and Newcombe's."
)
RANKING = (
    "A rank compares the defenses in one block, an attack with one seed in one slice of the grid: 1 is best, ties "
    "share their mean rank. Its bracket is a bootstrap over the blocks, percentiles 2.5 and 97.5. Rows are ordered by "
    "the mean of the ranks shown."
)


def number(m: Measure | None, unit: str) -> Entry:
    """A number with its interval, n/a where there is none."""
    return Entry(NOT_MEASURED) if m is None else Entry(written(m.value, unit), interval(m, unit), m.value, m)


def measured(view: View, cells: Sequence[Cell]) -> Entry:
    """What a view says of some cells, with its interval and, for attack success, the two rates in brackets."""
    entry = number(view.of(cells), view.unit)
    return replace(entry, interval=f"{entry.interval} {view.beside(cells)}".strip())


def called(attack: str) -> str:
    """The name of a row."""
    return "no attack" if attack == NONE else attack


def said(slot: Slot, view: View) -> Entry:
    """A slot as text: its mean and interval, or why there is none; never blank."""
    if not slot.cells:
        return Entry(ABSENT)
    if slot.mean is None:
        return Entry(state_of(slot) or NOT_MEASURED)
    entry = measured(view, slot.cells)
    some = f" ({slot.measured} of {len(slot.cells)} seeds)" if slot.measured < len(slot.cells) else ""
    return replace(entry, interval=f"{entry.interval}{some}".strip())


def state_of(slot: Slot) -> str:
    """ "failed", "not run", "stopped", "unreadable", or empty where every cell is done."""
    return next((cell.state for cell in slot.cells if cell.state != DONE), "")


def matrix(part: Slice, view: View) -> Table:
    """One row an attack, one column a defense."""
    columns = [Column("attack", "attack", "text")]
    columns += [Column(f"defense {i}", name, view.unit) for i, name in enumerate(part.defenses)]
    rows = [
        [Entry(called(name)), *(said(part.slot(view, name, defense), view) for defense in part.defenses)]
        for name in part.attacks
    ]
    return Table(columns, rows, "")


def twin_measure(part: Slice, view: View) -> Measure | None:
    """The view's measure for the twins of a slice: attack-free and undefended."""
    return None if view.key in AGAINST_TWINS else view.of(part.twins)


@dataclass(frozen=True)
class Ranking:
    """The table of defenses, best first, and what it leaves out."""

    table: Table
    remarks: tuple[str, ...]


def ranking(parts: Sequence[Slice], shown: Sequence[View]) -> Ranking:
    """One row a defense: its mean rank and its worst case over the attacks, by quality and by attack success."""
    ranked = judged(shown)
    lost = next((view for view in shown if view.key == "lost"), None)
    columns = [Column("defense", "defense", "text")]
    order = order_of(parts, shown)
    rows = [[Entry(name)] for name in order]
    remarks = []
    for view in ranked:
        found = ranks(parts, view)
        columns.append(Column(f"rank {view.key}", f"rank by {view.title}", "number", f"mean rank; {view.explained}"))
        for row in rows:
            m = found.mean.get(row[0].text)
            row.append(Entry(NOT_MEASURED) if m is None else Entry(f"{m.value:.1f}", _ranks(m), m.value, m))
        if found.blocks:
            remarks.append(f"Rank by {view.title}: {plural(found.blocks, 'block')}" + _left_out(found.left_out) + ".")
        elif len(order) > 1:
            remarks.append(
                f"No rank by {view.title}: in no block all defenses were measured{_left_out(found.left_out)}."
            )
    for view in (*ranked, *([lost] if lost else [])):
        title = f"most {view.title}" if view is lost else f"worst {view.title}"
        columns.append(Column(f"worst {view.key}", title, view.unit, f"worst over the attacks; {view.explained}"))
        columns.append(Column(f"by {view.key}", "under", "text"))
        over = met(parts, view)
        for row in rows:
            case = worst(over, view, row[0].text)
            row += [said(case.slot, view) if case else Entry(NOT_MEASURED), Entry(_under(case, len(parts) > 1))]
    note = f"{RANKING} {RATES}" if any(view.kind == ASR for view in shown) else RANKING
    return Ranking(Table(columns, rows, note), tuple(remarks))


def _ranks(m: Measure) -> str:
    return "" if m.low is None or m.high is None else f"[{m.low:.1f}, {m.high:.1f}]"


def _left_out(count: int) -> str:
    return f"; {plural(count, 'block')} left out, which some defense lacks" if count else ""


def _under(case: Worst | None, several: bool) -> str:
    """The attacks of a worst case, and over how many of the attacks it is where some were not met."""
    if case is None:
        return ABSENT
    names = [f"{attack} ({part.title})" if several and part.title else attack for part, attack in case.rows]
    things = "attacks in their settings" if several else "attacks"  # fewer than planned: of two or more
    some = f", {case.measured} of {case.planned} {things}" if case.measured < case.planned else ""
    shown = listed([*names[:3], *([f"{len(names) - 3} more"] if len(names) > 3 else [])])
    return f"{shown}{some}"


# ---------------------------------------------------------------- cost


def cost(parts: Sequence[Slice]) -> Table:
    """One row a defense: seconds of a round by part, the largest peak memory, and the time of all its runs."""
    columns = [
        Column("defense", "defense", "text"),
        Column("runs", "runs", "number", "finished runs that the row is a mean of"),
        Column(
            "step", "defense, a round", "seconds", "wall-clock seconds that the server's rule took, mean of a round"
        ),
        Column("train", "training, a round", "seconds", "wall-clock seconds of all clients' training, mean of a round"),
        Column("peak", "peak MiB", "number", "largest extra memory that the defense took in a round"),
        Column("all", "all rounds", "seconds", "wall-clock seconds of one run, mean"),
    ]
    rows = []
    for name in parts[0].defenses if parts else ():
        once = {cell.folder: cell.finished for part in parts for cell in part.cells if cell.defense == name}
        found = once.values()
        runs = [run for run in found if run is not None]
        per_round = [seconds_per_round(run) for run in runs]
        peak = max((v for run in runs if (v := peak_memory(run)) is not None), default=None)
        totals = [t for run in runs if (t := total_seconds(run)) is not None]
        rows.append(
            [
                Entry(name),
                Entry(str(len(runs)), sort=float(len(runs))),
                _seconds([row["defense"] for row in per_round if "defense" in row]),
                _seconds([row["train"] for row in per_round if "train" in row]),
                Entry(NOT_MEASURED) if peak is None else Entry(f"{peak:.1f}", sort=peak),
                _seconds(totals),
            ]
        )
    return Table(columns, rows, "Wall-clock time. n/a: not measured.")


def _seconds(values: Sequence[float]) -> Entry:
    return Entry(duration(mean(values)), sort=mean(values)) if values else Entry(NOT_MEASURED)


# ---------------------------------------------------------------- every run


def states(grid: Grid) -> list[Cell]:
    """The cells without a final result, in the grid's order."""
    return [cell for cell in grid.cells if cell.state != DONE]


def all_runs(grid: Grid, shown: Sequence[View], varied: Sequence[str]) -> Table:
    """One row a cell: its labels, its measures, how far it got."""
    columns = [Column("run", "run", "text"), *(Column(f"axis {axis}", axis, "text") for axis in varied)]
    columns += [Column(view.key, view.title, view.unit, view.explained) for view in shown]
    columns += [Column("state", "state", "text"), Column("seconds", "time", "seconds", "all recorded rounds")]
    rows = []
    for cell in grid.cells:
        time = total_seconds(cell.run) if cell.run else None
        rows.append(
            [
                Entry(cell.slug),
                *(Entry(cell.shown_axes.get(axis, ABSENT)) for axis in varied),
                *(measured(view, [cell]) for view in shown),
                Entry(_how_far(cell)),
                Entry(NOT_MEASURED) if time is None else Entry(duration(time), sort=time),
            ]
        )
    return Table(columns, rows, "")


def _how_far(cell: Cell) -> str:
    if cell.state == PARTIAL and cell.run:
        return f"{cell.state}, {cell.run.records[-1].round} of {cell.run.recipe.get('rounds')} rounds"
    if cell.state == DONE and cell.is_twin:
        return f"{DONE}, twin"
    return cell.state


# ---------------------------------------------------------------- for papers


def as_papers(grid: Grid, parts: Sequence[Slice], shown: Sequence[View], *, latex: bool) -> str:
    """The matrices and the ranking as Markdown or LaTeX, each under a line that says what it is."""
    form = as_latex if latex else as_markdown
    blocks = []
    for part in parts:
        for view in shown:
            caption = f"{view.title}: attack (rows) against defense (columns)" + (
                f"; {part.title}" if part.title else ""
            )
            twin = twin_measure(part, view)
            if twin is not None:
                caption += f"; attack-free and undefended: {measured(view, part.twins)}"
            blocks.append((caption, matrix(part, view)))
    ranked = ranking(parts, shown)
    remarks = f": {' '.join(ranked.remarks)}" if ranked.remarks else ""
    blocks.append((f"ranking of the defenses{remarks}", ranked.table))
    done = len(grid.in_state(DONE))
    note = f"{done} of {len(grid.cells)} cells are done; the others are named in their place. {INTERVALS}"
    note += f" {RATES}" if any(view.kind == ASR for view in shown) else ""
    text = [form(table, caption=caption) for caption, table in blocks]
    return "\n\n".join([*text, f"% {note}" if latex else note])
