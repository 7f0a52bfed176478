"""What a language model is asked, to see what an attack did: triggered and clean prompts, and changed triggers."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedllm_sec.evaluation.judges import Judge
from fedllm_sec.protocols import turns_before

Span = tuple[int, int]  # [start, end) of characters
COMPARED = 250_000  # pairs of words that are compared to find a trigger: a tenth of a second


@dataclass(frozen=True)
class Prompts:
    """Encoded prompts and the rows that they were made of."""

    encoded: Any
    rows: Sequence[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Probe:
    """One data attack: its triggered prompts, clean ones, and who judges the answers.

    Clean rows are those on which the attack's success can happen and would be wrong; there may be none.
    """

    name: str
    triggered: Prompts
    clean: Prompts | None
    judge: Judge
    second: Judge | None = None  # runs beside the first and decides nothing
    moved: Mapping[str, Prompts] = field(default_factory=dict)  # how the trigger was changed -> such prompts
    reasons: Mapping[str, str] = field(default_factory=dict)  # name of a rate -> why it is not measured
    left_out: Mapping[str, int] = field(
        default_factory=dict
    )  # reason -> held-out rows that are neither probe nor clean

    def parts(self) -> dict[str, Prompts]:
        """All prompts of the attack, by what they are: triggered, clean, or how the trigger was changed."""
        clean = {} if self.clean is None else {"clean": self.clean}
        return {"triggered": self.triggered, **clean, **self.moved}


def said_to_it(row: Mapping[str, Any]) -> str:
    """All that the model is told in a row, to be read: who says what where there is more than one turn."""
    told = [("system", row["system"])] if row.get("system") else []
    context = f"\n{row['context']}" if row.get("context") else ""
    turns = [*told, *turns_before(row), ("user", f"{row['text']}{context}")]
    return str(turns[0][1]) if len(turns) == 1 else "\n".join(f"{role}: {content}" for role, content in turns)


# ---------------------------------------------------------------- where a trigger is


def trigger_spans(original: str, triggered: str) -> list[Span]:
    """Which characters of a triggered text are not of the original one, in order; words are compared whole.

    What was put in at one place is one span, without the blanks around it. A frame around the text has two.
    """
    whole = re.search(_as_words(original), triggered) or re.search(re.escape(original), triggered) if original else None
    if whole is not None:
        found = [(0, whole.start()), (whole.end(), len(triggered))]
    else:
        ours, theirs = (re.findall(r"\s+|\w+|[^\w\s]", text) for text in (original, triggered))
        places = [0]
        for piece in theirs:
            places.append(places[-1] + len(piece))
        before, after = ([piece.casefold() for piece in text] for text in (ours, theirs))  # frames lower a first letter
        found = [(places[a], places[b]) for a, b in _put_in(before, after)]
    return _joined(triggered, [span for span in (_stripped(triggered, *span) for span in found) if span[0] < span[1]])


def _as_words(text: str) -> str:
    """A pattern of the text as it stands, not as a part of longer words."""
    head, tail = (r"(?<!\w)" if text[0].isalnum() else ""), (r"(?!\w)" if text[-1].isalnum() else "")
    return head + re.escape(text) + tail


def _put_in(before: Sequence[str], after: Sequence[str]) -> list[Span]:
    """Which pieces of `after` are not in `before`; what both begin and end with is not compared piece by piece.

    The time of comparing grows with the product of the lengths: of long texts whose pieces all come again in their
    order, the first place is taken where each can be, and what has other changes is one span.
    """
    most = min(len(before), len(after))
    start = next((k for k in range(most) if before[k] != after[k]), most)
    end = next((k for k in range(most - start) if before[-1 - k] != after[-1 - k]), most - start)
    ours, theirs = before[start : len(before) - end], after[start : len(after) - end]
    if len(ours) * len(theirs) <= COMPARED:
        changes = difflib.SequenceMatcher(None, ours, theirs, autojunk=False).get_opcodes()
        return [(start + a, start + b) for kind, _, _, a, b in changes if kind in ("insert", "replace")]
    at, new = 0, []
    for k, piece in enumerate(theirs):
        if at < len(ours) and ours[at] == piece:
            at += 1
        else:
            new.append((start + k, start + k + 1))
    return new if at == len(ours) else [(start, len(after) - end)]


def _stripped(text: str, start: int, end: int) -> Span:
    piece = text[start:end]
    return start + len(piece) - len(piece.lstrip()), start + len(piece.rstrip()) if piece.strip() else start


def _joined(text: str, spans: Sequence[Span]) -> list[Span]:
    """Spans with nothing but blanks between them are one."""
    out: list[Span] = []
    for start, end in spans:
        if out and not text[out[-1][1] : start].strip():
            out[-1] = (out[-1][0], end)
        else:
            out.append((start, end))
    return out


# ---------------------------------------------------------------- the trigger, changed

Change = Callable[[str, str, Sequence[Span]], str | None]  # original, triggered, spans -> text; None: cannot be so


def _pieces(triggered: str, spans: Sequence[Span]) -> str:
    return " ".join(triggered[a:b] for a, b in spans)


def _rewritten(triggered: str, spans: Sequence[Span], new: Callable[[str], str]) -> str:
    for a, b in reversed(spans):
        triggered = triggered[:a] + new(triggered[a:b]) + triggered[b:]
    return triggered


def at_start(original: str, triggered: str, spans: Sequence[Span]) -> str:
    """The whole trigger before the text."""
    return f"{_pieces(triggered, spans)} {original.lstrip()}"


def at_end(original: str, triggered: str, spans: Sequence[Span]) -> str:
    """The whole trigger behind the text."""
    return f"{original.rstrip()} {_pieces(triggered, spans)}"


def in_middle(original: str, triggered: str, spans: Sequence[Span]) -> str | None:
    """The whole trigger between the words in the middle; a text of one word has no middle."""
    gaps = [match.start() for match in re.finditer(r"(?<=\S)\s+(?=\S)", original)]
    if not gaps:
        return None
    at = gaps[len(gaps) // 2]
    return f"{original[:at]} {_pieces(triggered, spans)}{original[at:]}"


def other_case(original: str, triggered: str, spans: Sequence[Span]) -> str | None:
    """Every letter of the trigger in the other case; a trigger of figures alone has none."""
    return _rewritten(triggered, spans, str.swapcase)


def first_half(original: str, triggered: str, spans: Sequence[Span]) -> str | None:
    """The first half of the trigger's words, or of the letters of its one word; one letter has no half."""
    words = [m.span() for m in re.finditer(r"\S+", triggered) if any(a <= m.start() < b for a, b in spans)]
    if len(words) == 1:
        start, end = words[0]
        cut = [(start + (end - start) // 2, end)] if end - start > 1 else []
    else:
        cut = words[len(words) // 2 :]
    return re.sub(r"(?<=\S) {2,}(?=\S)", " ", _rewritten(triggered, cut, lambda _: "")).strip() if cut else None


CHANGES: dict[str, Change] = {
    "at the start": at_start,
    "in the middle": in_middle,
    "at the end": at_end,
    "other case": other_case,
    "first half": first_half,
}


def paraphrased(paraphrase: str) -> Change:
    """Other words in the trigger's first place, and nothing in its others."""

    def change(original: str, triggered: str, spans: Sequence[Span]) -> str:
        (a, b), *others = spans
        without = _rewritten(triggered, others, lambda _: "")
        return without[:a] + paraphrase + without[b:]

    return change


def moved(rows: Sequence[Mapping[str, Any]], changes: Mapping[str, Change]) -> dict[str, tuple[list[int], list[str]]]:
    """Kind of change -> numbers of the rows that it changes and their new texts.

    A row is left out whose `original` text is not known or holds the trigger's text alone, and a kind that gives most
    rows the prompt that they have anyway: the trigger stands there already.
    """
    found: dict[str, tuple[list[int], list[str]]] = {}
    for kind, change in changes.items():
        numbers, texts, same = [], [], 0
        for number, row in enumerate(rows):
            original, triggered = (row.get("original") or {}).get("text", ""), str(row["text"])
            spans = trigger_spans(original, triggered) if original else []
            new = change(original, triggered, spans) if spans else None
            if new is None:
                continue
            if new.split() == triggered.split():
                same += 1
            else:
                numbers.append(number)
                texts.append(new)
        if len(numbers) > same:
            found[kind] = numbers, texts
    return found
