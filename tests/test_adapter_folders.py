"""`fedllm-sec aggregate`: adapter folders in, one out; what cannot be read or compared is said by folder."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from fedllm_sec.__main__ import main

CONFIG = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)


@pytest.fixture
def adapters(tmp_path: Path) -> list[Path]:
    """Five adapters that were trained from one start; the last one's is thrown far away."""
    torch.manual_seed(0)
    LlamaForCausalLM(CONFIG).save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "start")
    begun = load_file(tmp_path / "start" / "adapter_model.safetensors")
    folders = []
    for k in range(5):
        model.save_pretrained(tmp_path / f"c{k}")
        far = 100.0 if k == 4 else 0.01
        moved = {name: value + far * torch.randn(value.shape) for name, value in begun.items()}
        save_file(moved, tmp_path / f"c{k}" / "adapter_model.safetensors")
        folders.append(tmp_path / f"c{k}")
    return folders


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def run(folders: list[Path], *words: str) -> int:
    return main(["aggregate", *map(str, folders), *words])


def test_the_folder_that_is_made_holds_the_rules_answer_and_loads(adapters, tmp_path: Path, capsys):
    assert run(adapters, "--rule", "median", "--out", str(tmp_path / "out")) == 0
    made, states = tensors(tmp_path / "out"), [tensors(folder) for folder in adapters]
    for name, value in made.items():
        torch.testing.assert_close(value, torch.stack([s[name] for s in states]).median(0).values)
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    PeftModel.from_pretrained(base, tmp_path / "out")
    assert "median of 5 adapters" in capsys.readouterr().out
    assert "median of 5 adapters" in (tmp_path / "out" / "README.md").read_text()


def test_a_rule_with_settings_drops_the_one_that_is_far_away_and_says_so(adapters, tmp_path: Path, capsys):
    words = ["--rule", "multi_krum", "--set", "f=1", "--start", str(tmp_path / "start"), "--out", str(tmp_path / "out")]
    assert run(adapters, *words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("weight ")[1][:5] for line in lines[1:6]] == ["0.250"] * 4 + ["0.000"]
    states = [tensors(folder) for folder in adapters[:4]]
    for name, value in tensors(tmp_path / "out").items():
        torch.testing.assert_close(value, torch.stack([s[name] for s in states]).mean(0), atol=1e-6, rtol=1e-5)


def test_a_stage_before_the_rule_and_a_broken_state_of_one_of_them(adapters, tmp_path: Path, capsys):
    states = tensors(adapters[1])
    save_file({name: value * float("nan") for name, value in states.items()}, adapters[1] / "adapter_model.safetensors")
    words = ["--rule", "mean", "--before", "norm_clipping", "--out", str(tmp_path / "out")]
    assert run(adapters, *words) == 0
    assert "c1: set aside: " in capsys.readouterr().out
    assert all(bool(value.isfinite().all()) for value in tensors(tmp_path / "out").values())


def test_a_stage_may_be_a_block_as_in_a_recipe_and_a_new_folder_above_the_answer_is_said(adapters, tmp_path, capsys):
    words = ["--before", "{name: nnm, f: 1}", "--out", str(tmp_path / "above" / "out")]
    assert run(adapters, "--rule", "mean", *words) == 0
    assert f"(the folder {tmp_path / 'above'} is new)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rule", "krum"], "error: --set f: is needed"),
        (["--rule", "kurm"], 'error: --rule: there is no "kurm"'),
        (["--rule", "fltrust"], "This command has no clean rows of a server: choose another rule."),
        (["--rule", "mean", "--before", "{name: nnm, g: 1}"], "error: --before.0.g: 1 is set"),
        (["--rule", "mean", "--before", "{nme: nnm}"], "error: --before {'nme': 'nnm'}: must be a name of the menu"),
        (["--rule", "krum", "--set", "f=3"], "Lower f or give more adapters."),
    ],
)
def test_an_error_is_one_line_that_names_the_commands_own_options(adapters, tmp_path, capsys, words, said):
    with pytest.raises(SystemExit):
        run(adapters, *words, "--out", str(tmp_path / "out"))
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1


def refused(capsys, words: str, folders: list[Path], *more: str) -> None:
    with pytest.raises(SystemExit) as caught:
        run(folders, *more)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


def test_what_cannot_be_done_is_one_line(adapters, tmp_path: Path, capsys):
    out = ["--out", str(tmp_path / "out")]
    refused(capsys, "exists already", adapters, "--rule", "mean", "--out", str(adapters[0]))
    refused(capsys, 'there is no "kurm". Did you mean "krum"?', adapters, "--rule", "kurm", *out)
    refused(capsys, "must be a name of the menu", adapters, "--rule", "os:system", *out)
    refused(capsys, "must be NAME=VALUE", adapters, "--rule", "mean", "--set", "f", *out)
    refused(
        capsys,
        "before is no setting of a rule. Give it as --before",
        adapters,
        "--rule",
        "mean",
        "--set",
        "before=nnm",
        *out,
    )
    refused(capsys, "ids is no setting of a rule", adapters, "--rule", "mean", "--set", "ids=[1]", *out)
    twice = ["--set", "f=0", "--set", "f=1"]
    refused(capsys, "--set f=1: f was set to 0 before it", adapters, "--rule", "krum", *twice, *out)
    inside = str(adapters[0] / "adapter_config.json" / "x")
    refused(capsys, "cannot be written (Not a directory)", adapters, "--rule", "mean", "--out", inside)
    refused(capsys, "krum: ", adapters, "--rule", "krum", "--set", "f=4", *out)
    refused(capsys, "Give a peft adapter folder", [*adapters, tmp_path], "--rule", "mean", *out)
    (tmp_path / "loop").symlink_to("loop")
    refused(capsys, "Give a peft adapter folder", [*adapters, tmp_path / "loop"], "--rule", "mean", *out)
    again = adapters[1] / ".." / "c0"
    refused(
        capsys,
        f"{again}: is {adapters[0]} once more, and would have two votes",
        [*adapters, again],
        "--rule",
        "mean",
        *out,
    )
    (tmp_path / "empty").mkdir()
    shutil.copy(adapters[0] / "adapter_config.json", tmp_path / "empty")
    start = ["--start", str(tmp_path / "empty")]
    refused(
        capsys, "empty/adapter_model.safetensors: no such file. Save the ad", adapters, "--rule", "mean", *start, *out
    )
    save_file({}, tmp_path / "empty" / "adapter_model.safetensors")
    refused(capsys, "empty/adapter_model.safetensors: holds no tensors", adapters, "--rule", "mean", *start, *out)
    config = json.loads((adapters[2] / "adapter_config.json").read_text())
    (adapters[2] / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 99}))
    refused(capsys, "lora_alpha: 99, in ", adapters, "--rule", "mean", *out)
    (adapters[2] / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    refused(capsys, "no LoRA adapter", adapters, "--rule", "mean", *out)
    (adapters[3] / "adapter_model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    refused(capsys, "cannot be read", adapters[3:], "--rule", "mean", *out)
    (adapters[3] / "adapter_model.safetensors").unlink()
    (adapters[3] / "adapter_model.bin").write_bytes(b"")
    refused(capsys, "pickles are not read", adapters[3:], "--rule", "mean", *out)
    assert not (tmp_path / "out").exists()


def test_adapters_that_did_not_start_as_one_are_told(adapters, tmp_path: Path):
    for folder in adapters[:3]:
        strange = {name: torch.randn(value.shape) for name, value in tensors(folder).items()}
        save_file(strange, folder / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match="they did not start from one adapter"):
        run(adapters[:3], "--rule", "median", "--out", str(tmp_path / "out"))


def test_a_hostile_adapter_in_the_first_place_decides_nothing(adapters, tmp_path: Path, capsys):
    evil = adapters[0]
    save_file({"evil": torch.ones(3)}, evil / "adapter_model.safetensors")
    (evil / "chat_template.jinja").write_text("EVIL")
    for folder in adapters[1:]:
        (folder / "tokenizer_config.json").write_text("{}")
    assert run(adapters, "--rule", "median", "--out", str(tmp_path / "out")) == 0
    assert "c0: set aside: it has other names" in capsys.readouterr().out
    assert set(tensors(tmp_path / "out")) == set(tensors(adapters[1]))
    assert not (tmp_path / "out" / "chat_template.jinja").exists()
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == "{}"
    refused(capsys, "no more than half of the adapters", adapters[:2], "--rule", "mean", "--out", str(tmp_path / "o"))
    config = json.loads((evil / "adapter_config.json").read_text())
    (evil / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "pissa"}))
    refused(capsys, "init_lora_weights: ", adapters, "--rule", "mean", "--out", str(tmp_path / "o"))
