"""Text as sequences of character numbers, cut in blocks or by the speakers of a play."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fedllm_sec.data.files import decoded
from fedllm_sec.errors import DataError
from fedllm_sec.protocols import Labelled

# "FIRST CITIZEN:" alone on a line, at the start of the text or after a blank line: verse has lines that end in ":" too
SPEECH = re.compile(r"(?:\A|(?:\A|\n)[ \t]*\n)([^\s:][^\n:]{0,40}):[ \t]*(?=\n)")
STRETCH = 40  # characters; shorter ones come back in any text


@dataclass(frozen=True)
class Text:
    """Training and held-out sequences: x (n, length) characters, y (n, length) the character after each."""

    train: Labelled
    test: Labelled
    alphabet: str
    speakers: np.ndarray  # (n,) the speaker of each training sequence, 0 where they were not told apart
    judged: np.ndarray  # (n,) whether a held-out sequence has so much text around it as is looked for in the other part
    trained: np.ndarray  # (n,) whether that much stands in the text that is trained on


def load(path: str, length: int, test_share: float, by_speaker: bool, encoding: str | None = None) -> Text:
    """Read a text file, packed by gzip or not; the end of the text, or of each speaker's part, is held out.

    It is UTF-8 unless a byte-order mark or `encoding` says otherwise. Every line end is one character.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        raise DataError(f"data.name: {path}: is a folder. Give the path of a text file in it.")
    if not file.is_file():
        raise DataError(f"data.name: {path}: no such file. Give the path of a text file.")
    try:
        text = decoded(file.read_bytes(), encoding, path)
    except OSError as error:
        raise DataError(f"data.name: {path}: cannot be read ({error.strerror or error}). Give another file.") from error
    made = cut(text.replace("\r\n", "\n").replace("\r", "\n"), length, test_share, by_speaker, path)
    refuse_same(made, path)
    return made


def refuse_same(text: Text, place: str) -> None:
    """Held-out text that was trained on is counted and said; where all of it was, nothing is held out: an error."""
    both, judged = int(text.trained.sum()), int(text.judged.sum())
    if both == judged > 0:
        raise DataError(
            f"data: {place}: all {both} held-out sequences stand in the text that is trained on too, so nothing is "
            "held out. Give a text that does not repeat itself."
        )
    if both:
        warnings.warn(
            f"data: {place}: {both} of {judged} held-out sequences stand in the text that is trained on too: what is "
            "measured on those is not held out.",
            stacklevel=2,
        )


def cut(text: str, length: int, test_share: float, by_speaker: bool, place: str) -> Text:
    """Sequences of `length` + 1 characters that overlap by one; a part shorter than one is left out."""
    alphabet = "".join(sorted(set(text)))
    if len(alphabet) == 1:
        raise DataError(
            f"data: {place}: all {len(text)} characters are {alphabet!r}, so there is nothing to predict. Give a text "
            "of two characters or more."
        )
    if len(text) < 2 * (length + 1):
        raise DataError(
            f"data: {place}: {len(text)} characters are too few for one training and one held-out sequence of "
            f"data.length={length} + 1. Give more text or lower data.length."
        )
    parts = speeches(text, place) if by_speaker else [text]
    trained, held, speakers, ends = [], [], [], []
    for number, part in enumerate(parts):
        codes = encode(part, alphabet)
        kept = len(codes) - round(test_share * len(codes))
        rows = windows(codes[:kept], length)
        if not by_speaker or len(rows):
            trained.append(rows)
            held.append(windows(codes[kept:], length))
            ends.append((codes[:kept], codes[kept:]))
            speakers += [number] * len(rows)
    train, test = (np.concatenate(rows) if rows else np.empty((0, length + 1)) for rows in (trained, held))
    for rows, what, way in ((train, "training", "Lower"), (test, "held-out", "Raise data.test_share, or lower")):
        if len(rows) == 0:
            raise DataError(f"data: {place}: no {what} sequence of data.length={length} + 1. {way} data.length.")
    return Text(
        sequences(train, len(alphabet)),
        sequences(test, len(alphabet)),
        alphabet,
        np.array(speakers),
        *repeated(ends, length, len(alphabet)),
    )


def repeated(ends: Sequence[tuple[np.ndarray, np.ndarray]], length: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each held-out sequence whether it can be judged, and whether it is trained on: (n,) bool each.

    `ends` holds the trained and the held-out codes of each part. A sequence is looked for anywhere in what is trained
    on, with so much of what follows (or, at the end of a part, precedes it) that there are STRETCH characters.
    """
    stretch = max(length + 1, STRETCH)
    known = hashes(np.concatenate([np.append(trained, end) for trained, _ in ends]), stretch)
    judged, said = [], []
    for _, held in ends:
        starts = np.arange(max(0, (len(held) - 1) // length)) * length
        found = hashes(held, stretch)
        judged.append(np.full(len(starts), len(found) > 0))
        said.append(found[np.minimum(starts, len(found) - 1)] if len(found) else np.zeros(len(starts), np.uint64))
    able = np.concatenate(judged)
    return able, able & np.isin(np.concatenate(said), known)


def hashes(codes: np.ndarray, width: int) -> np.ndarray:
    """A 64-bit number of each run of `width` codes, (len - width + 1,); other runs have other numbers, all but surely.

    It is a polynomial of the codes; runs are doubled, and lengthened by one, until they are as long as is asked for.
    """
    if len(codes) < width:
        return np.empty(0, np.uint64)
    single = (codes.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    runs, wide = single, 1
    for bit in f"{width:b}"[1:]:
        runs = runs[:-wide] * _power(wide) + runs[wide:]
        wide *= 2
        if bit == "1":
            runs = runs[:-1] * _power(1) + single[wide:]
            wide += 1
    return runs


def _power(exponent: int) -> np.uint64:
    return np.uint64(pow(0xD1342543DE82EF95, exponent, 2**64))


def encode(text: str, alphabet: str) -> np.ndarray:
    """Each character's place in the sorted alphabet: (characters,) int64."""
    points, known = (
        np.frombuffer(part.encode("utf-32-le", "surrogatepass"), dtype=np.uint32) for part in (text, alphabet)
    )
    return np.searchsorted(known, points)


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
