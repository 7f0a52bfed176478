"""A model's folder that is broken is told by the file that is, with a way out; code that is not there is missed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fedllm_sec.errors import RecipeError
from fedllm_sec.models.lora import load_tokenizer, source_of, told
from fedllm_sec.recipe import modelfolder
from fedllm_sec.recipe.sections import Model
from tests.conftest import ROOT

TINY = ROOT / "fedllm_sec" / "models" / "tiny"
WEIGHTS = "model.safetensors"


def indexed(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
    parts = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda folder: (folder / "config.json").unlink(),
            "has no config.json, so it is no model's folder. Give the one",
        ),
        (lambda folder: (folder / "config.json").write_text('{"a":'), "its config.json is no JSON"),
        (
            lambda folder: (folder / "config.json").write_text("[1]"),
            "its config.json holds no mapping, but list. Downl",
        ),
        (
            lambda folder: (folder / "tokenizer.json").write_bytes(b"\xff"),
            "its tokenizer.json is no JSON (byte 0xff at pl",
        ),
        (lambda folder: (folder / WEIGHTS).unlink(), "holds no weights (*.safetensors, *.bin). Download them into it."),
        (
            lambda folder: (folder / WEIGHTS).write_bytes(b""),
            "its model.safetensors is cut off, or no safetensors file",
        ),
        (lambda folder: shorten(folder / WEIGHTS), "its model.safetensors is cut off, or no safetensors file. Downl"),
        (
            lambda folder: save_file({"a.weight": torch.ones(2, dtype=torch.int32)}, folder / WEIGHTS),
            "its model.safetensors holds a.weight (I32), whole numbers where weights are fractions. Download it",
        ),
        (
            lambda folder: (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\n"),
            "`git lfs pull`",
        ),
        (indexed, "1 of the 2 files that model.safetensors.index.json names are not there, first model-00002-of"),
        (
            lambda folder: (folder / "tokenizer.json").unlink(),
            "has no tokenizer (tokenizer.json or tokenizer.model). Downl",
        ),
    ],
)
def test_the_broken_file_is_named(tmp_path: Path, damage: Callable[[Path], object], words: str):
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    assert modelfolder.wrong(str(folder)) is None
    damage(folder)
    found = modelfolder.wrong(str(folder))
    assert found is not None
    assert words in found
    with pytest.raises(RecipeError, match=f"^model.name: {folder}: "), told(str(folder)):
        raise OSError("what a library says")


def test_whole_numbers_are_weights_where_the_configuration_says_that_they_are_packed(tmp_path: Path):
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    save_file({"a.weight": torch.ones(2, dtype=torch.uint8)}, folder / WEIGHTS)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"load_in_4bit": True}}))
    assert modelfolder.wrong(str(folder)) is None


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def test_code_that_a_configuration_names_must_be_there(tmp_path: Path):
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    config = json.loads((folder / "config.json").read_text())

    def named(auto_map: object) -> None:
        (folder / "config.json").write_text(json.dumps({**config, "auto_map": auto_map}))

    for strange in ({"AutoModelForCausalLM": "modeling_x.X"}, {"AutoTokenizer": ["modeling_x.X", None]}):
        named(strange)
        with pytest.raises(
            RecipeError, match=r"\(auto_map: modeling_x.X\), but modeling_x.py is not in the folder. Copy"
        ):
            source_of(str(folder))
    named("x")
    with pytest.raises(RecipeError, match=r"\(auto_map: x\), but that is no module.Class"):
        source_of(str(folder))
    named({"AutoModelForCausalLM": "owner/other--modeling_x.X"})  # lies on the hub
    assert source_of(str(folder)) == str(folder)
    (folder / "modeling_x.py").write_text("raise SystemExit")
    named({"AutoModelForCausalLM": "modeling_x.X"})
    assert source_of(str(folder)) == str(folder)
    assert load_tokenizer(Model(name=str(folder))).vocab_size > 0  # nothing of it runs
