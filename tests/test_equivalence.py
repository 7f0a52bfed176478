"""The same run however it is executed: killed and resumed, one process or two, small blocks or large."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file

from fedllm_sec.build.loaded import Loaded
from fedllm_sec.build.names import checked
from fedllm_sec.build.plan import planned
from fedllm_sec.build.running import run_one
from fedllm_sec.errors import ResumeError
from fedllm_sec.matrix.storage import Storage
from fedllm_sec.protocols import LocalResult
from fedllm_sec.records import RunFolder
from fedllm_sec.rounds.compute import Machine

LOADED = Loaded()  # one base model for all runs of this file


def run(raw: dict[str, Any], folder: Path) -> Path:
    torch.set_num_threads(1)
    recipe = checked({**raw, "output": {"folder": str(folder)}})
    run_one(planned(recipe), Machine(Accelerator(cpu=True), recipe.compute.placement), "test", LOADED)
    return folder


def same_run(a: Path, b: Path) -> None:
    for name in ("history.jsonl", "answers.jsonl"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
    first, second = (load_file(x / "adapter" / "adapter_model.safetensors") for x in (a, b))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)


def launch(raw: dict[str, Any], folder: Path, processes: int, **extra: str) -> subprocess.Popen[str]:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "in.yaml"
    path.write_text(yaml.safe_dump({**raw, "output": {"folder": str(folder / "run")}}))
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **extra}
    return subprocess.Popen(
        [sys.executable, *start, "-m", "fedllm_sec.train", str(path)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> str:
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    return output


STATEFUL = {
    "algorithm": {"name": "fedopt", "optimizer": "adam"},
    "rounds": 4,
    "defense": {
        "before": [{"name": "norm_clipping"}],
        "rule": {"name": "foolsgold"},
        "after": [{"name": "crfl", "rho": 20.0, "sigma": 1e-4}],
    },
}


@pytest.mark.parametrize("when", [pytest.param("after the line", marks=pytest.mark.slow), "in the middle of the line"])
def test_a_run_stopped_between_line_and_checkpoint_ends_as_the_straight_run(small, tmp_path, monkeypatch, when):
    small |= STATEFUL
    straight = run(small, tmp_path / "straight")
    append = RunFolder.append

    def dies(self: RunFolder, record: Any, state: Any) -> None:
        if record.round < 3:
            return append(self, record, state)
        with self.history.open("a") as file:
            file.write('{"round": 3, "coh' if when == "in the middle of the line" else '{"round": 3}\n')
        raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "append", dies)
    with pytest.raises(KeyboardInterrupt):
        run(small, tmp_path / "resumed")
    monkeypatch.setattr(RunFolder, "append", append)
    same_run(straight, run(small, tmp_path / "resumed"))
    rounds = [json.loads(line)["round"] for line in (tmp_path / "resumed" / "timings.jsonl").read_text().splitlines()]
    assert rounds == [1, 2, 3, 4]


def test_a_finished_run_is_left_alone(small, tmp_path, capsys):
    small["rounds"] = 1
    folder = run(small, tmp_path / "a")
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    run(small, tmp_path / "a")
    assert "already done" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_a_changed_recipe_does_not_go_on_in_an_old_folder(small, tmp_path):
    small["rounds"] = 1
    folder = run(small, tmp_path / "a")
    old = (folder / "history.jsonl").read_bytes()
    small["clients"]["lr"] = 1e-4
    with pytest.raises(ResumeError, match=r"clients\.lr: 0\.003 -> 0\.0001"):
        run(small, tmp_path / "a")
    assert (folder / "history.jsonl").read_bytes() == old


@pytest.mark.parametrize(
    "damage", ["cut checkpoint", "no checkpoint", "short history", "no recipe", "alien checkpoint"]
)
def test_a_malformed_run_folder_is_refused_and_nothing_in_it_is_lost(small, tmp_path, damage):
    folder = run(small, tmp_path / "a")
    small["rounds"] = 2
    checkpoint, history = folder / "checkpoint.safetensors", folder / "history.jsonl"
    (folder / "summary.json").unlink()
    if damage == "cut checkpoint":
        checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    elif damage == "no checkpoint":
        checkpoint.unlink()
    elif damage == "short history":
        history.write_bytes(history.read_bytes()[:100])
    elif damage == "no recipe":
        (folder / "recipe.yaml").unlink()
    else:
        checkpoint.write_bytes(b"not safetensors at all")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(ResumeError):
        run(small, tmp_path / "a")
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_size_of_column_blocks_does_not_change_a_run(small, tmp_path):
    small["defense"] = {"before": [{"name": "nnm", "f": 1}], "rule": {"name": "median"}}
    vectors = []
    for name, chunk in (("large", 64.0), ("small", 0.01)):
        small["compute"]["chunk_mb"] = chunk
        folder = run(small, tmp_path / name)
        vectors.append(load_file(folder / "checkpoint.safetensors")["state.vector"])
    torch.testing.assert_close(vectors[0], vectors[1], rtol=1e-5, atol=1e-7)


def test_gradient_accumulation_gives_the_same_gradient(small, tmp_path):
    torch.set_num_threads(1)
    from fedllm_sec.build.federation import build

    recipe = checked(small)
    federation = build(recipe, Machine(Accelerator(cpu=True)))
    task, shard = federation.task, federation.clients[0].shard
    gradients = []
    for parts in (1, 3):
        federation.machine.accelerator.gradient_accumulation_steps = parts
        task.parameters.grad.zero_()
        federation.machine.backward(task, shard, list(range(7)))
        gradients.append(task.parameters.grad.clone())
    federation.machine.accelerator.gradient_accumulation_steps = 1
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-7)


def test_one_process_and_two_give_the_same_history(small, tmp_path):
    small["clients"]["total"] = 5  # an odd cohort: the ranks' shares differ
    small["evaluate"] |= {"temperature": 1.0, "draws": 2, "second_judge": {"name": "contains"}}
    one = launch(small, tmp_path / "one", 1)
    two = launch(small, tmp_path / "two", 2)
    finish(one), finish(two)
    same_run(tmp_path / "one" / "run", tmp_path / "two" / "run")


def nodes(raw: dict[str, Any], folder: Path) -> list[subprocess.Popen[str]]:
    """The run on two nodes of two ranks each: a launcher for each node, which meet at an address."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "in.yaml").write_text(yaml.safe_dump({**raw, "output": {"folder": str(folder / "run")}}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = ["--nnodes=2", "--nproc_per_node=2", "--master_addr=127.0.0.1", f"--master_port={port}"]
    command = [*meeting, "-m", "fedllm_sec.train", str(folder / "in.yaml")]
    return [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", f"--node_rank={node}", *command], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        )
        for node in (0, 1)
    ]  # fmt: skip


@pytest.mark.slow
def test_two_nodes_of_two_ranks_give_the_same_history_and_fewer_go_on_with_it(small, tmp_path):
    small["clients"]["total"], small["rounds"] = 6, 4
    finish(launch(small, tmp_path / "one", 1))
    for node in nodes(small, tmp_path / "four"):
        finish(node)
    same_run(tmp_path / "one" / "run", tmp_path / "four" / "run")

    history = tmp_path / "stopped" / "run" / "history.jsonl"
    four = nodes(small, tmp_path / "stopped")
    for _ in range(6000):
        if history.exists() and history.read_bytes().count(b"\n") >= 2:
            break
        time.sleep(0.05)
    for node in four:
        node.send_signal(signal.SIGTERM)  # as a scheduler does
    for node in four:
        node.communicate(timeout=60)
    assert 2 <= history.read_bytes().count(b"\n") < 5
    finish(launch(small, tmp_path / "stopped", 2))
    same_run(tmp_path / "one" / "run", tmp_path / "stopped" / "run")


def uneven(rank: int, port: int, folder: str) -> None:
    """Ten clients on two ranks, of which the second takes its time; what each holds goes into the folder."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"}
    machine, found = Machine(Accelerator(cpu=True)), {}
    for everywhere, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        trained = []

        def results(trained: list[int] = trained) -> Iterator[tuple[int, LocalResult]]:
            for place in machine.turns(10):
                time.sleep(1.0 * rank)
                trained.append(place)
                yield place, trained_client(place)

        storage = Storage(dtype=dtype)
        held = machine.collect(results(), 10, 3, everywhere=everywhere, beside=2, storage=storage)
        found[everywhere] = held, trained
    torch.save(found, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def trained_client(place: int) -> LocalResult:
    loss = float("nan") if place == 4 else place / 3
    return LocalResult(
        str(place), torch.full((3,), 1 + place / 7), place + 1, 2, loss, torch.tensor([-0.0, place / 9]).double()
    )


@pytest.mark.slow
def test_a_rank_that_is_free_takes_the_next_client_and_every_row_comes_to_its_place(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(uneven, args=(port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    made = [trained_client(place) for place in range(10)]
    for everywhere, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        (held, fast), (other, slow) = first[everywhere], second[everywhere]
        assert sorted(fast + slow) == list(range(10))
        assert len(fast) >= 8
        assert (other is None) is not everywhere
        for rows, claims, buffers in [held] + [other] * everywhere:
            assert torch.equal(rows, torch.stack([one.delta for one in made]).to(dtype))
            wanted = torch.tensor([[one.count, one.steps, one.loss] for one in made], dtype=torch.float64)
            assert torch.equal(claims.nan_to_num(-1.0), wanted.nan_to_num(-1.0))
            assert claims[4].isnan().tolist() == [False, False, True]
            assert buffers.signbit()[:, 0].all()
            assert torch.equal(buffers, torch.stack([one.buffers for one in made]))


@pytest.mark.slow
def test_spreading_each_batch_over_two_processes_trains_the_same_model(small, tmp_path):
    one = launch(small, tmp_path / "one", 1)
    small["compute"]["placement"] = "data"
    two = launch(small, tmp_path / "two", 2)
    finish(one), finish(two)
    first, second = (load_file(tmp_path / n / "run" / "checkpoint.safetensors")["state.vector"] for n in ("one", "two"))
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_base_model_sharded_by_zero3_trains_the_same_model(small, tmp_path):
    pytest.importorskip("deepspeed", reason="needs the extra llm-gpu")
    one = launch(small, tmp_path / "one", 1)
    small["compute"]["placement"] = "data"
    sharded = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
        "DS_ACCELERATOR": "cpu",
    }
    two = launch(small, tmp_path / "two", 2, **sharded)
    finish(one), finish(two)
    first, second = (load_file(tmp_path / n / "run" / "checkpoint.safetensors")["state.vector"] for n in ("one", "two"))
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_killed_process_goes_on_where_it_was(small, tmp_path):
    small["rounds"] = 6
    straight = launch(small, tmp_path / "straight", 1)
    finish(straight)
    victim = launch(small, tmp_path / "killed", 1)
    history = tmp_path / "killed" / "run" / "history.jsonl"
    for _ in range(600):
        if history.exists() and history.read_bytes().count(b"\n") >= 2:
            break
        time.sleep(0.1)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert history.read_bytes().count(b"\n") < 6
    finish(launch(small, tmp_path / "killed", 1))
    same_run(tmp_path / "straight" / "run", tmp_path / "killed" / "run")
