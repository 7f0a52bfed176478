"""`python -m fedllm_sec.report FOLDER [FOLDER ...]`: the page and the tables of finished or running runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from fedllm_sec.errors import FedError, Parser, quietly, reason
from fedllm_sec.records.files import write_atomic
from fedllm_sec.report.grid import page as grid_page
from fedllm_sec.report.grid.folder import is_grid, read_grid
from fedllm_sec.report.page import render, summary_text
from fedllm_sec.report.runs import ReportError, read_runs
from fedllm_sec.report.tables import as_latex, as_markdown, summary_table

EPILOG = """\
A FOLDER is a run folder (recipe.yaml, history.jsonl), a comparison (comparison.json), or a folder that holds
run folders; several are shown side by side. Or it is one grid folder (grid.json, cells/): heat-maps of attack by
defense, a ranking, and every run on demand. Only files are read; no model is loaded and no network is used.

examples:
  python -m fedllm_sec.report runs/quickstart
  python -m fedllm_sec.report runs/krum runs/median --out krum_or_median.html
  python -m fedllm_sec.report runs/quickstart --markdown >> notes.md
  python -m fedllm_sec.report runs/my_grid
  python -m fedllm_sec.report runs/my_grid --latex > tables.tex
"""


def path(text: str) -> Path:
    """A path as it is typed: `~` is the home folder, also where no shell has put it in."""
    return Path(os.path.expanduser(text))


def arguments() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m fedllm_sec.report",
        description="Write one self-contained HTML page: what the attacks did and what the defenses saved.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", nargs="+", type=path, metavar="FOLDER", help="run or comparison folder")
    parser.add_argument(
        "--out",
        type=path,
        metavar="FILE",
        help="the page to write (default: report.html in FOLDER; with several folders, in the current one)",
    )
    formats = parser.add_mutually_exclusive_group()
    text = "print the table as {}; no page without --out"
    formats.add_argument("--markdown", action="store_true", help=text.format("Markdown"))
    formats.add_argument("--latex", action="store_true", help=text.format("LaTeX"))
    return parser


def of_runs(options: argparse.Namespace) -> tuple[str, Callable[[], str]]:
    """What to print, and how to make the page, for run folders."""
    runs = read_runs(options.folders)
    table = summary_table(runs)
    if options.markdown:
        text = as_markdown(table)
    else:
        text = as_latex(table) if options.latex else summary_text(runs)
    return text, lambda: render(runs, options.folders)


def of_grid(options: argparse.Namespace) -> tuple[str, Callable[[], str]]:
    """What to print, and how to make the page, for a grid folder."""
    grid = read_grid(options.folders[0])
    if options.markdown or options.latex:
        text = grid_page.paper_text(grid, latex=options.latex)
    else:
        text = grid_page.summary_text(grid)
    return text, lambda: grid_page.render(grid)


@quietly
def main(argv: list[str] | None = None) -> int:
    options = arguments().parse_args(argv)
    try:
        grid = next((folder for folder in options.folders if is_grid(folder)), None)
        if grid is not None and len(options.folders) > 1:
            raise ReportError(f"{grid}: is a grid folder, which has a page of its own. Give it alone.")
        only_table = options.markdown or options.latex
        make = of_grid if grid is not None else of_runs
        text, page = make(options)
        print(text)
        if options.out is not None or not only_table:
            beside = options.folders[0] if len(options.folders) == 1 else Path()
            path = options.out or beside / "report.html"
            made = page().encode()
            try:
                write_atomic(path, made)
            except OSError as error:
                raise ReportError(f"{path}: cannot be written ({reason(error)}). Name a file with --out.") from error
            print(f"\nreport: {path}", file=sys.stderr if only_table else sys.stdout)
    except BrokenPipeError:
        raise  # nobody reads on
    except (FedError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
