"""What a translated recipe means: nothing is called the same that is not, and no secret is shown."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fedllm_sec.algorithms import fedopt
from fedllm_sec.build.names import checked
from fedllm_sec.build.threat import client_ids, make_threat
from fedllm_sec.fedml.defense import DEFENSES
from fedllm_sec.fedml.notes import READ
from fedllm_sec.fedml.threat import ATTACKS
from fedllm_sec.fedml.translate import KEYS, SECTIONS, translate
from fedllm_sec.protocols import Client
from fedllm_sec.recipe.__main__ import main
from fedllm_sec.rounds.cohort import sample
from fedllm_sec.seeds import generator_for
from tests.conftest import ROOT
from tests.fedml.test_translate import RULES, config, kinds, must_work, write

FLIP = {"attack_type": "byzantine", "attack_mode": "flip", "byzantine_client_num": 2}
OFF: tuple[dict[str, Any], dict[str, Any]] = ({"enable_attack": False}, {"enable_defense": False})


def of(total: int, per_round: int, **more: Any) -> dict[str, Any]:
    return {"client_num_in_total": total, "client_num_per_round": per_round, **more}


# ---------------------------------------------------------------- who attacks


def attackers_by_round(raw: dict[str, Any]) -> list[int]:
    """How many attackers stand in the cohort of each round of the translated recipe."""
    recipe = checked(translate(raw)[0])
    threat = make_threat(recipe)
    assert threat is not None
    clients, found = [Client(id, None) for id in client_ids(recipe)], []
    for r in range(1, recipe.rounds + 1):
        cohort = sample(clients, recipe.clients.per_round, generator_for(recipe.seed, r, "cohort"))
        found.append(sum(client.id in threat.attackers(r) for client in cohort))
    return found


def test_two_attackers_of_ten_in_each_round_stay_two_on_average_where_a_hundred_are_sampled():
    raw = config(FLIP, OFF[1], train_args=of(100, 10, comm_round=200))
    recipe, notes = translate(raw)
    assert recipe["attack"]["malicious"] == {"count": 20, "redraw": True}
    assert "2 among the 10 clients of each round; here 20 of all 100" in kinds(notes, "differs")["byzantine_client_num"]
    found = attackers_by_round(raw)
    assert 1.8 < sum(found) / 200 < 2.2  # 0.2 when two of all hundred were drawn


def test_all_clients_in_each_round_give_exactly_fedmls_number_and_no_difference():
    raw = config(FLIP, OFF[1], train_args=of(10, 10))
    recipe, notes = translate(raw)
    assert recipe["attack"]["malicious"] == {"count": 2, "redraw": True}
    assert "byzantine_client_num" in kinds(notes, "translated")
    assert set(attackers_by_round(raw)) == {2}


def test_fedmls_own_example_with_a_thousand_clients_is_attacked():
    raw = config(FLIP | {"byzantine_client_num": 1}, OFF[1], train_args=of(1000, 4, comm_round=10))
    recipe, _ = translate(raw)
    assert recipe["attack"]["malicious"]["count"] == 250
    must_work(recipe)
    assert sum(n > 0 for n in attackers_by_round(raw)) >= 5


@pytest.mark.parametrize("place", [{}, {"malicious_client_id": 4}])
def test_model_replacement_keeps_one_attacker_a_round_on_average(place: dict[str, int]):
    recipe, notes = translate(config({"attack_type": "model_replacement", **place}, OFF[1], train_args=of(100, 10)))
    assert recipe["attack"]["malicious"] == {"count": 10, "redraw": True}
    assert "here 10 of all 100 are drawn" in " ".join(kinds(notes, "differs").values())


def test_more_attackers_than_clients_of_a_round_are_all_of_them_as_in_fedml():
    recipe, _ = translate(config(FLIP | {"byzantine_client_num": 40}, OFF[1], train_args=of(100, 10)))
    assert recipe["attack"]["malicious"]["count"] == 100


def test_more_clients_in_a_round_than_there_are_means_all():
    recipe, _ = translate(config(FLIP, OFF[1], train_args=of(10, 30)))
    assert "per_round" not in recipe["clients"]
    must_work(recipe)


# ---------------------------------------------------------------- the server's optimizer


@pytest.mark.parametrize(
    ("given", "beta1", "kind"),
    [
        ({"server_optimizer": "sgd"}, 0.0, None),
        ({}, 0.0, None),
        ({"server_optimizer": "sgd", "server_momentum": 0.5}, 0.5, "differs"),
        ({"server_optimizer": "adam", "server_momentum": 0.0}, None, "ignored"),
        ({"server_optimizer": "yogi", "server_momentum": 0.3}, None, "ignored"),
        ({"server_optimizer": "adagrad"}, 0.0, None),
    ],
)
def test_the_server_has_the_momentum_that_fedmls_has(given: dict[str, Any], beta1: float | None, kind: str | None):
    recipe, notes = translate(config(*OFF, train_args={"federated_optimizer": "FedOpt", "server_lr": 1.0, **given}))
    assert recipe["algorithm"].get("beta1") == beta1
    assert kind is None or "server_momentum" in kinds(notes, kind)
    must_work(recipe)


def test_ten_equal_updates_move_fedopts_sgd_ten_steps_and_not_many_times_as_far():
    recipe, _ = translate(config(*OFF, train_args={"federated_optimizer": "FedOpt", "server_optimizer": "sgd"}))
    settings = {key: value for key, value in recipe["algorithm"].items() if key != "name"}
    server, x = fedopt(**settings).server, torch.zeros(1)
    for _ in range(10):
        x = server(x, torch.ones(1), None)  # type: ignore[arg-type]
    assert x.item() == 10.0  # 58.6 with momentum 0.9


# ---------------------------------------------------------------- what only looks the same


@pytest.mark.parametrize(
    ("model", "words"), [("lr", "sigmoid on the logits"), ("lenet", "20 and 50 channels"), ("resnet18_gn", "7x7 stem")]
)
def test_models_of_one_name_that_are_other_nets_differ(model: str, words: str):
    assert words in kinds(translate(config(*OFF, model_args={"model": model}))[1], "differs")["model"]


def test_use_memory_is_never_read_there():
    for value in (True, False):
        recipe, notes = translate(config(OFF[0], {"defense_type": "foolsgold", "use_memory": value}))
        assert recipe["defense"] == {"rule": {"name": "foolsgold"}}
        assert "never reads it" in kinds(notes, "ignored")["use_memory"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("3sigma", "to the mean of the models it kept the last time"),
        ("anomaly_detection", "to the mean of the models it kept the last time"),
        ("robust_learning_rate", "in MPI simulation it votes on models"),
        ("weak_dp", "fails in MPI simulation"),
    ],
)
def test_a_defense_says_what_fedmls_really_does(name: str, words: str):
    _, notes = translate(config(OFF[0], {"defense_type": name, **RULES[name][0]}))
    assert words in kinds(notes, "differs")["defense_type"]


@pytest.mark.parametrize("name", ["slsgd", "norm_diff_clipping", "cclip", "foolsgold", "3sigma", "weak_dp", "crfl"])
def test_a_defense_says_that_fedml_weighs_what_it_leaves_by_uncapped_counts(name: str):
    _, notes = translate(config(OFF[0], {"defense_type": name, **RULES[name][0]}))
    said = " ".join(note.text for note in notes if (note.kind, note.key) == ("differs", "defense_type"))
    assert re.search(r"claimed counts|the counts they claim", said)


def test_the_undefended_mean_differs_in_its_cap_on_claims():
    assert "at most three times the median claim" in kinds(translate(config(*OFF))[1], "differs")["federated_optimizer"]


@pytest.mark.parametrize(("batches", "buckets"), [(4, 4), (7, 5), (20, 10)])  # of ten clients: groups of 3, 2, 1
def test_geo_median_has_as_many_buckets_as_fedml_makes(batches: int, buckets: int):
    raw = config(OFF[0], {"defense_type": "geo_median", "byzantine_client_num": 1, "batch_num": batches})
    recipe, _ = translate(raw)
    assert recipe["defense"]["rule"]["buckets"] == buckets
    must_work(recipe)


def test_tests_are_counted_from_zero_there_and_so_fall_into_other_rounds():
    _, notes = translate(config(*OFF))
    how = "tests in 1, 6, 11, ... and the last; here in 5, 10, 15, ... and the last"
    assert how in kinds(notes, "differs")["frequency_of_the_test"]
    _, notes = translate(config(*OFF, validation_args={"frequency_of_the_test": 1}))
    assert "frequency_of_the_test" in kinds(notes, "translated")


# ---------------------------------------------------------------- switches, known keys, benign files


@pytest.mark.parametrize(
    ("attack", "defense"),
    [
        ({"attack_type": "lazy_worker"}, {"defense_type": "dp"}),
        ({"attack_type": "byzantine"}, {"defense_type": "krum"}),
    ],
)
def test_a_switch_that_the_recipe_cannot_follow_differs_and_is_no_unknown_key(attack: Any, defense: Any):
    recipe, notes = translate(config(attack, defense))
    assert (recipe["enable_attack"], recipe["enable_defense"]) == (False, False)
    assert {"enable_attack", "enable_defense"} <= kinds(notes, "differs").keys()
    assert not any("is no key" in note.text for note in notes)


@pytest.mark.parametrize("name", ["None", "none", None, "benign", " None "])
def test_a_benign_file_has_no_line_without_an_equivalent(name: str | None, tmp_path: Path, capsys):
    raw = config({"attack_type": name}, {"enable_defense": False, "defense_type": name})
    assert main(["from-fedml", write(tmp_path / "c.yaml", raw)]) == 0
    assert "NO EQUIVALENT" not in capsys.readouterr().err
    del raw["attack_args"], raw["defense_args"]
    assert main(["from-fedml", write(tmp_path / "d.yaml", raw)]) == 0
    assert "NO EQUIVALENT" not in capsys.readouterr().err


def test_what_the_file_does_not_say_is_said_in_words_and_not_as_none():
    raw = config(*OFF)
    del raw["model_args"], raw["data_args"]
    missing = kinds(translate(raw)[1], "missing")
    assert missing["model"].startswith("is not in the file: a cnn stands in its place")
    assert missing["dataset"].startswith("is not in the file: digits stands in its place")
    assert "None" not in "".join(missing.values())


@pytest.mark.parametrize("word", ["yes", "on", "True", True])
def test_a_switch_is_on_for_every_word_that_fedmls_yaml_reads_as_true(word: Any):
    raw = config(FLIP, {"defense_type": "wise_median"})
    raw["attack_args"]["enable_attack"] = raw["defense_args"]["enable_defense"] = word
    recipe, _ = translate(raw)
    assert (recipe["enable_attack"], recipe["enable_defense"]) == (True, True)


def test_a_known_key_without_a_value_is_not_set_and_never_unknown():
    kinds_of = [({"attack_type": name}, {}) for name in ATTACKS] + [({}, {"defense_type": name}) for name in DEFENSES]
    for attack, defense in kinds_of:
        raw = config(FLIP | attack, RULES.get(defense.get("defense_type", ""), ({},))[0] | defense)
        raw["common_args"] |= dict.fromkeys(READ - {key for section in raw.values() for key in section})
        _, notes = translate(raw)
        assert [note.key for note in notes if "is no key" in note.text] == [], (attack, defense)


def test_every_key_that_the_translation_reads_is_among_the_known_ones():
    read = set()
    for file in (ROOT / "fedllm_sec" / "fedml").glob("*.py"):
        text = file.read_text()
        read |= set(re.findall(r"""flat(?:\.get\(|, |\[)"(\w+)\"""", text)) | set(re.findall(r'"(\w+)" in flat', text))
    assert read <= READ
    assert len(read) > 40
    assert READ & KEYS.keys()


# ---------------------------------------------------------------- secrets

SECRET_KEYS = (
    "wandb_key", "WANDB_API_KEY", "api_key", "mlops_api_key", "run_api_key", "account_id", "access_token", "hf_token",
    "password", "passwd", "aws_access_key_id", "aws_secret_access_key", "CN_REGION_SECRET", "MQTT_PWD", "credentials",
    "private_key", "auth", "license_key", "s3_secret_key", "mqtt_config_path",
)  # fmt: skip


@pytest.mark.parametrize("key", SECRET_KEYS)
def test_a_secret_is_named_by_its_place_and_never_shown(key: str, tmp_path: Path, capsys):
    sections = ["common_args", "train_args", "attack_args", "defense_args", "my_args", *SECTIONS]
    for i, (first, second) in enumerate(zip(sections, [*sections[1:], "train_args"], strict=True)):
        raw = config(*OFF, train_args={"learning_rate": 0.1})
        raw.setdefault(first, {})[key] = "hunter2-one"
        raw.setdefault(second, {})[key] = "hunter2-two"
        assert main(["from-fedml", write(tmp_path / f"{i}.yaml", raw)]) in (0, 1)
        printed = capsys.readouterr()
        assert "hunter2" not in printed.out + printed.err
        assert key in printed.err
        assert "stands in" in printed.err
    for stray in ("hunter2-three", ["hunter2-four"], 20202):
        assert main(["from-fedml", write(tmp_path / f"{key}{type(stray)}.yaml", {**config(*OFF), key: stray})]) == 2
        error = capsys.readouterr().err
        assert f"error: {key}: {type(stray).__name__}: must be a section" in error
        assert "hunter2" not in error
        assert "20202" not in error


def test_the_written_recipe_holds_no_secret_either(tmp_path: Path):
    raw = config(*OFF)
    raw["train_args"]["wandb_key"] = {"deep": ["hunter2"]}
    main(["from-fedml", write(tmp_path / "c.yaml", raw), "--out", str(tmp_path / "r.yaml")])
    assert "hunter2" not in (tmp_path / "r.yaml").read_text()
    assert yaml.safe_load((tmp_path / "r.yaml").read_text())["rounds"] == 50
