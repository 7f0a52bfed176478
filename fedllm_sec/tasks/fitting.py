"""Rows that are longer than `data.max_length`: cut, dropped or refused, and how many.

A cut takes of what the row says itself, never of the template: the oldest turns first, then the end of the context,
then the end of the text. The answer stays whole, except with `cut_answer`, where one that is cut has no end token. A
poisoned row is never cut, as it could lose its trigger.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fedllm_sec.errors import AttackError, DataError
from fedllm_sec.protocols import turns_before
from fedllm_sec.tasks.encoding import Encoded, Writer

if TYPE_CHECKING:
    from datasets import Dataset

FEW = 5  # row numbers that a message lists


@dataclass(frozen=True)
class Fitted:
    """Rows that fit, and their tokens."""

    rows: Dataset
    encoded: Encoded
    kept: list[int]  # their numbers among the rows that were given, from 0
    cut: int = 0  # of these, how many are shorter than they were given
    dropped: int = 0  # how many were given and left out


def fitted(
    writer: Writer, rows: Dataset, most: int, too_long: str, place: str, others: Callable[[], Iterable[Dataset]] = list
) -> Fitted:
    """The rows, each of at most `most` tokens with its answer.

    Where they are refused, the length that would do is that of these and of those `others` that would be refused too.
    """

    def enough(length: int, poisoned_alone: bool = False) -> int:
        more = [row for table in others() for row in table.to_list() if row.get("poisoned") or not poisoned_alone]
        return max([length, *writer.tokens(more).lengths])

    whole = writer.tokens(rows.to_list())
    sizes = whole.lengths
    for i, prompt in enumerate(whole.prompts):
        if not prompt:
            raise DataError(
                f"{place}: row {i + 1}: this tokenizer has no token for its prompt. Remove the row, or write a word "
                "into data.template."
            )
    long = [i for i, size in enumerate(sizes) if size > most]
    if not long:
        return Fitted(rows, whole, list(range(len(sizes))))
    if too_long == "error":
        raise DataError(
            f"{place}: {len(long)} of {len(sizes)} rows are longer than data.max_length={most} tokens with their "
            f"answer: rows {[i + 1 for i in long[:FEW]]}, up to {max(sizes)} tokens. Raise data.max_length to "
            f"{enough(max(sizes))}, or set data.too_long to cut_prompt, cut_answer or drop."
        )
    if too_long != "drop":
        _refuse_cutting(rows, whole, [i for i in long if rows[i]["poisoned"]], most, place, enough)
    changed: dict[int, dict[str, Any]] = {}
    made: dict[int, Encoded] = {}
    gone = set()
    for i in long:
        prompt, answer = whole.prompts[i], whole.answers[i]
        if too_long == "cut_prompt" and (row := _shorter(writer, rows[i], most)) is not None:
            changed[i], made[i] = row, writer.tokens([row])
        elif too_long == "cut_answer" and len(prompt) < most:
            made[i] = replace(whole.select([i]), answers=[answer[: most - len(prompt)]])
        else:
            gone.add(i)
    kept = [i for i in range(len(sizes)) if i not in gone]
    if not kept:
        raise DataError(
            f"{place}: none of {len(sizes)} rows fits into data.max_length={most} tokens; the shortest has "
            f"{min(sizes)}. Raise data.max_length."
        )
    left = whole.replaced(made).select(kept)
    return Fitted(_replaced(rows, changed).select(kept), left, kept, len(long) - len(gone), len(gone))


class Fits:
    """What every task on texts does with rows: their tokens by its writer, in at most `max_length` of them."""

    writer: Writer
    max_length: int
    too_long: str

    def fit(
        self,
        rows: Dataset,
        place: str,
        too_long: str | None = None,
        others: Callable[[], Iterable[Dataset]] = list,
    ) -> Fitted:
        """The rows as `data.max_length` and `data.too_long`, or another way, leave them, and their tokens."""
        return fitted(self.writer, rows, self.max_length, too_long or self.too_long, place, others)

    def encode(self, rows: Dataset, place: str) -> Encoded:
        """The tokens of the rows that `fit` leaves."""
        return self.fit(rows, place).encoded


def _refuse_cutting(
    rows: Dataset, whole: Encoded, long: Sequence[int], most: int, place: str, enough: Callable[[int, bool], int]
) -> None:
    if not long:
        return
    lengths = whole.lengths
    worst = enough(max(lengths[i] for i in long), True)
    raise AttackError(
        f"{place}: {len(long)} poisoned rows are longer than data.max_length={most} and would lose part of their text, "
        f"perhaps the trigger, or of the answer that is taught: rows {[i + 1 for i in long[:FEW]]}, the first answered "
        f"{rows[long[0]]['response'][:60]!r}. Raise data.max_length to {worst}, choose a shorter target, set "
        "data.text_chars, or data.too_long: drop."
    )


def _shorter(writer: Writer, row: Mapping[str, Any], most: int) -> dict[str, Any] | None:
    """The row with less of its turns, context or text, so that it fits; None where only the answer would be left."""
    row = dict(row)
    while (excess := _size(writer, row) - most) > 0:
        if turns := turns_before(row):
            said = next((k for k, (role, _) in enumerate(turns) if role == "assistant"), len(turns))
            row["history"] = json.dumps(turns[said + 1 :], ensure_ascii=False) if turns[said + 1 :] else ""
            continue
        part = "context" if row["context"] else "text"
        row[part] = _cut(writer, row[part], excess)
        if not row["text"].strip():
            return None
    return row


def _size(writer: Writer, row: Mapping[str, Any]) -> int:
    return writer.tokens([row]).lengths[0]


def _cut(writer: Writer, text: str, excess: int) -> str:
    """The text without about `excess` tokens of its end, at least one character."""
    tokens = max(1, len(writer.tokenizer(text, add_special_tokens=False)["input_ids"]))
    return text[: min(len(text) - 1, len(text) * max(0, tokens - excess) // tokens)].rstrip()


def _replaced(rows: Dataset, changed: Mapping[int, Mapping[str, Any]]) -> Dataset:
    """The table with other values in some rows."""
    if not changed:
        return rows
    made = {name: list(rows[name][:]) for name in rows.column_names}
    for i, row in changed.items():
        for name in made:
            made[name][i] = row[name]
    return type(rows).from_dict(made, features=rows.features)
