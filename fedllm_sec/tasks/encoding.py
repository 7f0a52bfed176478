"""Prompts and answers of a language model as token ids."""

from __future__ import annotations

import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Protocol

import torch

from fedllm_sec.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fedllm_sec.recipe.sections import Data

BEFORE = 16  # characters before an answer, among which it is tokenised
GROUPED_BATCHES = 8  # rows are sorted by length within so many batches at a time


@dataclass(frozen=True)
class Encoded:
    """Token ids of rows: prompt, and answer with its end token.

    `earlier` has, of each row, the [start, end) of what is scored in the prompt: the assistant's earlier turns.
    """

    prompts: list[list[int]]
    answers: list[list[int]]
    earlier: list[list[tuple[int, int]]] = field(default_factory=list)  # empty: none in any row

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def lengths(self) -> list[int]:
        """Tokens that the model reads of each row, its answer's among them."""
        return [len(prompt) + len(answer) for prompt, answer in zip(self.prompts, self.answers, strict=True)]

    def select(self, rows: Iterable[int]) -> Encoded:
        """The rows of these numbers, in this order."""
        chosen = list(rows)
        parts = {part.name: getattr(self, part.name) for part in fields(self)}
        return type(self)(**{name: [values[i] for i in chosen] if values else [] for name, values in parts.items()})

    def replaced(self, changed: Mapping[int, Encoded]) -> Encoded:
        """The rows, those of these numbers each by the one row given for it."""
        parts = {part.name: list(getattr(self, part.name)) for part in fields(self)}
        for name, values in parts.items():
            for i, row in changed.items() if values else ():
                (values[i],) = getattr(row, name)
        return type(self)(**parts)


@dataclass(frozen=True)
class Room:
    """How long an answer is, and how much of it is taught and generated: counts of tokens."""

    answer: str
    tokens: int  # with its end token
    taught: int  # data.max_length, of which the prompt needs a part
    said: int  # evaluate.max_new_tokens: what a greedy answer may have, the end token not needed

    def __str__(self) -> str:
        return (
            f"{self.answer!r}: {self.tokens} tokens with its end token; training has room for {self.taught} with the "
            f"prompt (data.max_length), a generated answer for {self.said} (evaluate.max_new_tokens)"
        )


class Plain:
    """How the recipe's own template writes rows."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: Data) -> None:
        self.tokenizer, self.data = tokenizer, data

    @property
    def end(self) -> int:
        """The token that ends an answer."""
        return end_token(self.tokenizer)

    def prompt(self, row: Mapping[str, str]) -> str:
        """The text the model is given for a row."""
        with_context = self.data.template_with_context
        template = with_context if with_context is not None and row["context"] else self.data.template
        return template.format(text=row["text"], context=row["context"])

    def tokens(self, rows: Sequence[Mapping[str, Any]]) -> Encoded:
        """Token ids of all rows, of any length."""
        texts = [self.prompt(row) for row in rows]
        eos, bos = self.tokenizer.eos_token_id, self.tokenizer.bos_token_id
        prompts = [one_begin(ids, bos) for ids in self.tokenizer(texts)["input_ids"]] if texts else []
        # some tokenizers end every text
        prompts = [ids[:-1] if ids and ids[-1] == eos != bos else ids for ids in prompts]
        return Encoded(prompts, self.answer_ids([row["response"] for row in rows]))

    def answer_ids(self, responses: Sequence[str]) -> list[list[int]]:
        """The tokens of answers, each with its one end token, of any length.

        They are those that follow the end of the template: SentencePiece begins a text of its own with other tokens.
        Where the template's last token would grow into the answer, the answer is tokenised by itself.
        """
        written = [self.data.answer.format(response=response) for response in responses]
        end = _end(self.data.template)
        (start,) = _plain(self.tokenizer, [end])
        behind = _plain(self.tokenizer, [end + text for text in written])
        cut = [ids[len(start) :] if ids[: len(start)] == start else None for ids in behind]
        alone = [text for text, ids in zip(written, cut, strict=True) if ids is None]
        by_itself = iter(_plain(self.tokenizer, alone))
        return [one_end(next(by_itself) if ids is None else ids, self.end) for ids in cut]

    def unlike_joined(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """Of rows whose prompt and answer, written as one text, have other tokens: where, and which."""
        texts = [self.prompt(row) + self.data.answer.format(response=row["response"]) for row in rows]
        read = self.tokenizer(texts)["input_ids"] if texts else []
        wholes = [one_end(one_begin(ids, self.tokenizer.bos_token_id), self.end) for ids in read]
        found, ours = [], self.tokens(rows)
        for number, (whole, prompt, answer) in enumerate(zip(wholes, ours.prompts, ours.answers, strict=True), 1):
            if (apart := prompt + answer) != whole:
                at = next(k for k, (a, b) in enumerate(zip_longest(apart, whole)) if a != b)
                a, b = (self.tokenizer.convert_ids_to_tokens(ids[at : at + 4]) for ids in (apart, whole))
                found.append(f"row {number} has {a} where the joined text has {b}")
        return found


def end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's end-of-text token; an error where it has none."""
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"model: the tokenizer of {tokenizer.name_or_path} has no end-of-text token. Set one in its folder."
        )
    return int(tokenizer.eos_token_id)


def first_beyond(tokenizer: PreTrainedTokenizerBase, text: str, place: int, known: int) -> int:
    """The first of a text's tokens, from number `known` on, that ends behind a place in it."""
    if not tokenizer.is_fast:  # those alone say where a token lies
        return known
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return next((k for k in range(known, len(found)) if found[k][1] > place), known)


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


def by_length(lengths: Sequence[int], size: int, rng: torch.Generator) -> Iterator[list[int]]:
    """One epoch of row numbers: shuffled, grouped by length within a few batches, in shuffled order."""
    order = torch.randperm(len(lengths), generator=rng).tolist()
    grouped: list[list[int]] = []
    for start in range(0, len(order), size * GROUPED_BATCHES):
        group = sorted(order[start : start + size * GROUPED_BATCHES], key=lambda i: lengths[i])
        grouped += [group[i : i + size] for i in range(0, len(group), size)]
    for i in torch.randperm(len(grouped), generator=rng).tolist():
        yield grouped[i]


class Writer(Protocol):
    """How rows are written as tokens: by a model's chat template, or by the recipe's own."""

    tokenizer: Any

    def tokens(self, rows: Sequence[Mapping[str, Any]]) -> Encoded: ...

    def answer_ids(self, responses: Sequence[str]) -> list[list[int]]: ...

    def unlike_joined(self, rows: Sequence[Mapping[str, Any]]) -> list[str]: ...


def room(writer: Writer, data: Data, answer: str, max_new_tokens: int) -> Room:
    """How an attack's target, as it will be taught, fits the settings."""
    (ids,) = writer.answer_ids([answer])
    return Room(answer, len(ids), data.max_length, max_new_tokens)
