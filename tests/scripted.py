"""Models that answer by script, under the real tasks: what they say is known, so every rate can be counted by hand."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from fedllm_sec.protocols import Labelled

MARK = ">>"  # ends every prompt, so that the answer's beginning can be found
END, PAD = 0, 1
SIZE = 1024  # of the vocabulary
NEVER = 1e-9  # probability of an answer that the script does not name


class Words:
    """A tokenizer with one token for each word, with the blank before it; it learns words as it meets them."""

    eos_token_id, pad_token_id, bos_token_id, unk_token_id, name_or_path = END, PAD, None, None, "words"

    def __init__(self) -> None:
        self.words = ["", ""]
        self.numbers: dict[str, int] = {}

    def __call__(self, texts: list[str], add_special_tokens: bool = True) -> dict[str, list[list[int]]]:
        return {"input_ids": [self.ids(text) for text in texts]}

    def ids(self, text: str) -> list[int]:
        found = re.findall(rf"{MARK}| ?[^\s>]+| ", text)
        assert "".join(found) == text, f"{text!r} has more than words and single blanks"
        for word in found:
            if word not in self.numbers:
                self.numbers[word] = len(self.words)
                self.words.append(word)
        assert len(self.words) <= SIZE
        return [self.numbers[word] for word in found]

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(self.words[i] for i in ids)


class Talker(torch.nn.Module):
    """A language model with a script: prompt -> whole answers with their probabilities, which add up to 1 at most.

    The next word after the beginning of an answer has the probability of all answers that go on with it.
    """

    generation_config = None
    config = PreTrainedConfig()

    def __init__(self, words: Words) -> None:
        super().__init__()
        self.adapter = torch.nn.Parameter(torch.zeros(1))
        self.words = words
        self.script: Callable[[str], Mapping[str, float]] = lambda prompt: {}

    def get_base_model(self) -> Talker:
        return self

    def answers(self, prompt: str) -> list[tuple[list[int], float]]:
        """Tokens of the whole answers, as `data.answer` writes them, and their probabilities."""
        said = self.script(prompt).items()
        return [([*(self.words.ids(f" {answer}") if answer else []), END], chance) for answer, chance in said]

    def forward(self, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, **_: Any) -> SimpleNamespace:
        logits = torch.full((len(input_ids), logits_to_keep, SIZE), math.log(NEVER))
        mark = self.words.ids(MARK)[0]
        for row, (ids, mask) in enumerate(zip(input_ids.tolist(), attention_mask.tolist(), strict=True)):
            tokens = ids[mask.index(1) :]
            start = tokens.index(mark) + 1
            answers = self.answers(self.words.decode(tokens[:start]))
            for back in range(min(logits_to_keep, len(tokens) - start + 1)):
                for word, chance in next_words(answers, tokens[start : len(tokens) - back]).items():
                    logits[row, logits_to_keep - 1 - back, word] = math.log(chance)
        return SimpleNamespace(logits=logits)

    def generate(self, input_ids: Tensor, attention_mask: Tensor, generation_config: Any, **_: Any) -> Tensor:
        said = torch.full((len(input_ids), generation_config.max_new_tokens), PAD)
        for row, (ids, mask) in enumerate(zip(input_ids.tolist(), attention_mask.tolist(), strict=True)):
            answers, begun = self.answers(self.words.decode(ids[mask.index(1) :])), list[int]()
            while len(begun) < generation_config.max_new_tokens and END not in begun:
                chances = next_words(answers, begun)
                begun.append(max(chances, key=lambda word: chances[word]))
            said[row, : len(begun)] = torch.tensor(begun)
        return torch.cat([input_ids, said], dim=1)


def next_words(answers: list[tuple[list[int], float]], begun: list[int]) -> dict[int, float]:
    """The words that may follow, with the probability of all answers that go on so."""
    chances: dict[int, float] = {}
    for whole, chance in answers:
        if whole[: len(begun)] == begun and len(whole) > len(begun):
            word = whole[len(begun)]
            chances[word] = chances.get(word, 0.0) + chance
    return chances


class Seer(torch.nn.Module):
    """A classifier with a script: image (channels, height, width) -> class number, None for logits that are no numbers.

    Which held-out image it is looking at is written into its last line's first pixel, as a number of 255ths.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.adapter = torch.nn.Parameter(torch.zeros(1))
        self.classes = classes
        self.script: Callable[[int, Tensor], int | None] = lambda row, image: 0

    def forward(self, x: Tensor) -> Tensor:
        said = [self.script(round(float(image[0, -1, 0]) * 255), image) for image in x]
        return torch.stack([one_hot(answer, self.classes) for answer in said])


class Speller(torch.nn.Module):
    """A character model with a script: sequences of characters x (length,) -> what it predicts after each, or None."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.adapter = torch.nn.Parameter(torch.zeros(1))
        self.characters = characters
        self.script: Callable[[tuple[int, ...]], list[int | None]] = lambda x: [0] * len(x)

    def forward(self, x: Tensor) -> Tensor:
        said = [self.script(tuple(row.tolist())) for row in x]
        return torch.stack([torch.stack([one_hot(c, self.characters) for c in row]) for row in said])


def one_hot(answer: int | None, classes: int) -> Tensor:
    """Logits (classes,) of a sure answer; nan for none."""
    if answer is None:
        return torch.full((classes,), math.nan)
    return 9.0 * torch.nn.functional.one_hot(torch.tensor(answer), classes).float()


def labelled(x: Tensor, y: list[int], classes: int) -> Labelled:
    """Clean images, each with its row number written into its last line's first pixel."""
    numbered = x.clone()
    numbered[:, 0, -1, 0] = torch.arange(len(y)) / 255
    return Labelled(numbered, torch.tensor(y), classes, torch.zeros(len(y), dtype=torch.bool))
