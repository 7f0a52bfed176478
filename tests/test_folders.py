"""What happens to a run folder that two start, that is damaged, and when a run is told to stop."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedllm_sec.errors import ResumeError
from fedllm_sec.records import RunFolder, read_history
from fedllm_sec.records.environment import typed
from fedllm_sec.train import main
from tests.records.smallest import plain_page

DIGITS: dict[str, Any] = {
    "task": "classify",
    "rounds": 4,
    "model": {"name": "logistic"},
    "data": {"name": "digits", "train_rows": 200, "test_rows": 50},
    "clients": {"total": 4, "local_steps": 1, "batch_size": 20, "lr": 0.05, "optimizer": "sgd"},
}


@pytest.fixture(autouse=True, scope="module")
def _no_pictures() -> Iterator[None]:
    with plain_page():
        yield


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "r.yaml"
    path.write_text(yaml.safe_dump({**DIGITS, **changes, "output": {"folder": str(folder / "out")}}))
    return path


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four rounds that was stopped after the second."""
    folder = tmp_path_factory.mktemp("half")
    path = write(folder, rounds=2)
    assert main([str(path)]) == 0
    (folder / "out" / "summary.json").unlink()
    return folder


def copy(half: Path, folder: Path) -> Path:
    shutil.copytree(half / "out", folder / "out", dirs_exist_ok=True)
    return write(folder)


def test_a_half_done_run_goes_on_and_removes_what_a_killed_write_left(half: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    stray = tmp_path / "out" / ".checkpoint.safetensors.8objwnuq"
    stray.write_bytes(b"half a checkpoint")
    (tmp_path / "out" / ".adapter.8objwnuq").mkdir()
    assert main([str(copy(half, tmp_path))]) == 0
    assert [r.round for r in read_history(tmp_path / "out")] == [1, 2, 3, 4]
    assert not stray.exists()
    assert not (tmp_path / "out" / ".lock").exists()
    assert not (tmp_path / "out" / ".adapter.8objwnuq").exists()


def test_the_second_of_two_starts_on_a_folder_says_who_holds_it(half: Path, tmp_path: Path, capsys):
    path = copy(half, tmp_path)
    before = (tmp_path / "out" / "history.jsonl").read_bytes()
    with RunFolder(tmp_path / "out").held():
        assert main([str(path)]) == 2
    said = capsys.readouterr().err
    assert "is being run by process" in said
    assert "Traceback" not in said
    assert (tmp_path / "out" / "history.jsonl").read_bytes() == before
    assert main([str(path)]) == 0


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda lines: [lines[0], "[" + lines[1][1:]], "is damaged"),
        (lambda lines: [lines[0], lines[1].replace(": 0.", ": 1.", 1)], "is not the one that checkpoint.safetensors"),
        (lambda lines: [lines[0].replace('"round": 1', '"round": 2'), lines[1]], "history.jsonl holds rounds [2, 2]"),
        (lambda lines: ["\x00" * len(lines[0]), lines[1]], "is damaged"),
        (lambda lines: [lines[0]], "is shorter than its checkpoint says"),
    ],
)
def test_a_damaged_history_is_told_before_a_round_is_trained(half: Path, tmp_path: Path, damage, words, capsys):
    path = copy(half, tmp_path)
    history = tmp_path / "out" / "history.jsonl"
    history.write_text("".join(line + "\n" for line in damage(history.read_text().splitlines())))
    assert main([str(path)]) == 2
    said = capsys.readouterr()
    assert words in said.err
    assert "round 3" not in said.out


def test_rounds_that_are_not_in_order_are_no_history(half: Path, tmp_path: Path):
    copy(half, tmp_path)
    history = tmp_path / "out" / "history.jsonl"
    history.write_text(history.read_text() + history.read_text().splitlines()[0] + "\n")
    with pytest.raises(ResumeError, match=r"line 3: is round 1\. A line is lost"):
        read_history(tmp_path / "out")
    history.write_bytes(b"\xff\xfe")
    with pytest.raises(ResumeError, match="is not UTF-8"):
        read_history(tmp_path / "out")


def test_a_history_may_begin_before_the_first_round(half: Path, tmp_path: Path):
    copy(half, tmp_path)
    history = tmp_path / "out" / "history.jsonl"
    first = history.read_text().splitlines()[0].replace('"round": 1', '"round": 0')
    history.write_text(first + "\n" + history.read_text())
    assert [r.round for r in read_history(tmp_path / "out")] == [0, 1, 2]


def test_a_timing_that_cannot_be_read_takes_no_round_away(half: Path, tmp_path: Path):
    copy(half, tmp_path)
    timings = tmp_path / "out" / "timings.jsonl"
    timings.write_text("[]\nnonsense\n" + timings.read_text().splitlines()[1] + "\n")
    records = read_history(tmp_path / "out")
    assert [bool(r.seconds) for r in records] == [False, True]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, capsys):
    path = write(tmp_path)
    assert main([str(path), "output.folder=/proc/nothing/here"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "/proc/nothing" in said
    assert "Traceback" not in said


def test_a_run_in_which_every_round_was_skipped_has_failed(tmp_path: Path, capsys):
    attack = {"malicious": {"count": 3}, "update": [{"name": "inf_nan"}]}
    path = write(
        tmp_path, enable_attack=True, attack=attack, enable_defense=True, defense={"rule": {"name": "krum", "f": 0}}
    )
    assert main([str(path)]) == 1
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["skipped_rounds"] == summary["rounds"] == 4
    assert "every round was skipped in" in capsys.readouterr().err


def test_sigterm_keeps_the_last_whole_round_and_says_so(tmp_path: Path):
    path = write(tmp_path, rounds=100_000)
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "fedllm_sec.train", str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        while "round" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143
    assert "terminated; the same command goes on from the last whole round." in said
    assert RunFolder(tmp_path / "out").resume((tmp_path / "out" / "recipe.yaml").read_text()) is not None


# ---------------------------------------------------------------- more rounds, another machine, anew


def history(folder: Path) -> bytes:
    return (folder / "out" / "history.jsonl").read_bytes()


def test_a_finished_run_that_is_given_more_rounds_ends_as_the_longer_run(tmp_path: Path, capsys):
    attack = {"malicious": {"count": 2, "redraw": True}, "data": [{"name": "label_flip", "mapping": {3: 5}}]}
    parts = {"enable_attack": True, "attack": attack, "clients": {**DIGITS["clients"], "total": 6, "per_round": 3}}
    for name, rounds in (("straight", [6]), ("longer", [2, 6])):
        (tmp_path / name).mkdir()
        for number in rounds:
            assert main([str(write(tmp_path / name, **parts, rounds=number))]) == 0
    assert "going on after round 2" in capsys.readouterr().out
    assert history(tmp_path / "longer") == history(tmp_path / "straight")
    models = [(tmp_path / name / "out/model/model.safetensors").read_bytes() for name in ("straight", "longer")]
    assert models[0] == models[1]
    assert json.loads((tmp_path / "longer/out/summary.json").read_text())["rounds"] == 6
    assert main([str(write(tmp_path / "longer", **parts, rounds=5))]) == 2
    assert "was made with another recipe: rounds: 6 -> 5" in capsys.readouterr().err


def test_a_run_whose_schedule_ends_with_its_rounds_is_given_no_more(tmp_path: Path, capsys):
    falling = {**DIGITS["clients"], "lr_schedule": "linear"}
    assert main([str(write(tmp_path, clients=falling, rounds=1))]) == 0
    assert main([str(write(tmp_path, clients=falling, rounds=2))]) == 2
    assert "cannot be given 2: clients.lr_schedule: linear falls from the first round to the last" in (
        capsys.readouterr().err
    )


def test_another_version_that_goes_on_says_so_and_both_are_kept(half: Path, tmp_path: Path, capsys):
    path = copy(half, tmp_path)
    environment = tmp_path / "out" / "environment.json"
    old = json.loads(environment.read_text())
    environment.write_text(json.dumps({**old, "fedllm_sec": "0.0.1"}))
    assert main([str(path)]) == 0
    assert f"from round 3 on: fedllm_sec: '0.0.1' -> '{old['fedllm_sec']}'" in capsys.readouterr().out
    found = json.loads(environment.read_text())
    assert found["fedllm_sec"] == "0.0.1"
    assert found["resumed"][0]["after_round"] == 2
    assert found["resumed"][0]["fedllm_sec"] == old["fedllm_sec"]


def test_a_fresh_start_keeps_the_old_folder_beside_it(half: Path, tmp_path: Path, capsys):
    path = copy(half, tmp_path)
    before = history(tmp_path)
    assert main([str(path), "rounds=1", "--fresh"]) == 0
    assert f"{tmp_path / 'out'}: the old folder is now {tmp_path / 'out-1'}" in capsys.readouterr().out
    assert (tmp_path / "out-1" / "history.jsonl").read_bytes() == before
    assert not (tmp_path / "out-1" / ".lock").exists()
    assert [r.round for r in read_history(tmp_path / "out")] == [1]


def test_a_fresh_start_that_cannot_begin_leaves_the_old_folder_where_it_is(half: Path, tmp_path: Path, capsys):
    path = copy(half, tmp_path)
    before = history(tmp_path)
    assert main([str(path), "data.name=broken.npz", "--fresh"]) == 2
    (tmp_path / "broken.npz").write_bytes(b"PK")
    assert main([str(path), f"data.name={tmp_path / 'broken.npz'}", "--fresh"]) == 2
    assert "broken.npz" in capsys.readouterr().err
    assert (tmp_path / "out" / "history.jsonl").read_bytes() == before
    assert not (tmp_path / "out-1").exists()


def test_a_finished_run_of_one_round_without_its_checkpoint_is_not_run_over(half: Path, tmp_path: Path, capsys):
    path = copy(half, tmp_path)
    assert main([str(path), "rounds=1", "--fresh"]) == 0
    (tmp_path / "out" / "checkpoint.safetensors").unlink()
    assert main([str(path), "rounds=1"]) == 2
    assert "history.jsonl has rounds but checkpoint.safetensors is gone. Restore it" in capsys.readouterr().err


def test_the_recorded_command_is_the_one_that_was_typed(monkeypatch):
    words = ["r.yaml", "rounds=3", "--only", "a b"]
    for line, said in (
        (["/v/bin/python", "/v/bin/fedllm-sec", "train", *words], "fedllm-sec train r.yaml rounds=3 --only 'a b'"),
        (["python3", "-m", "fedllm_sec.train", *words], "python3 -m fedllm_sec.train r.yaml rounds=3 --only 'a b'"),
        (["/v/bin/python", "-m", "pytest"], "fedllm-sec train r.yaml rounds=3 --only 'a b'"),
    ):
        monkeypatch.setattr(sys, "orig_argv", line)
        monkeypatch.setattr("fedllm_sec.records.environment._parents", lambda: ["bash", "run.sh", *words])
        assert typed("train", words) == said
    launcher = ["/v/bin/python", "/v/bin/accelerate", "launch", "--cpu", "-m", "fedllm_sec.train", *words]
    monkeypatch.setattr("fedllm_sec.records.environment._parents", lambda: launcher)
    assert typed("train", words) == ("accelerate launch --cpu -m fedllm_sec.train r.yaml rounds=3 --only 'a b'")
