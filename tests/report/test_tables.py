"""The comparison table in its forms."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from fedllm_sec.report import tables
from fedllm_sec.report.runs import Run, read_runs

MakeRun = Callable[..., Path]


def column(table: tables.Table, key: str) -> list[str]:
    place = [c.key for c in table.columns].index(key)
    return [str(row[place]) for row in table.rows]


def test_a_row_for_each_run_with_intervals_and_na_for_what_was_not_measured(comparison: Path) -> None:
    table = tables.summary_table(read_runs([comparison]))
    assert column(table, "run") == ["attack-free", "attacked", "multi_krum", "geometric_median"]
    assert column(table, "defense") == ["none", "none", "multi_krum", "geometric_median"]
    # 116 of 120: p = 0.9667, Wilson [0.917, 0.987]
    assert column(table, "asr")[:2] == ["n/a", "97 % [92, 99]"]
    assert column(table, "tpr")[1] == "n/a"
    assert column(table, "quarantined") == ["0", "0", "2", "0"]
    assert "Measured after round 20." in table.note


def test_a_measure_that_no_run_has_gets_no_column(make_run: MakeRun, tmp_path: Path) -> None:
    table = tables.summary_table(read_runs([make_run(tmp_path / "alpaca", label_data=False)]))
    assert not {"accuracy", "exact_match", "tpr", "auc", "quarantined"} & {c.key for c in table.columns}


def test_what_attackers_weigh_stands_beside_how_many_were_dropped_in_every_form(
    make_run: MakeRun, tmp_path: Path
) -> None:
    run = read_runs([make_run(tmp_path / "nnm_krum", rule="multi_krum")])[0]
    rates = {"tpr": 1.0, "weight_share": 0.222, "fpr": 8 / 9, "auc": None}
    records = tuple(dataclasses.replace(r, attacking=True, detection=rates if r.round else None) for r in run.records)
    table = tables.summary_table([dataclasses.replace(run, records=records)])
    keys = [c.key for c in table.columns]
    assert keys[keys.index("tpr") : keys.index("tpr") + 3] == ["tpr", "weight_share", "fpr"]
    assert column(table, "weight_share") == ["22 %"]
    for text in (tables.as_markdown(table), tables.as_latex(table)):
        assert "malicious weight share" in text
    assert "malicious weight" in tables.as_text(tables.terse(table))  # its title stands on two lines


def test_an_unknown_measure_of_another_task_still_gets_its_column(make_run: MakeRun, tmp_path: Path) -> None:
    run = read_runs([make_run(tmp_path / "run")])[0]
    last = dataclasses.replace(run.records[-1], quality={"bleu": 0.31, "inception_score": None})
    table = tables.summary_table([dataclasses.replace(run, records=(*run.records[:-1], last))])
    assert column(table, "bleu") == ["0.310"]
    assert "inception_score" not in {c.key for c in table.columns}


def test_the_terminal_table_is_aligned_and_fits_a_wide_terminal(comparison: Path) -> None:
    text = tables.as_text(tables.terse(tables.summary_table(read_runs([comparison]))))
    lines = text.splitlines()
    assert max(len(line) for line in lines) <= 125
    ends = {line.rstrip().endswith(" s") and len(line) for line in lines[3:7]}
    assert len(ends) == 1


def test_control_characters_of_a_name_do_not_reach_the_terminal(comparison: Path) -> None:
    runs = read_runs([comparison])
    evil = dataclasses.replace(runs[0], name="\x1b[2Jgone\nnext")
    text = tables.as_text(tables.summary_table([evil]))
    assert "\x1b" not in text
    assert "?[2Jgone?next" in text


def hostile(run: Run) -> Run:
    return dataclasses.replace(run, name="a|b_50% & {c} <i>")


def test_markdown_and_latex_escape_names(comparison: Path) -> None:
    table = tables.summary_table([hostile(read_runs([comparison])[0])])
    assert r"| a\|b\_50% & {c} \<i\>" in tables.as_markdown(table).replace(r"\{c\}", "{c}")
    latex = tables.as_latex(table)
    assert r"a\textbar{}b\_50\% \& \{c\} \textless{}i\textgreater{}" in latex
    assert latex.count(r"\\") == 2  # the title row and one run


def test_every_markdown_row_has_as_many_cells_as_the_head(comparison: Path) -> None:
    lines = tables.as_markdown(tables.summary_table(read_runs([comparison]))).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1
    assert len(rows) == 6
