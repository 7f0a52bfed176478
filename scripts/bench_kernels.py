"""Measure the kernels and rules, and print one Markdown table: `python scripts/bench_kernels.py`.

Every row is a ratio within this run, since clocks and neighbours differ: to one read of the matrix (`rows.mean(0)`
on the CPU; on a GPU the device's own copy speed), to the plain torch way, and to ByzFL where that is installed.
The fast calls are repeated in turn with the read and the best of each counts; the slow ones run once to three
times. Where others use the machine, `--clock cpu` with OMP_WAIT_POLICY=passive counts the time of all threads.

    python scripts/bench_kernels.py                           n=32, d=4.2M float32 on the CPU
    python scripts/bench_kernels.py --device cuda --n 16 64 128 --d 40000000 --dtype bfloat16
    python scripts/bench_kernels.py --device cuda --rows host    rows in host memory, computed on the GPU
    python scripts/bench_kernels.py --all [NAME ...]          every entry of the menu, on a LoRA layout, with its limit
    python scripts/bench_kernels.py --sweep                   growth in d (1e5 to 1e8, n=16) and n (64 to 256)
    python scripts/bench_kernels.py --disk 12 --path FOLDER   a 12 GB matrix on disk, in memory of a fraction
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import inspect
import itertools
import math
import os
import platform
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from bench_menu import menu_table
from torch import Tensor

from fedllm_sec import kernels
from fedllm_sec.defenses import MENU
from fedllm_sec.matrix import UpdateMatrix
from fedllm_sec.matrix.rowfile import save_rows
from fedllm_sec.matrix.updates import new_rows
from fedllm_sec.protocols import RoundContext

Call = Callable[[], Any]


class Clock:
    """Times calls, waiting for the device where there is one."""

    def __init__(self, device: str, counts: str = "wall") -> None:
        self.cuda = device.startswith("cuda")
        self.now = time.process_time if counts == "cpu" else time.perf_counter

    def once(self, call: Call) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        start = self.now()
        call()
        if self.cuda:
            torch.cuda.synchronize()
        return self.now() - start

    def best_in_turn(self, calls: dict[str, Call], repeats: int) -> dict[str, float]:
        """The best time of each call; they take turns, so that a slow minute of the machine hits all alike."""
        best = dict.fromkeys(calls, math.inf)
        for call in calls.values():
            call()
        for _ in range(repeats):
            for name, call in calls.items():
                best[name] = min(best[name], self.once(call))
        return best


# ---------------------------------------------------------------- what is measured


def kernel_calls(updates: UpdateMatrix, f: int) -> dict[str, Call]:
    n = updates.n
    weights = torch.rand(n, dtype=torch.float64)
    half = updates.select(range(n - 2 * f))
    return {
        "kernels.row_norms": lambda: kernels.row_norms(updates),
        "kernels.gram": lambda: kernels.gram(updates),
        "kernels.sq_distances": lambda: kernels.sq_distances(updates),
        "kernels.combine": lambda: kernels.combine(updates, weights),
        "kernels.sign_sums": lambda: kernels.sign_sums(updates),
        "kernels.median": lambda: kernels.median(updates),
        "kernels.trimmed_mean": lambda: kernels.trimmed_mean(updates, f),
        "kernels.mean_around_median": lambda: kernels.mean_around_median(updates, n - f),
        "bulyan's second phase": lambda: kernels.mean_around_median(half, max(1, n - 4 * f)),
    }


def context(updates: UpdateMatrix) -> RoundContext:
    start = torch.zeros(1, device=updates.compute_device).expand(updates.d)
    return RoundContext(1, start, updates.layout, torch.Generator().manual_seed(0))


def rule_call(name: str, updates: UpdateMatrix, f: int) -> Call:
    """A rule of the menu with its defaults, f where it takes one; a stage before it is followed by the mean."""
    stage, _, rule = name.partition(" + ")
    make = MENU[stage].make
    settings = {"f": f} if "f" in inspect.signature(make).parameters else {}
    call = make(**settings) if inspect.isclass(make) else functools.partial(make, **settings)
    ctx = context(updates)
    if not rule:
        return lambda: call(updates, ctx)
    return lambda: MENU[rule].make(call(updates, ctx), ctx)


RULES = ["krum", "multi_krum", "geometric_median", "centered_clipping", "foolsgold", "nnm + mean"]
RULES += ["norm_clipping + mean", "dnc", "median", "trimmed_mean", "bulyan", "meamed"]
CALLS = {"gram": 3, "geometric_median": 3, "median": 3, "trimmed_mean": 3, "bulyan": 8, "meamed": 8}


def limit_of(name: str) -> str:
    """The number of reads a call may take on the CPU."""
    if name in CALLS or name in RULES:
        return f"{CALLS.get(name, 3)} reads"
    return ""


# ---------------------------------------------------------------- the plain torch way, and ByzFL


def weiszfeld(rows: Tensor) -> Tensor:
    """The textbook loop over the whole matrix, to a relative step of 1e-8 or 100 steps."""
    centre = rows.mean(0)
    for _ in range(100):
        weights = 1 / (rows - centre).norm(dim=1).clamp_min(1e-12)
        new = weights @ rows / weights.sum()
        step, centre = (new - centre).norm() / new.norm(), new
        if step < 1e-8:
            break
    return centre


def clipping_loop(rows: Tensor) -> Tensor:
    centre = torch.zeros_like(rows[0])
    for _ in range(3):
        gaps = rows - centre
        norms = gaps.norm(dim=1)
        centre = centre + ((norms.median() / norms).clamp_max(1)[:, None] * gaps).mean(0)
    return centre


def by_distances(rows: Tensor, neighbours: int) -> Tensor:
    return torch.cdist(rows, rows).square().sort(1).values[:, :neighbours].sum(1)


def around_median(rows: Tensor, k: int) -> Tensor:
    return rows.gather(0, (rows - rows.median(0).values).abs().argsort(0)[:k]).mean(0)


def plain_calls(rows: Tensor, f: int) -> dict[str, Call]:
    x = rows.float()
    n = len(x)
    calls: dict[str, Call] = {
        "kernels.gram": lambda: x @ x.T,
        "kernels.sq_distances": lambda: torch.cdist(x, x),
        "kernels.combine": lambda: torch.rand(n, device=x.device) @ x,
        "kernels.row_norms": lambda: x.norm(dim=1),
        "kernels.sign_sums": lambda: x.sign().sum(0),
        "median": lambda: x.median(0),
        "trimmed_mean": lambda: x.sort(0).values[f : n - f].mean(0),
        "meamed": lambda: around_median(x, n - f),
        "krum": lambda: x[by_distances(x, n - f - 1).argmin()].clone(),
        "multi_krum": lambda: x[by_distances(x, n - f - 1).argsort()[: n - f]].mean(0),
        "geometric_median": lambda: weiszfeld(x),
        "centered_clipping": lambda: clipping_loop(x),
        "foolsgold": lambda: (lambda unit: (unit @ unit.T, x.mean(0)))(x / x.norm(dim=1, keepdim=True)),
        "norm_clipping + mean": lambda: (x * (x.norm(dim=1).median() / x.norm(dim=1))[:, None]).mean(0),
    }
    for name in ("median", "trimmed_mean"):
        calls[f"kernels.{name}"] = calls[name]
    calls["kernels.mean_around_median"] = calls["meamed"]
    return calls


def byzfl_calls(rows: Tensor, f: int) -> tuple[dict[str, Call], str]:
    """ByzFL's aggregators; only its aggregator module is loaded, as the package wants torchvision for others."""
    found = importlib.util.find_spec("byzfl")
    if found is None or found.submodule_search_locations is None:
        return {}, "ByzFL is not installed: `pip install --no-deps byzfl` fills its column."
    package = types.ModuleType("byzfl")
    package.__path__ = list(found.submodule_search_locations)
    sys.modules["byzfl"] = package
    try:
        rules = importlib.import_module("byzfl.aggregators.aggregators")
        before = importlib.import_module("byzfl.aggregators.preaggregators")
    except ImportError as error:
        return {}, f"ByzFL cannot be imported: {error}."
    x = rows.float()
    made = {
        "median": rules.Median(),
        "trimmed_mean": rules.TrMean(f=f),
        "meamed": rules.Meamed(f=f),
        "krum": rules.Krum(f=f),
        "multi_krum": rules.MultiKrum(f=f),
        "geometric_median": rules.GeometricMedian(),
        "centered_clipping": rules.CenteredClipping(L=3),
    }
    calls: dict[str, Call] = {name: functools.partial(rule, x) for name, rule in made.items()}
    nnm = before.NNM(f=f)
    calls["nnm + mean"] = lambda: nnm(x).mean(0)
    return calls, "ByzFL: its defaults (its geometric median takes 3 steps, ours converges)."


# ---------------------------------------------------------------- the tables


def main_table(args: argparse.Namespace, n: int, d: int, dtype: str) -> Iterator[str]:
    clock = Clock(args.device, args.clock)
    f = max(1, min(n // 5, (n - 3) // 4))
    torch.manual_seed(0)
    host = args.rows == "host"
    rows = torch.randn(n, d, device="cpu" if host else args.device, dtype=getattr(torch, dtype))
    updates = UpdateMatrix.of(rows, device=args.device)
    calls = kernel_calls(updates, f) | {name: rule_call(name, updates, f) for name in RULES}
    if host:  # seconds each: one of a kind
        shown = ("kernels.gram", "kernels.median", "kernels.combine", "krum", "multi_krum", "geometric_median")
        calls = {name: calls[name] for name in shown}
        pinned, there = (
            rows[:, : 2**20].contiguous().pin_memory(),
            torch.empty(n, 2**20, dtype=rows.dtype, device=args.device),
        )
        times = clock.best_in_turn({"copy": lambda: there.copy_(pinned), **calls}, args.repeats)
        read = times.pop("copy") * d / 2**20
        note = f"one read at {rows.nbytes / read / 1e9:.0f} GB/s, a pinned copy to the GPU: {read * 1e3:.1f} ms"
    elif clock.cuda:
        copy = torch.empty_like(rows)
        times = clock.best_in_turn({"copy": lambda: copy.copy_(rows), **calls}, args.repeats)
        read = times.pop("copy") / 2
        note = f"one read at the copy speed of {rows.nbytes / read / 1e9:.0f} GB/s: {read * 1e3:.2f} ms"
        del copy
    else:
        times = clock.best_in_turn({"read": lambda: rows.mean(0), **calls}, args.repeats)
        read = times.pop("read")
        note = f"one read, rows.mean(0): {read * 1e3:.1f} ms ({rows.nbytes / read / 1e9:.1f} GB/s)"
    if args.rules or host:
        plain, byzfl, byzfl_note = {}, {}, ""
    else:
        plain, (byzfl, byzfl_note) = plain_calls(rows, f), byzfl_calls(rows, f)
    yield f"n={n}, d={d:,}, {dtype}, f={f}; {note}. {byzfl_note}"
    yield ""
    yield "| call | ms | reads | limit | plain torch / ours | ByzFL / ours |"
    yield "|---|---:|---:|---:|---:|---:|"
    for name, seconds in times.items():
        others = []
        for way in (plain, byzfl):
            if name not in way:
                others.append("n/a")
                continue
            slow = clock.once(way[name])
            if slow < 1:
                slow = min(slow, clock.once(way[name]), clock.once(way[name]))
            others.append(f"{slow / seconds:.1f} x")
        limit = "" if clock.cuda else limit_of(name)
        ms = f"{seconds * 1e3:.{2 if clock.cuda else 1}f}"
        yield f"| {name} | {ms} | {seconds / read:.2f} | {limit} | {' | '.join(others)} |"


def all_table(args: argparse.Namespace) -> Iterator[str]:
    """Every entry of the menu; plain torch and ByzFL for what they have, on the same shape."""
    (n,) = args.n
    rows = torch.randn(n, 4_194_304)
    f = max(1, min(n // 5, (n - 3) // 4))
    others: dict[str, dict[str, Any]] = {}
    if not args.rules:
        named = {"norm_clipping + mean": "norm_clipping", "nnm + mean": "nnm", "arc + mean": "arc"}
        others["plain torch"] = {named.get(name, name): call for name, call in plain_calls(rows, f).items()}
        byzfl, note = byzfl_calls(rows, f)
        others["ByzFL"] = {named.get(name, name): call for name, call in byzfl.items()}
        yield note
    yield from menu_table(n, 4_194_304, args.all, args.repeats, others)


def exponent(sizes: list[int], seconds: list[float]) -> float:
    """The slope of log seconds over log size (least squares)."""
    x, y = (torch.tensor(v, dtype=torch.float64).log() for v in (sizes, seconds))
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def sweep_table(args: argparse.Namespace) -> Iterator[str]:
    clock = Clock(args.device, args.clock)
    names = ["krum", "geometric_median", "median", "trimmed_mean"]

    def times(n: int, d: int, names: list[str], repeats: int) -> dict[str, float]:
        updates = UpdateMatrix.of(torch.randn(n, d, device=args.device))
        return clock.best_in_turn({name: rule_call(name, updates, 3) for name in names}, repeats)

    yield "| rule | over | ms | exponent |"
    yield "|---|---|---|---:|"
    for fixed, sizes, rules in (
        ("d", [10**5, 10**6, 10**7, 10**8], names),
        ("n", [64, 128, 256], names[:2]),
    ):
        found = []
        for size in sizes:
            n, d = (16, size) if fixed == "d" else (size, 1_000_000)
            found.append(times(n, d, rules, 3 if n * d > 5 * 10**8 else args.repeats))
        for name in rules:
            seconds = [one[name] for one in found]
            place = "d = 1e5, 1e6, 1e7, 1e8 at n = 16" if fixed == "d" else "n = 64, 128, 256 at d = 1e6"
            listed = ", ".join(f"{s * 1e3:.1f}" for s in seconds)
            yield f"| {name} | {place} | {listed} | {exponent(sizes, seconds):.2f} |"


class PeakMemory:
    """The most anonymous resident memory (without the page cache) of this process while it is open, in bytes."""

    def __enter__(self) -> PeakMemory:
        self.peak, self.open = 0, True
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.open = False
        self.thread.join()

    def _watch(self) -> None:
        while self.open:
            status = Path("/proc/self/status").read_text()
            self.peak = max(self.peak, int(status.split("RssAnon:")[1].split()[0]) * 1024)
            time.sleep(0.005)


def read_once(path: Path) -> None:
    """The whole file into one reused 8 MB buffer, from beginning to end."""
    buffer = bytearray(8 * 2**20)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def forget(path: Path) -> None:
    """Ask the system to drop the file from its page cache."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def memory_for_a_result(d: int) -> str:
    """What it costs to write d fresh values: much, where the host of a virtual machine takes free memory back."""
    clock, fresh = Clock("cpu"), []
    for _ in range(3):
        time.sleep(2)  # time enough to take it
        fresh.append(clock.once(lambda: new_rows(d).zero_()))
    kept = new_rows(d).zero_()
    again = min(clock.once(kept.zero_) for _ in range(3))
    times = ", ".join(f"{seconds:.2f}" for seconds in fresh)
    return f"Memory for a result of {4 * d / 1e6:.0f} MB: {times} s to write it when new, {again:.2f} s again."


def disk_table(args: argparse.Namespace) -> Iterator[str]:
    (n,) = args.n
    d = int(args.disk * 1e9) // (4 * n)
    with tempfile.TemporaryDirectory(dir=args.path) as folder:
        path = Path(folder) / "rows.safetensors"
        some = torch.randn(n, 2**18)
        places = [slice(s, min(s + 2**18, d)) for s in range(0, d, 2**18)]
        blocks = ((p, some[:, : p.stop - p.start].roll(p.start // 2**18, 0)) for p in places)
        save_rows(path, blocks, n, d, torch.float32, {})
        updates = UpdateMatrix.open(path)
        weights = torch.rand(n, dtype=torch.float64)
        calls: dict[str, tuple[int, Call]] = {
            "kernels.sq_distances": (1, lambda: kernels.sq_distances(updates)),
            "kernels.combine": (1, lambda: kernels.combine(updates, weights)),
            "kernels.median": (1, lambda: kernels.median(updates)),
            "geometric_median": (2, rule_call("geometric_median", updates, 3)),
        }
        kernels.gram(UpdateMatrix.of(some))  # compiled before the clock starts
        kernels.median(UpdateMatrix.of(some))
        yield f"A matrix on disk: n={n}, d={d:,} float32, {path.stat().st_size / 1e9:.1f} GB."
        yield memory_for_a_result(d)
        yield ""
        yield "| call | page cache | s | passes | speed / reading the file once | peak memory (RssAnon) |"
        yield "|---|---|---:|---:|---:|---:|"
        clock = Clock("cpu")
        for state in ("as left by the read", "dropped"):
            for name, (passes, call) in calls.items():
                whole, own, peak = math.inf, math.inf, 0
                if state == "dropped" and name != "kernels.sq_distances":
                    continue  # the disk decides, and takes minutes
                for _ in range(5 if state != "dropped" else 1):
                    if state == "dropped":
                        forget(path)
                    whole = min(whole, clock.once(lambda: read_once(path)))
                    if state == "dropped":
                        forget(path)
                    with PeakMemory() as memory:
                        own = min(own, clock.once(call))
                    peak = max(peak, memory.peak)
                share = passes * whole / own
                yield f"| {name} | {state} | {own:.2f} | {passes} | {share:.0%} | {peak / 1e6:.0f} MB |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the kernels and the rules.")
    parser.add_argument("--device", default="cpu")
    types = ["float32", "bfloat16", "float16"]
    parser.add_argument("--dtype", nargs="*", default=["float32"], choices=types)
    parser.add_argument("--n", type=int, nargs="*", help="rows; 32, or 20 on disk; several give a table each")
    parser.add_argument("--d", type=int, nargs="*", default=[4_200_000])
    parser.add_argument("--rows", choices=["device", "host"], default="device", help="where the rows lie")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu: time of all threads")
    parser.add_argument("--rules", action="store_true", help="leave the plain ways and ByzFL out")
    parser.add_argument("--all", nargs="*", metavar="NAME", help="every entry of the menu, or these")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--disk", type=float, metavar="GB", nargs="?", const=12.0)
    parser.add_argument("--path", default=".", help="folder for the matrix on disk")
    args = parser.parse_args()
    args.n = args.n or [20 if args.disk else 32]
    cuda = args.device.startswith("cuda")
    device = torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU"
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}", flush=True)
    if args.all is not None:
        tables = [all_table(args)]
    elif args.disk or args.sweep:
        tables = [disk_table(args) if args.disk else sweep_table(args)]
    else:
        shapes = itertools.product(args.n, args.d, args.dtype)
        tables = [main_table(args, n, d, dtype) for n, d, dtype in shapes]
    for table in tables:
        for line in table:
            print(line, flush=True)
        print(flush=True)


if __name__ == "__main__":
    main()
