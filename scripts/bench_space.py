"""Measure what comparing products costs: `python scripts/bench_space.py` prints one line for each way of comparing.

"Multiplied alone" is what no way of taking that Gram matrix can be below here: the two float32 products of matrices of
n r rows in each layer, over a little more than half of the pairs. Adapters of rank 16 on square layers, 4.2 million
values a row, 32 clients. A read is `rows.mean(0)` in the same run; the best of each counts. `--limit 12` ends with an
error where a product-space Gram matrix takes more reads than that.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from fedllm_sec import kernels
from fedllm_sec.kernels.products import PARTS, ProductSums
from fedllm_sec.matrix import Layout, UpdateMatrix
from fedllm_sec.matrix.factors import Products, aligned


def best(call: Callable[[], Any], repeats: int, device: str, now: Callable[[], float]) -> float:
    """The shortest of some calls, in seconds."""
    found = []
    for _ in range(repeats):
        start = now()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(now() - start)
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=32, help="clients")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--width", type=int, default=2048, help="in and out of a layer")
    parser.add_argument("--layers", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, help="reads that a Gram matrix may take")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: of all threads, beside others")
    parser.add_argument("--brief", action="store_true", help="the Gram matrices alone")
    args = parser.parse_args()
    now = time.perf_counter if args.clock == "wall" else time.process_time
    names = tuple(f"layers.{i}.q.lora_{f}.weight" for i in range(args.layers) for f in "AB")
    shapes = ((args.rank, args.width), (args.width, args.rank)) * args.layers
    layout = Layout(names, shapes)
    rng = torch.Generator().manual_seed(0)
    start = 0.05 * torch.randn(layout.size, generator=rng)
    rows = (0.01 * torch.randn(args.n, layout.size, generator=rng)).to(args.device)
    updates = UpdateMatrix.of(rows, layout=layout)
    products = Products.of(layout, start.to(args.device))
    shown = replace(updates, products=products)
    read = best(lambda: rows.mean(0), args.repeats, args.device, now)
    print(
        f"n={args.n}, r={args.rank}, {args.layers} layers of {args.width} x {args.width}, d={layout.size:,}, "
        f"{args.device}, {torch.get_num_threads()} threads; a read takes {read:.4f} s "
        f"({rows.numel() * 4 / read / 1e9:.1f} GB/s)"
    )
    long = [torch.randn(args.n * args.rank, args.width, device=args.device) for _ in range(2)]
    step = -(-len(long[0]) // PARTS)

    def multiplied() -> None:
        for _ in range(args.layers):
            for x in long:
                for first in range(0, len(x), step):
                    x[first : first + step] @ x[: first + step].T

    ways: dict[str, Callable[[], Any]] = {
        "gram of factors": lambda: kernels.gram(updates),
        "multiplied alone": multiplied,
        "gram of products": lambda: kernels.gram(shown),
        "rows aligned": lambda: aligned(rows, products),
        "history of products, first round": lambda: ProductSums().add(shown),
    }
    for name, call in list(ways.items())[: 3 if args.brief else None]:
        seconds = best(call, args.repeats if "history" not in name else 1, args.device, now)
        print(f"{name}: {seconds:.3f} s, {seconds / read:.1f} reads")
        if name == "gram of products" and args.limit is not None and seconds > args.limit * read:
            sys.exit(f"gram of products: {seconds / read:.1f} reads, the limit is {args.limit:g}")


if __name__ == "__main__":
    main()
