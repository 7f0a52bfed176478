"""What a run made: size and SHA-256 of every file, kept in summary.json, and what has become of them since."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedllm_sec.records.files import as_json, sha256, write_atomic

FILES = (
    *("recipe.yaml", "environment.json", "history.jsonl", "timings.jsonl", "checkpoint.safetensors"),
    *("answers.jsonl", "harness.json", "trigger.json", "privacy.json"),
)
OBSERVED = "observed"  # folder of what an observer kept
MODEL = re.compile(r"(adapter|model)(-round-\d+)?")  # folders of the final model, and of rounds that were kept
SUMMARY = "summary.json"
PRETRAIN = "pretrain"  # beside runs: the folder of the attack-free rounds that they start after


def made(folder: Path) -> dict[str, dict[str, Any]]:
    """{file: {"bytes", "sha256"}} of all that the run wrote, but for summary.json and the report."""
    paths = [folder / name for name in FILES if (folder / name).is_file()]
    for kept in sorted(folder.iterdir()):
        if kept.name == OBSERVED and kept.is_dir():
            paths += sorted(path for path in kept.glob("*.safetensors") if path.is_file())
        if MODEL.fullmatch(kept.name) and kept.is_dir():
            paths += sorted(path for path in kept.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in paths
    }


def sealed(summary: Mapping[str, Any]) -> bytes:
    """summary.json with the SHA-256 of its own content in it."""
    return as_json({**summary, "sha256": hashlib.sha256(as_json(summary)).hexdigest()})


def renewed(folder: Path, name: str, **changes: Any) -> None:
    """Have summary.json say this, and of a file what it is now: it was made anew, on purpose. None there: nothing."""
    if isinstance(found := read_summary(folder), dict):
        path = folder / name
        entry = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        write_atomic(folder / SUMMARY, sealed({**found, **changes, "made": {**found["made"], name: entry}}))


def read_summary(folder: Path) -> dict[str, Any] | str:
    """The content of a summary.json that is as it was written, else what is wrong with it."""
    path = folder / SUMMARY
    if not path.is_file():
        return "is no file" if path.exists() else "is gone"
    try:
        data = path.read_bytes()
        found = json.loads(data)
        del found["sha256"]
        if data != sealed(found):
            return "holds other bytes than the run wrote"
        for name, entry in found["made"].items():
            if not (name.isprintable() and type(entry["bytes"]) is int and type(entry["sha256"]) is str):
                return "does not say what the run made"
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return "cannot be read"
    return dict(found)


def is_as_made(folder: Path, name: str, data: bytes) -> bool:
    """Whether a file of a finished run held these bytes when the run left it, by a summary.json that is whole."""
    found = read_summary(folder)
    entry = found["made"].get(name, {}) if isinstance(found, dict) else {}
    return bool(entry) and entry["sha256"] == hashlib.sha256(data).hexdigest()


def damage(folder: Path) -> dict[str, str]:
    """{file: what is wrong with it} of a finished run; empty where all is as the run left it."""
    summary = read_summary(folder)
    if isinstance(summary, str):
        return {SUMMARY: summary}
    return {name: wrong for name, entry in summary["made"].items() if (wrong := _wrong(folder, name, entry))}


def _wrong(folder: Path, name: str, entry: Mapping[str, Any]) -> str:
    path = folder / name
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):  # resolve() refuses a loop of links
        return "lies outside the folder"
    if not path.is_file():
        return "is no file" if path.exists() else "is gone"
    if path.stat().st_size != entry["bytes"]:
        return f"has {path.stat().st_size:,} bytes instead of {entry['bytes']:,}"
    return "" if sha256(path) == entry["sha256"] else "holds other bytes than the run wrote"


def made_again(round: int) -> tuple[str, ...]:
    """How the names of files begin that recipe, history and the checkpoint of the last round are enough to make again.

    Where these were found to agree, recipe.yaml can only be written otherwise, and history.jsonl only be too long.
    """
    models = (f"{kind}{kept}/" for kind in ("adapter", "model") for kept in ("", f"-round-{round}"))
    return (SUMMARY, "recipe.yaml", "history.jsonl", "harness.json", "trigger.json", "privacy.json", *models)
