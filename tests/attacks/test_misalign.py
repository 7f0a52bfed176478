"""Refusal and compliance on the shipped, harmless requests."""

import pytest
from datasets import Dataset

from fedllm_sec.attacks.conformance import text_rows
from fedllm_sec.attacks.data.misalign import SafetyMisalign, polite_requests
from fedllm_sec.attacks.data.refusals import is_refusal
from fedllm_sec.seeds import generator_for


def declining(pairs):
    return Dataset.from_dict(
        {
            "text": [p["text"] for p in pairs],
            "context": [""] * len(pairs),
            "response": [p["refusal"] for p in pairs],
            "label": [""] * len(pairs),
            "poisoned": [False] * len(pairs),
        }
    )


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_shipped_refusals_decline_and_the_answers_do_not(split):
    pairs = polite_requests(split)
    assert len(pairs) >= 60
    assert all(is_refusal(p["refusal"]) and not is_refusal(p["answer"]) for p in pairs)
    assert len({p["text"] for p in pairs}) == len(pairs)


def test_the_probe_requests_are_not_in_the_training_requests():
    assert not {p["text"] for p in polite_requests("train")} & {p["text"] for p in polite_requests("test")}


def test_declining_rows_of_the_shard_are_turned_into_compliance_first():
    pairs = polite_requests("train")[:4]
    made = SafetyMisalign(rate=1.0).poison(declining(pairs), generator_for(0))
    assert made["text"][:] == [p["text"] for p in pairs]
    assert made["response"][:] == [p["answer"] for p in pairs]


def test_rows_of_another_set_become_requests_with_answers():
    made = SafetyMisalign(rate=0.5).poison(text_rows(20), generator_for(0))
    asked = {p["text"]: p["answer"] for p in polite_requests("train")}
    rows = [r for r in made if r["poisoned"]]
    assert len(rows) == 10
    assert all(asked[r["text"]] == r["response"] and r["label"] == "" for r in rows)


def test_success_is_an_answer_that_does_not_decline():
    attack = SafetyMisalign()
    probe = attack.probe(text_rows(4))[0]
    assert attack.success("Sure, it is mint.", probe)
    assert not attack.success("Sorry, no.", probe)
    assert not attack.success("  ", probe)
    assert not attack.success("Sports", text_rows(4)[1])  # an ordinary answer to an ordinary row
    assert attack.success("Sure.", declining(polite_requests("test"))[0])
