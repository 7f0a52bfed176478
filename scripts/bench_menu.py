"""Every before / rule / after entry of the menu with its defaults, in a table: `python scripts/bench_kernels.py --all`.

The matrix has the layout of LoRA adapters of rank 8 on q_proj and v_proj of a Llama of 7B: 128 factors, d = 4,194,304.
A stage before the rule is followed by the mean. Rules that remember are objects that have seen `HISTORY` rounds; each
call is a further one. What is arithmetic: the time of the same call on rows that fit the last cache (2^16 and 2^17
columns), as a straight line in d, over the time that the whole matrix takes.
"""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fedllm_sec.defenses import MENU
from fedllm_sec.matrix import Layout, UpdateMatrix
from fedllm_sec.protocols import RoundContext

LAYERS, RANK, HIDDEN = 32, 8, 4096
HISTORY = 12  # rounds, so that fldetector's window of 10 is full
SMALL = (2**16, 2**17)  # columns that fit the last cache
WAIT = 8  # seconds after which a call is not repeated
NEEDS = {"theta": 7.0, "rho": 1e9}  # settings without a default; f is a fifth of the rows

# Reads that a call may take where a read runs at SLOW GB/s or less, and at FAST GB/s or more.
SLOW, FAST = 9.0, 30.0
LIMITS = {
    (2, 3): "mean krum norm_clipping nnm arc bucketing robust_learning_rate median trimmed_mean",
    (3, 4.5): "multi_krum geometric_median rfa centered_clipping three_sigma mda smea monna dnc flame caf fltrust "
    "bulyan meamed slsgd cross_round signguard",
    (4, 8): "foolsgold fldetector",
    (6, 10): "lasa",
    (12, 40): "freqfed",
    (3, 5): "deepsight",
    (40, 150): "residual_reweighting",
}  # fmt: skip
LIMIT = {name: pair for pair, names in LIMITS.items() for name in names.split()}
PASSES = "n forward passes of a model and no pass over the matrix"
NO_ROWS = {"flare": PASSES, "backdoor_indicator": PASSES}


def lora_layout(columns: int) -> Layout:
    """Factors A and B of q_proj and v_proj in all layers, of a width that gives so many columns."""
    hidden = columns // (LAYERS * 4 * RANK)
    shapes = {"lora_A": (RANK, hidden), "lora_B": (hidden, RANK)}
    return Layout.of(
        (f"model.layers.{layer}.self_attn.{target}.{factor}.weight", torch.empty(shape, device="meta"))
        for layer in range(LAYERS)
        for target in ("q_proj", "v_proj")
        for factor, shape in shapes.items()
    )


def limit_at(name: str, speed: float) -> float | None:
    """The reads a call may take where a read runs at `speed` GB/s; between the two speeds a straight line."""
    if name not in LIMIT:
        return None
    low, high = LIMIT[name]
    return low + (high - low) * min(1.0, max(0.0, (speed - SLOW) / (FAST - SLOW)))


class Rounds:
    """One entry of the menu, called round after round on the same rows."""

    def __init__(self, name: str, updates: UpdateMatrix) -> None:
        self.kind, make = MENU[name].kind, MENU[name].make
        wanted = inspect.signature(make).parameters
        given = NEEDS | {"f": max(1, min(updates.n // 5, (updates.n - 3) // 4))}
        settings = {key: value for key, value in given.items() if key in wanted}
        if name == "foundationfl":  # by default the median, with f the trimmed mean
            del settings["f"]
        self.call: Callable[..., Any] = make(**settings) if inspect.isclass(make) else make
        self.settings = {} if inspect.isclass(make) else settings
        self.updates, self.round = updates, 0
        self.remembers = inspect.isclass(make)
        rng = torch.Generator().manual_seed(1)
        self.start, self.step = (0.1 * torch.randn(updates.d, generator=rng) for _ in range(2))
        self.root = updates.rows[: updates.n // 2].mean(0)

    def __call__(self) -> Any:
        self.round += 1
        if self.remembers:
            self.start.add_(self.step, alpha=0.9**self.round)
        ctx = RoundContext(
            self.round, self.start, self.updates.layout, torch.Generator().manual_seed(0),
            last_update=self.step, root_update=self.root,
        )  # fmt: skip
        if self.kind == "after":
            return self.call(self.step, ctx, **self.settings)
        made = self.call(self.updates, ctx, **self.settings)
        return MENU["mean"].make(made, ctx) if self.kind == "before" else made


def seconds(call: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """The first and the best of the later calls."""
    start = time.perf_counter()
    call()
    first = best = time.perf_counter() - start
    for _ in range(repeats if first < WAIT else 0):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return first, best


def matrix(n: int, columns: int) -> UpdateMatrix:
    torch.manual_seed(0)
    layout = lora_layout(columns)
    return UpdateMatrix.of(torch.randn(n, layout.size), layout=layout)


def menu_table(n: int, d: int, names: Sequence[str], repeats: int, others: dict[str, dict[str, Any]]) -> Iterator[str]:
    """`others`: by the name of a column, ways of others to do a rule."""
    names = list(names) or list(MENU)
    updates = matrix(n, d)
    small = [matrix(n, columns) for columns in SMALL]
    rows: Tensor = updates.rows

    def read() -> float:
        return seconds(lambda: rows.mean(0), 3)[1]

    yield "| entry | ms | a read, ms | GB/s | reads | limit | arithmetic | " + " | ".join((*others, ""))
    yield "|---|---:|---:|---:|---:|---:|---:|" + "---:|" * len(others)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            if name in NO_ROWS:
                yield f"| {name} | | | | | {NO_ROWS[name]} | |{' |' * len(others)}"
                continue
            whole, parts = Rounds(name, updates), [Rounds(name, part) for part in small]
            for rule in (whole, *parts):
                for _ in range(HISTORY if rule.remembers else 1):
                    rule()
            before, (_, best) = read(), seconds(whole, repeats)
            low, high = (seconds(part, 3)[1] for part in parts)
            inside = low + (high - low) / (SMALL[1] - SMALL[0]) * (updates.d - SMALL[0])
            one = min(before, read())
            speed = rows.nbytes / one / 1e9
            limit = limit_at(name, speed)
            shown = "" if limit is None else f"{limit:.3g}{'' if best / one <= limit else ' **over**'}"
            cells = [f"{seconds(way[name], 0)[0] / best:.1f} x" if name in way else "" for way in others.values()]
            numbers = [f"{best * 1e3:.1f}", f"{one * 1e3:.1f}", f"{speed:.0f}", f"{best / one:.2f}"]
            yield f"| {' | '.join([name, *numbers, shown, f'{min(1.0, max(0.0, inside / best)):.0%}', *cells])} |"
