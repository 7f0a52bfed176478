"""The parts of a run that predicts the next character of a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fedllm_sec.attacks.data.labels import LabelFlip
from fedllm_sec.attacks.threat import Threat
from fedllm_sec.build.loaded import Loaded, data_key
from fedllm_sec.build.parts import Parts, Split, make_model, poison
from fedllm_sec.data import arrays, characters
from fedllm_sec.errors import AttackError
from fedllm_sec.evaluation.characters import CharEvaluation
from fedllm_sec.protocols import Labelled
from fedllm_sec.recipe.resolve import did_you_mean
from fedllm_sec.recipe.sections import CharData, Recipe
from fedllm_sec.rounds.compute import Machine
from fedllm_sec.seeds import seed_for
from fedllm_sec.tasks.next_char import NextChar


class CharacterFlip:
    """A label flip on text: the character to be predicted is changed, as {e: a}; the text that is read stays.

    Characters are compared as they are: {e: a, E: A} flips two, and a line end may become a blank.
    """

    def __init__(self, flip: LabelFlip, alphabet: str) -> None:
        unknown = sorted({str(c) for pair in flip.mapping.items() for c in pair} - set(alphabet))
        if unknown:
            raise AttackError(
                f"attack.data.0.mapping: {unknown[0]!r} is not in the text.{did_you_mean(unknown[0], alphabet)}"
            )
        numbers = {alphabet.index(str(a)): alphabet.index(str(b)) for a, b in flip.mapping.items()}
        self.flip = LabelFlip(mapping=numbers, rate=flip.rate)
        self.wanted = torch.full((len(alphabet),), -1)
        for a, b in numbers.items():
            self.wanted[a] = b

    def poison(self, shard: Labelled, rng: torch.Generator) -> Labelled:
        """A sequence counts as poisoned where any of its characters is."""
        flat = replace(shard, y=shard.y.flatten(), poisoned=torch.zeros(shard.y.numel(), dtype=torch.bool))
        changed = self.flip.poison(flat, rng)
        assert isinstance(changed, Labelled)
        marks = shard.poisoned | changed.poisoned.view(shard.y.shape).any(1)
        return replace(shard, y=changed.y.view(shard.y.shape), poisoned=marks)


def refuse_overlap(flips: Sequence[CharacterFlip], alphabet: str) -> None:
    """An error where a later flip would act on a character that an earlier one flips, or has put there."""
    taken: set[int] = set()
    for number, flip in enumerate(flips):
        pairs = flip.flip.mapping
        if both := sorted(taken & set(pairs)):
            raise AttackError(
                f"attack.data.{number}.mapping: {alphabet[both[0]]!r} is flipped, or put in another's place, by an "
                "earlier label_flip, whose work this one would undo. Put all pairs in one mapping."
            )
        taken |= {*pairs, *pairs.values()}


def character_parts(recipe: Recipe, machine: Machine, threat: Threat | None, split: Split, loaded: Loaded) -> Parts:
    """The text is cut, split and poisoned before the model is made."""
    text = loaded.get("rows", data_key(recipe), lambda: load_text(recipe))
    flips: list[Any] = []
    if threat is not None and threat.data:
        flips = [CharacterFlip(flip, text.alphabet) for flip in threat.data]  # type: ignore[arg-type]
        refuse_overlap(flips, text.alphabet)
        threat.data = flips
    root, shares = split(text.speakers)
    shards = {id: arrays.subset(text.train, rows) for id, rows in shares.items()}
    poisoned = poison(recipe.seed, threat, shards)
    rng = np.random.default_rng(seed_for(recipe.seed, "evaluation"))
    test = arrays.sample(text.test, recipe.evaluate.rows, rng)
    attacked = arrays.sample(text.test, recipe.evaluate.attack_rows, rng) if flips else None
    if attacked is not None and not bool((flips[0].wanted[attacked.y] >= 0).any()):
        raise AttackError(
            "attack.data.0: the held-out text has none of the flipped characters, so its success cannot be measured. "
            "Raise evaluate.attack_rows or data.test_share."
        )
    task = loaded.get(
        "task",
        recipe.model_dump_json(include={"task", "model", "data", "seed"}),
        lambda: NextChar(make_model(recipe, (recipe.data.length,), len(text.alphabet)), machine.device),
    )
    move: Callable[[Labelled], Labelled] = lambda rows: arrays.to_device(rows, machine.device)  # noqa: E731
    return Parts(
        task=task,
        shards={id: move(rows) for id, rows in shards.items()},
        poisoned=poisoned.each(move),
        poisoned_share=poisoned.shares,
        root=move(arrays.subset(text.train, root)) if len(root) else None,
        evaluation=CharEvaluation(
            test=move(test),
            batch_size=recipe.evaluate.batch_size,
            attacked=move(attacked) if attacked is not None else None,
            wanted=flips[0].wanted if flips else None,
        ),
    )


def load_text(recipe: Recipe) -> characters.Text:
    """The clean text in sequences, as many of them as the recipe wants."""
    data: CharData = recipe.data
    text = characters.load(data.name, data.length, data.test_share, data.by_speaker, data.encoding)
    keep = np.arange(len(text.train.y))
    if data.train_rows is not None and data.train_rows < len(keep):
        drawn = np.random.default_rng(seed_for(recipe.seed, "rows", "train")).permutation(len(keep))
        keep = np.sort(drawn[: data.train_rows])
    test = arrays.sample(text.test, data.test_rows, np.random.default_rng(seed_for(recipe.seed, "rows", "test")))
    return replace(text, train=arrays.subset(text.train, keep), speakers=text.speakers[keep], test=test)
