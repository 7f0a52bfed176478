"""FedML's YAMLs become recipes, and every key of theirs is accounted for."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedllm_sec.build.names import checked
from fedllm_sec.build.plan import planned
from fedllm_sec.errors import RecipeError
from fedllm_sec.fedml.defense import DEFENSES, WITHOUT
from fedllm_sec.fedml.notes import Note, flatten
from fedllm_sec.fedml.setup import ALGORITHMS, DATA, MODELS
from fedllm_sec.fedml.threat import ATTACKS
from fedllm_sec.fedml.translate import line, translate
from fedllm_sec.recipe import reading as recipes
from fedllm_sec.recipe.__main__ import main
from tests.conftest import ROOT

# as people write them: a run on CIFAR-10 with a label flip against multi-Krum
CONFIG: dict[str, Any] = {
    "common_args": {"training_type": "cross_silo", "scenario": "horizontal", "using_mlops": False, "random_seed": 3},
    "environment_args": {"bootstrap": "config/bootstrap.sh"},
    "data_args": {
        "dataset": "cifar10",
        "data_cache_dir": "~/data",
        "partition_method": "hetero",
        "partition_alpha": 0.3,
    },
    "model_args": {"model": "resnet20", "model_file_cache_folder": "./cache"},
    "train_args": {
        "federated_optimizer": "FedAvg",
        "client_id_list": None,
        "client_num_in_total": 20,
        "client_num_per_round": 10,
        "comm_round": 50,
        "epochs": 2,
        "batch_size": 32,
        "client_optimizer": "sgd",
        "learning_rate": 0.05,
        "weight_decay": 0.001,
    },
    "validation_args": {"frequency_of_the_test": 5},
    "device_args": {"worker_num": 10, "using_gpu": True},
    "comm_args": {"backend": "MPI"},
    "tracking_args": {"enable_wandb": False, "wandb_key": "a-secret-key"},
    "attack_args": {
        "enable_attack": True,
        "attack_type": "label_flipping",
        "original_class_list": [3, 2],
        "target_class_list": [9, 1],
        "ratio_of_poisoned_client": 0.1,
    },
    "defense_args": {"enable_defense": True, "defense_type": "krum", "byzantine_client_num": 2, "krum_param_m": 3},
}


def config(attack: dict[str, Any] | None = None, defense: dict[str, Any] | None = None, **sections: Any) -> Any:
    raw = copy.deepcopy(CONFIG)
    if attack is not None:
        raw["attack_args"] = {"enable_attack": True, **attack}
    if defense is not None:
        raw["defense_args"] = {"enable_defense": True, **defense}
    for section, changes in sections.items():
        raw[section] |= changes
    return raw


def kinds(notes: list[Note], kind: str) -> dict[str, str]:
    return {note.key: note.text for note in notes if note.kind == kind}


def must_work(recipe: dict[str, Any]) -> None:
    planned(checked(recipe))


def test_a_label_flip_against_multi_krum_becomes_a_recipe_that_our_checker_takes():
    recipe, notes = translate(CONFIG)
    assert recipe == {
        "seed": 3,
        "rounds": 50,
        "task": "classify",
        "model": {"name": "resnet", "depth": 20, "norm": "batch"},
        "data": {"name": "cifar10"},
        "clients": {
            "total": 20,
            "per_round": 10,
            "local_epochs": 2,
            "batch_size": 32,
            "optimizer": "sgd",
            "lr": 0.05,
            "max_grad_norm": None,
            "partition": {"name": "dirichlet", "alpha": 0.3, "min_rows": 10},
        },
        "algorithm": {"name": "fedavg"},
        "enable_attack": True,
        "attack": {
            "malicious": {"share": 0.1, "redraw": True},
            "data": [{"name": "label_flip", "mapping": {3: 9, 2: 1}}],
        },
        "enable_defense": True,
        "defense": {"rule": {"name": "multi_krum", "f": 2, "m": 3}},
        "evaluate": {"every": 5},
    }
    must_work(recipe)
    assert kinds(notes, "missing") == {}


def test_every_key_of_the_file_has_a_note():
    _, notes = translate(CONFIG)
    assert {note.key for note in notes} == {key for section in CONFIG.values() for key in section}


def test_a_key_nobody_knows_has_no_equivalent():
    _, notes = translate(config(train_args={"gradient_mystery": 4}))
    assert kinds(notes, "missing") == {"gradient_mystery": "is no key that FedML 0.9.6 or we know here"}


def test_a_secret_is_never_repeated():
    recipe, notes = translate(CONFIG)
    places = flatten(CONFIG).places
    assert "a-secret-key" not in str(recipe) + "".join(line(note, places) for note in notes)


def test_the_defense_takes_the_number_of_attackers_from_the_attack_where_it_has_none_as_in_fedml():
    raw = config(
        {"attack_type": "byzantine", "attack_mode": "flip", "byzantine_client_num": 1},
        {"defense_type": "krum"},
        train_args={"client_num_per_round": 20},
    )
    recipe, _ = translate(raw)
    assert recipe["attack"] == {"malicious": {"count": 1, "redraw": True}, "update": [{"name": "byzantine_flip"}]}
    assert recipe["defense"] == {"rule": {"name": "krum", "f": 1}}


def test_a_key_that_stands_twice_counts_as_the_later_one_and_is_named():
    raw = config(
        {"attack_type": "byzantine", "attack_mode": "flip", "byzantine_client_num": 3},
        {"defense_type": "krum", "byzantine_client_num": 1},
        train_args={"client_num_per_round": 20},
    )
    recipe, notes = translate(raw)
    assert recipe["attack"]["malicious"]["count"] == recipe["defense"]["rule"]["f"] == 1
    assert any(note.text.startswith("stands in attack_args as 3 too") for note in notes)


@pytest.mark.parametrize(
    ("mode", "method", "kind"),
    [
        ("zero", {"name": "byzantine_zero"}, "differs"),
        ("random", {"name": "byzantine_random", "absolute": True}, "differs"),
        ("flip", {"name": "byzantine_flip"}, "translated"),
    ],
)
def test_byzantine_modes(mode: str, method: dict[str, Any], kind: str):
    recipe, notes = translate(config({"attack_type": "byzantine", "attack_mode": mode, "byzantine_client_num": 2}))
    assert recipe["attack"]["update"] == [method]
    assert "attack_mode" in kinds(notes, kind)
    must_work(recipe)


def test_model_replacement_has_one_attacker_and_says_what_it_lacks():
    attack = {"attack_type": "model_replacement", "malicious_client_id": 4, "attack_training_rounds": [3, 5, 7]}
    raw = config(attack, train_args={"client_num_per_round": 20})
    recipe, notes = translate(raw)
    assert recipe["attack"] == {
        "malicious": {"ids": [4]},
        "update": [{"name": "model_replacement"}],
        "start": 3,
        "stop": 7,
        "every": 2,
    }
    assert "no backdoor in it" in kinds(notes, "differs")["attack_type"]
    must_work(recipe)
    raw["attack_args"] |= {"attack_training_rounds": [1, 2, 5], "scale_factor_S": 2.5}
    assert kinds(translate(raw)[1], "missing").keys() == {"attack_training_rounds", "scale_factor_S"}


def test_rounds_are_counted_from_one_here_and_from_zero_there():
    attack = CONFIG["attack_args"] | {"poison_start_round_id": 0, "poison_end_round_id": 9}
    recipe, _ = translate(config(attack))
    assert (recipe["attack"]["start"], recipe["attack"]["stop"]) == (1, 10)


def test_a_swap_of_classes_is_one_here_and_none_there():
    _, notes = translate(config(CONFIG["attack_args"] | {"original_class_list": [0, 1], "target_class_list": [1, 0]}))
    assert "relabelled twice" in kinds(notes, "differs")["target_class_list"]


# what each defense type needs, and what it becomes
RULES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "norm_diff_clipping": (
        {"norm_bound": 0.3},
        {"before": [{"name": "norm_clipping", "radius": 0.3}], "rule": {"name": "mean"}},
    ),
    "diff_clipping": (
        {"norm_bound": 5},
        {"before": [{"name": "norm_clipping", "radius": 5}], "rule": {"name": "mean"}},
    ),
    "krum": ({"byzantine_client_num": 1}, {"rule": {"name": "krum", "f": 1}}),
    "multikrum": (
        {"byzantine_client_num": 1, "krum_param_m": 4},
        {"rule": {"name": "multi_krum", "f": 1, "m": 4}},
    ),
    "trimmed_mean": ({"beta": 0.2}, {"rule": {"name": "trimmed_mean", "beta": 0.2}}),
    "wise_median": ({}, {"rule": {"name": "median"}}),
    "geo_median": (
        {"byzantine_client_num": 1, "batch_num": 5},
        {"rule": {"name": "geometric_median", "weights": "counts", "buckets": 5}},
    ),
    "geometric_median": (
        {"byzantine_client_num": 0, "batch_num": 5},
        {"rule": {"name": "geometric_median", "weights": "counts", "buckets": 1}},
    ),
    "rfa": ({}, {"rule": {"name": "rfa"}}),
    "cclip": ({"bucket_size": 2}, {"rule": {"name": "centered_clipping", "tau": 10, "bucket_size": 2}}),
    "foolsgold": ({"use_memory": False}, {"rule": {"name": "foolsgold"}}),
    "slsgd": (
        {"trim_param_b": 2, "alpha": 0.7, "option_type": 2},
        {"rule": {"name": "slsgd", "option": 2, "alpha": 0.7, "f": 2}},
    ),
    "robust_learning_rate": ({"robust_threshold": 4}, {"rule": {"name": "robust_learning_rate", "theta": 4}}),
    "weak_dp": (
        {"stddev": 0.02, "client_num_per_round": 4},
        {
            "rule": {"name": "mean", "weights": "uniform"},
            "after": [{"name": "weak_dp", "sigma": 0.01, "absolute": True}],
        },
    ),
    "crfl": (
        {"clip_threshold": 15, "sigma": 0.02},
        {"rule": {"name": "mean"}, "after": [{"name": "crfl", "rho": 15, "growth": 0.0, "sigma": 0.02}]},
    ),
    "3sigma": ({}, {"rule": {"name": "three_sigma", "k": 0.5, "reference": "running_mean", "estimate": "moments"}}),
    "3sigma_geo": ({}, {"rule": {"name": "three_sigma", "estimate": "moments", "k": 1.0}}),
    "3sigma_foolsgold": (
        {},
        {"rule": {"name": "three_sigma", "estimate": "moments", "k": 2.0, "score": "foolsgold"}},
    ),
    "anomaly_detection": (
        {"cosine_similarity_bound": 0.5},
        {
            "rule": {
                "name": "cross_round",
                "threshold": 0.5,
                "compare": "models",
                "longer": None,
                "k": 0.5,
                "estimate": "moments",
            }
        },
    ),
    "cross_round": (
        {"cosine_similarity_bound": 0.4},
        {
            "rule": {
                "name": "cross_round",
                "threshold": 0.4,
                "compare": "models",
                "longer": None,
                "k": 0.5,
                "estimate": "moments",
            }
        },
    ),
    "bulyan": ({"byzantine_client_num": 1}, {"rule": {"name": "bulyan", "f": 1}}),
    "residual_based_reweighting": (
        {"lambda_param": 3.0, "thresh": 0.2},
        {"rule": {"name": "residual_reweighting", "tuning": 3.0, "threshold": 0.2}},
    ),
    "wbc": ({}, {"client": [{"name": "wbc"}], "rule": {"name": "mean"}}),
    "soteria": ({}, {"client": [{"name": "soteria"}], "rule": {"name": "mean"}}),
}


@pytest.mark.parametrize("name", DEFENSES)
def test_each_defense_type_becomes_a_block_that_our_checker_takes(name: str):
    settings, block = RULES[name]
    recipe, notes = translate(config({"attack_type": None, "enable_attack": False}, {"defense_type": name, **settings}))
    assert recipe["defense"] == block
    assert recipe["enable_defense"] is True
    assert kinds(notes, "missing") == {}
    assert {note.key for note in notes} >= {"defense_type", *settings}
    must_work(recipe)


@pytest.mark.parametrize("name", [name for name, (settings, _) in RULES.items() if settings])
def test_a_defense_without_its_settings_has_no_equivalent_unless_they_have_defaults(name: str):
    recipe, notes = translate(config({"enable_attack": False}, {"defense_type": name}))
    if recipe["enable_defense"]:
        assert name in ("geo_median", "geometric_median", "cclip", "foolsgold", "residual_based_reweighting")
    else:
        assert "which is not in the file" in kinds(notes, "missing")["defense_type"] or name == "crfl"
        assert "defense" not in recipe


def test_crfl_takes_fedmls_growing_bound_for_its_own_data_sets():
    sections = {"data_args": {"dataset": "mnist"}, "model_args": {"model": "lr"}}
    recipe, _ = translate(config({"enable_attack": False}, {"defense_type": "crfl"}, **sections))
    assert recipe["defense"]["after"] == [{"name": "crfl", "rho": 2.0, "growth": 0.1, "sigma": 0.01}]
    for bound, kind in ((2.0, "translated"), (4.0, "missing"), (99.0, "ignored")):
        defense = {"defense_type": "crfl", "clip_threshold": bound}
        _, notes = translate(config({"enable_attack": False}, defense, **sections))
        assert "clip_threshold" in kinds(notes, kind), bound


def test_what_is_switched_off_stays_switched_off_and_keeps_its_block():
    raw = copy.deepcopy(CONFIG)
    raw["attack_args"]["enable_attack"] = raw["defense_args"]["enable_defense"] = False
    recipe, notes = translate(raw)
    assert (recipe["enable_attack"], recipe["enable_defense"]) == (False, False)
    assert recipe["attack"]["data"][0]["name"] == "label_flip"
    assert recipe["defense"]["rule"]["name"] == "multi_krum"
    assert kinds(notes, "missing") == {}


@pytest.mark.parametrize(
    ("attack", "words"),
    [
        ({"attack_type": "edge_case_backdoor"}, "Ours is attack.data edge_case"),
        ({"attack_type": "lazy_worker"}, "Ours is attack.update lazy"),
        ({"attack_type": "labelflip"}, "takes this for no attack at all"),
    ],
)
def test_an_attack_without_an_equivalent_is_never_translated_in_silence(attack: dict[str, Any], words: str):
    recipe, notes = translate(config(attack))
    assert words in kinds(notes, "missing")["attack_type"]
    assert recipe["enable_attack"] is False
    assert "attack" not in recipe


def test_an_unknown_defense_lists_the_known_ones():
    _, notes = translate(config(None, {"defense_type": "krumm"}))
    assert "known: norm_diff_clipping" in kinds(notes, "missing")["defense_type"]
    assert "refuses this name" in kinds(translate(config(None, {"defense_type": "dp"}))[1], "missing")["defense_type"]


@pytest.mark.parametrize("name", MODELS)
def test_each_model_gets_its_task(name: str):
    raw = config({"enable_attack": False}, {"enable_defense": False}, model_args={"model": name})
    if name == "rnn":
        raw["data_args"]["dataset"] = "shakespeare"
    recipe, notes = translate(raw)
    assert recipe["task"] == MODELS[name][0]
    must_work(recipe)
    assert ("model" in kinds(notes, "differs")) == bool(MODELS[name][2])


def test_shakespeare_needs_a_file_and_says_so():
    raw = config({"enable_attack": False}, {"enable_defense": False}, model_args={"model": "rnn"})
    raw["data_args"]["dataset"] = "shakespeare"
    recipe, notes = translate(raw)
    assert recipe["clients"]["partition"] == {"name": "by_speaker"}
    assert "put its path into data.name" in kinds(notes, "missing")["dataset"]


def test_unknown_model_data_and_optimizers_are_named_and_something_else_stands_in_their_place():
    raw = config(
        None,
        None,
        model_args={"model": "mobilenet"},
        data_args={"dataset": "cinic10"},
        train_args={"federated_optimizer": "Mime", "client_optimizer": "adam"},
    )
    recipe, notes = translate(raw)
    assert kinds(notes, "missing").keys() == {"model", "dataset", "federated_optimizer"}
    assert recipe["data"] == {"name": "cinic10"}
    assert recipe["clients"]["optimizer"] == "adamw"
    assert recipe["clients"]["weight_decay"] == 0.001
    assert "amsgrad" in kinds(notes, "differs")["client_optimizer"]


def test_fedopt_takes_its_server_settings_and_other_methods_ignore_them():
    server = {"server_optimizer": "sgd", "server_lr": 0.02, "server_momentum": 0.8}
    recipe, notes = translate(config(None, None, train_args={"federated_optimizer": "FedOpt", **server}))
    assert recipe["algorithm"] == {"name": "fedopt", "optimizer": "sgd", "server_lr": 0.02, "beta1": 0.8}
    assert "in MPI simulation only" in kinds(notes, "differs")["server_momentum"]
    recipe, notes = translate(config(None, None, train_args=server))
    assert recipe["algorithm"] == {"name": "fedavg"}
    assert kinds(notes, "ignored")["server_lr"] == "because FedAvg does not use it"


@pytest.mark.parametrize(("name", "ours"), ALGORITHMS.items())
def test_each_fl_method_has_its_name(name: str, ours: str):
    recipe, _ = translate(config(None, None, train_args={"federated_optimizer": name}))
    assert recipe["algorithm"]["name"] == ours


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ([], "mapping of sections"),
        ({"train_args": 3}, "train_args: int: must be a section"),
        ({"train_args": {"comm_round": "many"}}, "comm_round: 'many': must be a number"),
        ({"mapping_default": {"host1": [2, 2]}}, "no FedML experiment: no section has any of dataset, model"),
        ({"model_args": {"model": ["lr", "cnn"]}}, r"model_args.model: \['lr', 'cnn'\]: must be one word"),
        ({"attack_args": {"attack_type": ["byzantine"]}}, "attack_args.attack_type: .*: must be one word"),
        ({"defense_args": {"defense_type": {"krum": 1}}}, "defense_args.defense_type: .*: must be one word"),
    ],
)
def test_what_is_no_fedml_yaml_is_an_error(raw: Any, words: str):
    with pytest.raises(RecipeError, match=words):
        translate(raw)


def write(path: Path, raw: Any) -> str:
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return str(path)


def test_the_command_prints_the_recipe_and_its_notes_apart(tmp_path: Path, capsys):
    assert main(["from-fedml", write(tmp_path / "c.yaml", CONFIG)]) == 0
    printed = capsys.readouterr()
    recipe = recipes.parse(printed.out, "printed")
    assert recipe == translate(CONFIG)[0]
    assert "translated    train_args.comm_round is rounds" in printed.err
    assert "ignored       device_args.using_gpu" in printed.err
    assert "DIFFERS" in printed.err


def test_the_command_exits_with_one_where_something_is_left_out_but_still_prints(tmp_path: Path, capsys):
    raw = config({"attack_type": "lazy_worker"})
    assert main(["from-fedml", write(tmp_path / "c.yaml", raw)]) == 1
    printed = capsys.readouterr()
    assert "rounds: 50" in printed.out
    assert "NO EQUIVALENT attack_args.attack_type 'lazy_worker'" in printed.err


def test_what_our_checker_refuses_is_said_and_exits_with_one(tmp_path: Path, capsys):
    raw = config(None, {"defense_type": "krum", "byzantine_client_num": 5})
    assert main(["from-fedml", write(tmp_path / "c.yaml", raw)]) == 1
    assert "TO BE CHANGED defense: krum: needs n >= 2f + 3" in capsys.readouterr().err


def test_the_command_writes_a_new_file_and_never_over_an_old_one(tmp_path: Path, capsys):
    config_file, out = write(tmp_path / "c.yaml", CONFIG), tmp_path / "recipe.yaml"
    assert main(["from-fedml", config_file, "--out", str(out)]) == 0
    assert capsys.readouterr().out == ""
    assert recipes.read(out)["rounds"] == 50
    assert main(["from-fedml", config_file, "--out", str(out)]) == 2
    assert "exists. Choose another name" in capsys.readouterr().err


def test_a_missing_file_is_an_error(tmp_path: Path, capsys):
    assert main(["from-fedml", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml: there is no such file" in capsys.readouterr().err


def test_the_page_on_migration_names_every_name():
    page = (ROOT / "docs" / "migration.md").read_text()
    for name in (*ATTACKS, *DEFENSES, *WITHOUT, *MODELS, *DATA, *ALGORITHMS):
        assert f"`{name}`" in page, name


def test_nothing_is_not_given_and_what_is_no_number_or_switch_is_refused():
    sections = {"train_args": {"client_num_in_total": None, "client_num_per_round": 4, "comm_round": 2}}
    assert "total" not in translate(sections)[0]["clients"]
    for key, value, words in (
        ("client_num_in_total", float("inf"), "client_num_in_total: inf: must be a finite number"),
        ("enable_attack", 2, "enable_attack: 2: must be true or false"),
        ("enable_attack", [1], r"enable_attack: \[1\]: must be true or false"),
    ):
        with pytest.raises(RecipeError, match=words):
            translate({"train_args": {"comm_round": 2, key: value}, "data_args": {"dataset": "mnist"}})
