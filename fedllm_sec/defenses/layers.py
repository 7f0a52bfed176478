"""A defense that decides layer by layer: another choice of clients for every pair of adapter factors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedllm_sec.defenses.pipeline import Pipeline, drawing, drawn_seed
from fedllm_sec.defenses.space import Space
from fedllm_sec.matrix import Layout, UpdateMatrix
from fedllm_sec.matrix.factors import Products
from fedllm_sec.protocols import After, Before, Decision, Defense, RoundContext

BESIDE = "beside"  # the name of what no pair of factors holds


class LayerByLayer(Pipeline):
    """The same stages and the same rule for each adapted layer by itself, and for what stands beside the factors.

    Each layer has a memory of its own. A client is kept that is kept in some layer, a score is the mean over layers,
    and there are no row weights: each layer has others.
    """

    def __init__(
        self, before: Sequence[Before], rule: Defense, after: Sequence[After] = (), enter: Space | None = None
    ) -> None:
        super().__init__(before, rule, after, enter)
        self.spent.rows, self.spent.why = None, "each layer has a defense of its own"
        self.fresh = copy.deepcopy((self.before, rule))
        self.layers: dict[str, Pipeline] = {}

    def decide(self, updates: UpdateMatrix, ctx: RoundContext) -> Decision:
        update, seed, made = torch.zeros(updates.d), drawn_seed(ctx), list[Decision]()
        for name, places in layers_of(updates.layout):
            if name not in self.layers:
                before, rule = copy.deepcopy(self.fresh)
                self.layers[name] = Pipeline(before, rule, (), self.enter)
            rows, cut = cut_out(updates, places)
            own = drawing(ctx, seed, name)
            layer = self.layers[name]
            layer.enter = self.enter if name != BESIDE else None
            own = replace(own, layout=rows.layout, notes={}, last_update=_if(cut, own.last_update))
            own = replace(own, global_vector=cut(own.global_vector), root_update=_if(cut, own.root_update))
            decision = layer.decide(rows, own)
            start = 0
            for place in places:
                width = place.stop - place.start
                update[place] = decision.update[start : start + width].to(update)
                start += width
            made.append(decision)
        self._made = update, updates.n
        return Decision(update, None, _any([d.kept for d in made]), _mean([d.scores for d in made]), _means(made))

    def state_dict(self) -> dict[str, Any]:
        return {"whole": super().state_dict(), "layers": {name: p.state_dict() for name, p in self.layers.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state["whole"])
        for name, known in state["layers"].items():
            before, rule = copy.deepcopy(self.fresh)
            self.layers[name] = Pipeline(before, rule, (), self.enter)
            self.layers[name].load_state_dict(known)


def layers_of(layout: Layout) -> Iterator[tuple[str, tuple[slice, ...]]]:
    """The places of the two factors of each adapted layer, and of all that stands beside them."""
    products = Products.of(layout, torch.zeros(layout.size))
    for pair in products.pairs:
        yield pair.name, (pair.a, pair.b) if pair.a.start < pair.b.start else (pair.b, pair.a)
    if products.plain:
        yield BESIDE, products.plain


def cut_out(updates: UpdateMatrix, places: Sequence[slice]) -> tuple[UpdateMatrix, Callable[[Tensor], Tensor]]:
    """The rows in some places alone, copied, and what does the same to a vector (d,)."""
    chosen = [
        (name, shape)
        for (name, place), shape in zip(updates.layout.slices().items(), updates.layout.shapes, strict=True)
        if place in places
    ]
    layout = Layout(tuple(name for name, _ in chosen), tuple(shape for _, shape in chosen))

    def cut(vector: Tensor) -> Tensor:
        return torch.cat([vector[..., place] for place in places], -1)

    return replace(updates, rows=cut(updates.rows), layout=layout, file=None), cut


def _if(cut: Callable[[Tensor], Tensor], vector: Tensor | None) -> Tensor | None:
    return None if vector is None else cut(vector)


def _any(masks: Sequence[Tensor | None]) -> Tensor | None:
    known = [mask for mask in masks if mask is not None]
    return torch.stack(known).any(0) if known else None


def _mean(scores: Sequence[Tensor | None]) -> Tensor | None:
    known = [score for score in scores if score is not None]
    return torch.stack(known).mean(0) if known else None


def _means(made: Sequence[Decision]) -> dict[str, float]:
    """Each note as its mean over the layers that have it."""
    notes = {key for decision in made for key in decision.notes}
    return {key: sum(v) / len(v) for key in sorted(notes) if (v := [d.notes[key] for d in made if key in d.notes])}
