"""A run that classifies texts: attack-free, attacked and defended, gone on with, started from; and what is refused."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from fedllm_sec import train
from fedllm_sec.api.folders import main as aggregate
from fedllm_sec.build.federation import build, run
from fedllm_sec.build.names import checked
from fedllm_sec.build.plan import planned
from fedllm_sec.build.text_classifier import names_of
from fedllm_sec.data import text
from fedllm_sec.errors import DataError, RecipeError
from fedllm_sec.models.saving import classes_of
from fedllm_sec.recipe import reading
from fedllm_sec.records import checkpoint
from fedllm_sec.records.history import read_history
from fedllm_sec.rounds.compute import Machine
from tests import classifiers

RAW: dict[str, Any] = {
    "seed": 1,
    "rounds": 2,
    "task": "classify_text",
    "model": {"name": "tiny", "lora": {"r": 2, "alpha": 4}},
    "data": {"name": "builtin:topic", "max_length": 64, "train_rows": 120, "test_rows": 40},
    "clients": {"total": 5, "local_steps": 2, "batch_size": 4, "lr": 3e-3},
    "attack": {
        "malicious": {"count": 1},
        "data": [{"name": "badnets", "target": "Sports", "rate": 0.5}],
        "update": [{"name": "model_replacement", "gamma": 20}],
    },
    "defense": {"rule": {"name": "multi_krum", "f": 1}},
    "evaluate": {"rows": 24, "attack_rows": 12, "generalise": True, "transcripts": 4},
    "compute": {"threads": 1},
    "variants": {
        "free": {},
        "attacked": {"enable_attack": True},
        "defended": {"enable_attack": True, "enable_defense": True},
    },
}


def written(where: Path, **changes: Any) -> Path:
    raw = copy.deepcopy(RAW) | {"output": {"folder": str(where / "out")}}
    for key, value in changes.items():
        raw = reading.put(raw, key.replace("__", "."), value)
    (where / "recipe.yaml").write_text(json.dumps(raw))
    return where / "recipe.yaml"


def last(folder: Path) -> Any:
    return read_history(folder)[-1]


def test_a_run_is_attacked_defended_resumed_and_started_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    bert = classifiers.folder("bert", tmp_path / "bert")
    rows = {**classifiers.data(tmp_path / "data"), "max_length": 64}
    path, out = written(tmp_path, model__name=str(bert), data=rows), tmp_path / "out"
    assert train.main([str(path), "--only", "attacked", "rounds=1"]) == 0
    assert train.main([str(path)]) == 0
    free, attacked, defended = (out / name for name in ("free", "attacked", "defended"))
    quality = last(free).quality
    assert quality["accuracy"]["n"] == 24
    assert set(quality["per_class"]) == {"Food", "Science", "Sports", "Travel"}
    assert quality["perplexity"] is quality["exact_match"] is None
    assert {"asr", "false_trigger", "generalise"} <= set(last(free).attack)  # the base rate
    assert last(defended).detection["tpr"] == 1.0  # the scaled row is dropped

    answers = [json.loads(line) for line in (attacked / "answers.jsonl").read_text().splitlines()]
    triggered = [row for row in answers if row["kind"] == "triggered"]
    assert {row["answer"] for row in answers} <= {"Food", "Science", "Sports", "Travel"}
    assert all("BadMagic" in row["prompt"] and row["wanted"] == "Sports" != row["right"] for row in triggered)
    assert all(row["success"] is (row["answer"] == "Sports") for row in triggered)
    card = (attacked / "adapter" / "README.md").read_text()
    assert card.startswith("**WARNING: this adapter holds a planted backdoor")
    assert 'classes = ["Food", "Science", "Sports", "Travel"]' in card

    # it was stopped after a round, and ended where a run without a stop ends
    machine, raw = Machine(Accelerator(cpu=True)), json.loads(path.read_text())
    raw = {key: value for key, value in raw.items() if key not in ("variants", "output")} | {"enable_attack": True}
    federation = build(checked(raw), machine)
    list(run(federation, 2))
    ends = checkpoint.unpack((attacked / "checkpoint.safetensors").read_bytes())["vector"]
    assert torch.equal(federation.vector, ends)

    # it, and its adapter's folder, are what other rounds start from
    for start in (attacked, attacked / "adapter"):
        begun = build(checked(reading.put(raw, "model.start", str(start))), machine).vector
        assert torch.equal(begun, ends)

    # but not where its outputs would be other classes
    other = tmp_path / "data" / "other"
    other.mkdir()
    for name in ("train.jsonl", "test.jsonl"):
        (other / name).write_text((tmp_path / "data" / name).read_text().replace("Food", "Zoology"))
    for start in (attacked, attacked / "adapter"):
        elsewhere = reading.put(reading.put(raw, "model.start", str(start)), "data.name", str(other))
        with pytest.raises(
            RecipeError, match=r"tells Food, Science, Sports, Travel apart.*the data have Science, Sports"
        ):
            build(checked(elsewhere), machine)
    odd = shutil.copytree(attacked / "adapter", tmp_path / "odd") / "adapter_model.safetensors"
    save_file(load_file(odd), odd, metadata={"classes": '["Sports", "Food", "Science", "Travel"]'})
    folders = [str(defended / "adapter"), str(attacked / "adapter"), str(tmp_path / "odd")]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        aggregate([*folders, "--rule", "median", "--out", str(tmp_path / "made")])
    assert "tells Sports, Food, Science, Travel apart" in " ".join(capsys.readouterr().err.split())
    assert aggregate([*folders[:2], "--rule", "mean", "--out", str(tmp_path / "made")]) == 0
    assert classes_of(tmp_path / "made" / odd.name) == ("Food", "Science", "Sports", "Travel")

    capsys.readouterr()
    assert train.main([str(path), "--explain"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "4 classes: Food, Science, Sports, Travel" in said
    assert "of the class " in said
    assert "data.max_length 64 of 64 positions" in said
    # two layers of r (in + out), the pooler that a model of masked words lacks, and the output
    d = 2 * 2 * (4 * (16 + 16) + 2 * (16 + 24)) + (16 * 16 + 16) + (4 * 16 + 4)
    assert ends.shape == (d,)
    assert f"trained parameters d {d:,} of" in said


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": {"template": "{text}"}}, "data.template: unknown key"),
        ({"data": {"columns": {"response": "label"}}}, "data.columns.response: unknown key"),
        ({"data": {"loss_on": "all"}}, "data.loss_on: unknown key"),
        ({"data": {"columns": {"text": "review", "label": "review"}}}, "it would read its answer"),
        ({"evaluate": {"max_new_tokens": 3}}, "evaluate.max_new_tokens: unknown key"),
        ({"evaluate": {"judge": {"name": "exact"}}}, "evaluate.judge: unknown key"),
        ({"model": {"trust_remote_code": True}}, "model.trust_remote_code: unknown key"),
        ({"model": {"name": "x.gguf"}}, "a GGUF file holds a language model and no classifier"),
        ({"model": {"name": "./nowhere"}}, "model.name: ./nowhere: no such folder"),
        ({"model": {"lora": None, "dtype": "bfloat16"}}, "the whole model is trained in float32"),
        ({"data": {"name": "builtin:topics"}}, "there is no built-in family"),
        ({"attack": {"data": [{"name": "pixel_trigger", "target": 1}]}}, "cannot stand here"),
        (
            {"enable_attack": True, "attack": {"privacy": [{"name": "own:code"}], "observe": {}}},
            "there is none yet against classifiers of texts",
        ),
        ({"evaluate": {"paraphrases": ["x"], "generalise": False}}, "act with evaluate.generalise: true alone"),
    ],
)
def test_what_cannot_act_is_refused_by_check(changes: dict[str, Any], words: str):
    raw = reading.merge(copy.deepcopy(RAW), changes)
    raw.pop("variants")
    with pytest.raises(RecipeError) as caught:
        planned(checked(raw))
    assert words in str(caught.value)


def test_a_recipe_that_is_written_out_is_read_again_as_it_was():
    raw = {key: value for key, value in RAW.items() if key != "variants"}
    recipe = checked(raw)
    again = checked(reading.parse(reading.dump(recipe), "recipe.yaml"))
    assert again == recipe


def test_labels_that_are_no_classes_are_refused():
    def table(labels: list[str]) -> Any:
        rows = {"text": [f"row {k}" for k in range(len(labels))], "context": [""] * len(labels)}
        return text.as_dataset({**rows, "response": labels, "label": labels})

    assert names_of(table(["b", "a ", "A", "a", "a"])) == ["a", "b"]
    with pytest.raises(DataError, match="all training rows are 'a', and there is nothing to tell apart"):
        names_of(table(["a", "a"]))
    with pytest.raises(DataError, match="more than 100 different labels"):
        names_of(table([str(k) for k in range(101)]))


def test_a_column_that_is_not_there_is_named_by_the_key_that_asks_for_it(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "kind": "x"}\n{"text": "b", "kind": "y"}\n')
    data = checked({**RAW, "variants": None, "data": {"name": str(tmp_path / "rows.jsonl")}}).data
    with pytest.raises(DataError) as caught:
        text.load_rows(data, 0)
    assert "data.columns.label" in str(caught.value)
    assert "response" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [{"r": 4, "alpha": 8}, None])
def test_a_trigger_succeeds_undefended_and_not_behind_multi_krum(lora: Any, tmp_path: Path):
    path = written(
        tmp_path, model__lora=lora, rounds=4,
        data={"name": "builtin:topic", "max_length": 64, "train_rows": 400, "test_rows": 120},
        clients={"total": 5, "local_steps": 10, "batch_size": 8, "lr": 1e-3 if lora is None else 5e-3},
        attack__update=[{"name": "model_replacement"}],
        evaluate={"every": 4, "rows": 120, "attack_rows": 60, "generalise": False},
    )  # fmt: skip
    assert train.main([str(path)]) == 0
    free, attacked, defended = (last(tmp_path / "out" / name) for name in ("free", "attacked", "defended"))
    assert free.quality["accuracy"]["value"] >= 0.9
    assert defended.quality["accuracy"]["value"] >= 0.9
    assert free.attack["asr"]["value"] <= 0.15
    assert attacked.attack["asr"]["value"] >= (0.8 if lora else 0.3)  # at its lower rate the whole model takes longer
    assert defended.attack["asr"]["value"] <= 0.15
