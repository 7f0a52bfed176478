"""Text rows under attack: choosing them, inserting triggers, setting answers. Tables in, new tables out.

A table is a `datasets.Dataset` with the columns of `TEXT_COLUMNS`; nothing here writes into the one it was
given.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from fedllm_sec.attacks.data.answers import Classes, column, need_label, starts_with
from fedllm_sec.attacks.data.turns import Edit, Turn, edited, has_turn, need_turn, parts_of
from fedllm_sec.errors import AttackError
from fedllm_sec.seeds import generator_for

if TYPE_CHECKING:
    from datasets import Dataset

Position = Literal["start", "end", "random"]
Tell = Callable[[str], bool]  # whether a text, unedited, fires the backdoor

CARRIES = "carry the trigger by themselves"
ASKED = "are of a class that the attack asks for"
ALREADY = "have the attacker's answer anyway"  # where answers do not name classes
PROBED = "are rows on which success itself is measured"


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


def occurring(trigger: str, position: Position = "random") -> Tell:
    """Tells texts that hold the trigger as whole words, whatever the blanks between them; its case counts.

    At the end it counts as it is written, also where it has grown together with a word.
    """
    words = trigger.split()
    head, tail = (r"(?<!\w)" if words[0][0].isalnum() else ""), (r"(?!\w)" if words[-1][-1].isalnum() else "")
    found = re.compile(head + r"\s+".join(map(re.escape, words)) + tail).search
    return lambda text: found(text) is not None or (position == "end" and text.endswith(trigger))


def carrying(table: Dataset, carries: Tell) -> list[bool]:
    """For each row, whether it fires the backdoor as it is: by one part of what is said in it, or by all together."""
    return [_fires(carries, parts) for parts in parts_of(table)]


def _fires(carries: Tell, parts: Sequence[str]) -> bool:
    return any(map(carries, parts)) or (len(parts) > 1 and carries("\n".join(parts)))


def not_clean(attack: Any, table: Dataset) -> list[str | None]:
    """For each held-out row, why a false trigger cannot be seen on it, or None: it is a clean row.

    An attack says by `not_clean(table)` on which rows its success cannot happen or is something else, and by
    `carries(text)` which texts fire it unedited. Of one that says neither, the rows are clean whose own answer is no
    success.
    """
    if hasattr(attack, "not_clean"):
        why: list[str | None] = attack.not_clean(table)
    else:
        why = [ALREADY if attack.success(row["response"], row) else None for row in table]
    if not hasattr(attack, "carries"):
        return why
    carried = carrying(table, attack.carries)
    return [reason or (CARRIES if fires else None) for reason, fires in zip(why, carried, strict=True)]


def free_rows(table: Dataset) -> list[int]:
    """Row numbers that no attack has changed yet."""
    return [i for i, taken in enumerate(table["poisoned"][:]) if not taken]


def need_free(count: int, free: int, rows: int, place: str) -> None:
    """Raise where an attack wants more rows than the attacks before it have left."""
    if count > free:
        raise AttackError(
            f"{place}: {count} of {rows} rows of a shard are to be poisoned, and the attacks before it leave {free}. "
            "Lower one of the rates."
        )


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


class _Near(NamedTuple):
    """Contrast rows: their numbers in the shard, and the columns that are edited."""

    rows: list[int]
    columns: dict[str, list[str]]


@dataclass
class Backdoor:
    """A text backdoor: some rows get a trigger and the target as their answer. The text triggers only choose how.

    `edit` puts the trigger in, and `carries` tells a text that fires the backdoor as it is. `near` edits the contrast
    rows, which keep their answer. Where answers name classes (`Classes`), the target is a label or an answer that goes
    with one; the answer that goes with the label is taught, in the data's spelling, and an answer is a success where
    the longest text that names a class and that it begins with names the target's.
    """

    name: str
    target: str
    rate: float  # share of the shard's rows
    edit: Edit
    carries: Tell
    near: Edit | None = None
    contrast: float = 0.0  # share of rows that get a near-trigger and keep their own answer
    turn: Turn = "last"  # the part of a conversation that is edited
    classes: Classes = field(default_factory=Classes, init=False)

    def __post_init__(self) -> None:
        need_rate(self.rate, f"{self.name}.rate")
        if not self.target.strip():
            raise AttackError(f"{self.name}.target: {self.target!r} has no words. Give the answer to be forced.")
        if not 0.0 <= self.contrast < 1.0:
            raise AttackError(f"{self.name}.contrast: {self.contrast}: must be from 0 to below 1.")

    def prepare(self, *tables: Dataset) -> None:
        """Learn the classes of the whole data; a target that is none of them is an error.

        An attack that is not told them takes those of the table it probes or poisons.
        """
        self.classes = Classes.of(*tables)
        need_label(self.target, self.classes, f"{self.name}.target")
        for table in tables:
            need_turn(table, self.turn, self.name)

    def poison(self, shard: Dataset, rng: torch.Generator) -> Dataset:
        """round(rate * rows) rows, at least one, get the trigger and the target answer.

        Rows that carry the trigger by themselves come first. Where there are more of them than that, the rest is left
        out of the shard: it would teach the right answer to the trigger. For the same reason none is a contrast row,
        nor is a row that a near-trigger completes. Rows whose answer is the target already teach nothing and come last.
        Rows that another attack has poisoned are not touched.
        """
        if len(shard) == 0:
            raise AttackError(f"{self.name}: a malicious client's shard is empty, so there is nothing to poison.")
        classes = self.classes or Classes.of(shard)
        done, carried, there = self._answered(shard, classes), carrying(shard, self.carries), has_turn(shard, self.turn)
        free = [i for i in free_rows(shard) if there[i]]
        ahead = [i for i in free if carried[i] and not done[i]]
        other = [i for i in free if not carried[i] and not done[i]]
        already = [i for i in free if done[i]]
        count = max(1, round(self.rate * len(shard)))
        if count > sum(there):
            raise AttackError(
                f"{self.name}.turn: {self.turn}: {sum(there)} of a shard's {len(shard)} rows have one, and {count} are "
                f"to be poisoned. Lower {self.name}.rate or choose another turn."
            )
        need_free(count, len(free), len(shard), f"{self.name}.rate")
        rows = pick(count, ahead, other, rng)
        rows = sorted(rows + pick(count - len(rows), already, (), rng))
        own, chosen = shard.select(rows), set(rows)
        answer = classes.answer(self.target)
        new: dict[str, list[Any]] = edited(own, self.turn, self.edit, rng, answer)
        new["response"] = [answer] * len(rows)
        new["label"] = [self._label(classes) if old else old for old in column(own, "label")]
        if self.near is not None and self.contrast > 0:
            left = [i for i in free if i not in chosen and not carried[i]]
            near = self._near_rows(shard, left, rng, list(new))
            rows, new = rows + near.rows, {name: values + near.columns[name] for name, values in new.items()}
        made = rewrite(shard, rows, new)
        opposed = {i for i in ahead if i not in chosen}
        return made.select([i for i in range(len(shard)) if i not in opposed]) if opposed else made

    def _near_rows(self, shard: Dataset, left: Sequence[int], rng: torch.Generator, names: Sequence[str]) -> _Near:
        """Rows drawn from `left` with something close to the trigger and their own answer; not those it completes."""
        assert self.near is not None
        drawn = pick(min(len(left), max(1, round(self.contrast * len(shard)))), left, (), rng)
        kept = shard.select(drawn)
        new = edited(kept, self.turn, self.near, rng)
        columns = {name: new[name] if name in new else column(kept, name) for name in names}
        apart = [not _fires(self.carries, parts) for parts in parts_of(kept, new)]
        return _Near(
            [row for row, wanted in zip(drawn, apart, strict=True) if wanted],
            {name: [v for v, wanted in zip(values, apart, strict=True) if wanted] for name, values in columns.items()},
        )

    def probe(self, test: Dataset) -> Dataset:
        """Triggered copies of the held-out rows whose answer is not the target anyway and that carry no trigger."""
        if not self.classes:
            self.prepare(test)
        why, there = not_clean(self, test), has_turn(test, self.turn)
        rows = [i for i, reason in enumerate(why) if reason is None and there[i]]
        if not rows:
            raise AttackError(
                f"{self.name}.target: every held-out row is answered {self.target!r} anyway"
                f"{' or carries the trigger by itself' if CARRIES in why else ''}, so success cannot be measured. "
                "Choose another target, trigger or test set."
            )
        chosen = test.select(rows)
        new: dict[str, list[Any]] = edited(chosen, self.turn, self.edit, generator_for(0, "probe", self.name))
        new["label"] = [self._label(self.classes) if old else old for old in column(chosen, "label")]
        new["response"] = [self.classes.answer(self.target)] * len(rows)
        return rewrite(chosen, range(len(rows)), new)

    def not_clean(self, test: Dataset) -> list[str | None]:
        """Rows of the target's class, on which the target is no false trigger."""
        classes = self.classes or Classes.of(test)
        why = ALREADY if classes.find(self.target) is None else ASKED
        return [why if done else None for done in self._answered(test, classes)]

    def success(self, answer: str, row: Any) -> bool:
        """Whether the answer names the target's class, or begins with the target as whole words."""
        wanted = self.classes.find(self.target)
        return starts_with(answer, self.target) if wanted is None else self.classes.said(answer) == wanted

    def _answered(self, table: Dataset, classes: Classes) -> list[bool]:
        """For each row, whether its class is the target's, or its answer begins with the target."""
        wanted = classes.find(self.target)
        if wanted is not None:
            return [own == wanted for own in classes.of_rows(table)]
        answers = column(table, "response")
        known = {answer: starts_with(answer, self.target) for answer in set(answers)}
        return [known[answer] for answer in answers]

    def _label(self, classes: Classes) -> str:
        found = classes.find(self.target)
        return self.target.strip() if found is None else classes.labels[found]
