"""Text as sequences of character numbers, cut in blocks or by the speakers of a play."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fedllm_sec.errors import DataError
from fedllm_sec.protocols import Labelled

# "FIRST CITIZEN:" alone on a line, at the start of the text or after a blank line: verse has lines that end in ":" too
SPEECH = re.compile(r"(?:\A|(?:\A|\n)[ \t]*\n)([^\s:][^\n:]{0,40}):[ \t]*(?=\n)")


@dataclass(frozen=True)
class Text:
    """Training and held-out sequences: x (n, length) characters, y (n, length) the character after each."""

    train: Labelled
    test: Labelled
    alphabet: str
    speakers: np.ndarray  # (n,) the speaker of each training sequence, 0 where they were not told apart


def load(path: str, length: int, test_share: float, by_speaker: bool) -> Text:
    """Read a UTF-8 file; the end of the text, or of each speaker's part, is held out."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(f"data.name: {path}: no such file. Give the path of a text file.")
    try:
        text = file.read_text(encoding="utf-8-sig")  # a byte-order mark is no character of the text
    except UnicodeDecodeError as error:
        raise DataError(f"data.name: {path}: is not UTF-8 text ({error}).") from error
    return cut(text, length, test_share, by_speaker, path)


def cut(text: str, length: int, test_share: float, by_speaker: bool, place: str) -> Text:
    """Sequences of `length` + 1 characters that overlap by one; a part shorter than one is left out."""
    alphabet = "".join(sorted(set(text)))
    if len(text) < 2 * (length + 1) or len(alphabet) < 2:
        raise DataError(
            f"data: {place}: {len(text)} characters are too few for one training and one held-out sequence of "
            f"data.length={length} + 1. Give more text or lower data.length."
        )
    parts = speeches(text, place) if by_speaker else [text]
    trained, held, speakers = [], [], []
    for number, part in enumerate(parts):
        codes = encode(part, alphabet)
        kept = len(codes) - round(test_share * len(codes))
        rows = windows(codes[:kept], length)
        if not by_speaker or len(rows):
            trained.append(rows)
            held.append(windows(codes[kept:], length))
            speakers += [number] * len(rows)
    train, test = (np.concatenate(rows) if rows else np.empty((0, length + 1)) for rows in (trained, held))
    for rows, what, way in ((train, "training", "Lower"), (test, "held-out", "Raise data.test_share, or lower")):
        if len(rows) == 0:
            raise DataError(f"data: {place}: no {what} sequence of data.length={length} + 1. {way} data.length.")
    return Text(sequences(train, len(alphabet)), sequences(test, len(alphabet)), alphabet, np.array(speakers))


def encode(text: str, alphabet: str) -> np.ndarray:
    """Each character's place in the sorted alphabet: (characters,) int64."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    return np.searchsorted(np.frombuffer(alphabet.encode("utf-32-le"), dtype=np.uint32), points)


def windows(codes: np.ndarray, length: int) -> np.ndarray:
    """(n, length + 1): the last character of a row is the first of the next; a remainder is dropped."""
    count = max(0, (len(codes) - 1) // length)
    return codes[np.arange(count)[:, None] * length + np.arange(length + 1)]


def sequences(rows: np.ndarray, characters: int) -> Labelled:
    both = torch.from_numpy(rows.astype(np.int64))
    return Labelled(
        both[:, :-1].contiguous(), both[:, 1:].contiguous(), characters, torch.zeros(len(both), dtype=torch.bool)
    )


def speeches(text: str, place: str) -> list[str]:
    """All that each speaker says, one string a speaker, in order of first appearance.

    A speech goes from the line after the name to the next name; what stands before the first name is nobody's.
    """
    names = list(SPEECH.finditer(text))
    ends = [*(name.start(1) for name in names[1:]), len(text)]
    said: dict[str, list[str]] = {}
    for name, end in zip(names, ends, strict=False):
        said.setdefault(name[1], []).append(text[name.end() + 1 : end])
    if not said:
        raise DataError(
            f'data.by_speaker: {place} has no line such as "FIRST CITIZEN:" that starts a speech. '
            "Set data.by_speaker: false."
        )
    return ["".join(parts) for parts in said.values()]
