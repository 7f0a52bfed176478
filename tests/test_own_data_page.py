"""docs/your_own_data.md: its files hold the same six rows, and its recipe is a recipe that reads them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedllm_sec import train
from fedllm_sec.build.text import load_rows
from fedllm_sec.data.files import read_file
from tests.conftest import ROOT

BLOCKS = dict(
    re.findall(r"```(csv|jsonl|json|yaml|python)\n(.*?)```", (ROOT / "docs/your_own_data.md").read_text(), re.S)
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for ending in ("csv", "jsonl", "json"):
        Path(f"reviews.{ending}").write_text(BLOCKS[ending], encoding="utf-8")
    exec(BLOCKS["python"], {})
    return tmp_path


def test_every_format_of_the_page_holds_the_same_six_rows(folder: Path):
    tables = [read_file(folder / f"reviews.{ending}") for ending in ("csv", "jsonl", "json", "parquet")]
    for table in tables:
        assert table.text("review") == tables[0].text("review")
        assert table.text("stars") == ["5", "1", "4", "3", "1", "5"]


@pytest.mark.usefixtures("folder")
def test_the_recipe_of_the_page_reads_them_and_holds_one_row_out():
    Path("mine.yaml").write_text(BLOCKS["yaml"], encoding="utf-8")
    recipe = train.load(Path("mine.yaml"))[""].recipe
    with pytest.warns(UserWarning, match="is training and test set"):
        train_rows, test_rows = load_rows(recipe)
    assert (len(train_rows), len(test_rows)) == (5, 1)
