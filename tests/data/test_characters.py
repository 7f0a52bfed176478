"""Text as sequences: every character is read, is followed by the right one, and belongs to its speaker."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedllm_sec.data import characters
from fedllm_sec.data.partition import by_block, by_speaker, split_rows
from fedllm_sec.errors import DataError

PLAY = """FIRST:
aaaa aaaa
To them: bbb

SECOND CITIZEN:
cccc cccc cccc

FIRST:
dddd dddd
"""


def test_sequences_overlap_by_one_and_the_end_is_held_out():
    text = characters.cut("abcdefghij" * 2, 3, 0.35, False, "here")
    assert text.alphabet == "abcdefghij"
    assert text.train.x.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 0, 1]]
    assert text.train.y.tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9], [0, 1, 2]]
    assert text.test.x.tolist() == [[3, 4, 5], [6, 7, 8]]
    assert text.train.classes == 10


def test_letters_beyond_ascii_are_single_characters():
    text = characters.cut("äß€😀" * 5, 3, 0.3, False, "here")
    assert text.train.classes == 4
    assert text.alphabet[int(text.train.x[0, 0])] == "ä"


def test_a_speaker_has_what_he_says_in_all_his_speeches():
    said = characters.speeches(PLAY, "here")
    assert said == ["aaaa aaaa\nTo them: bbb\n\ndddd dddd\n", "cccc cccc cccc\n\n"]
    text = characters.cut(PLAY, 3, 0.25, True, "here")
    letters = {"c": 1, "a": 0, "d": 0}
    for row, speaker in zip(text.train.x, text.speakers, strict=True):
        for letter in (text.alphabet[i] for i in row.tolist()):
            assert letters.get(letter, speaker) == speaker


def test_a_verse_line_that_ends_in_a_colon_is_no_speaker():
    said = characters.speeches("ROMEO:\nI say this:\nnever go.\n\nJULIET:\nHo.\n", "here")
    assert said == ["I say this:\nnever go.\n\n", "Ho.\n"]


def test_a_name_stands_at_the_start_or_after_a_line_of_blanks_and_may_say_nothing():
    said = characters.speeches("\nA:  \n\nB:\nhi\n \t\nC:\nx\n\n\nA:\ny", "here")
    assert said == ["\ny", "hi\n \t\n", "x\n\n\n"]
    assert characters.speeches("a prologue\n\nA:\ny", "here") == ["y"]


@pytest.mark.parametrize(
    ("text", "length", "share", "speaker", "words"),
    [
        ("abc", 3, 0.1, False, "3 characters are too few"),
        ("a" * 100, 3, 0.1, False, "too few"),
        ("abcdefghij" * 2, 3, 0.05, False, "no held-out sequence.*test_share"),
        ("abc " * 20, 3, 0.2, True, "no line such as"),
    ],
)
def test_text_that_cannot_be_used_is_refused(text, length, share, speaker, words):
    with pytest.raises(DataError, match=words):
        characters.cut(text, length, share, speaker, "here")


def test_a_file_must_be_there_and_be_text(tmp_path: Path):
    with pytest.raises(DataError, match="no such file"):
        characters.load(str(tmp_path / "none.txt"), 5, 0.1, False)
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00abc" * 9)
    with pytest.raises(DataError, match="not UTF-8"):
        characters.load(str(tmp_path / "bad.txt"), 5, 0.1, False)


def test_a_byte_order_mark_is_no_character_of_the_text(tmp_path: Path):
    (tmp_path / "marked.txt").write_text("abcd" * 20, encoding="utf-8-sig")
    assert characters.load(str(tmp_path / "marked.txt"), 5, 0.2, False).alphabet == "abcd"


def test_the_real_text_has_65_characters(shared: Path):
    text = characters.load(str(shared / "data/tinyshakespeare.txt"), 80, 0.1, True)
    assert text.train.classes == 65
    assert len(text.train.y) > 9_000
    assert len(set(text.speakers.tolist())) > 100
    play = (shared / "data/tinyshakespeare.txt").read_text()
    said = characters.speeches(play, "here")
    assert len(said) == 309
    names = [match[1] for match in characters.SPEECH.finditer(play)]
    assert sum(map(len, said)) + sum(len(f"{name}:\n") for name in names) == len(play)  # no line is lost


def test_blocks_are_runs_and_each_speaker_has_one_client():
    import numpy as np

    labels = np.array([0, 0, 1, 1, 1, 2, 3, 3])
    blocks = split_rows(by_block, labels, 3, np.random.default_rng(0))
    assert sorted(b.tolist() for b in blocks) == [[0, 1, 2], [3, 4, 5], [6, 7]]
    owned = split_rows(by_speaker, labels, 3, np.random.default_rng(0))
    assert sorted(i for rows in owned for i in rows.tolist()) == list(range(8))
    for speaker in range(4):
        assert sum(speaker in labels[rows] for rows in owned) == 1
    with pytest.raises(DataError, match="4 speakers for 5 clients"):
        by_speaker(labels, 5, np.random.default_rng(0))
