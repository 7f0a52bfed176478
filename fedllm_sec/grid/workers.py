"""Several processes on one machine that walk over the same cells."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from fedllm_sec.errors import FedError
from fedllm_sec.grid.cells import held, holder, record_error, settled, walk
from fedllm_sec.grid.grid import Cell


class WorkerDied(FedError):
    """A process that ended without saying why: killed, or out of memory."""


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_gpu(number: int) -> None:
    """Process `number` computes on its own GPU, as far as there are enough."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())


def spread(
    grid: Path, cells: Sequence[Cell], jobs: int, *, command: str, started: float, tell: Callable[[Cell, float], None],
    share: bool = True,
) -> None:  # fmt: skip
    """Walk over the cells with `jobs` processes; `tell` hears of every cell here.

    A process that dies takes its cell with it, as a failed one, and is replaced. Ctrl-C here stops all of them.
    """
    context = multiprocessing.get_context("spawn")
    by_slug = {cell.slug: cell for cell in cells}
    running: dict[Connection, BaseProcess] = {}

    def start(number: int) -> None:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(
            target=_work,
            args=(grid, list(cells), theirs, number, jobs, command, started, os.getpid(), share),
            name=str(number),
            daemon=True,
        )
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: a Ctrl-C is for this process to handle
        try:
            process.start()
        finally:
            signal.signal(signal.SIGINT, before)
        theirs.close()
        running[ours] = process

    try:
        for number in range(jobs):
            start(number)
        while running:
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                try:
                    slug, seconds = connection.recv()
                    tell(by_slug[slug], seconds)
                except EOFError:
                    process = running.pop(connection)
                    process.join()
                    if process.exitcode != 0 and _bury(grid, cells, process, started, tell):
                        start(int(process.name))
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.join(10)
            if process.is_alive():
                process.kill()
    if not all(settled(cell, started) for cell in cells):
        raise WorkerDied("every process ended before its cells were done; see what they wrote above.")


def _bury(
    grid: Path,
    cells: Sequence[Cell],
    process: BaseProcess,
    started: float,
    tell: Callable[[Cell, float], None],
) -> bool:
    """Record the death of a process as the error of the cell it had; whether it had one."""
    for cell in cells:
        if holder(grid, cell) == process.pid and not settled(cell, started):
            with held(grid, cell) as mine:
                if mine:
                    why = f"killed by signal {-process.exitcode}" if (process.exitcode or 0) < 0 else "ended"
                    hint = "Out of memory? Lower --jobs." if process.exitcode == -signal.SIGKILL else ""
                    record_error(cell, WorkerDied(f"the process that ran it was {why}. {hint}".strip()))
                    tell(cell, 0.0)
                    return True
    return False


def _work(
    grid: Path,
    cells: list[Cell],
    told: Connection,
    number: int,
    jobs: int,
    command: str,
    started: float,
    parent: int,
    share: bool,
) -> None:
    from fedllm_sec.train import in_words, quiet

    def orphaned() -> None:
        if os.getppid() != parent:
            raise SystemExit(1)

    quiet()
    use_gpu(number)
    try:
        walk(
            grid,
            cells,
            command=command,
            started=started,
            tell=lambda cell, seconds: told.send((cell.slug, round(seconds, 3))),
            most_threads=max(1, cores() // jobs),
            between=orphaned,
            share=share,
        )
    except Exception as error:  # a cell's own errors are in its folder; this one kept it from being written there
        if (said := in_words(error)) is None:
            raise
        print(f"error: {said}", file=sys.stderr)
        raise SystemExit(2) from error
