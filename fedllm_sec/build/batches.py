"""Batches of one row: BatchNorm cannot take them over maps of one value, nor can a model that drops their axis."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from fedllm_sec.data.arrays import subset, to_device
from fedllm_sec.errors import RecipeError, reason
from fedllm_sec.evaluation.arrays import ArrayEvaluation
from fedllm_sec.protocols import Labelled, LocalTraining
from fedllm_sec.rounds.compute import Machine
from fedllm_sec.seeds import generator_for
from fedllm_sec.tasks.classify import Classify

FEW = 5  # clients that a message names


def need_batches(
    task: Classify, shards: Mapping[str, Labelled], training: LocalTraining, machine: Machine, name: str
) -> None:
    """Raise where a client, or the server with its root rows, would train on a single row that the model cannot take.

    A single row comes of a batch size of 1, of a shard of one row, or of a batch that a search, gradient accumulation
    or several processes cut. Where BatchNorm has a last batch of one row join the one before it, that is told.
    """
    held = {id: shard for id, shard in shards.items() if len(shard.y)}
    with as_it_was(task.model):
        if task.normalises:
            _tell_joined({id: len(shard.y) for id, shard in held.items()}, training.batch_size)
        one = to_device(subset(next(iter(held.values())), [0]), task.device)
        task.model.train()
        if not (why := _fails(lambda: task.loss(one, torch.tensor([0])))):
            return
        of_size = {len(shard.y): shard for shard in held.values()}  # batches depend on nothing else
        least = {size: _least(task, shard, training, machine) for size, shard in of_size.items()}
    alone = [id for id, shard in held.items() if least[len(shard.y)] == 1]
    bare = [id for id in alone if len(held[id].y) == 1]
    if not alone:
        return
    if bare:
        cause = f"clients.partition: client {', '.join(bare[:FEW])} has one row ({len(bare)} such)"
        way_out = "Deal more rows to each (clients.total, data.train_rows)"
    elif training.batch_size == 1:
        cause, way_out = "clients.batch_size: 1: a batch has one row", "Raise it to 2 or more"
    else:
        cause = f"clients.batch_size: {training.batch_size}: a part of a batch has one row (client {alone[0]})"
        way_out = "Raise it, or cut batches into fewer parts (compute.gradient_accumulation, processes)"
    raise RecipeError(
        f"{cause}, which model {name} cannot be trained on ({why}). {way_out}, or choose a model with GroupNorm."
    )


def need_whole_batches(machine: Machine) -> None:
    """Raise where this machine does not give one process the gradient of each row of a batch as it is."""
    if machine.placement == "data" and machine.world > 1:
        raise RecipeError(
            f"compute.placement: data: a batch lies in {machine.world} processes, and dp_sgd clips each row's "
            "gradient in one. Set compute.placement: clients, or drop dp_sgd."
        )
    if machine.accelerator.scaler is not None:
        raise RecipeError(
            "compute: losses are scaled in fp16 (accelerate's mixed_precision), and dp_sgd clips gradients as they "
            "are. Use bf16 or no mixed precision, or drop dp_sgd."
        )


def need_evaluation(task: Classify, evaluation: ArrayEvaluation, name: str) -> None:
    """Raise where layers that normalise by the rows at hand would see a single one, which the model cannot take."""
    if task.kept != "batch":
        return
    sized = {name: len(rows.y) for name, rows in evaluation.parts().items()}
    alone = [f"there is 1 {part} row" for part, size in sized.items() if size == 1]
    if evaluation.batch_size == 1:
        alone.insert(0, "evaluate.batch_size is 1")
    with as_it_was(task.model):
        task.model.eval()
        if alone and (why := _fails(lambda: task.score(evaluation.test, [0]))):
            raise RecipeError(
                f"model.buffers: batch: {alone[0]}, and model {name} cannot normalise over one row ({why}). Evaluate "
                "more rows at a time, or set model.buffers: average."
            )


def _tell_joined(sizes: Mapping[str, int], batch: int | None) -> None:
    joined = [id for id, size in sizes.items() if batch is not None and size > batch > 1 and size % batch == 1]
    if joined:
        warnings.warn(
            f"clients.batch_size: {batch}: the last batch of {len(joined)} of {len(sizes)} shards "
            f"({', '.join(joined[:FEW])}{', ...' if len(joined) > FEW else ''}) has one row, over which BatchNorm has "
            "no statistics: it joins the one before it.",
            stacklevel=3,
        )


def _least(task: Classify, shard: Labelled, training: LocalTraining, machine: Machine) -> int:
    """The fewest rows of which a loss is computed at once in an epoch of this shard."""
    batches = task.batches(shard, training.batch_size or len(shard.y), generator_for(0, "batches"))
    smallest = min(batches, key=len)
    return min(machine.fewest(len(drawn.rows)) for drawn in task.draw(shard, smallest))


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Afterwards mode, buffers and torch's generator are what they were."""
    training, held = model.training, [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng(), torch.no_grad():
        try:
            yield
        finally:
            model.train(training)
            for buffer, old in held:
                buffer.copy_(old)


def _fails(call: Callable[[], object]) -> str:
    """Why a call fails; empty where it does not."""
    try:
        call()
    except Exception as error:
        return " ".join(reason(error).split())[:200]
    return ""
