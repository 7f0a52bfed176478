"""One FedAvg round of small clients against the same steps in a bare PyTorch loop, side by side in one process.

    python scripts/bench_small.py [--clients 100] [--images 100] [--batch 20] [--model lenet] [--clock cpu]
    python scripts/bench_small.py --clients 20 --images 40 --model resnet18 --norm batch --optimizers sgd

The round is the whole of it: local training, the update matrix, screening, the mean, the server step. The bare loop is
what one would write by hand: the same model and images, a fresh optimizer over the list of parameters for each client,
batches cut from a tensor by a permutation, and no update kept. Rounds of both alternate, as does the order within a
pair; the table gives the best times and the median of the ratios. `--clock cpu` counts this process's own time, for a
machine that others use as well. Where the model keeps running statistics, a last line says what reading and writing
them takes, which each client's training does once.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from accelerate import Accelerator

from fedllm_sec.algorithms import fedavg
from fedllm_sec.defenses import MENU as DEFENSES
from fedllm_sec.defenses.pipeline import Pipeline
from fedllm_sec.models import MENU as MODELS
from fedllm_sec.protocols import Client, Labelled
from fedllm_sec.recipe.resolve import resolve
from fedllm_sec.rounds.client import LocalTraining, make_optimizer
from fedllm_sec.rounds.compute import Machine
from fedllm_sec.rounds.federation import Federation, play_round
from fedllm_sec.tasks.classify import Classify

CLASSES, TIMES = 10, 20


def bare_round(model: torch.nn.Module, start: dict, shards: list[Labelled], batch: int, kind: str, lr: float) -> None:
    """The same clients and steps by hand."""
    for shard in shards:
        model.load_state_dict(start)
        make = torch.optim.SGD if kind == "sgd" else torch.optim.AdamW
        optimizer = make(model.parameters(), lr=lr, weight_decay=0.0)
        for rows in torch.randperm(len(shard.y)).split(batch):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(shard.x[rows]), shard.y[rows]).backward()
            optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--model", default="lenet", choices=[n for n, e in MODELS.items() if e.kind == "classify"])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--side", type=int, default=28, help="pixels of an image's side (default: 28)")
    parser.add_argument("--norm", choices=["group", "batch"], help="of a ResNet")
    parser.add_argument("--optimizers", nargs="+", choices=["sgd", "adamw"], default=["sgd", "adamw"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    shape, settings = (1, options.side, options.side), {} if options.norm is None else {"norm": options.norm}
    rng = torch.Generator().manual_seed(0)
    shards = [
        Labelled(
            torch.rand(options.images, *shape, generator=rng),
            torch.randint(CLASSES, (options.images,), generator=rng),
            CLASSES,
            torch.zeros(options.images, dtype=torch.bool),
        )
        for _ in range(options.clients)
    ]
    print("| optimizer | bare loop s | FedAvg round s | best ratio | median ratio |\n|---|---|---|---|---|")
    for kind, lr in ((kind, {"sgd": 0.05, "adamw": 1e-3}[kind]) for kind in options.optimizers):
        training = LocalTraining(batch_size=options.batch, epochs=1, optimizer=kind, lr=lr, max_grad_norm=None)
        task = Classify(MODELS[options.model].make(shape, CLASSES, **settings), torch.device("cpu"))
        federation = Federation(
            task=task,
            clients=[Client(f"c{i}", shard) for i, shard in enumerate(shards)],
            training=training,
            machine=Machine(Accelerator(cpu=True)),
            algorithm=fedavg(),
            defense=Pipeline([], resolve("mean", {}, DEFENSES, "defense.rule"), []),
            threat=None,
            evaluation=None,
            vector=task.initial.clone(),
            buffers=task.buffers.initial if task.buffers is not None else None,
        )
        plain = MODELS[options.model].make(shape, CLASSES, **settings)
        start = {name: value.clone() for name, value in plain.state_dict().items()}
        optimizer = make_optimizer(task, training)
        works = {
            "bare": lambda plain=plain, start=start, kind=kind, lr=lr: bare_round(
                plain, start, shards, options.batch, kind, lr
            ),
            "round": lambda f=federation, o=optimizer: play_round(f, f.round + 1, 99, o),
        }
        best, ratios = dict.fromkeys(works, float("inf")), []
        for pair in range(options.pairs + 1):
            times = {}
            for name in sorted(works, reverse=bool(pair % 2)):
                begun = clock()
                works[name]()
                times[name] = clock() - begun
            if pair:  # the first pair warms up
                best = {name: min(best[name], times[name]) for name in works}
                ratios.append(times["round"] / times["bare"])
        print(
            f"| {kind} | {best['bare']:.3f} | {best['round']:.3f} | {best['round'] / best['bare']:.2f} "
            f"| {statistics.median(ratios):.2f} |"
        )
    if task.buffers is not None:
        begun = clock()
        for _ in range(TIMES):
            task.buffers.write(task.buffers.read())
        size = len(task.buffers.floats) + len(task.buffers.counters)
        print(f"{size:,} running statistics read and written: {(clock() - begun) / TIMES * 1000:.2f} ms a client")


if __name__ == "__main__":
    main()
