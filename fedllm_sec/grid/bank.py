"""Adapters of one base, clean and backdoored, and the bank that `fedllm-sec scan` compares one adapter with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fedllm_sec.api.scan import Bank, weights_hash
from fedllm_sec.defenses.spectrum import spectral_features, spectral_scan
from fedllm_sec.errors import RecipeError
from fedllm_sec.matrix import Layout
from fedllm_sec.matrix.factors import product_pairs
from fedllm_sec.recipe.sections import Recipe
from fedllm_sec.train import load

FOLDS = 5  # parts of the seeds, each judged by a model of the others


@dataclass(frozen=True)
class Made:
    """One adapter, as one client trained it from the start."""

    seed: int
    variant: str
    backdoored: bool
    vector: Tensor  # (d,) its parameters
    federation: Any  # that it was trained in, to measure it with


def pairs_of(vector: Tensor, layout: Layout) -> list[tuple[Tensor, Tensor]]:
    """The factors (A, B) of an adapter's vector (d,)."""
    parts = layout.split(vector)
    return [(parts[a], parts[b]) for a, b in product_pairs(layout)]


def scales_of(task: Any) -> list[float]:
    """alpha / r of each of them."""
    return [task.scales.get(a, 1.0) for a, _ in product_pairs(task.layout)]


def as_saved(layout: Layout) -> dict[str, tuple[int, ...]]:
    """The shapes by the names that the saved adapter's tensors have, pairs in the layout's order."""
    shapes = dict(zip(layout.names, layout.shapes, strict=True))
    return {name.replace(".default", ""): shapes[name] for pair in product_pairs(layout) for name in pair}


def federations(path: Path, overrides: Sequence[str], seeds: Iterable[int]) -> Iterator[tuple[int, str, Any]]:
    """(seed, variant, federation) of the recipe, seed after seed; the variants take turns: an attack each."""
    from fedllm_sec.build.federation import assemble
    from fedllm_sec.build.loaded import Loaded
    from fedllm_sec.build.running import make_machine

    loaded, machine = Loaded(), None
    for seed in seeds:
        plans = load(path, [*overrides, f"seed={seed}"])
        variant = list(plans)[seed % len(plans)]
        plan = plans[variant]
        need_one_round(plan.recipe)
        if machine is None:
            machine = make_machine(plan.recipe, Path(plan.recipe.output.folder))
        yield seed, variant, assemble(plan, machine, loaded)


def trained(path: Path, overrides: Sequence[str], seeds: Iterable[int]) -> Iterator[Made]:
    """What each client of the recipe makes of the base in one round of its own training, seed after seed.

    A malicious client trains on its poisoned shard under the attack's local rules, the others on their clean shards.
    Adapter, shards and rows follow from the seed.
    """
    from fedllm_sec.rounds.client import make_optimizer
    from fedllm_sec.rounds.federation import train_client

    for seed, variant, made in federations(path, overrides, seeds):
        if len(product_pairs(made.task.layout)) * 2 != len(made.task.layout.names):
            raise RecipeError("model.lora: trains more than the two factors of products, of which no bank is made.")
        optimizer = make_optimizer(made.task, made.training)
        for client in made.clients:
            dressed = made.threat.dress(client, 1)
            done = train_client(made, dressed, made.vector, optimizer, (), None, 1, 1)
            yield Made(seed, variant, client.id in made.threat.malicious, made.vector + done.delta, made)


def need_one_round(recipe: Recipe) -> None:
    """An error where a recipe does not say how one client trains an adapter under an attack on its data."""
    if recipe.task != "causal_lm" or recipe.model.lora is None:
        raise RecipeError("scan: a bank is made of adapters of language models: set task: causal_lm and model.lora.")
    if not recipe.enable_attack or recipe.attack is None or not recipe.attack.data:
        raise RecipeError("scan: a bank needs backdoored adapters: set enable_attack and attack.data in every variant.")
    if recipe.attack.update or recipe.rounds != 1 or recipe.model.lora.average != "factors":
        raise RecipeError(
            "scan: an adapter of a bank is what one client trains by itself: set rounds: 1 and average: factors, and "
            "leave attack.update out."
        )


def calibrated(path: Path, overrides: Sequence[str], seeds: Sequence[int], rate: float = 0.05) -> Bank:
    """The bank of a recipe; every seed gives the adapters of its clients. The same command gives the same bank."""
    rows, bad, groups, last = [], [], [], None
    for made in trained(path, overrides, seeds):
        rows.append(
            spectral_features(pairs_of(made.vector, made.federation.task.layout), scales_of(made.federation.task))
        )
        bad.append(made.backdoored)
        groups.append(made.seed)
        last = made.federation
    assert last is not None
    recipe = next(iter(load(path, overrides).values())).recipe
    given = " ".join([path.name, *overrides])
    return of_features(
        np.stack(rows), np.array(bad), np.array(groups), rate=rate, base=recipe.model.name,
        sha256=weights_hash(recipe.model.name, recipe.model.revision), shapes=as_saved(last.task.layout),
        made_of=f"{given}, seeds {seeds[0]} to {seeds[-1]}",
    )  # fmt: skip


def of_features(
    features: np.ndarray, backdoored: np.ndarray, groups: np.ndarray, *, rate: float, base: str, sha256: str,
    shapes: dict[str, tuple[int, ...]], made_of: str,
) -> Bank:  # fmt: skip
    """The bank of features (n, k); adapters of one group (seed) share their start and are left out together.

    The threshold is 0.5, or more where else more than `rate` of the clean ones lie above it, each judged by a model
    that was fitted without its fifth of the seeds.
    """
    fold = np.unique(groups, return_inverse=True)[1] % FOLDS
    apart = np.empty(len(features))
    for number in range(FOLDS):
        left = fold == number
        apart[left] = spectral_scan(features[~left], backdoored[~left]).probability(features[left])
    clean = np.sort(apart[~backdoored])[::-1]
    threshold = max(0.5, float(clean[int(rate * len(clean))]))
    scanner = spectral_scan(features, backdoored)
    return Bank(
        base=base, sha256=sha256, shapes=shapes, scanner=scanner, threshold=min(threshold, 1 - 1e-9),
        clean=int((~backdoored).sum()), backdoored=int(backdoored.sum()),
        false_positives=int((apart[~backdoored] > threshold).sum()), found=int((apart[backdoored] > threshold).sum()),
        reach=float(np.abs(scanner.deviations(features)).mean(1).max()), made_of=made_of,
    )  # fmt: skip
