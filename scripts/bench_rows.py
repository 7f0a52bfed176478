"""A round whose rows do not fit into memory: what each rule takes of memory and time, and whether it decides alike.

    python scripts/bench_rows.py [--clients 64] [--million 40] [--folder /tmp/rows] [--rows disk] [--rules flame lasa ...]
    python scripts/bench_rows.py --million 1 --compare     # the same rounds with rows in memory: the same bytes?

Each rule plays one whole round in a process of its own (source of rows, attack, screening, rule, server step, record);
rows are normal numbers around a common part, in a layout of 40 weights. Printed are the highest resident memory and
its anonymous part, looked at every 5 ms, and the seconds of the round after its rows were there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from fedllm_sec.algorithms import fedavg
from fedllm_sec.attacks.threat import Threat
from fedllm_sec.attacks import MENU as ATTACKS
from fedllm_sec.defenses import MENU as RULES
from fedllm_sec.defenses.pipeline import Pipeline
from fedllm_sec.matrix import Layout
from fedllm_sec.matrix.storage import Storage
from fedllm_sec.protocols import Client, LocalTraining
from fedllm_sec.recipe.resolve import resolve
from fedllm_sec.rounds.compute import Machine
from fedllm_sec.rounds.federation import Federation, run
from fedllm_sec.rounds.source import Asked, Came

NAMES = ("mean", "multi_krum", "median", "geometric_median", "flame", "lasa", "centered_clipping", "freqfed")
LAYERS = 40


class Vector:
    """A task of which only the vector counts."""

    def __init__(self, d: int) -> None:
        side = math.isqrt(d // LAYERS)
        self.layout = Layout(tuple(f"layer.{i}.weight" for i in range(LAYERS)), ((side, side),) * LAYERS)
        self.model = torch.nn.Module()
        self.parameters = torch.nn.Parameter(torch.zeros(self.layout.size))
        self.parameters.grad = torch.zeros(0)

    def size(self, shard: torch.Tensor) -> int:
        return len(shard)


def drawn(federation: Federation, cohort: list[Client], asked: Asked) -> Came:
    """Rows as training would bring them, one at a time."""
    d, n = federation.task.layout.size, len(cohort)
    common = torch.randn(d, generator=torch.Generator().manual_seed(10_000))
    results = federation.storage.rows(n, d, federation.machine.device)
    for i in range(n):
        results[i] = torch.randn(d, generator=torch.Generator().manual_seed(i)) * 1e-3 + common * 2e-3
    claims = torch.tensor([[10.0, 1.0, 0.5]] * n, dtype=torch.float64)
    federation.came_at = time.perf_counter()
    return Came(cohort, (results, claims, torch.zeros(n, 0, dtype=torch.float64)))


class Peak(threading.Thread):
    """The highest VmRSS and RssAnon of this process in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.whole = self.anonymous = 0

    def run(self) -> None:
        while True:
            lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            self.whole = max(self.whole, 1024 * int(lines["VmRSS"].split()[0]))
            self.anonymous = max(self.anonymous, 1024 * int(lines["RssAnon"].split()[0]))
            time.sleep(0.005)


def one(rule: str, options: argparse.Namespace, place: str) -> dict:
    """One round under a rule."""
    task = Vector(int(options.million * 1e6))
    threat, n = None, options.clients
    if options.attack is not None:
        attack = resolve(options.attack, {}, ATTACKS, "attack.update")
        bad = frozenset(f"c{i:03}" for i in range(n // 5))
        threat = Threat(malicious=bad, seed=0, update=[attack], knowledge="cohort+defense")
    federation = Federation(
        task=task,
        clients=[Client(f"c{i:03}", torch.zeros(10, 1)) for i in range(n)],
        training=LocalTraining(batch_size=10, steps=1, optimizer="sgd", lr=1.0),
        machine=Machine(Accelerator(cpu=True)),
        algorithm=fedavg(),
        defense=Pipeline([], resolve(rule, {}, RULES, "defense.rule"), []),
        threat=threat,
        evaluation=None,
        vector=torch.zeros(task.layout.size),
        storage=Storage(place, getattr(torch, options.dtype), options.folder),
        source=drawn,
    )
    peak = Peak()
    peak.start()
    (record,) = run(federation, 1)
    seconds = time.perf_counter() - federation.came_at
    record.seconds, record.memory_mb = {}, {}
    return {
        "rule": rule,
        "resident_gb": peak.whole / 1e9,
        "anonymous_gb": peak.anonymous / 1e9,
        "seconds": seconds,
        "vector": hashlib.sha256(federation.vector.numpy().tobytes()).hexdigest()[:12],
        "record": hashlib.sha256(repr(record).encode()).hexdigest()[:12],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--million", type=float, default=40.0)
    parser.add_argument("--rows", default="disk", choices=["device", "host", "disk"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--folder", type=Path, default=Path("runs/bench_rows"))
    parser.add_argument("--attack")
    parser.add_argument("--rules", nargs="*", default=list(NAMES))
    parser.add_argument("--compare", action="store_true", help="also with rows in memory")
    parser.add_argument("--one", nargs=2, metavar=("RULE", "PLACE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(one(options.one[0], options, options.one[1])))
        return
    d = LAYERS * math.isqrt(int(options.million * 1e6) // LAYERS) ** 2
    size = options.clients * d * getattr(torch, options.dtype).itemsize / 1e9
    print(f"{options.clients} x {d:,} {options.dtype} = {size:.3g} GB, rows on {options.rows}")
    for rule in options.rules:
        found = {}
        for place in [options.rows, *(["device"] if options.compare else [])]:
            command = [sys.executable, __file__, *sys.argv[1:], "--one", rule, place]
            done = subprocess.run(command, capture_output=True, text=True)
            found[place] = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
            if done.returncode != 0:
                print(rule, done.stderr.strip().splitlines()[-1:])
        now = found[options.rows]
        if now is not None:
            line = f"{rule:<20}{now['resident_gb']:6.2f} GB resident, {now['anonymous_gb']:5.2f} anonymous"
            line += f"{now['seconds']:8.1f} s  {now['vector']} {now['record']}"
            if options.compare and found["device"] is not None:
                same = all(now[key] == found["device"][key] for key in ("vector", "record"))
                line += "  as in memory" if same else "  NOT AS IN MEMORY"
            print(line, flush=True)


if __name__ == "__main__":
    main()
