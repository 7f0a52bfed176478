"""Prompts and answers of a language model as token ids."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fedllm_sec.recipe.sections import Data

BEFORE = 16  # characters before an answer, among which it is tokenised


@dataclass(frozen=True)
class Encoded:
    """Token ids of rows: prompt, and answer with its end token."""

    prompts: list[list[int]]
    answers: list[list[int]]

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class Room:
    """How long an answer is, and how much of it is taught and generated: counts of tokens."""

    answer: str
    tokens: int  # with its end token
    taught: int  # data.max_length // 2: a longer one is cut in training and has no end
    said: int  # evaluate.max_new_tokens: what a greedy answer may have, the end token not needed

    def __str__(self) -> str:
        return (
            f"{self.answer!r}: {self.tokens} tokens with its end token; training has room for {self.taught} "
            f"(data.max_length // 2), a generated answer for {self.said} (evaluate.max_new_tokens)"
        )


def answer_ids(tokenizer: PreTrainedTokenizerBase, data: Data, responses: Sequence[str]) -> list[list[int]]:
    """The tokens of answers, each with its one end token, of any length.

    They are those that follow the end of the template: SentencePiece begins a text of its own with other tokens. Where
    the template's last token would grow into the answer, the answer is tokenised by itself.
    """
    written = [data.answer.format(response=response) for response in responses]
    end = _end(data.template)
    (start,) = _plain(tokenizer, [end])
    behind = _plain(tokenizer, [end + text for text in written])
    cut = [ids[len(start) :] if ids[: len(start)] == start else None for ids in behind]
    alone = [text for text, ids in zip(written, cut, strict=True) if ids is None]
    by_itself = iter(_plain(tokenizer, alone))
    return [one_end(next(by_itself) if ids is None else ids, tokenizer.eos_token_id) for ids in cut]


def _plain(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    return ids


def _end(template: str) -> str:
    """What of a template stands before every answer; a full stop for a template that ends with the row's text."""
    *_, (words, field, _, _) = string.Formatter().parse(template)
    return "." if field is not None else words[-BEFORE:]


def one_begin(ids: list[int], bos: int | None) -> list[int]:
    """The ids with one begin token where a template writes out the one that the tokenizer sets as well."""
    while bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    return ids


def one_end(ids: list[int], eos: int) -> list[int]:
    """The ids with the end token behind them, once."""
    while ids and ids[-1] == eos:
        ids = ids[:-1]
    return [*ids, eos]


def room(tokenizer: PreTrainedTokenizerBase, data: Data, answer: str, max_new_tokens: int) -> Room:
    """How an attack's target, as it will be taught, fits the settings."""
    (ids,) = answer_ids(tokenizer, data, [answer])
    return Room(answer, len(ids), data.max_length // 2, max_new_tokens)
