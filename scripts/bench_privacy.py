"""Measure what gradients and deltas of images give away, and print Markdown tables: `python scripts/bench_privacy.py`.

Victims are drawn by the number of the try: model weights, rows and starts. Scores are taken after the best matching of
the batch. Seconds are those of this process' processor.

    python scripts/bench_privacy.py                            everything: about half an hour on one core
    python scripts/bench_privacy.py dlg reveal --tries 3       some parts, in small
    python scripts/bench_privacy.py --json docs/results/privacy_images.json

A part that is measured replaces its lines in an existing JSON file and leaves the others.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from fedllm_sec.attacks.privacy.exclusive import exclusive_neurons
from fedllm_sec.attacks.privacy.inversion import invert_gradient
from fedllm_sec.attacks.privacy.linear import linear_layer
from fedllm_sec.attacks.privacy.matching import dlg, idlg
from fedllm_sec.attacks.privacy.reveal import reveal
from fedllm_sec.attacks.privacy.seen import Observation
from fedllm_sec.data import arrays
from fedllm_sec.evaluation.images import counts_accuracy, matched
from fedllm_sec.matrix import Layout
from fedllm_sec.models import MENU
from fedllm_sec.protocols import Labelled, LocalTraining

FILES = {"fashion": "fashion_mnist_10k.npz", "cifar": "cifar10_jpeg_10k.npz"}
Line = dict[str, Any]


@functools.cache
def rows_of(data: str, folder: str) -> tuple[Labelled, Labelled]:
    return arrays.load(str(Path(folder) / FILES[data]), None, "train", "test", None, None, None)


def victim(model: str, rows: Labelled, number: int) -> nn.Module:
    torch.manual_seed(number)
    made: nn.Module = MENU[model].make(tuple(rows.x.shape[1:]), rows.classes)
    return made


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def gradient_seen(net: nn.Module, x: Tensor, y: Tensor) -> Observation:
    """The gradient of one batch."""
    loss = nn.functional.cross_entropy(net(x), y)
    sent = flat(torch.autograd.grad(loss, list(net.parameters())))
    layout = Layout.of(net.named_parameters())
    return Observation(sent, "gradient", flat(net.parameters()), layout, net, tuple(x.shape[1:]), rows=len(y))


def delta_seen(net: nn.Module, x: Tensor, y: Tensor, batch: int, training: LocalTraining) -> Observation:
    """The delta of one epoch over these rows; the model is as before afterwards."""
    start = flat(net.parameters())
    kind = {"sgd": torch.optim.SGD, "adamw": functools.partial(torch.optim.AdamW, weight_decay=0.0)}
    optimizer = kind[training.optimizer](net.parameters(), lr=training.lr)
    for here in range(0, len(y), batch):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[here : here + batch]), y[here : here + batch]).backward()
        optimizer.step()
    sent = flat(net.parameters()) - start
    nn.utils.vector_to_parameters(start, net.parameters())
    return Observation(
        sent, "delta", start, Layout.of(net.named_parameters()), net, tuple(x.shape[1:]), rows=batch,
        steps=len(y) // batch, size=len(y), training=training,
    )  # fmt: skip


def drawn(rows: Labelled, n: int, number: int, skew: float | None = None) -> Tensor:
    """n row numbers: at random, or with class shares from a Dirichlet distribution."""
    rng = torch.Generator().manual_seed(number)
    if skew is None:
        return torch.randperm(len(rows.y), generator=rng)[:n]
    torch.manual_seed(number)
    shares = torch.distributions.Dirichlet(torch.full((rows.classes,), skew)).sample()
    labels = torch.multinomial(shares, n, replacement=True).bincount(minlength=rows.classes)
    own = [(rows.y == c).nonzero()[:, 0] for c in range(rows.classes)]
    found = torch.cat([o[torch.randperm(len(o))[:k]] for o, k in zip(own, labels.tolist(), strict=True)])
    return found[torch.randperm(len(found))]


def images(
    name: str, data: str, model: str, batch: int, tries: int, attack: Callable[..., Any], options: Any,
    made_by: Callable[[str, Labelled, int], nn.Module] = victim,
) -> Line:  # fmt: skip
    """One line of the table: PSNR and SSIM of every image of every try."""
    rows, _ = rows_of(data, options.data)
    scores, alike, right, seconds = [], [], [], []
    for number in range(tries):
        at = drawn(rows, batch, number)
        seen = gradient_seen(made_by(model, rows, number), rows.x[at], rows.y[at])
        begun = time.process_time()
        made = attack(seen, seed=number) if "linear" not in name else attack(seen)
        seconds.append(time.process_time() - begun)
        pairs = matched(made.inputs, rows.x[at])
        scores, alike = scores + pairs.psnr, alike + (pairs.ssim or [])
        counted = [labels.bincount(minlength=rows.classes) for labels in (made.labels, rows.y[at])]
        right.append(counts_accuracy(*counted))
        print(f"  {name} {data} {model} {number}: {[round(s, 1) for s in pairs.psnr]}", file=sys.stderr, flush=True)
    return {
        "attack": name, "data": data, "model": model, "batch": batch, "images": len(scores),
        "psnr_mean": statistics.fmean(scores), "psnr_median": statistics.median(scores), "psnr_worst": min(scores),
        "over_20_db": sum(s > 20 for s in scores), "ssim_median": statistics.median(alike),
        "labels": statistics.fmean(right), "seconds": statistics.fmean(seconds),
    }  # fmt: skip


def of_linear(options: Any) -> Iterator[Line]:
    for data in FILES:
        yield images("linear_layer", data, "logistic", 1, options.tries or 20, linear_layer, options)


def of_dlg(options: Any) -> Iterator[Line]:
    yield images("dlg", "fashion", "sigmoid_cnn", 1, options.tries or 12, dlg, options)
    longer = functools.partial(dlg, iterations=2000, restarts=1, spread=0.1)
    yield images("dlg, 2,000 iterations", "cifar", "sigmoid_cnn", 1, options.tries or 10, longer, options)


def of_idlg(options: Any) -> Iterator[Line]:
    for starts in (1, 3):
        attack = functools.partial(idlg, restarts=starts)
        name = f"idlg, {starts} start{'s' * (starts > 1)}"
        yield images(name, "fashion", "sigmoid_cnn", 1, options.tries or 20, attack, options)


def of_invert(options: Any) -> Iterator[Line]:
    longer = functools.partial(invert_gradient, iterations=1200)
    yield images("invert_gradient", "fashion", "cnn", 1, options.tries or 10, invert_gradient, options)
    yield images("invert_gradient, 1,200 iterations", "fashion", "cnn", 4, options.tries or 3, longer, options)
    yield images("invert_gradient, 1,200 iterations", "fashion", "cnn", 8, options.tries or 3, longer, options)
    yield images("invert_gradient", "cifar", "cnn", 1, options.tries or 6, invert_gradient, options)
    thousand = functools.partial(invert_gradient, iterations=1000)
    yield images("invert_gradient, 1,000 iterations", "cifar", "cnn", 1, options.tries or 6, thousand, options)
    for data in FILES:
        yield images("invert_gradient", data, "lenet", 1, options.tries or 6, invert_gradient, options)


def of_exclusive(options: Any) -> Iterator[Line]:
    for data, model, batch, tries in (
        ("fashion", "cnn", 1, 10), ("fashion", "cnn", 4, 3), ("fashion", "cnn", 8, 3), ("fashion", "cnn", 32, 1),
        ("cifar", "cnn", 1, 6), ("cifar", "cnn", 8, 3), ("fashion", "lenet", 1, 6), ("cifar", "lenet", 1, 6),
    ):  # fmt: skip
        yield images("exclusive_neurons", data, model, batch, options.tries or tries, exclusive_neurons, options)
    name = "exclusive_neurons, trained model"
    yield images(name, "fashion", "cnn", 8, options.tries or 3, exclusive_neurons, options, trained)


def of_delta(options: Any) -> Iterator[Line]:
    """invert_gradient on the delta of k SGD steps of 2 rows."""
    rows, _ = rows_of("fashion", options.data)
    for steps in (2, 4):
        scores: list[float] = []
        alike: list[float] = []
        seconds = []
        for number in range(options.tries or 2):
            at = drawn(rows, 2 * steps, number)
            training = LocalTraining(batch_size=2, steps=steps, optimizer="sgd", lr=0.01, max_grad_norm=None)
            seen = delta_seen(victim("cnn", rows, number), rows.x[at], rows.y[at], 2, training)
            begun = time.process_time()
            made = invert_gradient(seen, rows.y[at], seed=number)
            seconds.append(time.process_time() - begun)
            pairs = matched(made.inputs, rows.x[at])
            scores, alike = scores + pairs.psnr, alike + (pairs.ssim or [])
        yield {
            "attack": f"invert_gradient, delta of {steps} SGD steps of 2 rows, labels given", "data": "fashion",
            "model": "cnn", "batch": 2 * steps, "images": len(scores), "psnr_mean": statistics.fmean(scores),
            "psnr_median": statistics.median(scores), "psnr_worst": min(scores),
            "over_20_db": sum(s > 20 for s in scores), "ssim_median": statistics.median(alike), "labels": None,
            "seconds": statistics.fmean(seconds),
        }  # fmt: skip


def trained(model: str, rows: Labelled, number: int) -> nn.Module:
    """After steps of 64 rows, of Fashion-MNIST's held-out images right: LeNet's 300 get 75 %, cnn's 100 get 79 %."""
    net = victim(model, rows, number)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for step in range(300 if model == "lenet" else 100):
        at = drawn(rows, 64, 10_000 * (number + 1) + step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(rows.x[at]), rows.y[at]).backward()
        optimizer.step()
    return net


def of_reveal(options: Any) -> Iterator[Line]:
    for data in FILES:
        _, other = rows_of(data, options.data)
        own = arrays.subset(other, torch.arange(1000).numpy())
        for batch in (1, 8, 32, 128):
            yield _counts("gradient, own statistics", data, batch, 1, None, own, options)
        if data == "fashion":
            for batch in (8, 32, 128):
                yield _counts("gradient, trained model, own statistics", data, batch, 1, None, own, options)
                yield _counts("gradient, trained model, auxiliary rows", data, batch, 1, None, own, options)
            for skew in (None, 0.3):
                for steps, batch in ((4, 8), (10, 20)):
                    yield _counts("sgd delta, auxiliary rows", data, batch, steps, skew, own, options)
                for steps, batch in ((1, 16), (4, 8), (10, 16)):
                    yield _counts("adamw delta, auxiliary rows", data, batch, steps, skew, own, options)


def _counts(what: str, data: str, batch: int, steps: int, skew: float | None, own: Labelled, options: Any) -> Line:
    rows, _ = rows_of(data, options.data)
    found, seconds = [], []
    for number in range(options.tries or 20):
        at = drawn(rows, batch * steps, number, skew)
        x, y = rows.x[at], rows.y[at]
        net = _trained_once(number, options.data) if "trained" in what else victim("lenet", rows, number)
        if "delta" in what:
            kind, lr = ("sgd", 0.05) if "sgd" in what else ("adamw", 1e-3)
            training = LocalTraining(batch_size=batch, steps=steps, optimizer=kind, lr=lr, max_grad_norm=None)
            seen = delta_seen(net, x, y, batch, training)
        else:
            seen = gradient_seen(net, x, y)
        seen = replace(seen, auxiliary=own if "auxiliary" in what else None)
        begun = time.process_time()
        counts = reveal(seen, len(y))
        seconds.append(time.process_time() - begun)
        found.append(counts_accuracy(counts, y.bincount(minlength=rows.classes)))
    return {
        "attack": f"reveal_labels, {what}", "data": data, "model": "lenet", "batch": batch, "steps": steps,
        "classes": "skewed" if skew else "alike", "labels": statistics.fmean(found), "labels_worst": min(found),
        "tries": len(found), "seconds": statistics.fmean(seconds),
    }  # fmt: skip


@functools.cache
def _trained_once(number: int, folder: str) -> nn.Module:
    return trained("lenet", rows_of("fashion", folder)[0], number % 2)


PARTS: dict[str, Callable[[Any], Iterator[Line]]] = {
    "linear": of_linear, "reveal": of_reveal, "idlg": of_idlg, "dlg": of_dlg, "invert": of_invert,
    "exclusive": of_exclusive, "delta": of_delta,
}  # fmt: skip


def table(lines: list[Line]) -> str:
    """Markdown: images, then labels."""
    out = ["| attack | data | model | batch | images | mean dB | median | worst | over 20 dB | SSIM median | s |",
           "|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|"]  # fmt: skip
    out += [
        f"| {x['attack']} | {x['data']} | {x['model']} | {x['batch']} | {x['images']} | {x['psnr_mean']:.1f} | "
        f"{x['psnr_median']:.1f} | {x['psnr_worst']:.1f} | {x['over_20_db']} | {x['ssim_median']:.2f} | "
        f"{x['seconds']:.1f} |"
        for x in lines if "psnr_mean" in x
    ]  # fmt: skip
    out += ["", "| attack | data | batch | steps | classes | labels right | worst | tries | s |",
            "|---|---|--:|--:|---|--:|--:|--:|--:|"]  # fmt: skip
    out += [
        f"| {x['attack']} | {x['data']} | {x['batch']} | {x['steps']} | {x['classes']} | {x['labels']:.3f} | "
        f"{x['labels_worst']:.2f} | {x['tries']} | {x['seconds']:.2f} |"
        for x in lines if "steps" in x
    ]  # fmt: skip
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), choices=[*PARTS, []], help="of the measurement")
    parser.add_argument("--tries", type=int, help="victims of each line; without it, as many as docs/privacy.md has")
    parser.add_argument("--data", default="../shared/data", help="folder of the two .npz files")
    parser.add_argument("--json", type=Path, help="write the lines there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    known = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    for part in options.parts:
        lines = list(PARTS[part](options))
        print(table(lines), flush=True)
        known = {name: line for name, line in known.items() if line["part"] != part}
        known |= {named(line): {"part": part, **line} for line in lines}
        if options.json:
            options.json.write_text(json.dumps(known, indent=1) + "\n")


def named(line: Line) -> str:
    """What tells a line from all others."""
    return ", ".join(str(line[key]) for key in ("attack", "data", "model", "batch", "steps", "classes") if key in line)


if __name__ == "__main__":
    main()
