"""The parts of a language-model run: rows, shards, the LoRA task, held-out prompts."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedllm_sec.attacks.data.answers import MOST_LABELS, Classes, column, normal, numbered, spellings
from fedllm_sec.attacks.data.text import PROBED, not_clean
from fedllm_sec.attacks.threat import Threat
from fedllm_sec.build.loaded import Loaded, data_key, poison_key, probe_key, split_key
from fedllm_sec.build.parts import Parts, Split, poison
from fedllm_sec.build.selftest import generation_problems, say_unlike, tested
from fedllm_sec.data import text
from fedllm_sec.errors import AttackError, DataError, FedError, RecipeError
from fedllm_sec.evaluation.text import Choices, TextEvaluation
from fedllm_sec.models.lora import add_adapter, load_base, source_of
from fedllm_sec.recipe.sections import Recipe
from fedllm_sec.rounds.compute import Machine
from fedllm_sec.seeds import seed_for
from fedllm_sec.tasks.causal_lm import CausalLM
from fedllm_sec.tasks.encoding import Encoded

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel

    from fedllm_sec.recipe.sections import Model


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
    task = load_task(recipe, machine, loaded)
    say_unlike(task, train)

    def encoded(place: str, key: str, rows: dict[str, Dataset]) -> dict[str, Encoded]:
        key += json.dumps(recipe.model.name)  # whose tokenizer
        return loaded.get(
            place, key, lambda: {id: task.encode(rows, f"{place} of client {id}") for id, rows in rows.items()}
        )

    evaluation = loaded.get(
        "evaluation",
        probe_key(recipe) + json.dumps(recipe.model.name),
        lambda: make_evaluation(recipe, task, train, test, threat),
    )
    if problems := generation_problems(task, evaluation):
        raise RecipeError(problems)
    return Parts(
        task=task,
        shards=encoded("shard", split_key(recipe), shards),
        poisoned=encoded("poisoned shard", poison_key(recipe), poisoned),
        root=task.encode(root, "root rows") if len(root) else None,
        evaluation=evaluation,
        poisoned_share=poisoned.shares,
    )


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


def rows_in_words(recipe: Recipe) -> list[str]:
    """Where training and held-out rows come from and how many there are; a hub set is not loaded for it."""
    data = recipe.data
    try:
        if not data.name.startswith("builtin:") and text.file_of(data.name, data.train) is None:
            return [f"{data.name}, a set of the hub: {data.train} is trained on, {data.test} is held out"]
        drawn = text.split_at_random(data)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            train, test = load_rows(recipe)
    except FedError as error:
        return [f"cannot be read: {error}"]
    share = f"{data.test_share or text.SHARE:.3g}"
    how = f": one table, of whose texts a share of {share}, drawn by the seed, is held out" if drawn else ""
    return [f"{data.name}{how}", f"{len(train):,} training rows, {len(test):,} held-out rows"] + [
        str(warning.message) for warning in said if "is training and test set" not in str(warning.message)
    ]


@dataclass
class Base:
    """A frozen base model, read once; it carries one adapter at a time."""

    model: Any
    tokenizer: Any
    adapted: PeftModel | None = None

    def adapt(self, settings: Model, seed: int) -> PeftModel:
        """The model with a fresh adapter; the adapter it had is taken off, and with it the task that used it."""
        if self.adapted is not None:
            self.model, self.adapted = self.adapted.unload(), None
        self.adapted = add_adapter(self.model, settings, seed)
        return self.adapted


def load_task(recipe: Recipe, machine: Machine, loaded: Loaded | None = None) -> CausalLM:
    """The base model with a fresh adapter, whose weights depend on the seed; runs of equal settings share it."""
    loaded = loaded if loaded is not None else Loaded()

    def read() -> Base:
        base, tokenizer = load_base(recipe.model, machine.device)
        return Base(machine.shard(base), tokenizer)

    def adapt() -> CausalLM:
        base = loaded.get("base", recipe.model.model_dump_json(exclude={"lora"}), read, keep=1)
        adapted: Any = base.adapt(recipe.model, seed_for(recipe.seed, "adapter") % 2**31)
        if not recipe.model.load_in_4bit:
            adapted = adapted.to(machine.device)
        made = CausalLM(adapted, base.tokenizer, recipe.data, machine.device)
        tested(made, recipe)
        return made

    whole, part = dict.fromkeys(("task", "model", "data", "seed"), True), {"batch_size"}  # of which the self-test asks
    return loaded.get(
        "task", recipe.model_dump_json(include={**whole, "clients": part, "evaluate": part}), adapt, keep=1
    )


def make_evaluation(
    recipe: Recipe, task: CausalLM, train: Dataset, test: Dataset, threat: Threat | None
) -> TextEvaluation:
    """Held-out rows for quality, and triggered and clean prompts for the attack; there may be no clean ones."""
    settings = recipe.evaluate
    rng = np.random.default_rng(seed_for(recipe.seed, "evaluation"))
    quality_rows = text.sample(test, settings.rows, rng)
    evaluation = TextEvaluation(
        test=task.encode(quality_rows, "test rows"),
        truths=column(quality_rows, "response"),
        answer_rows=settings.answer_rows,
        batch_size=settings.batch_size,
        max_new_tokens=settings.max_new_tokens,
    )
    classes = Classes.of(train, test)
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
    if threat is not None and threat.data:
        attack = threat.data[0]  # the first is the one whose success is measured
        triggered = text.sample(attack.probe(test), settings.attack_rows, rng)
        if len(triggered) == 0:
            raise AttackError("attack.data.0: the test set has no row on which its success could be measured.")
        why = not_clean(attack, test)
        clean = text.sample(
            test.select([i for i, reason in enumerate(why) if reason is None]), settings.attack_rows, rng
        )
        counts = Counter(reason for reason in why if reason is not None)
        evaluation.left_out = {reason: n for reason, n in counts.items() if reason != PROBED}
        evaluation.triggered = task.encode(triggered, "triggered test rows")
        evaluation.triggered_rows, evaluation.clean_rows = list(triggered), list(clean)
        evaluation.success = attack.success
        if len(clean):
            evaluation.clean = task.encode(clean, "clean test rows")
        else:
            of_them = ", ".join(f"{n} {reason}" for reason, n in counts.items())
            evaluation.reasons["false_trigger"] = f"no held-out row is clean: {of_them}"
        _refuse_invisible_trigger(task, test, triggered, evaluation.triggered)
        _refuse_cut_answers(task, attack, evaluation.triggered_rows, classes, settings.max_new_tokens)
    return evaluation


def choices(task: CausalLM, classes: Classes, order: Sequence[str], rows: Encoded) -> Choices:
    """The answers that go with the classes, and `rows` answered with them."""
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
        answered=lambda which, said: Encoded([rows.prompts[i] for i in which], [ids[k] for k in said]),
    )


def _refuse_cut_answers(
    task: CausalLM, attack: Any, triggered: Sequence[dict[str, Any]], classes: Classes, most: int
) -> None:
    """Greedy answers of at most `most` tokens must be able to succeed, and to differ from those that do not."""
    row = triggered[0]
    wanted = {row["response"]: row for row in triggered}
    others = [a for found in classes.answers.values() for a in found.values() if not attack.success(a, row)]
    for answer, ids in zip([*wanted, *others], task.answer_ids([*wanted, *others]), strict=True):
        own = wanted.get(answer, row)

        def succeeds(count: int, own: Any = own, ids: Sequence[int] = ids) -> bool:
            return bool(attack.success(task.decode(ids[:count]), own))

        right = answer in wanted
        if succeeds(most) == right:
            continue
        needed = next((k for k in range(most + 1, len(ids) + 1) if succeeds(k) == right), None)
        if needed is None:
            raise AttackError(
                f"attack.data.0: the answer {answer!r} reads as {task.decode(ids)!r} in this model's tokens, which is "
                f"{'no' if right else 'a'} success. Choose another target or model."
            )
        raise AttackError(
            f"attack.data.0: the answer {answer!r} has {len(ids)} tokens with its end token, and "
            f"evaluate.max_new_tokens={most} cuts it to {task.decode(ids[:most])!r}, which is "
            f"{'no' if right else 'a'} success. Raise evaluate.max_new_tokens to {needed}."
        )


def _refuse_invisible_trigger(task: CausalLM, test: Dataset, triggered: Dataset, encoded: Encoded) -> None:
    """A trigger that leaves the tokens as they were is a silent no-op."""
    originals = set(test["text"])
    changed = [i for i, value in enumerate(triggered["text"]) if value not in originals]
    if not changed:
        return
    clean_tokens = {tuple(prompt) for prompt in task.encode(test, "test rows").prompts}
    same = [i for i in changed if tuple(encoded.prompts[i]) in clean_tokens]
    if same:
        raise AttackError(
            f"attack.data.0: the trigger changes the text but not its tokens in {len(same)} of {len(changed)} test "
            f"prompts, first {triggered[same[0]]['text'][-40:]!r}: this tokenizer drops it. Choose another trigger."
        )
