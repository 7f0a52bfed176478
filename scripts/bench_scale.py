"""What rounds move and hold by n and d, as fedllm_sec.cost computes it, and two of these numbers measured.

    python scripts/bench_scale.py              # the table
    python scripts/bench_scale.py --measure    # and the two points; needs unshare (util-linux) and Linux

The first point is the bytes that cross the loopback device of a network namespace while two, then four processes
simulate a round of 16 clients (torchrun, gloo), against `RoundCost.exchange`: the difference of a run of four rounds
and one of two, so that starting and evaluation cancel. The second is the peak of resident memory of a process that
aggregates 64 rows of 4.2M parameters by two rules, beyond what it had with its libraries, rows in
memory and on disk, against `RoundCost.server`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from safetensors.torch import load_file

import fedllm_sec
from fedllm_sec.build.cost import size

CLIENTS, RANK = 16, 64
N, D = 64, 4_200_000
RULES = ("geometric_median", "median")


def table() -> None:
    print(
        "| n | d | a client receives, sends: float32 | int8 | all, int8 | rows float32 | bfloat16 | on disk, resident |"
    )
    print("|--:|--:|--:|--:|--:|--:|--:|--:|")
    for n in (10, 100, 1_000, 10_000):
        for d in (1_000_000, 40_000_000, 1_000_000_000):
            plain, int8 = fedllm_sec.cost(n, d), fedllm_sec.cost(n, d, wire="int8")
            half, disk = fedllm_sec.cost(n, d, rows_dtype="bfloat16"), fedllm_sec.cost(n, d, rows="disk")
            print(
                f"| {n:,} | {d:,} | {size(plain.received)}, {size(plain.sent)} | {size(int8.sent)} | {size(int8.wire)} "
                f"| {size(plain.matrix)} | {size(half.matrix)} | {size(disk.server)} |"
            )


# ---------------------------------------------------------------- bytes between processes


def crossed(processes: int, rounds: int, folder: Path) -> tuple[int, int]:
    """Bytes over loopback of a simulation in a network namespace of its own, and d."""
    recipe = {
        "seed": 0, "rounds": rounds, "model": {"lora": {"r": RANK, "alpha": RANK}}, "task": "causal_lm",
        "data": {"train_rows": 160, "test_rows": 8}, "clients": {"total": CLIENTS, "local_steps": 1, "batch_size": 2},
        "algorithm": {"name": "fedavg"}, "evaluate": {"every": 100, "rows": 8, "transcripts": 0},
        "output": {"folder": str(folder / "run")},
    }  # fmt: skip
    folder.mkdir()
    (folder / "in.yaml").write_text(yaml.safe_dump(recipe))
    launch = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node={processes}"
    done = f"ip link set lo up && {launch} -m fedllm_sec.train {folder}/in.yaml >&2 && grep lo: /proc/net/dev"
    found = subprocess.run(
        ["unshare", "-rn", "bash", "-c", done], capture_output=True, text=True,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if found.returncode:
        raise SystemExit(found.stderr[-2000:])
    return int(found.stdout.split()[1]), load_file(folder / "run" / "checkpoint.safetensors")["state.vector"].numel()


def measure_exchange() -> None:
    print(f"\n| processes, {CLIENTS} clients | computed for a round | measured | ratio |\n|--:|--:|--:|--:|")
    for processes in (2, 4):
        with tempfile.TemporaryDirectory() as folder:
            (two, d), (four, _) = (crossed(processes, rounds, Path(folder) / str(rounds)) for rounds in (2, 4))
        computed, measured = fedllm_sec.cost(CLIENTS, d, processes=processes).exchange, (four - two) / 2
        print(f"| {processes} | {size(computed)} | {size(measured)} | {measured / computed:.2f} |")


# ---------------------------------------------------------------- memory

CHILD = """
import sys, torch, fedllm_sec
from pathlib import Path
from fedllm_sec.matrix.storage import Storage
n, d, place, rule, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], Path(sys.argv[5])
torch.set_num_threads(1)
fedllm_sec.aggregate(torch.randn(8, 1000), rule)
def peak():
    return 1024 * int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])
before = peak()
storage = Storage("disk" if place == "disk" else "device", folder=folder)
with storage.in_use():
    rows = storage.rows(n, d, torch.device("cpu"))
    for row in rows:
        row.normal_()
    fedllm_sec.aggregate(rows, rule)
print(peak() - before)
"""


def measure_memory() -> None:
    print(f"\n| {N} x {D:,} | rows | computed | measured peak | ratio |\n|---|---|--:|--:|--:|")
    for place in ("memory", "disk"):
        for rule in RULES:
            with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
                command = [sys.executable, "-c", CHILD, str(N), str(D), place, rule, folder]
                measured = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            computed = fedllm_sec.cost(N, D, rows=place).server
            print(f"| {rule} | {place} | {size(computed)} | {size(measured)} | {measured / computed:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="measure the two points as well: a few minutes")
    options = parser.parse_args()
    table()
    if options.measure:
        measure_memory()
        measure_exchange()


if __name__ == "__main__":
    main()
