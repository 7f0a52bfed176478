"""The pages say what the stored results say, and the script that compares them sees a difference."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fedllm_sec.attacks import MENU
from fedllm_sec.matrix import Layout
from fedllm_sec.protocols import ThreatView
from fedllm_sec.seeds import generator_for
from tests.conftest import ROOT


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_docs", ROOT / "scripts" / "check_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module


check_docs = script()

GRID = """cell,status,is_twin,attack,defense,accuracy,accuracy_low,accuracy_high,asr,false_trigger
flip__none,done,False,flip,none,0.144,0.1,0.2,,
flip__krum,done,False,flip,krum,0.78,0.71,0.83,,
bd__none,done,False,bd,none,0.5,0.4,0.6,0.995,0.0004
bd__krum,done,False,bd,krum,0.755,0.7,0.8,0.126,0.06
twin,done,True,none,none,0.94,0.9,0.97,0.04,
"""
PAGE = """# Findings

<!-- from docs/results/grid.csv: {where: {is_twin: True}, says: ["accuracy {accuracy:.2f}", "{asr:pct} % of rows"]} -->
Without attack: accuracy 0.94, and
4 % of rows.

<!-- from docs/results/grid.csv: {rows: attack, columns: defense, names: {m-krum: krum},
  cell: "{accuracy:.2f} [{accuracy_low:.2f}, {accuracy_high:.2f}]"} -->

| attack | none | m-krum |
|---|---|---|
| flip: negated | 0.14 [0.10, 0.20] | **0.78** [0.71, 0.83] |
| bd: a trigger | 0.50 [0.40, 0.60] | 0.76 [0.70, 0.80], and no honest client dropped |

<!-- from docs/results/grid.csv: {rows: [attack, defense], cells: {success: "{asr:pct} / {false_trigger:pct} %"}} -->
| attack | defense | success | remark |
|---|---|---|---|
| bd | none | 99.5 / 0.04 % | one |
| | krum | 13 / 6 % | two |
| flip | none | n/a | three |
"""
RUNS = {
    "attack-free": {"quality": {"loss": 2.94}, "attack": {"asr": {"value": 0.0}}, "detection": None},
    "defended": {"quality": {"loss": 3.1}, "attack": {"asr": {"value": 0.98}}, "detection": {"tpr": 1.0}},
}
README = """<!-- from docs/results/runs.json: {rows: run, names: {by krum: defended},
  cells: {loss: "{quality.loss:.2f}", dropped: "{detection.tpr:pct} %"}} -->
| run | loss | dropped |
|---|--:|--:|
| attack-free | 2.94 | n/a |
| by krum | 3.10 | 100 % |
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "docs" / "results").mkdir(parents=True)
    (tmp_path / "docs" / "results" / "grid.csv").write_text(GRID)
    (tmp_path / "docs" / "results" / "runs.json").write_text(json.dumps(RUNS))
    (tmp_path / "docs" / "findings.md").write_text(PAGE)
    (tmp_path / "README.md").write_text(README)
    return tmp_path


def test_the_pages_of_this_repository_agree_with_their_stored_results():
    problems, _, _ = check_docs.check(ROOT)
    assert problems == []


def test_pages_that_agree_have_no_problem(root: Path):
    assert check_docs.check(root) == ([], [], 4)


@pytest.mark.parametrize(
    ("page", "old", "new", "words"),
    [
        (
            "docs/findings.md",
            "0.14 [0.10",
            "0.15 [0.10",
            "findings.md:12: flip: negated, none: the page says '0.15 [0.10",
        ),
        ("docs/findings.md", "**0.78**", "**0.79**", "findings.md:12: flip: negated, m-krum"),
        (
            "docs/findings.md",
            "0.76 [0.70, 0.80], and",
            "0.76 [0.70, 0.81], and",
            "findings.md:13: bd: a trigger, m-krum",
        ),
        ("docs/findings.md", "| 13 / 6 %", "| 13 / 7 %", "grid.csv '13 / 6 %'"),
        ("docs/findings.md", "| n/a | three", "| 0 / 0 % | three", "grid.csv 'n/a'"),
        ("docs/findings.md", "accuracy 0.94", "accuracy 0.95", "does not say 'accuracy 0.94'"),
        ("README.md", "| 3.10 |", "| 3.01 |", "README.md:6: by krum, loss: the page says '3.01', runs.json '3.10'"),
        ("README.md", "2.94 | n/a", "2.94 | 0 %", "attack-free, dropped: the page says '0 %', runs.json 'n/a'"),
        ("docs/findings.md", "| flip: negated", "| flop: negated", "0 stored rows have attack flop"),
        ("docs/findings.md", "{accuracy:.2f} [", "{acuracy:.2f} [", 'no column "acuracy" is stored'),
        ("docs/findings.md", "rows: attack,", "row: attack,", "must be a mapping with rows or says"),
        ("README.md", "docs/results/runs.json", "docs/results/grid.csv", "docs/results/runs.json: no page uses it"),
    ],
)
def test_a_difference_is_named_with_its_place(root: Path, page: str, old: str, new: str, words: str):
    text = (root / page).read_text()
    assert old in text
    (root / page).write_text(text.replace(old, new, 1))
    problems, _, _ = check_docs.check(root)
    assert any(words in problem for problem in problems), problems
    assert check_docs.main([], root) == 1


def test_results_that_are_not_stored_yet_are_named_and_are_no_difference(root: Path, capsys):
    (root / "docs" / "results" / "runs.json").unlink()
    assert check_docs.main([], root) == 0
    printed = capsys.readouterr().out
    assert "not stored yet: README.md:3: docs/results/runs.json" in printed
    assert "3 marked places checked, 1 without stored results, 0 differences" in printed


def test_write_puts_the_right_numbers_into_the_tables_and_changes_nothing_else(root: Path):
    for page, pairs in {
        "docs/findings.md": [
            ("0.14 [0.10, 0.20]", "0.99 [0.98, 0.99]"),
            ("0.76 [0.70, 0.80], and", "0.11 [0.10, 0.12], and"),
            ("| 13 / 6 %", "| 1 / 2 %"),
        ],
        "README.md": [("| 3.10 |", "| 3.01 |")],
    }.items():
        text = (root / page).read_text()
        for right, wrong in pairs:
            text = text.replace(right, wrong)
        (root / page).write_text(text)
    assert check_docs.main([], root) == 1
    assert check_docs.main(["--write"], root) == 0
    assert (root / "docs" / "findings.md").read_text() == PAGE
    assert (root / "README.md").read_text() == README


def test_store_keeps_a_grids_table_and_the_summaries_of_a_recipes_runs(tmp_path: Path):
    for name, summary in RUNS.items():
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "summary.json").write_text(json.dumps(summary))
    check_docs.main(["--store", str(tmp_path / "runs"), str(tmp_path / "kept" / "runs.json")])
    assert json.loads((tmp_path / "kept" / "runs.json").read_text()) == RUNS
    (tmp_path / "runs" / "results.csv").write_text(GRID)
    check_docs.main(["--store", str(tmp_path / "runs"), str(tmp_path / "kept" / "grid.csv")])
    assert (tmp_path / "kept" / "grid.csv").read_text() == GRID
    for done, kept in ((2, GRID), (3, "attack,seeds,done\nnone,3,3\n")):  # over the seeds where all were run
        (tmp_path / "runs" / "results_by_cell.csv").write_text(f"attack,seeds,done\nnone,3,{done}\n")
        check_docs.main(["--store", str(tmp_path / "runs"), str(tmp_path / "kept" / "grid.csv")])
        assert (tmp_path / "kept" / "grid.csv").read_text() == kept


# ---------------------------------------------------------------- what the docs say of the code

LAYOUT = Layout(("layer.lora_A.weight", "layer.lora_B.weight"), ((4, 16), (16, 4)))
READS_NONE = {"byzantine_zero", "byzantine_flip", "inf_nan", "lazy", "lora_gauge", "model_replacement", "poisonedfl"}
READS_THEM = {"byzantine_random", "min_max", "min_sum", "mimic", "ipm", "fang", "alie", "gaussian"}


def forged(name: str, factor: float) -> torch.Tensor:
    """What an attack sends where the honest rows are `factor` times as long and all else is the same."""
    rows = torch.randn(8, LAYOUT.size, generator=generator_for(1, "rows"))
    view = ThreatView(
        own=rows[:2].clone(),
        others=factor * rows[2:] + (factor - 1),
        global_vector=torch.ones(LAYOUT.size),
        last_update=torch.ones(LAYOUT.size),
        defense=None,
        layout=LAYOUT,
        own_counts=(10.0, 10.0),
        cohort_size=8,
        round=2,
        rng=generator_for(3, "attack"),
        own_ids=("c0", "c1"),
        other_ids=tuple(f"c{i}" for i in range(2, 8)),
        other_counts=(10.0,) * 6,
        order=tuple(f"c{i}" for i in range(8)),
        server_lr=1.0,
    )
    make = MENU[name].make
    settings = {"z": 1.0} if name == "alie" else {}
    made: torch.Tensor = make(**settings)(view) if isinstance(make, type) else make(view, **settings)
    return made


@pytest.mark.parametrize("name", sorted(READS_NONE | READS_THEM))
def test_which_attacks_read_no_honest_row_is_what_the_cost_section_says(name: str):
    same = torch.equal(torch.nan_to_num(forged(name, 1.0)), torch.nan_to_num(forged(name, 3.0)))
    assert same == (name in READS_NONE)
    sentence = (ROOT / "docs" / "attacks.md").read_text().split("read no honest row")[0].split("\n\n")[-1]
    assert (name in sentence) == (name in READS_NONE)
