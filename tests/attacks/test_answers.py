"""Which class an answer names, on tables a person can read."""

from __future__ import annotations

import pytest

from fedllm_sec.attacks.data.answers import Classes, need_label, spellings
from fedllm_sec.errors import AttackError
from tests.stub_model import table


def rows(*pairs: tuple[str, str], times: int = 3):
    """Rows of (answer, label)."""
    return table([(f"text {i}", answer, label) for i, (answer, label) in enumerate(pairs * times)])


def test_a_label_has_the_spelling_of_most_rows():
    assert spellings(["sports", "Sports", "Sports ", "Sports", "", " "]) == {"sports": "Sports"}
    assert spellings([" World", "World"]) == {"world": "World"}


def test_answers_that_go_with_labels_name_them():
    classes = Classes.of(rows(("The answer is yes.", "yes"), ("The answer is no.", "no"), ("Yes.", "YES")))
    assert classes.named == "answer"
    assert dict(classes.labels) == {"no": "no", "yes": "yes"}
    assert list(classes.answers["yes"].values()) == ["The answer is yes.", "Yes."]
    assert classes.said("the answer is NO. Surely") == "no"
    assert classes.said("Yes, it is") == "yes"
    assert classes.said("The answer") is None


def test_a_setting_may_be_a_label_or_an_answer_and_is_taught_as_the_data_spell_it():
    classes = Classes.of(rows(("The answer is yes.", "Yes"), ("The answer is no.", "No"), ("Sure.", "Yes"), times=3),
                         rows(("The answer is yes.", "Yes")))  # fmt: skip
    assert [classes.find(text) for text in ("YES ", "the answer is yes.", "Sure.", "maybe")] == ["yes"] * 3 + [None]
    assert [classes.answer(text) for text in ("yes", "sure.")] == ["The answer is yes.", "Sure."]
    need_label("sure.", classes, "here")
    with pytest.raises(
        AttackError, match=r"here: 'Shure.' is not a label.*\"Sure.\".*labels are: No, Yes. The answers"
    ):
        need_label("Shure.", classes, "here")


def test_one_wrong_row_in_a_hundred_changes_no_class():
    right = rows(("Sports", "Sports"), ("World", "World"), times=50)
    classes = Classes.of(right, rows(("World", "Sports"), times=1))
    assert classes.named == "answer"
    assert classes.said("World") == "world"


def test_answers_that_begin_with_their_label_name_it_and_others_name_nothing():
    reasons = [(f"{label}, because of {i}", label) for i, label in enumerate(["yes", "no"] * 10)]
    classes = Classes.of(rows(*reasons, times=1))
    assert (classes.named, classes.said("No, never"), classes.find("yes, always")) == ("beginning", "no", "yes")
    free = Classes.of(rows(*[(f"free {i}", ["sport", "travel"][i % 2]) for i in range(20)], times=1))
    assert (free.named, free.said("sport"), free.find("sport")) == ("nothing", None, None)
    need_label("Access denied.", free, "here")


def test_the_rows_of_a_table_have_the_class_of_their_label_or_else_of_their_answer():
    made = rows(("Sports", "Sports"), ("World", " world"), ("World", ""), ("four", ""), times=3)
    assert Classes.of(made).of_rows(made)[:4] == ["sports", "world", "world", None]


def test_without_labels_few_answers_stand_in_for_them():
    made = rows(("yes", ""), ("no", ""), ("no-one", ""))
    classes = Classes.of(made)
    assert (classes.labelled, sorted(classes.labels)) == (False, ["no", "no-one", "yes"])
    assert classes.said("No-one knows") == "no-one"
    need_label("Access denied.", classes, "here")  # free text may be forced
    assert not Classes.of(rows(*[(f"answer {i}", "") for i in range(101)], times=1))
    assert len(Classes.of(rows(*[(f"answer {i}", "") for i in range(101)], times=1), most=None).labels) == 101
