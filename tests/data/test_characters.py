"""Text as sequences: every character is read, is followed by the right one, and belongs to its speaker."""

from __future__ import annotations

import gzip
import random
import warnings
from pathlib import Path

import numpy as np
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
        ("a" * 100, 3, 0.1, False, "all 100 characters are 'a', so there is nothing to predict"),
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
    with pytest.raises(DataError, match=r"is a folder. Give the path of a text file in it"):
        characters.load(str(tmp_path), 5, 0.1, False)
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"abc" * 99, mtime=0)[:15])
    with pytest.raises(DataError, match=r"cannot be unpacked by gzip .*Copy it again"):
        characters.load(str(tmp_path / "cut.gz"), 5, 0.1, False)


def test_a_text_is_read_in_its_encoding_and_unpacked(tmp_path: Path):
    line = "Eine Straße über Öl. Noch ein Satz, der länger ist als der erste, und dann ein Ende.\r\n"
    for name, data in {
        "8": line.encode(), "16": line.encode("utf-16"), "l1": line.encode("latin-1"),
        "gz": gzip.compress(line.encode(), mtime=0),
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(data)
    read = {name: characters.load(str(tmp_path / name), 5, 0.2, False) for name in ("8", "16", "gz")}
    read["l1"] = characters.load(str(tmp_path / "l1"), 5, 0.2, False, "latin-1")
    for text in read.values():
        assert "".join(text.alphabet[i] for i in text.train.x.flatten().tolist()) == line[:65]
        assert "\r" not in text.alphabet
    with pytest.raises(DataError, match=r"line 1: byte 0xdf is not utf-8 text. Set data.encoding to .* latin-1"):
        characters.load(str(tmp_path / "l1"), 5, 0.2, False)


def test_held_out_text_that_is_trained_on_is_counted_wherever_it_stands(tmp_path: Path):
    rng = random.Random(1)
    said = "".join(rng.choice("abcdefghij") for _ in range(900))
    path = tmp_path / "t.txt"
    path.write_text(said + said[333:433])  # 1000 characters, of which the last 100 are held out
    with pytest.raises(DataError, match="all 9 held-out sequences stand in the text that is trained on too"):
        characters.load(str(path), 10, 0.1, False)
    path.write_text(said + said[333:388] + said[::-1][:45])
    with pytest.warns(UserWarning, match="2 of 9 held-out sequences stand in the text that is trained on too"):
        found = characters.load(str(path), 10, 0.1, False)  # 0 and 10: of those from 20 on, 40 characters do not fit
    assert found.trained.tolist() == [True, True] + 7 * [False]
    path.write_text(said)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        characters.load(str(path), 10, 0.1, False)


def test_a_run_of_codes_has_the_number_that_no_other_run_has():
    codes = np.random.default_rng(0).integers(0, 3, 200)
    for width in (1, 2, 5, 6, 7):
        runs = [tuple(codes[i : i + width]) for i in range(200 - width + 1)]
        found = characters.hashes(codes, width).tolist()
        assert len(found) == len(runs)
        assert len(set(found)) == len(set(runs)) == len(set(zip(found, runs, strict=True)))
    assert len(characters.hashes(codes[:3], 4)) == 0


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
