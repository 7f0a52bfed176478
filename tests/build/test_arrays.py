"""Small models from recipe to record: the same loop, attacks and defenses; mistakes are named before training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator

from fedllm_sec.build.arrays import innocent, success_table
from fedllm_sec.build.federation import build
from fedllm_sec.build.names import checked
from fedllm_sec.errors import AttackError, DataError, RecipeError
from fedllm_sec.recipe import reading as recipes
from fedllm_sec.recipe.resolve import resolve
from fedllm_sec.rounds.compute import Machine
from fedllm_sec.rounds.federation import run
from fedllm_sec.train import load, run_all

DIGITS: dict[str, Any] = {
    "seed": 1,
    "rounds": 2,
    "task": "classify",
    "model": {"name": "logistic"},
    "data": {"name": "digits"},
    "clients": {"total": 5, "local_epochs": 2, "batch_size": 20, "lr": 1e-2},
    "compute": {"threads": 1},
}
TRIGGER = {"name": "pixel_trigger", "target": 0, "rate": 0.5, "size": 3}


def attacked(*, data=(), update=(), **more) -> dict[str, Any]:
    block = {"malicious": {"ids": [0, 1]}, "data": list(data), "update": list(update)}
    return {**DIGITS, "enable_attack": True, "attack": block, **more}


def federation(raw: dict[str, Any]):
    return build(checked(raw), Machine(Accelerator(cpu=True)))


def problems(raw: dict[str, Any]) -> str:
    with pytest.raises(RecipeError) as caught:
        checked(raw)
    return str(caught.value)


def test_a_linear_model_learns_the_digits():
    records = list(run(federation(DIGITS), 2))
    assert records[-1].quality["accuracy"]["value"] > 0.85
    assert records[-1].quality["accuracy"]["n"] == 359
    assert records[-1].attack is None
    assert records[-1].lora_gap is None


def test_the_same_seed_gives_the_same_run():
    raw = {**DIGITS, "data": {"name": "digits", "crop": 1, "flip": True}}
    one, two = (list(run(federation(raw), 2)) for _ in range(2))
    assert [r.losses for r in one] == [r.losses for r in two]


def test_three_defenses_repair_what_a_flipped_update_does():
    raw = attacked(update=[{"name": "byzantine_flip", "scale": 5.0}])
    harmed = list(run(federation(raw), 2))[-1].quality["accuracy"]["value"]
    assert harmed < 0.4
    for rule in ({"name": "median"}, {"name": "multi_krum", "f": 1}, {"name": "geometric_median"}):
        fewer = {**raw, "attack": {**raw["attack"], "malicious": {"ids": [0]}}}
        defended = {**fewer, "enable_defense": True, "defense": {"rule": rule}}
        assert list(run(federation(defended), 2))[-1].quality["accuracy"]["value"] > 0.8, rule


def test_a_pixel_trigger_is_measured_on_stamped_and_on_clean_images():
    record = list(run(federation(attacked(data=[TRIGGER])), 8))[-1]
    assert record.attack["asr"]["value"] > 0.5
    assert record.attack["false_trigger"]["value"] < 0.1
    assert record.attack["asr"]["n"] == record.attack["false_trigger"]["n"]  # all but the target's class


def test_a_label_flip_is_measured_on_the_flipped_class_and_on_the_others():
    flip = {"name": "label_flip", "mapping": {3: 9, 2: 1}}
    fed = federation(attacked(data=[flip]))
    evaluation = fed.evaluation
    assert set(evaluation.triggered.y.tolist()) == {9, 1}
    assert not set(evaluation.clean.y.tolist()) & {3, 2}
    assert evaluation.hits[3].nonzero().flatten().tolist() == [9]
    assert evaluation.hits[5].nonzero().flatten().tolist() == [1, 9]
    assert evaluation.hits[9].nonzero().flatten().tolist() == [1]


def test_clean_rows_are_those_on_which_an_attack_without_a_trigger_does_not_act():
    from fedllm_sec.attacks import MENU
    from fedllm_sec.data.arrays import load as load_arrays

    test = load_arrays("digits")[1]
    for name, settings in (("semantic", {"target": 2}), ("edge_case", {"target": 2, "source": 7})):
        attack = resolve(name, settings, MENU, "attack")
        rows = innocent(attack, test, success_table(attack, 10))[0]
        acted_on = attack.rows(test, None) if name == "semantic" else attack.rows(test)
        assert 2 not in test.y[rows].tolist()
        assert not set(acted_on) & set(rows.tolist())


def test_attackers_without_the_flipped_class_are_named_and_only_all_of_them_are_an_error():
    flip = {"name": "label_flip", "mapping": {3: 9}}
    raw = attacked(data=[flip], clients={**DIGITS["clients"], "partition": {"name": "shards"}})
    zeros = attacked(clients=raw["clients"], update=[{"name": "byzantine_zero"}])
    shards = {c.id: set(c.shard.y.tolist()) for c in federation(zeros).clients}
    have = [int(id[1:]) for id, classes in shards.items() if 3 in classes]
    lack = [int(id[1:]) for id, classes in shards.items() if 3 not in classes]
    raw["attack"]["malicious"] = {"ids": [have[0], lack[0]]}
    with pytest.warns(UserWarning, match=f"1 of 2 clients with poisoned data hold no row.*c0{lack[0]}"):
        fed = federation(raw)
    assert list(fed.threat.poisoned) == [f"c0{have[0]}"]
    raw["attack"]["malicious"] = {"ids": lack[:1]}
    with pytest.raises(AttackError, match="poisoned none of the rows"):
        federation(raw)


def test_a_run_saves_its_model_and_made_again_gives_the_same_bytes(tmp_path: Path):
    from safetensors.torch import load_file

    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({**DIGITS, "rounds": 3}))
    folders = {}
    for name in ("first", "second"):
        variants = load(path, [f"output.folder={tmp_path / name}"])
        folders[name] = run_all(variants, "test")
    saved = load_file(folders["first"] / "model" / "model.safetensors")
    assert {k: tuple(v.shape) for k, v in saved.items()} == {"1.weight": (10, 64), "1.bias": (10,)}
    assert json.loads((folders["first"] / "summary.json").read_text())["quality"]["accuracy"]["value"] > 0.9
    histories = [(f / "history.jsonl").read_bytes() for f in folders.values()]
    assert histories[0] == histories[1]


def test_a_root_update_comes_from_clean_arrays():
    raw = {**DIGITS, "enable_defense": True, "defense": {"rule": {"name": "fltrust"}, "root_rows": 50}}
    fed = federation(raw)
    assert len(fed.root.shard.y) == 50
    assert sum(len(c.shard.y) for c in fed.clients) == 1438 - 50
    assert next(run(fed, 1)).quality["accuracy"]["value"] > 0.3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"task": "clasify"}, 'task: there is no "clasify". Did you mean "classify"?'),
        ({"model": {"name": "lenett"}}, 'model.name: there is no "lenett". Did you mean "lenet"?'),
        ({"model": {"name": "lstm"}}, "model.name: lstm is of kind 'next_char'"),
        ({"model": {"name": "resnet", "dept": 20}}, 'model.dept: 20 is set, but there is no such setting. Did you'),
        ({"model": {"name": "lenet", "lora": {"r": 4}}}, "model.lora"),
        ({"model": {}}, "model: {}: must be a block with a name"),
        ({"data": {"nam": "digits"}}, 'data.nam: unknown key. Did you mean "name"?'),
        ({"data": {"template": "{text}"}}, "data.template: unknown key"),
        ({"evaluate": {"max_new_tokens": 3}}, "evaluate.max_new_tokens: unknown key"),
        ({"data": {"crop": 99}}, "data.crop: 99"),
    ],
)  # fmt: skip
def test_mistakes_are_named_for_the_task_at_hand(change, words):
    assert words in problems({**DIGITS, **change})


def test_text_triggers_cannot_stand_in_a_recipe_of_images_nor_the_other_way():
    text = {"name": "text_trigger", "trigger": " cf", "target": "x"}
    assert "text_trigger is of kind 'data_text'" in problems(attacked(data=[text]))
    words = problems({**attacked(data=[TRIGGER]), "task": "causal_lm", "model": {}, "data": {}})
    assert "pixel_trigger is of kind 'data_image'" in words


def test_characters_have_their_own_contradictions():
    raw = {**attacked(data=[TRIGGER]), "task": "next_char", "model": {"name": "lstm"}, "data": {}}
    raw["clients"] = {**DIGITS["clients"], "partition": {"name": "by_speaker"}}
    text = problems(raw)
    assert "data.name: is needed" in text
    assert "by_speaker needs sequences" in text
    assert "pixel_trigger" in text


def test_a_dumped_recipe_of_a_small_model_reads_back_as_itself():
    recipe = checked(DIGITS)
    assert checked(recipes.parse(recipes.dump(recipe), "dump")) == recipe


def test_wrong_labels_in_a_file_stop_the_run_before_training(tmp_path: Path):
    x, y = np.zeros((9, 8, 8), dtype=np.uint8), np.arange(9) % 3
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x, y_test=y + 1)
    with pytest.raises(DataError, match="label 3 in row 2"):
        federation({**DIGITS, "data": {"name": str(tmp_path / "a.npz")}})


def test_outside_models_are_named_by_module_and_attribute(tmp_path: Path, monkeypatch):
    (tmp_path / "my_models.py").write_text(
        "from torch import nn\n"
        "def wide(shape, classes, *, width: int = 8):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Linear(width, classes))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    fed = federation({**DIGITS, "model": {"name": "my_models:wide", "width": 3}})
    assert fed.task.layout.size == 64 * 3 + 3 + 3 * 10 + 10
    assert isinstance(fed.vector, torch.Tensor)


def test_images_of_any_set_are_brought_to_a_size_and_one_step_has_no_course():
    fed = federation({**DIGITS, "data": {"name": "digits", "size": 4}})
    shapes = {tuple(client.shard.x.shape[1:]) for client in fed.clients}
    assert shapes == {tuple(fed.evaluation.test.x.shape[1:])} == {(1, 4, 4)}
    assert fed.task.layout.size == 16 * 10 + 10
    one = {**DIGITS["clients"], "local_epochs": None, "local_steps": 1, "lr_in_round": "cosine"}
    with pytest.raises(RecipeError, match=r"clients\.lr_in_round: cosine: clients take one step in a round"):
        federation({**DIGITS, "clients": one})
