"""The comparison table, for the terminal, Markdown, LaTeX and the page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedllm_sec.records.outcomes import worst_classes
from fedllm_sec.report import guarantees
from fedllm_sec.report.measures import (
    ATTACK,
    QUALITY,
    Kind,
    Measure,
    attack_name,
    defense_name,
    detection_mean,
    final,
    interval,
    kinds,
    listed,
    total_seconds,
    written,
)
from fedllm_sec.report.repaired import repaired
from fedllm_sec.report.runs import Run

NOT_MEASURED = "n/a"
CLASSES_SHOWN = 100
OVER = "mean over the rounds under attack, or over all of a run without attackers"


@dataclass(frozen=True)
class Cell:
    """One cell: its text, its interval as text, the number it sorts by, and the measure behind it."""

    text: str
    interval: str = ""
    sort: float | None = None
    measure: Measure | None = None
    worst: bool = False  # marked as the worst of its column

    def __str__(self) -> str:
        return f"{self.text} {self.interval}".rstrip()


@dataclass(frozen=True)
class Column:
    key: str
    title: str
    unit: str  # text, rate, percent, number, seconds
    explained: str = ""


@dataclass(frozen=True)
class Table:
    columns: list[Column]
    rows: list[list[Cell]]
    note: str


def _number_cell(m: Measure | None, unit: str) -> Cell:
    if m is None:
        return Cell(NOT_MEASURED)
    return Cell(written(m.value, unit), interval(m, unit), m.value, m)


def summary_table(runs: Sequence[Run]) -> Table:
    """One row a run: what attacked, what defended, and every measure when it was last taken.

    A measure that no run has gets no column; one that a run lacks is n/a there, never 0.
    """
    quality, attack = kinds(runs)
    columns = [
        Column("run", "run", "text"),
        Column("attack", "attack", "text"),
        Column("defense", "defense", "text"),
    ]
    cells = [[Cell(run.name), Cell(attack_name(run)), Cell(defense_name(run))] for run in runs]

    def add(column: Column, values: list[Cell]) -> None:
        if any(value.text != NOT_MEASURED for value in values):
            columns.append(column)
            for row, value in zip(cells, values, strict=True):
                row.append(value)

    for kind in (*attack, *quality):
        add(
            Column(kind.key, kind.title, kind.unit, kind.explained),
            [_number_cell(final(run, kind.key), kind.unit) for run in runs],
        )
    explained = "the class with the lowest accuracy at the last evaluation; all classes stand in their own table"
    add(Column("worst class", "worst class", "rate", explained), [worst_class(run) for run in runs])
    for key, title, explained in (
        ("tpr", "malicious dropped", f"share of malicious clients whose rows the rule dropped, {OVER} (TPR)"),
        (
            "weight_share",
            "malicious weight share",
            f"what the malicious rows weigh in the update, of what all clients' rows do, {OVER}",
        ),
        ("fpr", "honest dropped", f"share of honest clients whose rows the rule dropped, {OVER} (FPR)"),
    ):
        add(
            Column(key, title, "percent", explained),
            [_number_cell(detection_mean(run, key), "percent") for run in runs],
        )
    add(
        Column(
            "auc",
            "AUC",
            "rate",
            f"chance that a malicious row scores worse than an honest one, {OVER}",
        ),
        [_number_cell(detection_mean(run, "auc"), "rate") for run in runs],
    )
    spent = [_number_cell(guarantees.epsilon(run), "number") for run in runs]
    add(Column("epsilon", "epsilon", "number", guarantees.EPSILON), spent)
    quarantined = [sum(len(record.quarantined) for record in run.records) for run in runs]
    if any(quarantined):
        explained = "rows screened out before the rule (not finite, wrong shape), over all rounds"
        add(
            Column("quarantined", "quarantined", "number", explained),
            [Cell(str(q), sort=float(q)) for q in quarantined],
        )
    rounds = [Cell(_rounds_text(run), sort=float(run.records[-1].round)) for run in runs]
    add(Column("rounds", "rounds", "number", "recorded rounds, of those planned"), rounds)
    add(
        Column("seconds", "time", "seconds", "wall-clock time of all recorded rounds"),
        [_time_cell(run) for run in runs],
    )
    return Table(columns, cells, _note(runs, [*quality, *attack]))


def worst_class(run: Run) -> Cell:
    """The lowest accuracy of a class, with its name; all names where several share it."""
    found = worst_classes(next((r.quality for r in reversed(run.records) if r.quality is not None), None))
    if found is None:
        return Cell(NOT_MEASURED)
    names, rate = found
    m = Measure(rate["value"], rate.get("low"), rate.get("high"))
    some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return Cell(written(m.value, "rate"), f"{interval(m, 'rate')} ({some})".strip(), m.value, m)


def class_table(runs: Sequence[Run]) -> Table | None:
    """Accuracy class by class at the last evaluation, one column a run; the worst of each run is marked."""
    rates: dict[str, dict[str, Measure]] = {}
    for run in runs:
        quality = next((r.quality for r in reversed(run.records) if r.quality is not None), None)
        found = ((quality or {}).get("per_class") or {}).items()
        rates[run.name] = {
            name: Measure(rate["value"], rate.get("low"), rate.get("high"))
            for name, rate in found
            if rate and rate.get("value") is not None
        }
    classes = list(dict.fromkeys(name for own in rates.values() for name in own))
    shown = [run for run in runs if rates[run.name]]
    if not classes:
        return None
    least = {run.name: min(m.value for m in rates[run.name].values()) for run in shown}
    rows = []
    for name in classes[:CLASSES_SHOWN]:
        cells = []
        for run in shown:
            m = rates[run.name].get(name)
            cell = _number_cell(m, "rate")
            cells.append(replace(cell, worst=m is not None and m.value == least[run.name]))
        rows.append([Cell(name), *cells])
    columns = [Column("class", "class", "text"), *(Column(run.name, run.name, "rate") for run in shown)]
    more = len(classes) - len(rows)
    note = "Accuracy of each class at the last evaluation; the worst of each run is marked."
    return Table(columns, rows, note + (f" {more} more classes are in history.jsonl." if more > 0 else ""))


def remarks(runs: Sequence[Run]) -> list[str]:
    """Why a rate is not measured, which held-out rows count in none, what is promised: at each last evaluation."""
    texts: dict[str, list[str]] = {}
    for run in runs:
        blocks = [
            next((block for r in reversed(run.records) if (block := getattr(r, field)) is not None), None) or {}
            for field in ("quality", "attack")
        ]
        titles = {kind.key: kind.title for kind in (*QUALITY, *ATTACK)}
        for block in blocks:
            named = block.get("attacks") or {}
            reasons = [("", block), *((f"{name}: ", own) for name, own in list(named.items())[1:])]
            for attack, key, why in ((a, k, w) for a, own in reasons for k, w in (own.get("reasons") or {}).items()):
                how = f"the {key}" if "judge" in key else f"{titles.get(key, key)} n/a:"
                texts.setdefault(f"{attack}{how} {why}", []).append(run.name)
            for why, count in (block.get("left_out") or {}).items():
                texts.setdefault(f"in none of the attack's rates: {count:.0f} held-out ({why})", []).append(run.name)
        for text in (*guarantees.guarantees(run), *repaired(run)):
            texts.setdefault(text, []).append(run.name)
    alone = len(runs) == 1
    return [f"{text}." if alone else f"{listed(names)}: {text}." for text, names in texts.items()]


def _rounds_text(run: Run) -> str:
    done, planned = run.records[-1].round, run.recipe.get("rounds")
    return str(done) if planned == done or not isinstance(planned, int) else f"{done} of {planned}"


def _time_cell(run: Run) -> Cell:
    seconds = total_seconds(run)
    return _number_cell(None if seconds is None else Measure(seconds), "seconds")


def _note(runs: Sequence[Run], shown: Sequence[Kind]) -> str:
    measured = [m for run in runs for kind in shown if (m := final(run, kind.key)) is not None]
    rounds = sorted({m.round for m in measured})
    if not rounds:
        return "Nothing was evaluated."
    last = f"round {rounds[0]}" if len(rounds) == 1 else f"the last evaluated round ({rounds[0]} to {rounds[-1]})"
    note = f"Measured after {last}."
    if any(m.low is not None for m in measured):
        note += " Brackets are 95 % Wilson intervals."
    return note


# ---------------------------------------------------------------- as text


def as_text(table: Table) -> str:
    """Aligned columns for the terminal, titles on two lines: text to the left, numbers to the right."""
    blocks = []
    for place, column in enumerate(table.columns):
        cells = [row[place] for row in table.rows]
        left, right = max(len(cell.text) for cell in cells), max(len(cell.interval) for cell in cells)
        lines = [f"{c.text.rjust(left)} {c.interval.ljust(right)}" if right else c.text.rjust(left) for c in cells]
        if column.unit == "text":
            lines = [_clean(cell.text) for cell in cells]
        upper, _, lower = column.title.rpartition(" ")
        block = [upper, lower, *lines]
        width = max(len(line) for line in block)
        blocks.append([line.ljust(width) if column.unit == "text" else line.rjust(width) for line in block])
    lines = ["  ".join(parts).rstrip() for parts in zip(*blocks, strict=True)]
    rule = "-" * max(len(line) for line in lines)
    return "\n".join([*lines[:2], rule, *lines[2:], rule, table.note])


def terse(table: Table) -> Table:
    """The table without columns that follow from others or never change, for a terminal and the page."""
    titles = {column.key for column in table.columns}
    drop = {"auc", *({"perplexity"} if "loss" in titles else ())}
    if len({row[1].text for row in table.rows} - {"none"}) <= 1:
        drop.add("attack")
    if all(row[2].text == "none" or row[2].text in row[0].text for row in table.rows):
        drop.add("defense")
    for key in ("rounds", "quarantined"):
        place = next((i for i, column in enumerate(table.columns) if column.key == key), None)
        if place is not None and len({row[place].text for row in table.rows}) == 1:
            drop.add(key)
    keep = [i for i, column in enumerate(table.columns) if column.key not in drop]
    return Table([table.columns[i] for i in keep], [[row[i] for i in keep] for row in table.rows], table.note)


def _clean(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


def printable(text: str) -> str:
    """Several lines without control characters, which could move the cursor of a terminal."""
    return "\n".join(_clean(line) for line in text.split("\n"))


def as_markdown(table: Table, *, caption: str = "") -> str:
    """A GitHub table, under its caption if it has one."""
    head = "| " + " | ".join(_markdown(column.title) for column in table.columns) + " |"
    align = "|" + "|".join(" :-- " if column.unit == "text" else " --: " for column in table.columns) + "|"
    body = ["| " + " | ".join(_markdown(str(cell)) for cell in row) + " |" for row in table.rows]
    above = [f"**{_markdown(caption.strip())}**", ""] if caption else []
    below = ["", table.note] if table.note else []
    return "\n".join([*above, head, align, *body, *below])


def _markdown(text: str) -> str:
    return re.sub(r"([\\`*_{}<>|\[\]#])", r"\\\1", _clean(text))


def as_latex(table: Table, *, caption: str = "") -> str:
    """A booktabs tabular; needs \\usepackage{booktabs}. With a caption it stands in a table."""
    spec = "".join("l" if column.unit == "text" else "r" for column in table.columns)
    head = " & ".join(_latex(column.title) for column in table.columns) + r" \\"
    body = [" & ".join(_latex(str(cell)) for cell in row) + r" \\" for row in table.rows]
    lines = [
        rf"\begin{{tabular}}{{{spec}}}",
        r"\toprule",
        head,
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    if caption:
        lines = [r"\begin{table}", r"\centering", rf"\caption{{{_latex(caption)}}}", *lines, r"\end{table}"]
    return "\n".join([*lines, *([f"% {_clean(table.note)}"] if table.note else [])])


LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "→": r"$\rightarrow$",
    "<": r"\textless{}",  # the usual font has other signs in the places of these four
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\texttt{\char34}",
    **{c: f"\\{c}" for c in "&%$#_{}"},
}


def _latex(text: str) -> str:
    # A cell that begins with "[" would be read as the optional argument of the \\ before it.
    escaped = "".join(LATEX.get(c, c) for c in _clean(text))
    return "{" + escaped + "}" if escaped.startswith("[") else escaped
