"""After training: the last model to the one that is handed out, made by the server alone, once.

It looks at no client and drops none: what got into the model is to be taken out again. Before and after are measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fedllm_sec.defenses.checks import need
from fedllm_sec.errors import DefenseError
from fedllm_sec.matrix import Layout
from fedllm_sec.matrix.factors import product_pairs
from fedllm_sec.models.products import singular_values, with_spectrum


@dataclass(frozen=True)
class Trained:
    """What a repair gets: the model after the last round, the server's rows, and how it may use both."""

    vector: Tensor  # (d,) the global vector, or the adapter
    layout: Layout
    scales: Mapping[str, float]  # how often the product of each A factor counts, by its name
    root: Any = None  # the server's clean rows, as the task has them
    tune: Callable[..., Tensor] | None = None  # (rows, steps, lr or None) -> (d,): training of `vector` on rows
    answered: Callable[..., Any] | None = None  # (rows, reminder) -> the rows with the model's own safe answers
    notes: dict[str, float] = field(default_factory=dict)  # what is worth recording


def _need_rows(trained: Trained, name: str, steps: int, lr: float | None) -> Callable[..., Tensor]:
    need(steps >= 1, name, "steps >= 1", "Raise it.", steps=steps)
    need(lr is None or lr > 0, name, "lr > 0", "Raise it, or leave it out.", lr=lr)
    if trained.root is None or trained.tune is None:
        raise DefenseError(f"{name}: needs rows of the server's own, and there are none. Set defense.root_rows.")
    return trained.tune


def fine_tune(trained: Trained, *, steps: int = 100, lr: float | None = None) -> Tensor:
    """Train the last model on the server's root rows.

    Ye et al. 2024 (2406.10630), section 4, with rows that the server has: level 1 of their three. Batches, optimizer
    and losses are those of a client, `lr` the clients' where none is given, constant over the `steps`. The paper trains
    on rows made for safety; root rows here are drawn from the training data, so that what they show is a clean task: a
    backdoor whose trigger is in none of them is forgotten only as far as training on other rows wears it off.
    """
    return _need_rows(trained, "fine_tune", steps, lr)(trained.root, steps, lr)


def own_answers(trained: Trained, *, steps: int = 100, lr: float | None = None, reminder: str = "") -> Tensor:
    """Train the last model on its own safe answers to the server's root prompts.

    Ye et al. 2024 (2406.10630), section 4, level 3: the model that was trained answers, reminded to be safe, and learns
    these answers without the reminder. `reminder` is text put before each prompt while answers are made, and none of
    the rows learnt has it; "" reminds of nothing. Answers are greedy, of `evaluate.max_new_tokens` at most. An answer
    is safe where it declines, wherever the root row's own answer does; answers to other rows are taken as they are. The
    rest are left out; where none is left the model stays as it is (note `rows` = 0).

    Stated here: the paper's model also makes up the harmful and the harmless instructions; here they are the prompts of
    root rows. Nothing of the rows' own answers is learnt.
    """
    tune = _need_rows(trained, "own_answers", steps, lr)
    assert trained.answered is not None
    rows = trained.answered(trained.root, reminder)
    trained.notes["rows"] = float(len(rows))
    return tune(rows, steps, lr) if len(rows) else trained.vector.clone()


def without_leading(a: Tensor, b: Tensor, directions: int, scale: float = 1.0) -> tuple[Tensor, Tensor, float]:
    """Factors of scale B A without its leading singular directions, and the share of its energy that went: 0 to 1.

    A is (r, in), B (out, r). No (out, in) matrix is formed.
    """
    values = singular_values(a, b, scale)
    left = values.clone()
    left[:directions] = 0.0
    energy = float(values.square().sum())
    gone = 1 - float(left.square().sum()) / energy if energy > 0 else 0.0
    return (*with_spectrum(a, b, left, scale), gone)


def prune_directions(trained: Trained, *, directions: int = 1) -> Tensor:
    """Take the leading singular directions of each layer's product B A out of the adapter.

    A backdoor by model replacement is one large step that few directions hold. The `directions` largest singular values
    of every adapted layer become 0; parameters beside the factors stay. No rows are needed and nothing is trained. Note
    `energy`: the mean share of ||B A||^2 that went.

    Ours: in Ye et al. 2024, whose repairs the other two are, no pruning could be found. Clean training has leading
    directions too, and loses them.
    """
    need(directions >= 1, "prune_directions", "directions >= 1", "Raise it.", directions=directions)
    vector, pairs = trained.vector.clone(), product_pairs(trained.layout)
    parts = trained.layout.split(vector)  # views: what is written into them is in the vector
    if not pairs:
        raise DefenseError("prune_directions: needs adapters with both factors trained, and there are none.")
    gone = 0.0
    for a_name, b_name in pairs:
        a, b = parts[a_name], parts[b_name]
        if directions >= len(a):
            raise DefenseError(
                f"prune_directions: directions={directions} of an adapter of rank {len(a)} leave nothing. Lower it."
            )
        new_a, new_b, share = without_leading(a, b, directions, trained.scales.get(a_name, 1.0))
        a.copy_(new_a), b.copy_(new_b)
        gone += share / len(pairs)
    trained.notes["energy"] = gone
    return vector
