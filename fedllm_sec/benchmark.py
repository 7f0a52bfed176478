"""Run a grid: `python -m fedllm_sec.benchmark grid.yaml [key.sub=value ...] [--jobs N]`.

Started again it goes on: cells that are done are skipped, an interrupted one continues after its last whole round,
and one that failed is tried again. Under `accelerate launch` the ranks share the cells out among themselves.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedllm_sec.errors import FedError, Parser, RecipeError, quietly
from fedllm_sec.recipe.resolve import did_you_mean
from fedllm_sec.records.environment import typed
from fedllm_sec.records.files import remove_leftovers, write_json
from fedllm_sec.records.outcomes import numbers
from fedllm_sec.train import OLD, Terminated, heed_ctrl_c, in_words, terminate

# what launchers set for one process of several; accelerate would make them work on one run together
RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
WORLD = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
LOCAL_RANK = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")
LOCAL_WORLD = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")


def arguments() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m fedllm_sec.benchmark",
        description="Attack x defense grids: every cell is a run of its own, and what is done is skipped.",
        epilog="example: python -m fedllm_sec.benchmark recipes/grids/quick.yaml --jobs 2 'axes.seed=[0, 1, 2]'",
    )
    parser.add_argument("grid", type=Path, nargs="?", help="the YAML file of the grid, or a shipped one: grids/quick")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="settings of the base recipe, or axes.NAME=[values]"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes that share the cells (default: 1)")
    parser.add_argument(
        "--only", metavar="PATTERN", action="append",
        help="run only cells of this name (as in --list), e.g. 'flip__*'; may be given again",
    )  # fmt: skip
    parser.add_argument("--list", "--dry-run", action="store_true", help="check the grid, list its cells and stop")
    parser.add_argument(
        "--no-share", action="store_true", help="train and measure anew what another cell has trained or measured"
    )
    parser.add_argument(
        "--allow-code", action="store_true", help="with --list: import the code that cells name as package.module:name"
    )
    return parser


@quietly
def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    parser = arguments()
    options = parser.parse_intermixed_args(words)
    if options.allow_code and not options.list:
        parser.error("--allow-code: goes with --list; a grid that is run imports what its cells name.")
    rank = 0
    heed_ctrl_c()
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        rank, world, local_rank, local_world = take_ranks()
        from fedllm_sec.grid.grid import load

        grid = load(options.grid, options.overrides, allow_code=options.allow_code or not options.list)
        chosen = choose(grid, options.only)
        if options.list:
            print(listing(grid, chosen))
            return 0
        if options.jobs < 1 or (options.jobs > 1 and world > 1):
            raise RecipeError(
                f"--jobs: {options.jobs}: must be at least 1, and 1 where a launcher starts the processes."
            )
        command = typed("benchmark", words)
        return run(grid, chosen, command, options.jobs, rank, world, local_rank, local_world, not options.no_share)
    except BrokenPipeError:
        raise  # nobody reads on
    except Exception as error:
        if (said := in_words(error)) is None:
            raise
        if rank == 0 or not isinstance(error, FedError):
            print(f"error: {said}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        how, code = ("terminated", 143) if isinstance(stop, Terminated) else ("stopped", 130)
        print(f"{how}; the same command goes on from the last whole round of every cell.", file=sys.stderr)
        return code
    finally:
        signal.signal(signal.SIGTERM, before)


def take_ranks() -> tuple[int, int, int, int]:
    """Rank and number of processes, in all and on this machine; then forgotten: each process runs cells on its own."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" or os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise RecipeError("launcher: a grid runs one cell in each process; launch it without DeepSpeed and FSDP.")

    def first(names: Sequence[str], default: int) -> int:
        return next((int(os.environ[name]) for name in names if name in os.environ), default)

    rank, world = first(RANK, 0), first(WORLD, 1)
    found = rank, world, first(LOCAL_RANK, 0), first(LOCAL_WORLD, world)
    if world > 1:
        for name in (*RANK, *WORLD, *LOCAL_RANK, *LOCAL_WORLD):
            os.environ.pop(name, None)
    return found


def choose(grid: Any, patterns: Sequence[str] | None) -> list[Any]:
    """The cells to run, in the order in which they load least: those of any pattern, with their twins."""
    if patterns is None:
        return list(grid.run_order())
    slugs, wanted = [cell.slug for cell in grid.cells], set[str]()
    for pattern in patterns:
        if not (found := set(fnmatch.filter(slugs, pattern))):
            raise RecipeError(
                f'--only: no cell is called "{pattern}".{did_you_mean(pattern, slugs)} --list names them.'
            )
        wanted |= found
    wanted |= {cell.twin for cell in grid.cells if cell.slug in wanted and cell.twin is not None}
    return [cell for cell in grid.run_order() if cell.slug in wanted]


def run(
    grid: Any, chosen: list[Any], command: str, jobs: int, rank: int, world: int, local_rank: int, local_world: int,
    share: bool = True,
) -> int:  # fmt: skip
    """Run what is left of the chosen cells, then write tables and report; 1 where a cell failed."""
    from fedllm_sec.grid import cells, results, workers
    from fedllm_sec.report.grid.folder import read_shared
    from fedllm_sec.train import quiet

    quiet()
    cells.refuse_conflicts(grid)
    begun, started = time.monotonic(), time.time()
    damaged = {cell.slug: found for cell in chosen if (found := cells.damage(cell))}
    left = [cell for cell in chosen if cells.status(cell) != "done" or cell.slug in damaged]
    if rank == 0:
        remove_leftovers(grid.folder, OLD)
        shutil.rmtree(grid.folder / cells.SHARED, ignore_errors=True)  # of a start that was killed
        write_json(grid.folder / "grid.json", cells.describe(grid, command))
        several = f" with {max(jobs, world)} processes" if max(jobs, world) > 1 else ""
        print(
            f"{grid.folder}: {_cells(len(chosen))}, {len(chosen) - len(left)} done, {len(left)} to run{several}",
            flush=True,
        )
        for slug, found in damaged.items():
            print(f"  damaged: {slug}: {'; '.join(f'{name} {wrong}' for name, wrong in found.items())}", flush=True)

    def tell(cell: Any, seconds: float) -> None:
        finished = sum(cells.settled(other, started) for other in chosen)
        print(f"[{finished:>{len(str(len(chosen)))}}/{len(chosen)}] {line_of(cell, seconds)}", flush=True)

    try:
        if jobs > 1 and left:
            workers.spread(
                grid.folder, left, min(jobs, len(left)), command=command, started=started, tell=tell, share=share
            )
        else:
            most = max(1, workers.cores() // local_world) if world > 1 else None
            if world > 1:
                workers.use_gpu(local_rank)
            cells.walk(grid.folder, left, command=command, started=started, tell=tell, most_threads=most, share=share)
    finally:
        if rank == 0:
            shutil.rmtree(grid.folder / cells.SHARED, ignore_errors=True)
            written = results.write(grid)
    if rank != 0:
        return 0
    counts = Counter(cells.status(cell) for cell in chosen)
    total = ", ".join(f"{n} {what}" for what, n in counts.items())
    print(f"\n{_cells(len(chosen))}: {total}; {time.monotonic() - begun:.0f} s")
    if (told := read_shared(grid.folder)) is not None:
        for what, words in told.in_words("other cells").items():
            print(f"{what}: {words}")
    for cell in chosen:
        if cells.status(cell) == "failed":
            print(f"  failed: {cell.slug}: {cells.error_of(cell).get('message', '')}  ({cell.folder}/error.json)")
    print("\n" + results.as_text(grid))
    print("\nresults: " + ", ".join(str(path) for path in written))
    _report(grid.folder)
    return 0 if counts["done"] == len(chosen) else 1


def _report(folder: Path) -> None:
    from fedllm_sec.report.page import write_report

    try:
        print(f"report: {write_report(folder)}")
    except Exception as error:  # the runs and their tables are safe by now
        print(f"no report ({type(error).__name__}): {error}", file=sys.stderr)


def _cells(number: int) -> str:
    return f"{number} cell{'' if number == 1 else 's'}"


def line_of(cell: Any, seconds: float) -> str:
    """What came out of a cell, in a line."""
    from fedllm_sec.grid import cells
    from fedllm_sec.report.measures import share

    if cells.status(cell) != "done":
        error = cells.error_of(cell)
        first = (str(error.get("message", "")).splitlines() or [""])[0]
        return f"{cell.slug}  FAILED  {error.get('type', '')}: {first}"
    summary = json.loads((cell.folder / "summary.json").read_text(encoding="utf-8"))
    parts = [cell.slug]
    given = {**(summary["quality"] or {}), **(summary["attack"] or {})}
    for name, value in numbers(given).items():
        if isinstance(given[name], dict):
            parts.append(f"{'ASR' if name == 'asr' else name.replace('_', ' ')} {share(value, 3)}")
    if len(parts) == 1 and summary["quality"]:
        parts.append(f"loss {float(summary['quality']['loss']):.3f}")
    return "  ".join([*parts, f"{seconds:.1f} s"])


def listing(grid: Any, chosen: Sequence[Any]) -> str:
    """The cells with where they stand."""
    from fedllm_sec.grid import cells

    width = max(len(cell.slug) for cell in chosen)
    lines = [f"{cell.slug:<{width}}  {cells.status(cell)}{'  (twin)' if cell.twin is None else ''}" for cell in chosen]
    axes = "; ".join(f"{axis}: {', '.join(labels)}" for axis, labels in grid.axes.items())
    return "\n".join([*lines, f"\n{grid.folder}: {_cells(len(chosen))}. {axes}"])


if __name__ == "__main__":
    sys.exit(main())
