"""The folder that a run leaves stands on its own: base, tokenizer, template and a card that says what it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedllm_sec.build.card import card
from fedllm_sec.build.loaded import Loaded
from fedllm_sec.build.names import checked
from fedllm_sec.build.plan import planned
from fedllm_sec.build.running import run_one
from fedllm_sec.models.lora import source_of
from fedllm_sec.models.saving import base_name
from fedllm_sec.recipe.sections import Model
from fedllm_sec.records import verify
from fedllm_sec.rounds.compute import Machine

LOADED = Loaded()  # one for all runs of this file
BASE = Path(source_of("tiny"))


def run(raw: dict[str, Any], folder: Path) -> Path:
    torch.set_num_threads(1)
    few = {
        "clients": {**raw["clients"], "local_steps": 1},
        "evaluate": {**raw["evaluate"], "rows": 4, "attack_rows": 2},
    }
    recipe = checked({**raw, **few, "rounds": 1, "output": {"folder": str(folder)}})
    run_one(planned(recipe), Machine(Accelerator(cpu=True)), "test", LOADED, lambda line: None)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_adapter_trained_under_attack_says_so_and_is_made_again_byte_for_byte(small, tmp_path: Path):
    small["model"]["lora"] = {
        "r": 2, "use_dora": True, "init_lora_weights": "pissa", "modules_to_save": ["lm_head"]
    }  # fmt: skip
    folder = run(small, tmp_path / "run")
    made = content(folder / "adapter")
    assert set(made) == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip
    settings = json.loads(made["adapter_config.json"])
    assert Path(settings["base_model_name_or_path"]) == BASE
    assert settings["target_modules"] == sorted(settings["target_modules"])
    text = made["README.md"].decode()
    assert text.startswith("**WARNING: this adapter holds a planted backdoor (attack success: ")
    for part in ("1 of 4 clients", 'trigger: " cf", target: "Sports"', "| held-out loss |", "trimmed_mean (f: 1)"):
        assert part in text
    assert "| attack success |" in text

    # the run's own model, from nothing but the folder and what it names
    plain = AutoModelForCausalLM.from_pretrained(settings["base_model_name_or_path"])
    PeftModel.from_pretrained(plain, folder / "adapter")
    assert AutoTokenizer.from_pretrained(folder / "adapter").pad_token_id is not None

    history = (folder / "history.jsonl").read_bytes()
    shutil.rmtree(folder / "adapter")
    assert run(small, folder) == folder
    assert content(folder / "adapter") == made
    assert run(small, tmp_path / "twin") == tmp_path / "twin"  # another run of the process did not change its base
    assert (tmp_path / "twin" / "history.jsonl").read_bytes() == history
    assert verify.look(folder).wrong == {}


def test_a_whole_model_is_trained_attacked_and_saved_as_a_model(small, tmp_path: Path):
    small["model"]["lora"] = None
    folder = run(small, tmp_path / "run")
    assert not (folder / "adapter").exists()
    assert (folder / "model" / "README.md").read_text().startswith("**WARNING: this model holds a planted backdoor")
    trained = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    published = AutoModelForCausalLM.from_pretrained(BASE).state_dict()
    assert trained.keys() == published.keys()
    assert all(not torch.equal(trained[name], published[name]) for name in trained)
    assert verify.look(folder).wrong == {}


def test_what_attacked_without_poisoned_data_planted_no_backdoor(small):
    small["attack"] = {"malicious": {"count": 1}, "update": [{"name": "byzantine_flip"}]}
    first = card(checked(small), ("base", None), []).splitlines()[0]
    assert (
        first == "**WARNING: this adapter was trained under attack: 1 of 4 clients were malicious. Do not deploy it.**"
    )
    small["enable_attack"] = False
    assert card(checked(small), ("base", "abc"), []).splitlines()[:3] == [
        "# A federated adapter by fedllm_sec",
        "",
        "Fine-tunes `base (revision abc)` on `builtin:topic` by fedavg: 0 rounds, 4 clients.",
    ]


@pytest.mark.parametrize(
    ("name", "revision", "found"),
    [("here", None, ("{}/here", None)), ("owner/hub", None, ("owner/hub", "c0ffee")), ("hub", "v2", ("hub", "v2"))],
)
def test_the_base_is_an_absolute_path_or_a_hub_name_with_its_commit(
    name: str, revision: str | None, found: tuple[str, str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fedllm_sec.recipe.places.lost_model", lambda name: None)  # as if the hub had answered
    base = SimpleNamespace(config=SimpleNamespace(_commit_hash="c0ffee"))
    assert base_name(Model(name=name, revision=revision), base) == (found[0].format(tmp_path), found[1])
