"""The numbers of the pages against the stored results they were made from: `python scripts/check_docs.py [--write]`.

A comment above a table, or above a paragraph, of README.md or docs/*.md says where its numbers come from:

    <!-- from docs/results/quick.csv: {rows: attack, columns: defense, cell: "{accuracy:.2f} [{accuracy_low:.2f}]"} -->
    <!-- from docs/results/runs.json: {rows: run, cells: {accuracy: "{quality.accuracy.value:.2f}"}} -->
    <!-- from docs/results/quick.csv: {where: {cell: twin}, says: ["accuracy {accuracy:.2f}"]} -->

- `rows` is the column of the stored table that the first cell of a row names, up to a colon; or a list of columns, for
  the first cells of a row, of which an empty one repeats the one above. `names` maps what the page writes to what is
  stored. `where` picks among the stored rows.
- With `columns`, every further head of the table is a value of that column, and `cell` is what stands in each square.
  With `cells`, heads have a template each; a head that is left out is not checked, and without `cells` a head is a
  column whose text is compared.
- `{column:.2f}` is a number as Python writes it, `{column:pct}` a percentage as the reports write it, without the sign.
  A number that was not measured is n/a, - or an empty cell on the page. Words may follow a number after a comma.

The stored tables are results.csv of a grid, or JSON of the summaries of runs; `--store FOLDER FILE` makes either from a
folder of results. `--write` puts the right numbers into the tables (bold stays), not into paragraphs. A file that is
not there yet is named and is no difference; one that no page uses is.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedllm_sec.report.measures import percent

ROOT = Path(__file__).parents[1]
COMMENT = re.compile(r"<!--\s*from\s+(\S+?\.(?:csv|json)):(.*?)-->[ \t]*\n", re.DOTALL)
FIELD = re.compile(r"\{([^{}:]+)(?::([^{}]*))?\}")
UNMEASURED = ("n/a", "-", "–", "")
KEYS = {"rows", "names", "where", "columns", "cell", "cells", "says"}

Row = Mapping[str, Any]


class Mistake(Exception):
    """A comment that cannot be followed."""


@dataclass(frozen=True)
class Claim:
    """One marked place of a page: what is stored, how it is to be read, and where the text begins."""

    page: Path
    source: Path
    how: Mapping[str, Any]
    start: int  # of the table or paragraph in the page's text

    def at(self, text: str, offset: int = 0) -> str:
        return f"{self.page.name}:{text.count(chr(10), 0, self.start) + 1 + offset}"


def claims(page: Path, text: str, root: Path) -> list[Claim]:
    """All marked places of a page."""
    found = []
    for match in COMMENT.finditer(text):
        how = yaml.safe_load(match[2])
        where = f"{page.name}: comment for {match[1]}"
        if not isinstance(how, dict) or not how or how.keys() - KEYS or not how.keys() & {"rows", "says"}:
            raise Mistake(f"{where}: must be a mapping with rows or says, of {', '.join(sorted(KEYS))}.")
        found.append(Claim(page, root / match[1], how, match.end()))
    return found


# ---------------------------------------------------------------- what is stored


def stored(file: Path) -> list[Row]:
    """The rows of a stored table; of JSON, {name: summary}, one row a run with its leaves as a.b.c."""
    if file.suffix == ".csv":
        with file.open(newline="", encoding="utf-8") as lines:
            return list(csv.DictReader(lines))
    runs = json.loads(file.read_text(encoding="utf-8"))
    rows = [{"run": name, **leaves(summary)} for name, summary in runs.items()]
    columns = dict.fromkeys(column for row in rows for column in row)
    return [{column: row.get(column) for column in columns} for row in rows]


def leaves(value: Any, place: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {
            k: v for key, part in value.items() for k, v in leaves(part, f"{place}.{key}" if place else key).items()
        }
    return {place: value}


def one(rows: Sequence[Row], wanted: Mapping[str, Any]) -> Row:
    """The one stored row with these values."""
    for column in wanted:
        if rows and column not in rows[0]:
            raise Mistake(f'no column "{column}" is stored')
    found = [row for row in rows if all(str(row[c]) == str(v) for c, v in wanted.items())]
    if len(found) != 1:
        said = ", ".join(f"{column} {value}" for column, value in wanted.items())
        raise Mistake(f"{len(found)} stored rows have {said}; must be one (names and where choose)")
    return found[0]


def filled(template: str, row: Row) -> str | None:
    """The template with the row's numbers; None where one was not measured."""
    missing = False

    def put(match: re.Match[str]) -> str:
        nonlocal missing
        name, form = match[1], match[2]
        if name not in row:
            raise Mistake(f'no column "{name}" is stored')
        value = row[name]
        if value is None or value == "":
            missing = True
            return ""
        if not form:
            return str(value)
        return percent(float(value)).removesuffix(" %") if form == "pct" else format(float(value), form)

    text = FIELD.sub(put, template)
    return None if missing else text


# ---------------------------------------------------------------- what a page says


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def table_lines(text: str, start: int) -> list[str]:
    """The lines of the table that begins there, after at most one empty line."""
    lines = text[start:].split("\n")
    skip = 1 if lines and not lines[0].strip() else 0
    table = []
    for line in lines[skip:]:
        if not line.startswith("|"):
            break
        table.append(line)
    return table


def bare(cell: str) -> str:
    return re.sub(r"\s+", " ", cell.replace("**", "")).strip()


def label(cell: str, names: Mapping[str, Any]) -> str:
    """What a cell of the page is called where results are stored."""
    text = bare(cell).strip("`")
    return str(names.get(text, names.get(text.split(":")[0], text.split(":")[0])))


def expected_table(claim: Claim, rows: Sequence[Row], table: Sequence[str]) -> list[list[str | bool | None]]:
    """For every body row of the table, what each cell must be; True where it is not checked, None if not measured."""
    how, head = claim.how, cells_of(table[0])
    keys = [how["rows"]] if isinstance(how["rows"], str) else list(how["rows"])
    names, where, above = how.get("names") or {}, how.get("where") or {}, [""] * len(keys)
    made: list[list[str | bool | None]] = []
    for line in table[2:]:
        cells = cells_of(line)
        above = [given or last for given, last in zip(cells[: len(keys)], above, strict=True)]
        wanted = dict(where) | {key: label(cell, names) for key, cell in zip(keys, above, strict=True)}
        row: list[str | bool | None] = [True] * len(keys)
        for title in head[len(keys) :]:
            if "columns" in how:
                square = one(rows, wanted | {how["columns"]: label(title, names)})
                row.append(filled(how["cell"], square))
            elif "cells" in how:
                template = how["cells"].get(bare(title))
                row.append(True if template is None else filled(template, one(rows, wanted)))
            else:
                row.append(filled("{" + label(title, names) + "}", one(rows, wanted)))
        made.append(row)
    return made


def agrees(cell: str, wanted: str | bool | None) -> bool:
    if wanted is True:
        return True
    if wanted is None:
        return bare(cell) in UNMEASURED
    return bare(cell) == bare(str(wanted)) or bare(cell).startswith(f"{bare(str(wanted))}, ")


def differences(claim: Claim, text: str) -> list[str]:
    """What the page says otherwise than its stored results."""
    rows, found = stored(claim.source), []
    if "says" in claim.how:
        row = one(rows, claim.how.get("where") or {})
        paragraph = bare(text[claim.start :].lstrip("\n").split("\n\n")[0])
        for template in claim.how["says"]:
            said = filled(template, row)
            if said is None or bare(said) not in paragraph:
                found.append(f"{claim.at(text)}: does not say {said!r}, as {claim.source.name} does")
        return found
    table = table_lines(text, claim.start)
    if len(table) < 3:
        raise Mistake("no table follows")
    head = cells_of(table[0])
    offset = 3 if not text[claim.start :].startswith("|") else 2
    for i, (line, wanted) in enumerate(zip(table[2:], expected_table(claim, rows, table), strict=True)):
        cells = cells_of(line)
        if len(cells) != len(head):
            raise Mistake(f"row {i + 1} has {len(cells)} cells, the head {len(head)}")
        for title, cell, right in zip(head, cells, wanted, strict=True):
            if not agrees(cell, right):
                shown = "n/a" if right is None else right
                what = f"{bare(cells[0])}, {bare(title)}: the page says {bare(cell)!r}, {claim.source.name} {shown!r}"
                found.append(f"{claim.at(text, offset + i)}: {what}")
    return found


def corrected(cell: str, right: str | bool | None) -> str:
    """The right number in the place of a wrong one; bold, and words after an interval, stay."""
    number, comma, words = cell.partition("], ")
    shown = "n/a" if right is None else str(right)
    if number.startswith("**") and number.endswith("**"):
        shown = f"**{shown}**"
    return f"{shown}, {words}" if comma else shown


def rewritten(claim: Claim, text: str) -> str:
    """The page with the right numbers in this table."""
    table = table_lines(text, claim.start)
    if "says" in claim.how or len(table) < 3:
        return text
    lines = list(table[:2])
    for line, wanted in zip(table[2:], expected_table(claim, stored(claim.source), table), strict=True):
        made = []
        for cell, right in zip(cells_of(line), wanted, strict=True):
            made.append(cell if agrees(cell, right) else corrected(cell, right))
        lines.append(line if made == cells_of(line) else "|" + "|".join(f" {c} " if c else " " for c in made) + "|")
    return text[: claim.start] + text[claim.start :].replace("\n".join(table), "\n".join(lines), 1)


# ---------------------------------------------------------------- all pages


def check(root: Path, *, write: bool = False) -> tuple[list[str], list[str], int]:
    """Problems, marked places whose results are not stored, and how many places were checked."""
    problems, waiting, used, checked = [], [], set(), 0
    for page in [root / "README.md", *sorted((root / "docs").glob("*.md"))]:
        text = page.read_text(encoding="utf-8") if page.exists() else ""
        try:
            marked = claims(page, text, root)
        except (Mistake, yaml.YAMLError) as error:
            problems.append(str(error).replace("\n", " "))
            continue
        for claim in reversed(marked):  # from the end, so that rewriting one moves no other
            used.add(claim.source)
            if not claim.source.exists():
                waiting.append(f"{claim.at(text)}: {claim.source.relative_to(root)}")
                continue
            checked += 1
            try:
                text = rewritten(claim, text) if write else text
                problems += differences(claim, text)
            except (Mistake, ValueError, KeyError) as error:
                problems.append(f"{claim.at(text)}: {claim.source.name}: {error}")
        if write and text:
            page.write_text(text, encoding="utf-8")
    results = [file for file in sorted((root / "docs" / "results").glob("*")) if file.suffix in (".csv", ".json")]
    problems += [f"{file.relative_to(root)}: no page uses it. Mark its table, or remove it." for file in results
                 if file not in used]  # fmt: skip
    return problems, waiting, checked


def store(folder: Path, file: Path) -> None:
    """The results of a grid, of cells over their seeds where all were run, or of a recipe's variants, as one table."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if (folder / "results.csv").exists():
        cells: list[dict[str, str]] = []
        if (by_cell := folder / "results_by_cell.csv").exists():
            with by_cell.open(encoding="utf-8", newline="") as opened:
                cells = list(csv.DictReader(opened))
        repeated = bool(cells) and all(int(c["seeds"]) > 1 and c["done"] == c["seeds"] for c in cells)
        shutil.copyfile(by_cell if repeated else folder / "results.csv", file)
        return
    found = sorted(folder.glob("*/summary.json")) or [folder / "summary.json"]
    runs = {summary.parent.name: json.loads(summary.read_text(encoding="utf-8")) for summary in found}
    file.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description="The numbers of the pages against the results they were made from.")
    parser.add_argument("--write", action="store_true", help="put the right numbers into the tables")
    parser.add_argument("--store", nargs=2, type=Path, metavar=("FOLDER", "FILE"), help="keep the results of a folder")
    options = parser.parse_args(argv)
    if options.store:
        store(*options.store)
    problems, waiting, checked = check(root, write=options.write)
    print("\n".join([*problems, *(f"not stored yet: {place}" for place in waiting)]))
    print(f"{checked} marked places checked, {len(waiting)} without stored results, {len(problems)} differences")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
