"""A base model out of a GGUF file: read as ordinary tensors, or refused with the reason."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fedllm_sec.errors import RecipeError
from fedllm_sec.models.lora import load_base, source_of
from fedllm_sec.recipe.sections import Model

CPU = torch.device("cpu")


def written(folder: Path, architecture: str) -> Path:
    """A GGUF file with one tensor and no tokenizer."""
    gguf = pytest.importorskip("gguf", reason="needs the package gguf")
    file = folder / "model.gguf"
    writer = gguf.GGUFWriter(str(file), architecture)
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_a_gguf_file_of_an_unknown_architecture_is_refused_by_name(tmp_path: Path):
    file = written(tmp_path, "nonsense")
    with pytest.raises(RecipeError, match=rf'model.name: "{file}" cannot be loaded \(GGUF model with arch.* nonsense'):
        load_base(Model(name=str(file)), CPU)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"hello", "is no GGUF file: it begins with b'hell', not b'GGUF'"), (b"", "is no GGUF file"), (None, "no such")],
)
def test_a_file_that_is_no_gguf_file_is_refused_before_a_library_reads_it(tmp_path: Path, content, words: str):
    file = tmp_path / "model.gguf"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(RecipeError, match=f"model.name: {file}: {words}"):
        source_of(str(file))


def test_a_gguf_files_weights_are_unpacked_so_4bit_is_a_contradiction(tmp_path: Path):
    file = written(tmp_path, "llama")
    with pytest.raises(RecipeError, match=r"model.load_in_4bit: .*model.gguf is a GGUF file"):
        load_base(Model(name=str(file), load_in_4bit=True), CPU)


def test_without_the_package_a_gguf_file_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(RecipeError, match=r"needs the package gguf.*pip install 'fedllm_sec\[gguf\]'"):
        source_of(str(file))
