"""The parts of a language-model run: rows, shards, the LoRA task, held-out prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedllm_sec.attacks.threat import Threat
from fedllm_sec.build.loaded import Loaded, data_key, poison_key, probe_key, split_key
from fedllm_sec.build.parts import Parts, Split, poison
from fedllm_sec.data import text
from fedllm_sec.errors import AttackError
from fedllm_sec.evaluation.text import TextEvaluation
from fedllm_sec.models.lora import add_adapter, load_base
from fedllm_sec.recipe.reading import Recipe
from fedllm_sec.rounds.compute import Machine
from fedllm_sec.seeds import seed_for
from fedllm_sec.tasks.causal_lm import CausalLM, Encoded

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel

    from fedllm_sec.recipe.sections import Model

MOST_LABELS = 100  # a label column with more values than this does not hold classes


def text_parts(recipe: Recipe, machine: Machine, threat: Threat | None, split: Split, loaded: Loaded) -> Parts:
    """Data are read, split and poisoned before the model is loaded; what `loaded` holds already is used again."""
    train, test = loaded.get("rows", data_key(recipe), lambda: load_rows(recipe))

    def deal() -> tuple[Dataset, dict[str, Dataset]]:
        root, shares = split(class_numbers(train))
        return train.select(root), {id: train.select(rows) for id, rows in shares.items()}

    root, shards = loaded.get("split", split_key(recipe), deal)
    poisoned = loaded.get("poisoned rows", poison_key(recipe), lambda: poison(recipe.seed, threat, shards, test))
    task = load_task(recipe, machine, loaded)

    def encoded(place: str, key: str, rows: dict[str, Dataset]) -> dict[str, Encoded]:
        key += json.dumps(recipe.model.name)  # whose tokenizer
        return loaded.get(
            place, key, lambda: {id: task.encode(rows, f"{place} of client {id}") for id, rows in rows.items()}
        )

    return Parts(
        task=task,
        shards=encoded("shard", split_key(recipe), shards),
        poisoned=encoded("poisoned shard", poison_key(recipe), poisoned),
        root=task.encode(root, "root rows") if len(root) else None,
        evaluation=loaded.get(
            "evaluation",
            probe_key(recipe) + json.dumps(recipe.model.name),
            lambda: make_evaluation(recipe, task, test, threat),
        ),
    )


def class_numbers(train: Dataset) -> np.ndarray:
    """Each row's class, by which shards are drawn: its label, or its answer where answers are few."""
    if len(set(train["label"])) <= 1 < len(set(train["response"])) <= MOST_LABELS:
        return text.numbers(train["response"])
    return text.numbers(train["label"])


def load_rows(recipe: Recipe) -> tuple[Dataset, Dataset]:
    """Clean training and test rows."""
    data = recipe.data

    def rows(part: str, split: str, wanted: dict[str, str], limit: int | None) -> Dataset:
        table = text.where(text.load_table(data.name, data.config, split, recipe.seed), wanted, f"data.{part}_where")
        clean = text.canonical(
            table,
            data.columns.model_dump(),
            rename=data.rename,
            text_chars=data.text_chars,
            place=f"{data.name} ({split})",
        )
        return text.sample(clean, limit, np.random.default_rng(seed_for(recipe.seed, "rows", part)))

    return (
        rows("train", data.train, data.train_where, data.train_rows),
        rows("test", data.test, data.test_where, data.test_rows),
    )


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
        return CausalLM(adapted, base.tokenizer, recipe.data, machine.device)

    return loaded.get("task", recipe.model_dump_json(include={"task", "model", "data", "seed"}), adapt, keep=1)


def make_evaluation(recipe: Recipe, task: CausalLM, test: Dataset, threat: Threat | None) -> TextEvaluation:
    """Held-out rows for quality, and triggered and clean prompts for the attack."""
    settings = recipe.evaluate
    rng = np.random.default_rng(seed_for(recipe.seed, "evaluation"))
    quality_rows = text.sample(test, settings.rows, rng)
    names = sorted(set(test["label"]))
    classes = len(names) > 1 and len(names) <= MOST_LABELS
    encoded = task.encode(quality_rows, "test rows")
    numbers = {name: k for k, name in enumerate(names)}

    def with_label(rows: Sequence[int], k: int) -> Encoded:
        answer = task.answer_ids(names[k])
        return Encoded([encoded.prompts[i] for i in rows], [answer for _ in rows])

    evaluation = TextEvaluation(
        test=encoded,
        truths=quality_rows["response"],
        labels=names if classes else None,
        classes=torch.tensor([numbers[v] for v in quality_rows["label"]]) if classes else None,
        label_tokens=task.first_label_tokens(names) if classes else None,
        label_answers=with_label,
        answer_rows=settings.answer_rows,
        batch_size=settings.batch_size,
        max_new_tokens=settings.max_new_tokens,
    )
    if threat is not None and threat.data:
        attack = threat.data[0]  # the first is the one whose success is measured
        triggered = text.sample(attack.probe(test), settings.attack_rows, rng)
        innocent = [i for i, row in enumerate(test) if not attack.success(row["response"], row)]
        clean = text.sample(test.select(innocent), settings.attack_rows, rng)
        if len(triggered) == 0 or len(clean) == 0:
            raise AttackError("attack.data.0: the test set has no row on which its success could be measured.")
        evaluation.triggered = task.encode(triggered, "triggered test rows")
        evaluation.clean = task.encode(clean, "clean test rows")
        evaluation.triggered_rows, evaluation.clean_rows = list(triggered), list(clean)
        evaluation.success = attack.success
        _refuse_invisible_trigger(task, test, triggered, evaluation.triggered)
    return evaluation


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
