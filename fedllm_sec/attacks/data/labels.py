"""Label flipping, for text (the label word in the answer) and for class numbers."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from fedllm_sec.attacks.data.answers import Classes, column, need_label, normal, starts_with
from fedllm_sec.attacks.data.text import ASKED, PROBED, free_rows, need_rate, pick, rewrite
from fedllm_sec.errors import AttackError
from fedllm_sec.protocols import Labelled

if TYPE_CHECKING:
    from datasets import Dataset


class LabelFlip:
    """Rows of class a are taught as class b (Biggio et al. 2012; Tolpegin et al. 2020, sec. 3).

    `mapping` {a: b} applies to all rows at once, so {a: b, b: a} is a swap. `rate` is the share of the
    affected rows that are flipped; rows that another attack has poisoned are none of them. For text the label is
    replaced where it stands in the answer as a whole word (the first time), or the answer becomes the one that goes
    with the new label (`Classes`; the label itself where no answer does). For text without a label column the answer
    itself is the label. A mapping may name classes by their labels or by answers that go with them.
    """

    def __init__(self, *, mapping: dict[str, str] | dict[int, int], rate: float = 1.0) -> None:
        need_rate(rate, "label_flip.rate")
        if not mapping:
            raise AttackError("label_flip.mapping: is empty, so no row would change. Give {from: to}.")
        same = [a for a, b in mapping.items() if str(a) == str(b)]
        if same:
            raise AttackError(f"label_flip.mapping: {same[0]!r} is mapped to itself, which changes nothing. Remove it.")
        self.mapping: Mapping[Any, Any] = mapping
        self.rate = rate
        self.classes = Classes()  # of text

    @functools.cached_property
    def by_name(self) -> dict[str, str]:
        """For text: new label by the normalised old one. Class numbers and characters are compared as they are."""
        same = [a for a, b in self.mapping.items() if normal(str(a)) == normal(str(b))]
        if same:
            raise AttackError(f"label_flip.mapping: {same[0]!r} is mapped to itself, which changes nothing. Remove it.")
        found = {normal(str(a)): str(b) for a, b in self.mapping.items()}
        if len(found) < len(self.mapping):
            raise AttackError(f"label_flip.mapping: {dict(self.mapping)}: names one class twice. Keep one of them.")
        return found

    def poison(self, shard: Dataset | Labelled, rng: torch.Generator) -> Dataset | Labelled:
        """A shard without rows of the mapped classes comes back as it is: there is nothing to flip in it."""
        size = len(shard.y) if isinstance(shard, Labelled) else len(shard)
        if size == 0:
            raise AttackError("label_flip: a malicious client's shard is empty, so there is nothing to flip.")
        if isinstance(shard, Labelled):
            return self._poison_numbers(shard, rng)
        classes = self.classes or Classes.of(shard, most=None)
        flips, own = self._flips(classes), classes.of_rows(shard)
        return self._flipped(shard, self._drawn([i for i in free_rows(shard) if own[i] in flips], rng), classes)

    def probe(self, test: Dataset | Labelled) -> Dataset | Labelled:
        """The held-out rows of the mapped classes, with the answers the attack wants."""
        if isinstance(test, Labelled):
            return self._probe_numbers(test)
        if not self.classes:
            self.prepare(test)
        own, flips = self.classes.of_rows(test), self._flips(self.classes)
        rows = [i for i, c in enumerate(own) if c in flips]
        return self._flipped(test.select(rows), range(len(rows)), self.classes)

    def prepare(self, *tables: Dataset) -> None:
        """Learn the classes of the whole data; a mapping of what is no class is an error."""
        self.classes = Classes.of(*tables, most=None)
        for name in (str(c) for pair in self.mapping.items() for c in pair):
            if self._class(name, self.classes) not in self.classes.labels:
                need_label(name, replace(self.classes, labelled=True, named="answer"), "label_flip.mapping")
        self._flips(self.classes)

    def not_clean(self, test: Dataset) -> list[str | None]:
        """Rows of the flipped classes, which are the probe's, and of a class on which every flipped-to label is right.

        With {World: Sports} the first are World's and the second those of Sports.
        """
        classes = self.classes or Classes.of(test, most=None)
        flips = self._flips(classes)

        def why(own: str | None) -> str | None:
            if own in flips:
                return PROBED
            return ASKED if all(b == own for b in flips.values()) else None

        return [why(own) for own in classes.of_rows(test)]

    def success(self, answer: Any, row: Any) -> bool:
        """On a probe row: the flipped label. On a clean row of a class that is not attacked: any flipped-to
        label.

        For images `answer` is a class number and `row` the true class number (or anything with item "label"); of an
        attacked class it is the flipped number.
        """
        if isinstance(answer, str):
            return self._succeeds(answer, row)
        truth, said = int(row["label"] if isinstance(row, Mapping) else row), int(answer)
        numbers = self._numbers()
        if truth in numbers:
            return said == numbers[truth]
        return said != truth and said in numbers.values()

    def acts_on(self, test: Labelled) -> torch.Tensor:
        """Held-out images of the mapped classes: (n,) bool."""
        table = _table(self._checked(test), test)
        return table[test.y] != test.y

    def _drawn(self, affected: list[int], rng: torch.Generator) -> list[int]:
        if not affected:
            return []
        return pick(max(1, round(self.rate * len(affected))), affected, (), rng)

    def _succeeds(self, answer: str, row: Any) -> bool:
        """`success` for text: what the longest text that names a class and that the answer begins with says."""
        classes, flips = self.classes, self._flips(self.classes)
        own = self._class(row["label"], classes) if row["label"] else classes.said(row["response"])
        if row["poisoned"]:
            by_name = own in classes.labels and classes.named != "nothing"
            return classes.said(answer) == own if by_name else starts_with(answer, row["response"])
        wrong = {b for b in flips.values() if b != own} if own not in flips else set()
        if classes.named != "nothing":
            return classes.said(answer) in wrong
        return any(starts_with(answer, classes.labels.get(b, b)) for b in wrong)

    def _class(self, name: str, classes: Classes) -> str:
        """The class that a label or an answer means; its normal form where the data have no such class."""
        return normal(name) if normal(name) in classes.labels else classes.find(name) or normal(name)

    def _flips(self, classes: Classes) -> dict[str | None, str]:
        """The mapping between classes; names of one class under two names are an error."""
        found: dict[str | None, str] = {
            self._class(a, classes): self._class(b, classes) for a, b in self.by_name.items()
        }
        if len(found) < len(self.by_name) or any(a == b for a, b in found.items()):
            raise AttackError(f"label_flip.mapping: {dict(self.mapping)}: names one class twice. Keep one of them.")
        return found

    def _flipped(self, table: Dataset, rows: Any, classes: Classes) -> Dataset:
        if len(rows) == 0:
            return table
        chosen, flips = table.select(rows), self._flips(classes)
        names = {self._class(b, classes): b for b in self.by_name.values()} | dict(classes.labels)
        responses, labels = [], []
        columns = (column(chosen, "response"), column(chosen, "label"))
        for own, answer, label in zip(classes.of_rows(chosen), *columns, strict=True):
            new, old = flips[own], label or classes.labels.get(own or "", answer)
            name = names[new]
            word = rf"(?<!\w){re.escape(old.strip())}(?!\w)"
            hit = re.search(word, answer, flags=re.IGNORECASE)
            replaced = answer[: hit.start()] + name + answer[hit.end() :] if hit else name
            fitting = classes.answers.get(new, {})  # what goes with the new class, the commonest first
            responses.append(fitting.get(normal(replaced), next(iter(fitting.values()), replaced)))
            labels.append(name if label else label)
        return rewrite(table, rows, {"response": responses, "label": labels})

    def _numbers(self) -> dict[int, int]:
        try:
            return {int(a): int(b) for a, b in self.mapping.items()}
        except ValueError:
            raise AttackError(
                f"label_flip.mapping: {dict(self.mapping)}: classes of images are numbers, e.g. {{1: 7}}."
            ) from None

    def _checked(self, shard: Labelled) -> dict[int, int]:
        numbers = self._numbers()
        bad = sorted({c for pair in numbers.items() for c in pair if not 0 <= c < shard.classes})
        if bad:
            raise AttackError(f"label_flip.mapping: {bad}: classes go from 0 to {shard.classes - 1}.")
        return numbers

    def _poison_numbers(self, shard: Labelled, rng: torch.Generator) -> Labelled:
        table = _table(self._checked(shard), shard)
        free = ~shard.poisoned  # what an earlier attack has made of a row stays
        affected = (free & (table[shard.y] != shard.y)).nonzero().flatten().tolist()
        rows = torch.tensor(self._drawn(affected, rng), dtype=torch.long)
        y, marks = shard.y.clone(), shard.poisoned.clone()
        y[rows], marks[rows] = table[shard.y[rows]], True
        return replace(shard, y=y, poisoned=marks)

    def _probe_numbers(self, test: Labelled) -> Labelled:
        table = _table(self._checked(test), test)
        rows = table[test.y] != test.y
        return replace(test, x=test.x[rows], y=table[test.y[rows]], poisoned=torch.ones_like(test.poisoned[rows]))


def _table(mapping: Mapping[int, int], shard: Labelled) -> torch.Tensor:
    """The mapping as a lookup (classes,): class -> new class."""
    table = torch.arange(shard.classes, device=shard.y.device)
    for a, b in mapping.items():
        table[a] = b
    return table
