"""In the manner of SQLite: the machine fails at the n-th step, and the same command ends as if it never had.

A step is an opening, a write, a flush to the disk, a renaming or a removal by the run; it fails as an error (a full
disk, which takes half of what is written) or as a kill (half is written, and no handler cleans anything up). By default
every 7th step, errors and kills by turns; `pytest -m slow tests/records/test_faults.py` takes all of them in both ways,
real kills, and a failure of either of two processes at every message between them.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fedllm_sec.records.verify import look
from fedllm_sec.train import in_words
from tests.conftest import ROOT
from tests.records.ranks import Pair
from tests.records.smallest import contents, start, write

STEPS = ("open", "write", "fsync", "replace", "rename", "unlink", "ftruncate", "mkdir")
BY_HANDLE = ("write", "fsync", "ftruncate")


class Killed(BaseException):
    """The process has ended here: nothing that comes after this is done."""


class Disk:
    """The run's steps on the disk, of which the n-th fails; `really`: the process is killed by the system."""

    def __init__(self, folder: Path, fails: int = 0, kills: bool = False, really: bool = False) -> None:
        self.folder, self.fails, self.kills, self.really = str(folder), fails, kills, really
        self.steps, self.dead = 0, False
        self.handles: set[int] = set()
        self.checkpoints = 0  # that stand under their name

    @contextmanager
    def used(self) -> Iterator[Disk]:
        real = {name: getattr(os, name) for name in STEPS}
        with mock.patch.multiple(os, **{name: self.watched(name, real[name]) for name in STEPS}):
            yield self

    def watched(self, name: str, real: Any) -> Any:
        def step(first: Any, *more: Any, **named: Any) -> Any:
            ours = first in self.handles if name in BY_HANDLE else self.folder in os.path.abspath(os.fspath(first))
            if name == "open" and not more[0] & (os.O_WRONLY | os.O_RDWR):
                ours = False
            if name == "mkdir" and os.path.isdir(first):
                ours = False  # nothing is made
            if ours and self.dead:
                raise Killed
            self.steps += ours
            if ours and self.steps == self.fails:
                if name == "write":
                    real(first, bytes(more[0])[: len(more[0]) // 2])
                if self.really:
                    os.kill(os.getpid(), signal.SIGKILL)
                if self.kills:
                    self.dead = True
                    raise Killed
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            made = real(first, *more, **named)
            if name == "open":
                (self.handles.add if ours else self.handles.discard)(made)
            if name == "replace" and str(more[0]).endswith("checkpoint.safetensors"):
                self.checkpoints += 1
            return made

        return step


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], int]:
    """What an undisturbed run leaves, and how many steps it took."""
    folder = tmp_path_factory.mktemp("straight")
    write(folder)
    with Disk(folder / "out").used() as disk:
        assert start(folder) == 0
    return contents(folder / "out"), disk.steps


def not_of_a_kill(error: BaseException, again: str = "") -> str | None:
    """What a command says of an error; a process that is killed says nothing."""
    return None if isinstance(error, Killed) else in_words(error, again)


def fail_and_go_on(folder: Path, n: int, kills: bool, left: dict[str, Any], capsys: Any) -> None:
    path = write(folder)
    with Disk(folder / "out", n, kills).used() as disk, mock.patch("fedllm_sec.train.in_words", not_of_a_kill):
        try:
            code = start(folder)
        except Killed:
            code = None
    said = capsys.readouterr()
    if code is not None:
        assert code == 2, (n, said.out)
        assert said.err.startswith("error: No space left on device"), (n, said.err)
        assert said.err.count("\n") == 1, (n, said.err)
    assert start(folder) == 0, n
    again = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("start ", "round "))]
    assert len(again) == 3 - disk.checkpoints, (n, again)  # what was kept is not measured or trained once more
    assert contents(folder / "out") == left, n
    assert path.is_file()


def test_whatever_step_fails_the_same_command_ends_as_the_straight_run(straight, tmp_path: Path, capsys):
    left, steps = straight
    assert steps > 50
    for turn, n in enumerate(range(1, steps + 1, 7)):
        fail_and_go_on(tmp_path / str(n), n, turn % 2 == 1, left, capsys)


@pytest.mark.slow
def test_every_single_step_may_fail(straight, tmp_path: Path, capsys):
    left, steps = straight
    for n in range(1, steps + 1):
        fail_and_go_on(tmp_path / f"error-{n}", n, False, left, capsys)
        fail_and_go_on(tmp_path / f"kill-{n}", n, True, left, capsys)


# ---------------------------------------------------------------- memory


class Memory(TorchDispatchMode):
    """The n-th tensor of `least` bytes or more finds no memory."""

    def __init__(self, fails: int, least: int) -> None:
        super().__init__()
        self.fails, self.least, self.asked = fails, least, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.nbytes >= self.least:
            self.asked += 1
            if self.asked == self.fails:
                raise RuntimeError(
                    f"DefaultCPUAllocator: not enough memory: you tried to allocate {made.nbytes} bytes."
                )
        return made


def starve(folder: Path, n: int, left: dict[str, Any], capsys: Any) -> int:
    """Start with the n-th large tensor failing, and again without; gives how many there were."""
    write(folder)
    with Memory(n, 2_000) as memory:
        code = start(folder)
    said = capsys.readouterr().err
    if n <= memory.asked:
        assert code == 2, n
        assert said.startswith("error: not enough memory"), (n, said)
        assert said.count("\n") == 1, (n, said)
    assert start(folder) == 0, n
    assert contents(folder / "out") == left, n
    return memory.asked


def test_whatever_tensor_finds_no_memory_the_same_command_ends_as_the_straight_run(straight, tmp_path: Path, capsys):
    """2,000 bytes stand for the megabyte that a real run's tensors have: a weight of this model has 2,560."""
    for n in (1, 29, 87):
        assert starve(tmp_path / str(n), n, straight[0], capsys) >= n


@pytest.mark.slow
def test_every_single_tensor_may_find_no_memory(straight, tmp_path: Path, capsys):
    n, asked = 1, 1
    while n <= asked:
        asked = starve(tmp_path / str(n), n, straight[0], capsys)
        n += 1


# ---------------------------------------------------------------- processes


def die_at(folder: str, n: str) -> None:
    """What a test starts in a process of its own: the run, killed at its n-th step on the disk."""
    with Disk(Path(folder) / "out", int(n), really=True).used():
        start(Path(folder))


@pytest.mark.slow
def test_a_run_that_the_system_kills_goes_on(straight, tmp_path: Path):
    left, steps = straight
    for n in range(3, steps, 11):
        folder = tmp_path / str(n)
        write(folder)
        code = f"from tests.records.test_faults import die_at; die_at({str(folder)!r}, '{n}')"
        assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == -signal.SIGKILL
        assert start(folder) == 0
        assert contents(folder / "out") == left, n


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    two = Pair()
    yield two
    two.end()


def anywhere(left: dict[str, Any]) -> dict[str, Any]:
    """What of a run does not hang on how many processes made it."""
    summary = left["summary.json"]
    made = {name: entry for name, entry in summary["made"].items() if name != "environment.json"}
    return {**left, "summary.json": {**summary, "made": made}, "environment.json": None}


def break_off(pair: Pair, folder: Path, failures: list[tuple[int, int, bool]], left: dict[str, Any]) -> None:
    """The n-th message of a rank fails, in one start after the other: both ranks end, each with one line.

    Then the same command ends as the straight run, and trains no round again that was kept. How many messages a start
    takes depends on who trained how many clients: where there was no n-th, nothing failed.
    """
    write(folder)
    for rank, n, kills in failures:
        ranks = pair.play(folder, rank, n, kills)
        how = (rank, n, kills, ranks)
        if int(ranks[rank]["sent"]) < n:
            assert [one["code"] for one in ranks] == [0, 0], how
            continue
        assert [one["code"] for one in ranks] == [-signal.SIGKILL if kills and k == rank else 2 for k in (0, 1)], how
        for one in ranks:
            if one["code"] == 2:
                assert one["err"].startswith("error: another process of this run has ended, or does not answer ("), how
                assert one["err"].endswith(" What was written is whole: the same command goes on from there.\n"), how
                assert one["err"].count("\n") == 1, how
    kept = look(folder / "out").rounds if (folder / "out" / "checkpoint.safetensors").exists() else -1
    first, second = pair.play(folder)
    assert (first["code"], second["code"], first["err"] + second["err"]) == (0, 0, ""), (how, first, second)
    assert second["out"] == "", how  # only the first speaks
    again = [line for line in first["out"].splitlines() if line.startswith(("start ", "round "))]
    assert len(again) == sum(round > kept for round in left["timings.jsonl"]), (how, again)
    assert anywhere(contents(folder / "out")) == anywhere(left), how


def test_a_rank_that_fails_at_a_message_ends_the_other_and_the_same_command_goes_on(straight, pair, tmp_path: Path):
    break_off(pair, tmp_path, [(0, 4, True), (1, 8, False)], straight[0])


def test_a_rank_that_does_not_answer_in_time_is_told_in_a_line():
    error = RuntimeError("[/x/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation")
    assert in_words(error) == (
        "another process of this run has ended, or does not answer (Timed out waiting 1800000ms for recv operation). "
        "What was written is whole: the same command goes on from there."
    )


@pytest.mark.slow
def test_every_single_message_between_two_processes_may_fail(straight, pair, tmp_path: Path):
    write(tmp_path / "whole")
    first, second = pair.play(tmp_path / "whole")
    assert first["sent"] == second["sent"]
    assert int(first["sent"]) >= 12
    for n in range(1, int(first["sent"]) + 5):  # a start may have some more
        for rank in (0, 1):
            for kills in (False, True):
                break_off(pair, tmp_path / f"{n}-{rank}-{kills}", [(rank, n, kills)], straight[0])


@pytest.mark.slow
def test_a_launcher_ends_both_ranks_where_one_is_killed(straight, tmp_path: Path):
    """torchrun, as it is typed: the rank that is left may be ended by a signal before it can say why."""
    write(tmp_path)
    (tmp_path / "ranks.py").write_text(
        "import os, sys\nfrom tests.records.ranks import started\nrank = int(os.environ['RANK'])\n"
        "sys.exit(started(rank, int(sys.argv[1]) * rank, kills=True))\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "ranks.py"]
    more = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for n, code in (("4", 1), ("0", 0)):
        done = subprocess.run([*launch, n], cwd=tmp_path, capture_output=True, timeout=300, env={**os.environ, **more})
        assert done.returncode == code, done.stderr
    assert anywhere(contents(tmp_path / "out")) == anywhere(straight[0])


# ---------------------------------------------------------------- a disk that is full


def test_a_disk_without_room_is_told_before_anything_is_trained(tmp_path: Path, capsys):
    write(tmp_path, rounds=100)
    with mock.patch("fedllm_sec.build.running.shutil.disk_usage", return_value=mock.Mock(free=200_000)):
        assert start(tmp_path) == 2
    said = capsys.readouterr()
    # 650 numbers of 4 bytes: two checkpoints of two vectors, the model, and that of each of 100 rounds: 105 x 2,600
    assert "0.2 MB are free on its disk, the run writes at least 0.3 MB" in said.err
    assert "round 1" not in said.out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == []


@pytest.mark.slow
def test_a_limit_on_the_size_of_files_is_one_line(tmp_path: Path):
    write(tmp_path)
    command = f"ulimit -f 4; exec {sys.executable} -m fedllm_sec.train r.yaml"  # 4 KiB: the checkpoint has 6
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: File too large")
    assert done.stderr.count("\n") == 1
