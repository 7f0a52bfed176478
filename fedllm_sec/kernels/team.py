"""The threads that the CPU kernels run on: those of torch's own OpenMP team.

A thread of that team that has nothing to do turns in a loop for milliseconds before it sleeps (OMP_WAIT_POLICY), and
beside a pool of our own it takes a core from it. So there is no pool: the work is a parallel region of the same OpenMP
library that torch has loaded, and the threads that would turn are those that work. How many they are follows from the
cores this process may use, whatever OMP_NUM_THREADS says, unless `use` or `torch.set_num_threads` says otherwise.
In a forked child, whose team is gone, and where there is no such library, a pool of Python threads does it.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")

AT_ONCE = 256  # jobs of one parallel region: their results are held until it ends
_REGION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_AT_START = torch.get_num_threads()
_wanted: int | None = None
_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def use(threads: int | None) -> None:
    """Compute with so many threads from now on, torch too; None: torch as it is, a matrix with as many as cores."""
    global _wanted
    _wanted = threads
    if threads is not None:
        torch.set_num_threads(threads)


def size() -> int:
    """How many threads work on a matrix."""
    if _wanted is not None:
        return _wanted
    given = torch.get_num_threads()
    if given != _AT_START:
        return given
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else given


def results(jobs: Iterable[Callable[[], T]], threads: int) -> Iterator[T]:
    """What the jobs return, in order. They run on `threads` threads, and should release the interpreter lock."""
    waiting = iter(jobs)
    while True:
        found: list[T] = []
        ended = _batch(waiting, found, threads)
        yield from found
        if ended:
            return


def _batch(waiting: Iterator[Callable[[], T]], found: list[T], threads: int) -> bool:
    """Do up to AT_ONCE jobs; whether there are no more."""
    lock, done, taken, state = threading.Lock(), dict[int, T](), 0, {"ended": False}
    errors: list[BaseException] = []

    def work() -> None:
        nonlocal taken
        while True:
            with lock:
                if errors or state["ended"] or taken == AT_ONCE:
                    return
                try:
                    job = next(waiting, None)
                except BaseException as error:
                    errors.append(error)
                    return
                if job is None:
                    state["ended"] = True
                    return
                number, taken = taken, taken + 1
            try:
                done[number] = job()
            except BaseException as error:  # raised below, where somebody hears it
                errors.append(error)

    parallel = None if _forked else _region()
    if parallel is not None:
        code = _REGION(lambda _: work())
        parallel(code, None, threads, 0)
    else:
        with ThreadPoolExecutor(threads) as pool:
            for one in [pool.submit(work) for _ in range(threads)]:
                one.result()
    if errors:
        raise errors[0]
    found.extend(done[number] for number in range(taken))
    return state["ended"]


@functools.cache
def _region() -> Any:
    """GOMP_parallel(function, data, threads, flags) of the OpenMP library that torch has loaded, if there is one."""
    try:
        loaded = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    for path in sorted(set(re.findall(r"/\S*/lib(?:gomp|iomp5|omp)[-.\w]*", loaded)), key=lambda p: "torch" not in p):
        try:
            parallel = ctypes.CDLL(path).GOMP_parallel
        except (OSError, AttributeError):
            continue
        parallel.argtypes = [_REGION, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        parallel.restype = None
        return parallel
    return None
