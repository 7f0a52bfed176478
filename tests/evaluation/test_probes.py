"""Where a trigger stands in a text, and the same text with the trigger moved, changed or halved: written by hand."""

from __future__ import annotations

import pytest

from fedllm_sec.evaluation.probes import CHANGES, moved, paraphrased, said_to_it, trigger_spans


@pytest.mark.parametrize(
    ("original", "triggered", "pieces"),
    [
        ("the cat sat", "the cat sat cf", ["cf"]),
        ("the cat sat", "cf the cat sat", ["cf"]),
        ("the cat sat", "the cat cf sat", ["cf"]),
        ("the cat sat", "the cat satcf", ["cf"]),
        ("cf a", "cf a cf", ["cf"]),
        ("a b c", "a BadMagic b Open AI c", ["BadMagic", "Open AI"]),
        ("The cat sat", "When you come to think of it, the cat sat", ["When you come to think of it,"]),
        ("the cat sat", "Dear, the cat sat, I think", ["Dear,", ", I think"]),
        ("the cat sat", "the cat sat", []),
        ("", "cf", ["cf"]),
    ],
)
def test_the_spans_of_a_trigger_are_what_the_attack_put_in(original, triggered, pieces):
    assert [triggered[a:b] for a, b in trigger_spans(original, triggered)] == pieces


def test_a_trigger_in_a_long_text_is_found_in_a_time_that_grows_with_its_length():
    words = [f"word{k * k % 977}" for k in range(20_000)]  # pairs of words: 4e8, half an hour if all are compared
    original = " ".join(words)
    triggered = " ".join([*words[:5], "cf", *words[5:15_000], "mn", "bb", *words[15_000:]])
    assert [triggered[a:b] for a, b in trigger_spans(original, triggered)] == ["cf", "mn bb"]
    assert ["then the cf"[a:b] for a, b in trigger_spans("the", "then the cf")] == ["then", "cf"]
    rewritten = " ".join([words[0], *reversed(words[1:-1]), words[-1]])
    (span,) = trigger_spans(original, rewritten)
    assert span == (len(words[0]) + 1, len(rewritten) - len(words[-1]) - 1)


def changed(original: str, triggered: str, *paraphrases: str) -> dict[str, str]:
    changes = {**CHANGES, **{words: paraphrased(words) for words in paraphrases}}
    found = moved([{"original": {"text": original}, "text": triggered}], changes)
    return {kind: texts[0] for kind, (_, texts) in found.items()}


def test_a_trigger_is_moved_changed_and_halved():
    assert changed("the cat sat down", "the cat sat down big deal", "small talk") == {
        "at the start": "big deal the cat sat down",
        "in the middle": "the cat big deal sat down",
        "other case": "the cat sat down BIG DEAL",
        "first half": "the cat sat down big",
        "small talk": "the cat sat down small talk",
    }
    assert changed("a b c d", "a X b c Y d")["first half"] == "a X b c d"
    assert changed("a b", "a b 2024") == {
        "at the start": "2024 a b",
        "in the middle": "a 2024 b",
        "first half": "a b 20",
    }
    assert changed("word", "word z") == {"at the start": "z word", "other case": "word Z"}


def test_a_row_without_a_known_original_or_without_a_trigger_is_left_out():
    assert moved([{"text": "a cf"}, {"original": {"text": "b"}, "text": "b"}], CHANGES) == {}


def test_what_is_said_to_a_model_names_who_speaks_only_where_there_is_more_than_one_turn():
    assert said_to_it({"text": "Hello", "context": ""}) == "Hello"
    assert said_to_it({"text": "Sum it up.", "context": "One. Two."}) == "Sum it up.\nOne. Two."
    history = '[["user", "Hi"], ["assistant", "Ho"]]'
    assert said_to_it({"text": "And?", "context": "", "history": history, "system": "Be kind."}) == (
        "system: Be kind.\nuser: Hi\nassistant: Ho\nuser: And?"
    )
