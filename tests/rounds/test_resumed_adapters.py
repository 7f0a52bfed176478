"""A run that averages adapters in its own way is killed in round 2, and the same command ends with the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from fedllm_sec.models.lora import load_tokenizer
from fedllm_sec.recipe.language_model import Model
from fedllm_sec.rounds import federation
from tests.models.test_families import LLAMA, saved_base
from tests.records.smallest import contents, start, write

WAYS = ("exact", "stack", "svd", "pad", "core", "alternate", "share_a")
TEXT: dict[str, Any] = {
    "task": "causal_lm",
    "rounds": 3,
    "data": {"train_rows": 60, "test_rows": 6, "max_length": 64, "too_long": "drop"},
    "clients": {"total": 3, "local_steps": 2, "batch_size": 2, "lr": 0.01},
    "evaluate": {"rows": 2, "max_new_tokens": 2},
    "enable_defense": True,
    "defense": {"rule": {"name": "multi_krum", "f": 0}},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("llama") / "base"
    return saved_base("llama", LLAMA, load_tokenizer(Model()), folder).name


def prepared(folder: Path, base: str, way: str) -> Path:
    ranks = {"clients": {**TEXT["clients"], "ranks": {1: 1, 2: 2}}} if way in ("svd", "pad") else {}
    write(folder, **{**TEXT, **ranks}, model={"name": base, "lora": {"r": 2, "alpha": 4, "average": way}})
    return folder


def killed_in_round_2(folder: Path) -> None:
    """The run, which the system ends before the second client of round 2 has trained."""
    train = federation.train_client

    def once(fed: Any, client: Any, *rest: Any) -> Any:
        if fed.round == 1 and client.id.endswith("1"):
            os.kill(os.getpid(), signal.SIGKILL)
        return train(fed, client, *rest)

    with mock.patch.object(federation, "train_client", once):
        start(folder)


def check(folder: Path, base: str, way: str) -> None:
    assert start(prepared(folder / "straight", base, way)) == 0
    broken = prepared(folder / "broken", base, way)
    code = (
        f"from pathlib import Path; from tests.rounds.test_resumed_adapters import killed_in_round_2; "
        f"killed_in_round_2(Path({str(broken)!r}))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert len((broken / "out" / "history.jsonl").read_text().splitlines()) == 1
    assert start(broken) == 0
    assert contents(broken / "out") == contents(folder / "straight" / "out")


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_run_killed_in_round_2_ends_with_the_same_bytes(way: str, base: str, tmp_path: Path):
    check(tmp_path, base, way)
