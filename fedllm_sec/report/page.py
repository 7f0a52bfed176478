"""One self-contained HTML page from run folders: no network, nothing from a file trusted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedllm_sec.records.files import write_atomic
from fedllm_sec.report import beside, client_plots, pairs, plots, privacy, said, tables, threat, triggers, words
from fedllm_sec.report.grid import page as grid_page
from fedllm_sec.report.grid.folder import is_grid, read_grid
from fedllm_sec.report.markup import environment_of, facts_of, fill, grouped
from fedllm_sec.report.measures import (
    attack_name,
    defense_name,
    detection_mean,
    duration,
    flat,
    kinds,
    listed,
    main_quality,
    peak_memory,
    seconds_per_round,
    total_seconds,
    written,
)
from fedllm_sec.report.runs import Run, command_of, read_runs
from fedllm_sec.report.samples import samples
from fedllm_sec.report.terms import as_yaml

# Pictures of single clients are drawn for so many runs; a grid of hundreds would make the page huge and slow.
RUNS_WITH_PICTURES = 12
INCIDENTS_SHOWN = 100
DIFFERENCES_SHOWN = 30


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run, comparison or grid folder, and return its path."""
    path = folder / "report.html"
    write_atomic(path, page_of(folder).encode())
    return path


def terminal_summary(folder: Path) -> str:
    """The finding and the table of a run, comparison or grid folder, for the end of a run."""
    if is_grid(folder):
        return grid_page.summary_text(read_grid(folder))
    return summary_text(read_runs([folder]))


def page_of(folder: Path) -> str:
    """The page of a run, comparison or grid folder."""
    return grid_page.render(read_grid(folder)) if is_grid(folder) else render(read_runs([folder]), [folder])


def summary_text(runs: Sequence[Run]) -> str:
    """The finding, the table and the notes, as plain text."""
    table = tables.as_text(tables.terse(tables.summary_table(runs)))
    notes = [*warnings_of(runs), *tables.remarks(runs)]
    parts = [" ".join(words.finding(runs)), table, *(f"note: {text}" for text in notes)]
    return tables.printable("\n\n".join(parts))


def render(runs: Sequence[Run], folders: Sequence[Path]) -> str:
    """The page as one string."""
    pictured = runs if len(runs) <= RUNS_WITH_PICTURES else []
    anchors = {run.name: f"run-{place}" for place, run in enumerate(runs, 1) if run in pictured}
    incidents = incidents_of(runs)
    cards = grouped([run for run in runs if run.attack], threat.attack_card)
    return fill(
        "page.html",
        styles=["page.css"],
        scripts=["page.js"],
        title=listed([folder.resolve().name for folder in folders[:4]]) + (" …" if len(folders) > 4 else ""),
        folders=" ".join(str(folder) for folder in folders),
        finding=words.finding(runs),
        facts=facts_of(runs),
        warnings=warnings_of(runs),
        runs=runs,
        table=tables.terse(tables.summary_table(runs)),
        remarks=tables.remarks(runs),
        said=said.transcript(runs),
        triggers=triggers.triggers(runs),
        beside=beside.tables(runs),
        classes=tables.class_table(runs),
        colours={name: stroke.colour for name, stroke in plots.strokes(runs).items()},
        anchors=anchors,
        curves=curves_of(runs),
        privacy=privacy.sections(runs),
        attacks=cards,
        several_attacks=len(cards) > 1,
        defenses=grouped(runs, threat.defense_steps),
        sections=[section_of(run, anchors[run.name]) for run in pictured],
        left_out=_left_out(runs, pictured),
        incidents=incidents[:INCIDENTS_SHOWN],
        more_incidents=max(0, len(incidents) - INCIDENTS_SHOWN),
        costs=costs_of(runs),
        commands=[(names, command) for names, command in grouped(runs, command_of) if command],
        differences=differences_of(runs),
        recipes=grouped(runs, lambda run: run.recipe_text.rstrip()),
        environments=[(names, rows) for names, rows in grouped(runs, environment_of) if rows],
    )


def warnings_of(runs: Sequence[Run]) -> list[str]:
    own = [f"{run.name}: {text}" if len(runs) > 1 else text for run in runs for text in run.warnings]
    return [*pairs.notes(runs), *own]


def curves_of(runs: Sequence[Run]) -> list[plots.Picture]:
    """Attack success, false triggers, the main quality measure, and held-out loss, each over the rounds."""
    quality, attack = kinds(runs)
    main = main_quality(runs)
    chosen = [kind for kind in attack if kind.key in ("asr", "false_trigger")] + ([main] if main else [])
    chosen += [kind for kind in quality if kind.key == "loss" and kind != main]
    return [picture for kind in chosen if (picture := plots.curves(runs, kind)) is not None]


def section_of(run: Run, anchor: str) -> dict[str, Any]:
    """The pictures of one run, and in words what could not be drawn."""
    decided = client_plots.decisions(run, f"{anchor}-decisions")
    pictures = [samples(run, f"{anchor}-samples"), client_plots.norms(run, f"{anchor}-norms"), decided]
    remarks = []
    if decided is None:
        equal = any(record.weights for record in run.rounds)
        what = "gave every row the same weight" if equal else "gives rows no weight of their own"
        remarks.append(f"The server ({defense_name(run) if run.defended else 'plain mean'}) {what}.")
    area = detection_mean(run, "auc")
    if area is not None:
        remarks.append(
            "Its scores put a malicious client above an honest one with probability "
            f"{written(area.value, 'rate')} (AUC)."
        )
    return {
        "anchor": anchor,
        "name": run.name,
        "attack": attack_name(run),
        "defense": defense_name(run),
        "pictures": [picture for picture in pictures if picture is not None],
        "remarks": remarks,
    }


def _left_out(runs: Sequence[Run], pictured: Sequence[Run]) -> str:
    if len(pictured) == len(runs):
        return ""
    return (
        f"Pictures of single clients are drawn for up to {RUNS_WITH_PICTURES} runs; there are {len(runs)}. "
        "Make a report of one run folder to see its clients."
    )


def incidents_of(runs: Sequence[Run]) -> list[tuple[str, int, str, str]]:
    """(run, round, client, reason) of every quarantined row, refused buffers and skipped round."""
    found = []
    for run in runs:
        for record in run.records:
            for i, reason in record.quarantined.items():
                found.append((run.name, record.round, i, reason))
            for i, reason in record.buffers_refused.items():
                found.append((run.name, record.round, i, reason))
            if record.skipped is not None:
                found.append((run.name, record.round, "all", f"round skipped: {record.skipped}"))
    return found


def costs_of(runs: Sequence[Run]) -> dict[str, Any]:
    """Seconds of a round by part, and the peak memory of the defense where it was measured; one row a run."""
    means = {run.name: seconds_per_round(run) for run in runs}
    keys = list(dict.fromkeys(key for row in means.values() for key in row))
    timed = [run for run in runs if means[run.name]]
    peaks = {run.name: peak_memory(run) for run in timed}
    shown = any(peak is not None for peak in peaks.values())

    def cell(value: float | None, write: Callable[[float], str] = duration) -> tables.Cell:
        return tables.Cell(tables.NOT_MEASURED) if value is None else tables.Cell(write(value), sort=value)

    rows = []
    for run in timed:
        cells = [*(cell(means[run.name].get(key)) for key in keys), cell(total_seconds(run))]
        rows.append((run.name, [*cells, *([cell(peaks[run.name], "{:.1f}".format)] if shown else [])]))
    return {"titles": [*keys, "all rounds", *(["peak MiB of the defense"] if shown else [])], "rows": rows}


def differences_of(runs: Sequence[Run]) -> dict[str, Any]:
    """The recipe keys in which the runs differ, with each run's value."""
    if not 1 < len(runs) <= RUNS_WITH_PICTURES:
        return {"names": [], "rows": []}
    leaves = [{key: as_yaml(value) for key, value in flat(run.recipe)} for run in runs]
    keys = [key for key in dict.fromkeys(k for row in leaves for k in row) if key.split(".")[0] != "output"]
    keys = [key for key in keys if len({row.get(key) for row in leaves}) > 1]
    rows = [(key, [row.get(key, "–") for row in leaves]) for key in keys]
    return {"names": [run.name for run in runs], "rows": rows[:DIFFERENCES_SHOWN]}
