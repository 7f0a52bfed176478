"""What is wrong with a folder that is to hold a language model: files that are missing, cut off or never fetched."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedllm_sec.errors import reason

WEIGHTS = (".safetensors", ".bin")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
POINTER = b"version https://git-lfs"  # how the stand-in of a file begins that Git has not fetched
AGAIN = "Download it again"
LISTED = "modules.json"  # a list, which sentence-transformers writes and transformers does not read


def lost_code(folder: str) -> str | None:
    """Code that the folder's configuration names and the folder has not; None where it names none, or all is there.

    The libraries say nothing of it where they know the kind of model: what would run is not what was published.
    """
    try:
        named = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")).get("auto_map")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None  # said by what reads the whole of it
    for value in (named.values() if isinstance(named, dict) else [named]) if named is not None else ():
        for name in value if isinstance(value, list) else [value]:
            if name is None or (isinstance(name, str) and "--" in name):  # none, or in another place of the hub
                continue
            module = name.rpartition(".")[0] if isinstance(name, str) else ""
            if not module or not (Path(folder) / f"{module}.py").is_file():
                file = f"{module}.py is not in the folder" if module else "that is no module.Class"
                return (
                    f"its config.json names code of its own (auto_map: {name}), but {file}. Copy the code there, or "
                    "take auto_map out of config.json if transformers has the model without it."
                )
    return None


def wrong(folder: str) -> str | None:
    """The first thing that is wrong with the files of a model's folder and its way out; None where nothing is seen."""
    return next(_faults(Path(folder)), None)


def _faults(folder: Path) -> Iterator[str]:
    if not (folder / "config.json").is_file():
        yield "has no config.json, so it is no model's folder. Give the one with config.json, weights and tokenizer."
    for path in sorted(folder.glob("*.json")):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            yield f"its {path.name} is no JSON ({reason(error)}). {AGAIN}."
            continue
        if not isinstance(found, dict) and path.name != LISTED:
            yield f"its {path.name} holds no mapping, but {type(found).__name__}. {AGAIN}."
        elif path.name.endswith(".index.json"):
            yield from _lost_parts(folder, path.name, found)
    weights = [path for path in sorted(folder.iterdir()) if path.suffix in WEIGHTS]
    if not weights:
        yield f"holds no weights ({', '.join(f'*{ending}' for ending in WEIGHTS)}). Download them into it."
    for path in weights:
        yield from _wrong_weights(path)
    if not any((folder / name).is_file() for name in TOKENIZERS):
        yield "has no tokenizer (tokenizer.json or tokenizer.model). Download it into the folder."


def wrong_weights(folder: str) -> str | None:
    """What is wrong with a file of weights in the folder; None where nothing is seen."""
    paths = sorted(path for path in Path(folder).iterdir() if path.suffix in WEIGHTS and path.is_file())
    return next((fault for path in paths for fault in _wrong_weights(path)), None)


def _wrong_weights(path: Path) -> Iterator[str]:
    if not path.is_file():
        yield f"its {path.name} is no file, or a link that leads nowhere. {AGAIN}."
        return
    with path.open("rb") as file:
        begin = file.read(max(8, len(POINTER)))
    if begin.startswith(POINTER):
        yield f"its {path.name} is a pointer of Git LFS, not the weights. Fetch them with `git lfs pull`."
    elif path.suffix == ".safetensors":
        if (header := _header(path)) is None:
            yield f"its {path.name} is cut off, or no safetensors file. {AGAIN}."
        elif (whole := _whole_numbers(header)) is not None and not _packed(path.parent):
            yield f"its {path.name} holds {whole}, whole numbers where weights are fractions. {AGAIN}."


def _lost_parts(folder: Path, name: str, index: dict[str, Any]) -> Iterator[str]:
    """Files of weights that an index names and the folder has not."""
    parts = index.get("weight_map")
    named = sorted({str(part) for part in parts.values()}) if isinstance(parts, dict) else []
    if lost := [part for part in named if not (folder / part).is_file()]:
        yield f"{len(lost)} of the {len(named)} files that {name} names are not there, first {lost[0]}. Download them."


def _header(path: Path) -> dict[str, Any] | None:
    """What a safetensors file says of its tensors; None where it is not as long as that says."""
    size = os.path.getsize(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            return None
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            return dict(header) if 8 + length + max(ends, default=0) == size else None
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return None


def _whole_numbers(header: dict[str, Any]) -> str | None:
    """The first weight that is kept as whole numbers, and how."""
    return next(
        (
            f"{name} ({kind})"
            for name, entry in header.items()
            if name.endswith(".weight") and (kind := str(entry.get("dtype")))[:1] in "IUB" and kind != "BF16"
        ),
        None,
    )


def _packed(folder: Path) -> bool:
    """Whether the configuration says that weights are packed, as GPTQ and bitsandbytes do."""
    try:
        return "quantization_config" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, RecursionError):
        return True  # said by what reads the whole of it
