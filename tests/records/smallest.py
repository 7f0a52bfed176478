"""The smallest run there is, for tests that start it very often, and what must be equal however it was disturbed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

from fedllm_sec.train import main

RECIPE: dict[str, Any] = {
    "task": "classify",
    "rounds": 2,
    "model": {"name": "logistic"},
    "data": {"name": "digits", "train_rows": 40, "test_rows": 20},
    "clients": {"total": 2, "local_steps": 1, "batch_size": 8, "lr": 0.05, "optimizer": "sgd"},
    "evaluate": {"start": True},
    "compute": {"threads": 1},
    "output": {"adapter_every": 1},
}
TIMED = ("timings.jsonl", "summary.json", "report.html")  # in which seconds stand


def write(folder: Path, **changes: Any) -> Path:
    """The recipe of a run that goes to `folder`/out."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "r.yaml"
    output = {**RECIPE["output"], "folder": "out"}
    path.write_text(yaml.safe_dump({**RECIPE, **changes, "output": output}))
    return path


def start(folder: Path, *more: str) -> int:
    """The command, in the folder where its recipe lies, without the pictures of its page."""
    with plain_page(), _inside(folder):
        return main(["r.yaml", *more])


@contextmanager
def plain_page() -> Iterator[None]:
    with mock.patch("fedllm_sec.report.page.page_of", return_value="<p>a page</p>"):
        yield


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    import os

    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def contents(out: Path) -> dict[str, Any]:
    """All files of a run: bytes of what is reproducible, of the summary what does not hang on the clock."""
    found: dict[str, Any] = {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in TIMED
    }
    summary = json.loads((out / "summary.json").read_text())
    made = {name: entry for name, entry in summary["made"].items() if name not in TIMED}
    rounds = [json.loads(line)["round"] for line in (out / "timings.jsonl").read_text().splitlines()]
    return found | {"summary.json": {**summary, "made": made, "seconds": None, "sha256": None}, "timings.jsonl": rounds}


def edit(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))
