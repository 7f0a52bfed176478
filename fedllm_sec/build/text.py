"""The parts of a run on texts: rows, shards, the task of the language model or classifier, held-out prompts."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedllm_sec.attacks.data.answers import MOST_LABELS, Classes, column, normal, numbered, spellings
from fedllm_sec.attacks.threat import Threat
from fedllm_sec.build.judging import probes
from fedllm_sec.build.language_model import load_task
from fedllm_sec.build.loaded import Loaded, data_key, poison_key, probe_key, split_key
from fedllm_sec.build.parts import Parts, Split, poison
from fedllm_sec.build.selftest import generation_problems, need_known_answers, say_ended, say_unlike
from fedllm_sec.build.text_classifier import load_text_classifier
from fedllm_sec.build.threat import client_ids
from fedllm_sec.data import canaries, sources, text
from fedllm_sec.errors import DataError, FedError, RecipeError
from fedllm_sec.evaluation.text import Choices, TextEvaluation
from fedllm_sec.models.lora import source_of
from fedllm_sec.recipe.sections import Recipe
from fedllm_sec.rounds.compute import Machine
from fedllm_sec.seeds import seed_for
from fedllm_sec.tasks.causal_lm import CausalLM
from fedllm_sec.tasks.classify_text import ClassifyText
from fedllm_sec.tasks.encoding import Encoded
from fedllm_sec.tasks.fitting import Fitted

if TYPE_CHECKING:
    from datasets import Dataset


def text_parts(recipe: Recipe, machine: Machine, threat: Threat | None, split: Split, loaded: Loaded) -> Parts:
    """Data are read, split and poisoned before the model is loaded; what `loaded` holds already is used again.

    What is kept depends on the settings in its key alone. A check of the attackers is made in `poison`, whose key names
    them, or outside of what is kept: an attack-free variant that ran before in the process makes none of them.
    """
    source_of(recipe.model.name)  # a name that leads nowhere is said before data are read
    train, test = loaded.get("rows", data_key(recipe), lambda: load_rows(recipe))

    def deal() -> tuple[Dataset, dict[str, Dataset]]:
        root, shares = split(class_numbers(train))
        shards = {id: train.select(rows) for id, rows in shares.items()}
        if (secret := recipe.data.canaries) is not None:
            owner = client_ids(recipe)[secret.client]
            shards[owner] = canaries.planted(shards[owner], secret, recipe.seed)
        twice = text.overlap(train.select(root), train.select(np.concatenate(list(shares.values()))))
        if twice:
            warnings.warn(
                f"defense.root_rows: {twice} of {len(root)} root rows are rows of clients too.",
                stacklevel=2,
            )
        return train.select(root), shards

    root, shards = loaded.get("split", split_key(recipe), deal)
    for attack in threat.data if threat is not None else ():
        if hasattr(attack, "prepare"):
            attack.prepare(train, test)
    poisoned = loaded.get("poisoned rows", poison_key(recipe), lambda: poison(recipe.seed, threat, shards, test))
    task: Any
    if recipe.task == "causal_lm":
        task = load_task(recipe, machine, loaded)
        need_known_answers(task, train)
        say_unlike(task, train)
    else:
        task = load_text_classifier(recipe, machine, loaded, train)

    def every() -> Iterable[Dataset]:
        return [train, *poisoned.values(), test]

    def fitted(place: str, key: str, rows: dict[str, Dataset]) -> dict[str, Fitted]:
        key += json.dumps(recipe.model.name)  # whose tokenizer
        return loaded.get(
            place,
            key,
            lambda: {id: task.fit(rows, f"{place} of client {id}", others=every) for id, rows in rows.items()},
        )

    own, changed = fitted("shard", split_key(recipe), shards), fitted("poisoned shard", poison_key(recipe), poisoned)
    if recipe.task == "causal_lm":
        say_ended(task, [answer for of in own.values() for answer in of.encoded.answers])
    evaluation = loaded.get(
        "evaluation",
        probe_key(recipe) + json.dumps(recipe.model.name),
        lambda: make_evaluation(recipe, task, train, test, threat),
    )
    if problems := generation_problems(task, evaluation):
        raise RecipeError(problems)
    return Parts(
        task=task,
        shards={id: rows.encoded for id, rows in own.items()},
        poisoned={id: rows.encoded for id, rows in changed.items()},
        root=task.encode(root, "root rows") if len(root) else None,
        evaluation=evaluation,
        poisoned_share=poisoned.shares,
        too_long=_too_long(recipe, own, changed, evaluation),
    )


def _too_long(
    recipe: Recipe, own: dict[str, Fitted], changed: dict[str, Fitted], evaluation: TextEvaluation
) -> dict[str, Any] | None:
    """How many rows did not fit into data.max_length, which is also said; None where all did."""
    parts = {"training": own.values(), "poisoned training": changed.values(), "held-out": [evaluation.fitted]}
    told = {
        part: {"rows": sum(len(f.kept) + f.dropped for f in found), "cut": cut, "dropped": dropped}
        for part, found in parts.items()
        if (cut := sum(f.cut for f in found)) + (dropped := sum(f.dropped for f in found))
    }
    if not told:
        return None
    said = [f"{c['cut']} cut and {c['dropped']} dropped of {c['rows']} {part} rows" for part, c in told.items()]
    warnings.warn(
        f"data.max_length: {recipe.data.max_length} tokens, data.too_long: {recipe.data.too_long}: {', '.join(said)}.",
        stacklevel=2,
    )
    return told


def class_numbers(train: Dataset) -> np.ndarray:
    """Each row's class, by which shards are drawn: its label, or its answer where answers are few."""
    values = column(train, "label")
    if len(set(values)) <= 1 < len(spellings(answers := column(train, "response"))) <= MOST_LABELS:
        values = answers
    names = spellings(values)  # "Sports" and "sports " are one class
    return text.numbers([names.get(normal(value), "") for value in values])


def load_rows(recipe: Recipe) -> tuple[Dataset, Dataset]:
    """Clean training and test rows; how many rows are in both is said, and all of them are an error."""
    data = recipe.data

    def some(rows: Dataset, part: str, limit: int | None) -> Dataset:
        return text.sample(rows, limit, np.random.default_rng(seed_for(recipe.seed, "rows", part)))

    clean, held = text.load_rows(data, recipe.seed)
    train, test = some(clean, "train", data.train_rows), some(held, "test", data.test_rows)
    both = text.overlap(test, train)
    if both == len(test):
        raise DataError(
            f"data: {data.name}: all {both} test rows are training rows too, so nothing is held out. Name other rows "
            "with data.test or data.test_where."
        )
    if both:
        warnings.warn(
            f"data: {data.name}: {both} of {len(test)} test rows are training rows too: what is measured on those is "
            "not held out.",
            stacklevel=2,
        )
    return train, test


def rows_in_words(recipe: Recipe) -> tuple[list[str], Dataset | None]:
    """Where training and held-out rows come from and how many there are, and the training rows where they can be read.

    A hub set is not loaded for it.
    """
    data = recipe.data
    try:
        if not data.name.startswith("builtin:") and sources.file_of(data.name, data.train) is None:
            return [f"{data.name}, a set of the hub: {data.train} is trained on, {data.test} is held out"], None
        drawn = text.split_at_random(data)
        found = text.format_of(data, recipe.seed)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            train, test = load_rows(recipe)
    except FedError as error:
        return [f"cannot be read: {error}"], None
    share = f"{data.test_share or text.SHARE:.3g}"
    how = f": one table, of whose texts a share of {share}, drawn by the seed, is held out" if drawn else ""
    by = "as data.format says" if data.format is not None else "found by the columns"
    of_columns = [f"format: {found}, {by}"] if recipe.task == "causal_lm" else []
    rows = f"{len(train):,} training rows, {len(test):,} held-out rows"
    more = [str(warning.message) for warning in said if "is training and test set" not in str(warning.message)]
    return [f"{data.name}{how}", *of_columns, rows, *more], train


def make_evaluation(
    recipe: Recipe, task: CausalLM | ClassifyText, train: Dataset, test: Dataset, threat: Threat | None
) -> TextEvaluation:
    """Held-out rows for quality, and triggered and clean prompts for the attack; there may be no clean ones."""
    settings = recipe.evaluate
    rng = np.random.default_rng(seed_for(recipe.seed, "evaluation"))
    whole = task.fit(test, "test rows")
    numbers = text.drawn(len(whole.rows), settings.rows, rng)
    quality_rows = whole.rows.select(numbers)
    evaluation = TextEvaluation(
        fitted=whole,
        test=whole.encoded.select(numbers),
        truths=column(quality_rows, "response"),
        answer_rows=settings.answer_rows,
        batch_size=settings.batch_size,
        max_new_tokens=settings.max_new_tokens,
        test_rows=list(quality_rows),
        draws=settings.draws,
        temperature=settings.temperature,
        seed=recipe.seed,
        transcripts=settings.transcripts,
    )
    classes = Classes.of(train, whole.rows)
    order = sorted(classes.labels)
    if classes.labelled and classes.named != "nothing" and len(order) > 1:
        evaluation.labels = [classes.labels[name] for name in order]
        labelled = [own if label.strip() else None for own, label in
                    zip(classes.of_rows(quality_rows), column(quality_rows, "label"), strict=True)]  # fmt: skip
        evaluation.classes = torch.tensor(numbered(labelled, order))
        if classes.named == "answer":
            evaluation.choices = choices(task, classes, order, evaluation.test)
        else:
            evaluation.read = lambda answer: numbered([classes.said(answer)], order)[0]
    evaluation.attacks = probes(recipe, task, whole, classes, threat, rng)
    return evaluation


def choices(task: CausalLM | ClassifyText, classes: Classes, order: Sequence[str], rows: Encoded) -> Choices:
    """The answers that go with the classes; `rows` are those that are asked."""
    answers = [(k, answer) for k, name in enumerate(order) for answer in classes.answers.get(name, {}).values()]
    ids = task.answer_ids([answer for _, answer in answers])
    said: dict[tuple[int, ...], int] = {}
    for k, (number, answer) in enumerate(answers):
        if answers[twin := said.setdefault(tuple(ids[k]), k)][0] != number:
            raise RecipeError(
                f"data: the answers {answers[twin][1]!r} and {answer!r} of two classes are the same tokens of this "
                "model, so none can be told from the other. Write them otherwise with data.rename, or choose another "
                "model."
            )
    numbers = {tuple(answer): k for k, answer in enumerate(ids)}
    return Choices(
        classes=torch.tensor([k for k, _ in answers]),
        first=torch.tensor([answer[0] for answer in ids]),
        own=torch.tensor([numbers.get(tuple(answer), -1) for answer in rows.answers]),
        answers=ids,
        single=all(len(answer) == 1 for answer in ids),
    )
