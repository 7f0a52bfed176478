"""A base model out of one GGUF file, the form in which llama.cpp and its kin pass models around."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedllm_sec.errors import RecipeError

MAGIC = b"GGUF"


def is_gguf(name: str) -> bool:
    """Whether a model's name is that of a GGUF file."""
    return name.lower().endswith(".gguf")


def check(file: Path) -> None:
    """Raise where the file is no GGUF file, or where the package that reads one is not installed."""
    with file.open("rb") as opened:
        begins = opened.read(len(MAGIC))
    if begins != MAGIC:
        raise RecipeError(f"model.name: {file}: is no GGUF file: it begins with {begins!r}, not {MAGIC!r}.")
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise RecipeError(
            f"model.name: {file}: a GGUF file needs the package gguf, which is not installed. "
            "pip install 'fedllm_sec[gguf]', or give a folder of safetensors."
        ) from error


def place(source: str) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` is called with: folder (or hub name), and the file in it where it is a GGUF file."""
    if not is_gguf(source):
        return source, {}
    file = Path(source)
    return str(file.parent), {"gguf_file": file.name}


def dense(source: str) -> dict[str, Any]:
    """`from_pretrained` options by which a GGUF file's weights become ordinary tensors; none for anything else.

    Its quantised blocks are unpacked once: LoRA adapts linear layers, and training needs their products in floats.
    """
    if not is_gguf(source):
        return {}
    from transformers import GgufConfig

    return {"quantization_config": GgufConfig(gguf_file=source, dequantize=True)}
