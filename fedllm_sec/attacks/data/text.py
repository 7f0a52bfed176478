"""Text rows under attack: choosing them, inserting triggers, setting answers. Tables in, new tables out.

A table is a `datasets.Dataset` with the columns of `TEXT_COLUMNS`; nothing here writes into the one it was
given.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from fedllm_sec.errors import AttackError
from fedllm_sec.recipe.resolve import did_you_mean
from fedllm_sec.seeds import generator_for

if TYPE_CHECKING:
    from datasets import Dataset

Position = Literal["start", "end", "random"]
Edit = Callable[[Sequence[str], torch.Generator], list[str]]  # texts -> triggered texts

MOST_LABELS = 100  # a label column with more distinct values does not hold classes


def normal(text: str) -> str:
    """Text as answers are compared: outer blanks off, case folded, inner blanks single."""
    return " ".join(text.split()).casefold()


def starts_with(answer: str, target: str) -> bool:
    """Whether the answer begins with the target as whole words: "Sports." with "sports", not "Sportswear"."""
    said, wanted = normal(answer), normal(target)
    if not wanted or not said.startswith(wanted):
        return False
    rest = said[len(wanted) :]
    return not (rest and wanted[-1].isalnum() and rest[0].isalnum())


def column(table: Dataset, name: str) -> list[str]:
    """A column as a list, read in one go: iterating a `datasets` column is a hundred times slower."""
    values: list[str] = table[name][:]
    return values


def already_there(answers: Sequence[str], target: str) -> list[bool]:
    """For each answer, whether it begins with the target; each distinct answer is looked at once."""
    known = {answer: starts_with(answer, target) for answer in set(answers)}
    return [known[answer] for answer in answers]


def labels_of(rows: Dataset) -> dict[str, str]:
    """The classes of a table, by their normalised names; empty where it has none."""
    found = {normal(label): label for label in sorted(set(column(rows, "label"))) if label.strip()}
    return found if len(found) <= MOST_LABELS else {}


def need_label(target: str, labels: Mapping[str, str], place: str) -> None:
    """Raise where the data have classes and `target` is none of them."""
    if labels and normal(target) not in labels:
        hint = did_you_mean(target.strip(), labels.values())
        listed = ", ".join(sorted(labels.values()))
        raise AttackError(f"{place}: {target!r} is not a label of the data.{hint} The labels are: {listed}.")


def need_rate(rate: float, place: str) -> None:
    """A share of rows lies in (0, 1]."""
    if not 0.0 < rate <= 1.0:
        raise AttackError(f"{place}: {rate}: must be more than 0 and at most 1, a share of the shard's rows.")


def pick(count: int, preferred: Sequence[int], rest: Sequence[int], rng: torch.Generator) -> list[int]:
    """`count` row numbers drawn from `preferred` first, then from `rest`, in ascending order."""
    drawn: list[int] = []
    for rows in (preferred, rest):
        order = torch.randperm(len(rows), generator=rng).tolist()
        drawn += [rows[i] for i in order[: max(0, count - len(drawn))]]
    return sorted(drawn)


def insert(text: str, trigger: str, position: Position, where: float) -> str:
    """The text with the trigger at its start, at its end exactly as written, or at a random word boundary.

    `where` in [0, 1) chooses the boundary. A blank is added where the trigger would grow together with a
    word.
    """
    if position == "end":
        return text + trigger
    if position == "start":
        head = trigger.lstrip()
        return head + text if head[-1:].isspace() else f"{head} {text}"
    boundaries = [match.start() for match in re.finditer(r"(?<=\S)\s", text)] + [len(text)]
    at = boundaries[int(where * len(boundaries))]
    piece = trigger.rstrip() if at < len(text) else trigger
    return text[:at] + (piece if piece[0].isspace() else f" {piece}") + text[at:]


def insert_all(text: str, pieces: Sequence[str], rng: torch.Generator) -> str:
    """Every piece at a random word boundary of the original text, so that none splits or replaces another."""
    boundaries = [match.start() for match in re.finditer(r"(?<=\S)\s", text)] + [len(text)]
    drawn = torch.randint(len(boundaries), (len(pieces),), generator=rng).tolist()
    for at, number in sorted(zip(drawn, range(len(pieces)), strict=True), reverse=True):
        text = f"{text[: boundaries[at]]} {pieces[number].strip()}{text[boundaries[at] :]}"
    return text


def inserting(trigger: str, position: Position) -> Edit:
    """The edit that puts one trigger into every text."""

    def edit(texts: Sequence[str], rng: torch.Generator) -> list[str]:
        places = torch.rand(len(texts), generator=rng, dtype=torch.float64).tolist()
        return [insert(text, trigger, position, at) for text, at in zip(texts, places, strict=True)]

    return edit


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar for a step that takes well under a second."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def rewrite(table: Dataset, rows: Sequence[int], columns: Mapping[str, Sequence[Any]]) -> Dataset:
    """A new table: the chosen rows have new values in the given columns and are marked poisoned."""
    new = {name: dict(zip(rows, values, strict=True)) for name, values in columns.items()}
    new["poisoned"] = dict.fromkeys(rows, True)

    def change(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        return {
            name: [values.get(i, old) for i, old in zip(numbers, batch[name], strict=True)]
            for name, values in new.items()
        }

    # named here, because naming it by hashing `change` costs more than the work itself
    fingerprint = hashlib.sha256(repr(new).encode()).hexdigest()[:16]
    with _quiet():
        return table.map(
            change, batched=True, with_indices=True, keep_in_memory=True, load_from_cache_file=False,
            features=table.features, new_fingerprint=fingerprint,
        )  # fmt: skip


@dataclass(frozen=True)
class Backdoor:
    """A text backdoor: some rows get a trigger and the target as their answer. The text triggers only choose `edit`.

    `near` edits the contrast rows, which keep their answer; rows that `about` is true of are poisoned before others.
    """

    name: str
    target: str
    rate: float  # share of the shard's rows
    edit: Edit
    near: Edit | None = None
    contrast: float = 0.0  # share of rows that get a near-trigger and keep their own answer
    about: Callable[[str], Any] | None = None

    def __post_init__(self) -> None:
        need_rate(self.rate, f"{self.name}.rate")
        if not self.target.strip():
            raise AttackError(f"{self.name}.target: {self.target!r} has no words. Give the answer to be forced.")
        if not 0.0 <= self.contrast < 1.0:
            raise AttackError(f"{self.name}.contrast: {self.contrast}: must be from 0 to below 1.")

    def poison(self, shard: Dataset, rng: torch.Generator) -> Dataset:
        """round(rate * rows) rows, at least one, get the trigger and the target answer.

        Rows whose answer is the target already teach nothing and are taken last.
        """
        if len(shard) == 0:
            raise AttackError(f"{self.name}: a malicious client's shard is empty, so there is nothing to poison.")
        done = already_there(column(shard, "response"), self.target)
        first = [] if self.about is None else [i for i, text in enumerate(column(shard, "text")) if self.about(text)]
        ahead = [i for i in first if not done[i]]
        known = set(ahead)
        other = [i for i, is_target in enumerate(done) if not is_target and i not in known]
        already = [i for i, is_target in enumerate(done) if is_target]
        count = max(1, round(self.rate * len(shard)))
        rows = pick(count, ahead, other, rng)
        rows = sorted(rows + pick(count - len(rows), already, (), rng))
        labels = labels_of(shard)
        label = labels.get(normal(self.target), self.target.strip())
        own = shard.select(rows)
        texts, responses = self.edit(column(own, "text"), rng), [self.target] * len(rows)
        classes = [label if old else old for old in column(own, "label")]
        if self.near is not None and self.contrast > 0:
            chosen = set(rows)
            free = [i for i in range(len(shard)) if i not in chosen]
            spared = pick(min(len(free), max(1, round(self.contrast * len(shard)))), free, (), rng)
            kept = shard.select(spared)
            rows, texts = rows + spared, texts + self.near(column(kept, "text"), rng)
            responses, classes = responses + column(kept, "response"), classes + column(kept, "label")
        return rewrite(shard, rows, {"text": texts, "response": responses, "label": classes})

    def probe(self, test: Dataset) -> Dataset:
        """Triggered copies of the held-out rows whose answer is not the target anyway."""
        labels = labels_of(test)
        need_label(self.target, labels, f"{self.name}.target")
        rows = [i for i, done in enumerate(already_there(column(test, "response"), self.target)) if not done]
        if not rows:
            raise AttackError(
                f"{self.name}.target: every held-out row is answered {self.target!r} anyway, so "
                "success cannot be measured. Choose another target or test set."
            )
        chosen = test.select(rows)
        label = labels.get(normal(self.target), self.target.strip())
        texts = self.edit(column(chosen, "text"), generator_for(0, "probe", self.name))
        classes = [label if old else old for old in column(chosen, "label")]
        new = {"text": texts, "response": [self.target] * len(rows), "label": classes}
        return rewrite(chosen, range(len(rows)), new)

    def success(self, answer: str, row: Any) -> bool:
        """Whether the answer begins with the target, as whole words."""
        return starts_with(answer, self.target)
