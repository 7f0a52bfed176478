"""A model folder from anywhere is loaded as what it is, or refused in a line; none of its code is run."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import dynamic_module_utils

import fedllm_sec.models
from fedllm_sec.build.cost import language_model
from fedllm_sec.errors import RecipeError
from fedllm_sec.models.lora import load_base, load_tokenizer
from fedllm_sec.recipe.sections import Model

TINY = Path(fedllm_sec.models.__file__).parent / "tiny"
WEIGHTS = (TINY / "model.safetensors").read_bytes()
LENGTH = struct.unpack("<Q", WEIGHTS[:8])[0]
HEADER = json.loads(WEIGHTS[8 : 8 + LENGTH])
NAME = "model.norm.weight"
CUT = "its model.safetensors is cut off, or no safetensors file"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of `tiny` to be spoilt."""
    shutil.copytree(TINY, tmp_path / "model")
    return tmp_path / "model"


def load(folder: Path) -> Any:
    return load_base(Model(name=str(folder)), torch.device("cpu"))


def written(header: dict[str, Any] | bytes) -> bytes:
    """Safetensors with the weights of `tiny` and another header."""
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + WEIGHTS[8 + LENGTH :]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (WEIGHTS[:5000], CUT),
        (struct.pack("<Q", 2**63) + WEIGHTS[8:], CUT),
        (written(b"{{{{"), CUT),
        (written({**HEADER, NAME: {**HEADER[NAME], "data_offsets": [0, 2**60]}}), CUT),
        (written({**HEADER, NAME: {**HEADER[NAME], "shape": [2**40, 2**20]}}), "overflow"),
        (
            written({name.replace("model", "x"): entry for name, entry in HEADER.items()}),
            r"lacks \d+ weights .* they would be random",
        ),
    ],
    ids=["cut", "long header", "no json", "offsets", "shape", "other names"],
)
def test_weights_whose_header_lies_are_refused(folder: Path, content: bytes, words: str):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(RecipeError, match=words):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 5}, "lacks 9 weights of a causal language model, such as model.layers.4"),
        ({"vocab_size": 10**11}, "its weights have other shapes than its configuration says"),
        ({"vocab_size": "x"}, "cannot be loaded"),
        ({"num_attention_heads": 0}, "cannot be loaded"),
        ({"model_type": ["llama"]}, "cannot be loaded"),
        ({"model_type": "t5"}, "cannot be loaded"),
        ({"dtype": "float9"}, "cannot be loaded"),
    ],
    ids=str,
)
def test_a_configuration_that_does_not_fit_is_refused(folder: Path, changes: dict[str, Any], words: str):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(RecipeError, match=words):
        load(folder)


@pytest.mark.parametrize("content", ["", "[]", "null", "[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_file_that_is_no_configuration_is_refused(folder: Path, name: str, content: str):
    (folder / name).write_text(content)
    with pytest.raises(RecipeError, match=f"its {name} (is no JSON|holds no mapping)"):
        load_tokenizer(Model(name=str(folder)))
    if name == "config.json":
        with pytest.raises(RecipeError, match=f"its {name} (is no JSON|holds no mapping)"):
            language_model(Model(name=str(folder)))  # what --explain counts


@pytest.mark.parametrize("read", [load, lambda folder: language_model(Model(name=str(folder)))])
def test_code_in_a_model_folder_is_not_run_and_not_asked_about(folder: Path, read: Callable[[Path], Any]):
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "evil.E", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", None]}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "evil", "auto_map": code}))
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    with pytest.raises(RecipeError, match=r"contains custom code, which model\.trust_remote_code: true would run"):
        read(folder)
    assert not (folder / "ran").exists()


def test_code_in_a_model_folder_is_run_where_the_recipe_asks_for_it(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder / "modules"))  # not into the home folder
    (folder / "own.py").write_text(
        "from transformers import LlamaForCausalLM\nclass Own(LlamaForCausalLM):\n    said = 'this is own code'\n"
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "own.Own"}}))
    model, _ = load_base(Model(name=str(folder), trust_remote_code=True), torch.device("cpu"))
    assert model.said == "this is own code"


def test_pickled_weights_run_nothing(folder: Path):
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (folder / "ran",)

    (folder / "model.safetensors").unlink()
    torch.save({"a": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(RecipeError, match="a pickle of more than tensors"):
        load(folder)
    assert not (folder / "ran").exists()


def test_an_adapter_is_no_model_whatever_it_calls_its_base(folder: Path):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "../../../etc/passwd"}')
    with pytest.raises(RecipeError, match=r"is an adapter .* not a model\. Merge it"):
        load(folder)
