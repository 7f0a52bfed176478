"""A round whose rows do not fit into memory: what each rule takes of memory and time, and whether it decides alike.

    python scripts/bench_rows.py [--clients 64] [--million 40] [--folder /tmp/rows] [--rules flame lasa ...]
    python scripts/bench_rows.py --million 1 --compare     # the same rounds with rows in memory: the same bytes?

Each rule plays a whole round (attack, screening, rule, server step, record) on rows that are made once: normal numbers
around a common part, in a layout of 40 weights. Printed are the highest resident memory while rows are made and the
round is played, its anonymous part, looked at every 5 ms, and the seconds of the round after its rows are there. The
attackers, a fifth of the clients, see all rows and the defense.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import threading
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from fedllm_sec.algorithms import fedavg
from fedllm_sec.attacks import MENU as ATTACKS
from fedllm_sec.attacks.threat import Threat
from fedllm_sec.defenses import MENU as RULES
from fedllm_sec.defenses.pipeline import Pipeline
from fedllm_sec.matrix import Layout
from fedllm_sec.matrix.storage import Storage
from fedllm_sec.protocols import Client, LocalTraining
from fedllm_sec.recipe.resolve import resolve
from fedllm_sec.rounds.compute import Machine
from fedllm_sec.rounds.federation import Federation, run
from fedllm_sec.rounds.source import Came

NAMES = ("mean", "multi_krum", "median", "geometric_median", "flame", "lasa", "centered_clipping", "freqfed")
LAYERS = 40


class Vector:
    """A task of which only the vector counts."""

    def __init__(self, d: int) -> None:
        side = math.isqrt(d // LAYERS)
        self.layout = Layout(tuple(f"layer.{i}.weight" for i in range(LAYERS)), ((side, side),) * LAYERS)
        self.model = torch.nn.Module()
        self.parameters = torch.nn.Parameter(torch.zeros(self.layout.size))
        self.parameters.grad = torch.zeros(1).expand(self.layout.size)

    def size(self, shard: torch.Tensor) -> int:
        return len(shard)


def made(storage: Storage, n: int, d: int) -> torch.Tensor:
    """Rows (n, d) as training would bring them, one at a time."""
    common, noise = (torch.randn(d, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    rows = storage.rows(n, d, torch.device("cpu"))
    for i in range(n):
        rows[i] = torch.add(2 * common, noise.roll(i * d // n + i))
    return rows


class Peak(threading.Thread):
    """The highest VmRSS and RssAnon of this process in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.whole = self.anonymous = 0
        self.over = False

    def run(self) -> None:
        while not self.over:
            lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            self.whole = max(self.whole, 1024 * int(lines["VmRSS"].split()[0]))
            self.anonymous = max(self.anonymous, 1024 * int(lines["RssAnon"].split()[0]))
            time.sleep(0.005)


def one(rule: str, options: argparse.Namespace, storage: Storage, rows: torch.Tensor) -> tuple[float, list[str]]:
    """Seconds of a round under a rule, and hashes of the new vector and the record."""
    task, n = Vector(int(options.million * 1e6)), options.clients
    threat = None
    if options.attack is not None:
        attack = resolve(options.attack, {}, ATTACKS, "attack.update")
        bad = frozenset(f"c{i:03}" for i in range(n // 5))
        threat = Threat(malicious=bad, seed=0, update=[attack], knowledge="cohort+defense")
    claims = torch.tensor([[10.0, 1.0, 0.5]] * n, dtype=torch.float64)
    federation = Federation(
        task=task,
        clients=[Client(f"c{i:03}", torch.zeros(10, 1)) for i in range(n)],
        training=LocalTraining(batch_size=10, steps=1, optimizer="sgd", lr=1.0),
        machine=Machine(Accelerator(cpu=True)),
        algorithm=fedavg(),
        defense=Pipeline([], resolve(rule, {"f": n // 5} if "krum" in rule else {}, RULES, "defense.rule"), []),
        threat=threat,
        evaluation=None,
        vector=torch.zeros(task.layout.size),
        storage=storage,
        source=lambda federation, cohort, asked: Came(cohort, (rows, claims, torch.zeros(n, 0).double())),
    )
    began = time.perf_counter()
    (record,) = run(federation, 1)
    seconds = time.perf_counter() - began
    record.seconds.clear()
    record.memory_mb.clear()
    vector = federation.vector.numpy().tobytes()
    return seconds, [hashlib.sha256(part).hexdigest()[:8] for part in (vector, repr(record).encode())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--million", type=float, default=40.0)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--folder", type=Path, default=Path("runs/bench_rows"))
    parser.add_argument("--attack", help="an update attack; it writes its rows over the attackers' for all rules after")
    parser.add_argument("--rules", nargs="*", default=list(NAMES))
    parser.add_argument("--compare", action="store_true", help="also with rows in memory")
    options = parser.parse_args()
    d = LAYERS * math.isqrt(int(options.million * 1e6) // LAYERS) ** 2
    dtype = getattr(torch, options.dtype)
    disk, memory = Storage("disk", dtype, options.folder), Storage("device", dtype)
    print(
        f"{options.clients} x {d:,} {options.dtype} = {options.clients * d * dtype.itemsize / 1e9:.3g} GB", flush=True
    )
    peak = Peak()
    peak.start()
    with disk.in_use():
        rows = made(disk, options.clients, d)
    beside = made(memory, options.clients, d) if options.compare else None
    peak.over = True
    print(
        f"{'rows are made':<20}{peak.whole / 1e9:6.2f} GB resident, {peak.anonymous / 1e9:5.2f} anonymous", flush=True
    )
    for rule in options.rules:
        peak = Peak()
        peak.start()
        seconds, found = one(rule, options, disk, rows)
        peak.over = True
        line = f"{rule:<20}{peak.whole / 1e9:6.2f} GB resident, {peak.anonymous / 1e9:5.2f} anonymous {seconds:8.1f} s"
        if beside is not None:
            line += ", as in memory" if one(rule, options, memory, beside)[1] == found else ", NOT AS IN MEMORY"
        print(line, flush=True)


if __name__ == "__main__":
    main()
