"""What an observer kept of a run, and what was learnt from it: files of the run folder.

`observed/round-00001-c00.safetensors` holds one vector as sent and the one received; `privacy.json` the attacks' scores
and pictures. Without torch, so that a report can read the second.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedllm_sec.errors import ResumeError
from fedllm_sec.records import checkpoint
from fedllm_sec.records.files import in_a_line, write_atomic, write_json

if TYPE_CHECKING:
    from torch import Tensor

FOLDER, FOUND = "observed", "privacy.json"


def path_of(folder: Path, client: str, round: int) -> Path:
    return folder / FOLDER / f"round-{round:05d}-{client}.safetensors"


def keep(folder: Path, what: str, client: str, round: int, sent: Tensor, start: Tensor) -> None:
    """Write one vector (d,) as it was sent, and the one that the client had received."""
    state = {"what": what, "client": client, "round": round, "sent": sent, "start": start}
    write_atomic(path_of(folder, client, round), *checkpoint.pack(state))


def kept(folder: Path, client: str, round: int) -> dict[str, Any] | None:
    """That file's content; None where there is none. A damaged one is an error."""
    path = path_of(folder, client, round)
    if not path.is_file():
        return None
    try:
        return checkpoint.unpack(path.read_bytes())
    except (*checkpoint.UNREADABLE, OSError) as error:
        raise ResumeError(
            f"{path}: cannot be read ({in_a_line(error)}). Remove it and start anew (--fresh)."
        ) from error


def last_vector(folder: Path) -> Tensor | None:
    """The global vector (d,) after the last round of a run; None where its checkpoint is not there, or damaged."""
    try:
        vector: Tensor | None = checkpoint.unpack((folder / "checkpoint.safetensors").read_bytes())["vector"]
    except (*checkpoint.UNREADABLE, OSError):
        return None
    return vector


def write_found(folder: Path, found: Mapping[str, Any]) -> None:
    write_json(folder / FOUND, found)


def read_found(folder: Path) -> dict[str, Any] | None:
    """What was learnt; None where no audit was made, or its file is no longer one."""
    try:
        found = json.loads((folder / FOUND).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("attacks"), list) else None
