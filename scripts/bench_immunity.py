"""The same rules in other people's processes: `python scripts/bench_immunity.py` prints one line a process.

A read and a few rules, best of some calls that take turns, each after a torch operation whose threads may still turn:
in a plain `python -c`, with OMP_WAIT_POLICY, OMP_NUM_THREADS and MALLOC_* set, with torch imported last, under
`accelerate launch`, in a notebook kernel (where ipykernel is installed) and in two processes at once.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RULES = ("mean", "krum", "geometric_median", "median", "trimmed_mean")
CODE = "import sys; sys.path[:0] = {paths!r}; import bench_immunity; bench_immunity.here({repeats})"
TORCH_LAST = "import numba, fedllm_sec; " + CODE
NOTEBOOK = """
from jupyter_client.manager import start_new_kernel
manager, client = start_new_kernel()
client.execute_interactive({code!r}, timeout=600)
client.stop_channels(); manager.shutdown_kernel(now=True)
"""


def here(repeats: int) -> None:
    """One line of the table, measured in this process."""
    import torch

    from fedllm_sec import aggregate

    rows = torch.randn(32, 2**16).repeat(1, 64)
    calls = {"read": lambda: rows.mean(0)}
    for name in RULES:
        settings = {"f": 6} if name in ("krum", "trimmed_mean") else {}
        calls[name] = lambda name=name, settings=settings: aggregate(rows, name, **settings).update
    first, best = dict[str, float](), dict.fromkeys(calls, float("inf"))
    for turn in range(repeats + 1):
        for name, call in calls.items():
            rows[:, : 2**20].sum(0)
            start = time.perf_counter()
            call()
            took = time.perf_counter() - start
            if turn == 0:
                first[name] = took
            else:
                best[name] = min(best[name], took)
    read = best["read"]
    cells = [f"{best[name] / read:.2f} ({first[name] / best[name]:.0f})" for name in RULES]
    print(f"{read * 1e3:.1f} | {' | '.join(cells)} |", flush=True)


def run(label: str, command: list[str], **settings: str) -> None:
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, cwd=ROOT)
    lines = [line for line in done.stdout.splitlines() if line.endswith("|")]
    print(f"| {label} | {lines[-1] if lines else done.stderr.strip()[-200:]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="The speed of some rules in several kinds of processes.")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", nargs="*", help="lines whose label holds one of these words")
    given = parser.parse_args()
    paths = [str(ROOT), str(ROOT / "scripts")]
    code = CODE.format(paths=paths, repeats=given.repeats)
    plain = [sys.executable, "-c", code]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    runs: list[tuple[str, list[str], dict[str, str]]] = [
        ("python -c", plain, {}),
        ("OMP_WAIT_POLICY=passive", plain, {"OMP_WAIT_POLICY": "passive"}),
        ("OMP_WAIT_POLICY=active", plain, {"OMP_WAIT_POLICY": "active"}),
        ("OMP_NUM_THREADS=1", plain, {"OMP_NUM_THREADS": "1"}),
        ("MALLOC_MMAP_THRESHOLD_=65536", plain, {"MALLOC_MMAP_THRESHOLD_": "65536"}),
        ("torch imported last", [sys.executable, "-c", TORCH_LAST.format(paths=paths, repeats=given.repeats)], {}),
        ("accelerate launch", [*launch, str(Path(__file__)), "--here", str(given.repeats)], {}),
    ]
    if importlib.util.find_spec("ipykernel"):
        runs.append(("notebook kernel", [sys.executable, "-c", NOTEBOOK.format(code=code)], {}))
    print(f"| process | a read, ms | {' | '.join(RULES)} |\n|---|---:|{'---:|' * len(RULES)}")
    for label, command, settings in runs:
        if not given.only or any(word in label for word in given.only):
            run(label, command, **settings)
    if not given.only or any(word in "two at once" for word in given.only):
        other = subprocess.Popen([*plain[:2], code], cwd=ROOT, stdout=subprocess.DEVNULL)
        run("two at once", plain)
        other.wait()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--here"]:
        sys.path.insert(0, str(ROOT))
        here(int(sys.argv[2]))
    else:
        main()
