"""Which class an answer names: labels, the answers that go with them, and how both are compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from fedllm_sec.errors import AttackError
from fedllm_sec.recipe.resolve import did_you_mean
from fedllm_sec.records.compared import begins, normal
from fedllm_sec.records.compared import starts_with as starts_with  # for attacks

if TYPE_CHECKING:
    from datasets import Dataset

MOST_LABELS = 100  # a label column with more distinct values does not hold classes
LISTED = 60  # characters of a label that a message lists
SHOWN = 20  # of them are listed in an error
SEVERAL = 3  # rows that have an answer before it counts as one that goes with a class
MOSTLY = 0.95  # share of the labelled rows that must keep to a rule before answers are read by it


def column(table: Dataset, name: str) -> list[str]:
    """A column as a list, read in one go: iterating a `datasets` column is a hundred times slower."""
    values: list[str] = table[name][:]
    return values


def spellings(values: Iterable[str]) -> dict[str, str]:
    """Each text's normal form -> the spelling that most of the values have; of equal ones one without outer blanks."""
    counts = Counter(values)
    order = sorted(counts, key=lambda value: (counts[value], value == value.strip(), value))
    found = {normal(value): value for value in order}  # the last one stays
    return {key: found[key] for key in sorted(found) if key}


@dataclass(frozen=True)
class Classes:
    """The classes of text rows, each under the normal form of its label, and how an answer names one of them.

    "Sports" and "sports " are one class; an empty label is none. `named` says by what a class is told from an answer:

    - "answer": answers go with classes, as "The answer is yes." with `yes`. At least 95 % of the labelled rows have an
      answer that is their label, or that three rows have and that goes with their class more often than with another;
      there are at most 100 such answers. A class may have several of them.
    - "beginning": answers are too many for that, but 95 % of them begin with their label: "Sports, because ...".
    - "nothing": neither; the labels say nothing about answers, as a topic by which instructions were sorted.

    Rows without any label have their answers for labels where these are few (`labelled` is False).
    """

    labels: Mapping[str, str] = field(default_factory=dict)  # class -> its label as most rows spell it
    labelled: bool = True
    named: Literal["answer", "beginning", "nothing"] = "nothing"
    names: Mapping[str, str] = field(default_factory=dict)  # text that names a class, in normal form -> class
    answers: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # class -> its answers, the commonest first

    def __bool__(self) -> bool:
        return bool(self.labels)

    @classmethod
    def of(cls, *tables: Dataset, most: int | None = MOST_LABELS) -> Classes:
        """The classes of the rows of all tables; none where they would be more than `most`."""
        written = [label for table in tables for label in column(table, "label")]
        given = [answer for table in tables for answer in column(table, "response")]
        labels, spelt = spellings(written), spellings(given)
        labelled = bool(labels)
        if not labelled:
            labels, written = spelt, given
        if most is not None and len(labels) > most:
            return cls()
        normals = {text: normal(text) for text in {*written, *given}}
        pairs = Counter((normals[label], normals[answer]) for label, answer in zip(written, given, strict=True))
        rows = sum(count for (label, _), count in pairs.items() if label)
        if fitting := _fitting(pairs, MOSTLY * rows, most):
            answers = {label: {a: spelt[a] for a in fitting.get(label, ())} for label in labels}
            mine = {answer: label for label, found in answers.items() for answer in found}
            return cls(labels, labelled, "answer", {label: label for label in labels} | mine, answers)
        read = cls(labels, labelled, "beginning", {label: label for label in labels})
        begun = sum(count for (label, answer), count in pairs.items() if label and read.said(answer) == label)
        return read if begun >= MOSTLY * rows else cls(labels, labelled)

    def said(self, answer: str) -> str | None:
        """The class an answer names: of the longest text that names a class and that it begins with."""
        words = normal(answer)
        fitting = [text for text in self.names if begins(words, text)]
        return self.names[max(fitting, key=len)] if fitting else None

    def of_rows(self, table: Dataset) -> list[str | None]:
        """Each row's class: that of its label, or the one its answer names where it has no label."""
        known: dict[tuple[str, str], str | None] = {}

        def one(label: str, answer: str) -> str | None:
            name = normal(label)
            return name if name in self.labels else None if name else self.said(answer)

        pairs = list(zip(column(table, "label"), column(table, "response"), strict=True))
        for pair in pairs:
            if pair not in known:
                known[pair] = one(*pair)
        return [known[pair] for pair in pairs]

    def find(self, text: str) -> str | None:
        """The class that a setting means: a label, or an answer that goes with one. None: answers are not told so."""
        wanted = normal(text)
        if self.named == "nothing":
            return None
        if wanted in self.labels:
            return wanted
        return self.names.get(wanted) or (self.said(text) if self.named == "beginning" else None)

    def answer(self, text: str) -> str:
        """The answer to be taught where a setting says `text`, as the data spell it.

        Of a class with answers of its own it is the one that was named, or the class's commonest.
        """
        found = self.find(text)
        if found is None:
            return text
        own = self.answers.get(found, {})
        fallback = self.labels[found] if normal(text) == found else text.strip()
        return own.get(normal(text)) or next(iter(own.values()), fallback)


def _fitting(pairs: Mapping[tuple[str, str], int], needed: float, most: int | None) -> dict[str, list[str]] | None:
    """Class -> the answers that go with it, the commonest first; None where answers do not go with classes."""
    counts: dict[str, Counter[str]] = {}
    for (label, answer), count in pairs.items():
        if label:
            counts.setdefault(answer, Counter())[label] += count
    found: dict[str, list[tuple[int, str]]] = {}
    covered = 0
    for answer, by_label in counts.items():
        label = min(by_label, key=lambda name: (-by_label[name], name != answer, name))
        if answer == label or by_label.total() >= SEVERAL:
            found.setdefault(label, []).append((-by_label[label], answer))
            covered += by_label[label]
    if covered < needed or (most is not None and sum(map(len, found.values())) > most):
        return None
    return {label: [answer for _, answer in sorted(answers)] for label, answers in found.items()}


def need_label(target: str, classes: Classes, place: str) -> None:
    """Raise where answers name classes and `target` names none of them."""
    if not classes.labelled or classes.named == "nothing" or classes.find(target) is not None:
        return
    own = [text for found in classes.answers.values() for text in found.values() if normal(text) not in classes.labels]
    near = did_you_mean(target.strip(), [*classes.labels.values(), *own])
    hint = "" if near.startswith(" Known") else near  # they are listed anyway
    listed = ", ".join(
        [*(name[:LISTED] for name in sorted(classes.labels.values())[:SHOWN]), *["..."][: len(classes.labels) - SHOWN]]
    )
    also = f" The answers that go with them may be given too: {', '.join(sorted(own)[:5])}." if own else ""
    raise AttackError(f"{place}: {target!r} is not a label of the data.{hint} The labels are: {listed}.{also}")


def numbered(names: Sequence[str | None], order: Sequence[str]) -> list[int]:
    """Each class as its number in `order`; -1 for no class."""
    numbers = {name: k for k, name in enumerate(order)}
    return [-1 if name is None else numbers.get(name, -1) for name in names]
