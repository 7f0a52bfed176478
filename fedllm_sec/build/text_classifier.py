"""The task of a run that classifies texts: its classes, its model, and the model's self-test on two short rows."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from fedllm_sec.attacks.data.answers import MOST_LABELS, Classes
from fedllm_sec.build.language_model import need_whole
from fedllm_sec.build.loaded import Loaded
from fedllm_sec.build.selftest import TWO, in_evaluation, left_to_the_run
from fedllm_sec.data.text import as_dataset
from fedllm_sec.errors import DataError, FedError, RecipeError
from fedllm_sec.models import selftest
from fedllm_sec.models.lora import add_adapter, base_of
from fedllm_sec.models.text_classifier import load_classifier, positions
from fedllm_sec.recipe.sections import Recipe
from fedllm_sec.rounds.compute import Machine
from fedllm_sec.seeds import seed_for
from fedllm_sec.tasks.classify_text import ClassifyText, Texts

if TYPE_CHECKING:
    from datasets import Dataset


def names_of(train: Dataset) -> list[str]:
    """The classes of the training rows in the order of the model's outputs: sorted, each as most rows spell it."""
    classes = Classes.of(train)
    if not classes.labels:
        raise DataError(
            f"data.columns.label: more than {MOST_LABELS} different labels, so the column holds no classes that the "
            "attacks and the measures could tell. Name another column, or choose rows with data.train_where."
        )
    if len(classes.labels) == 1:
        raise DataError(
            f"data.columns.label: all training rows are {next(iter(classes.labels.values()))!r}, and there is nothing "
            "to tell apart. Name another column, or choose other rows."
        )
    return [classes.labels[name] for name in sorted(classes.labels)]


def load_text_classifier(recipe: Recipe, machine: Machine, loaded: Loaded, train: Dataset) -> ClassifyText:
    """The model with a fresh output layer and adapter, both drawn by the seed; runs of equal settings share it."""
    need_whole(recipe, machine)
    whole, part = dict.fromkeys(("task", "model", "data", "seed"), True), {"batch_size"}  # of which the self-test asks
    key = recipe.model_dump_json(include={**whole, "clients": part, "evaluate": part})
    return loaded.get("task", key, lambda: made(recipe, machine.device, names_of(train)), keep=1)


def made(recipe: Recipe, device: torch.device, names: Sequence[str]) -> ClassifyText:
    """The task of a recipe whose training rows have these classes, tried on two short rows."""
    model, data = recipe.model, recipe.data
    base, tokenizer, output = load_classifier(model, names, seed_for(recipe.seed, "output") % 2**31, device)
    adapted = add_adapter(base, model, seed_for(recipe.seed, "adapter") % 2**31, output).to(device)
    task = ClassifyText(adapted, tokenizer, names, device, max_length=data.max_length, too_long=data.too_long)
    tested(task, recipe)
    return task


def tested(task: ClassifyText, recipe: Recipe) -> list[str]:
    """What two short rows show of the model, a line for each test; a RecipeError says what cannot be right.

    Neither a parameter, nor a gradient, nor a random number, nor the mode of a layer is changed.
    """
    base, tokenizer, most = base_of(task.model), task.tokenizer, positions(base_of(task.model))
    known = getattr(base.get_input_embeddings(), "num_embeddings", base.config.vocab_size)
    problems = selftest.token_problems(tokenizer, known)
    if most is not None and recipe.data.max_length > most:
        problems.append(
            f"data.max_length: {recipe.data.max_length}: this model reads {most} tokens. Lower it to {most}, or choose "
            "another model."
        )
    if problems:  # the model would read beyond what it has
        raise RecipeError(problems)
    rows = task.tokens(as_dataset({**TWO, "response": [task.names[0], task.names[-1]]}))
    rows = replace(rows, prompts=[ids[: recipe.data.max_length] for ids in rows.prompts],
                   types=[ids[: recipe.data.max_length] for ids in rows.types])  # fmt: skip
    found = in_evaluation(task.model, recipe, lambda: _run(task, rows, recipe))
    classes = ", ".join(task.names[:5]) + (", ..." if len(task.names) > 5 else "")
    return [
        f"data.max_length {recipe.data.max_length} of {most or 'any number of'} positions",
        f"{len(task.names)} classes: {classes}",
        "of a text and its context it is told which tokens are whose" if task.writer.typed else
        "text and context are read as one text: the model has no token types",
        *found,
    ]  # fmt: skip


def _run(task: ClassifyText, rows: Texts, recipe: Recipe) -> tuple[list[str], list[str]]:
    """What running the model on the rows shows, and what is wrong with it."""
    both = range(len(rows))
    short = min(both, key=lambda i: rows.lengths[i])
    with torch.no_grad():
        together = task.logits(task.collate(rows, both))
        alone = task.logits(task.collate(rows, [short]))[0]
    if tuple(together.shape) != (len(rows), len(task.names)):
        return [], [f"model.name: gives logits of shape {tuple(together.shape)}, must be (2, {len(task.names)})."]
    bound = selftest.ALIKE[getattr(torch, recipe.model.dtype)]
    gap = float((together[short].log_softmax(-1) - alone.log_softmax(-1)).abs().mean())
    trained = {name: p for name, p in task.model.named_parameters() if p.requires_grad}
    length, unused = selftest.gradient(task.loss(rows, both), trained)
    if not all(math.isfinite(number) for number in (gap, length)):
        return [], ["model.name: on two short rows logits or gradient are not finite. Choose another, or a dtype."]
    if length > 0 and (words := selftest.unused_words(unused, len(trained))):
        warnings.warn(words, stacklevel=2)
    single = recipe.clients.batch_size == recipe.evaluate.batch_size == 1
    found = [
        f"a row of a padded batch scores {gap:.2g} nats apart from alone "
        + ("(every batch is one row)" if single else f"(at most {bound:g}, on average)"),
        f"the {'adapter' if recipe.model.lora is not None else 'model'}'s gradient has length {length:.3g}",
    ]
    return found, selftest.gradient_problems(length) + ([] if single else selftest.padding_problems(gap, bound))


def in_words(recipe: Recipe, train: Dataset) -> list[str]:
    """What the self-test finds, for `--explain`; a model that is large or not in a folder here is left to the run."""
    try:
        if (why := left_to_the_run(recipe)) is not None:
            return [why]
        return tested(made(recipe, torch.device("cpu"), names_of(train)), recipe)
    except FedError as error:
        return [f"will be refused: {error}"]
