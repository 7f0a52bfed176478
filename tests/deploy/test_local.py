"""Real Flower processes on loopback: SuperLink, SuperNodes and resident clients, over TLS with a key for each node."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="needs flwr, the extra `edge`")

from fedllm_sec.build.federation import build, run
from fedllm_sec.build.names import checked
from fedllm_sec.build.running import make_machine
from fedllm_sec.deploy import local
from fedllm_sec.deploy.command import bring_up
from fedllm_sec.deploy.folder import Deployment
from fedllm_sec.errors import FedError
from fedllm_sec.records.history import read_history, record_line


def recipe(small, folder: Path, **changes):
    """Two rounds of `tiny`, honest unless asked otherwise."""
    small |= {"enable_attack": False, "enable_defense": False, "output": {"folder": str(folder)}}
    small["clients"] |= {"total": 2}
    small["data"] |= {"train_rows": 40, "test_rows": 20}
    small["evaluate"] |= {"answer_rows": 0, "rows": 8, "every": 2}
    small["deploy"] = {"timeout_s": 60.0}
    for key, value in changes.items():
        small[key] = {**small[key], **value} if isinstance(value, dict) and isinstance(small.get(key), dict) else value
    return checked(small)


def simulated(made) -> list[str]:
    """The history that the same recipe has in one process."""
    machine = make_machine(made, Path(made.output.folder))
    return [record_line(record) for record in run(build(made, machine), made.rounds)]


def history(made: Deployment) -> list[str]:
    return (made.run / "history.jsonl").read_text().splitlines(keepends=True)


def test_two_supernodes_over_tls_have_the_simulation_s_history_byte_for_byte(small, tmp_path, monkeypatch, capsys):
    # the slow tests write the page: its plots would be an eighth of what this one costs
    monkeypatch.setattr("fedllm_sec.deploy.command._report", lambda made: print(f"report of {made.run}"))
    made = Deployment.init(tmp_path / "deployment", recipe(small, tmp_path / "sim"), "fedllm-sec deploy up")
    bring_up(made)
    said = capsys.readouterr().out
    assert "memory limit of the server:" in said
    assert "round 2/2" in said
    assert f"report of {made.run}" in said
    assert history(made) == simulated(recipe(small, tmp_path / "sim"))
    assert oct((made.folder / "tls" / "server.key").stat().st_mode)[-3:] == "600"


ATTACKED = {
    "enable_attack": True,
    "attack": {
        "malicious": {"ids": [1]},
        "collude": False,
        "data": [{"name": "text_trigger", "trigger": " cf", "target": "Sports", "rate": 0.5}],
        "update": [{"name": "model_replacement"}],
    },
    "enable_defense": True,
    "defense": {"rule": {"name": "multi_krum", "f": 1}},
}


@pytest.mark.slow
def test_a_malicious_device_is_dropped_in_every_round_and_history_is_the_simulation_s(small, tmp_path):
    attacked = {**ATTACKED, "clients": {"total": 5}, "data": {"train_rows": 200}}
    made = Deployment.init(tmp_path / "deployment", recipe(small, tmp_path / "sim", **attacked), "up")
    bring_up(made)
    records = read_history(made.run)
    assert all(record.malicious == ["c01"] and "c01" not in record.kept for record in records)
    assert history(made) == simulated(recipe(small, tmp_path / "sim", **attacked))


@pytest.mark.slow
@pytest.mark.parametrize("wire", ["bfloat16", "int8"])
def test_a_shorter_wire_ends_near_the_simulation(small, tmp_path, wire):
    made = Deployment.init(
        tmp_path / "d", recipe(small, tmp_path / "sim", deploy={"wire": wire, "timeout_s": 60.0}), "up"
    )
    bring_up(made)
    ours, theirs = read_history(made.run)[-1], json.loads(simulated(recipe(small, tmp_path / "sim"))[-1])
    assert ours.update_norm == pytest.approx(theirs["update_norm"], rel=0.02)
    assert ours.update_norm != theirs["update_norm"]


@pytest.mark.slow
def test_a_node_with_a_key_that_nobody_registered_gets_nothing_and_a_wrong_root_is_named(small, tmp_path):
    from fedllm_sec.deploy import keys
    from fedllm_sec.deploy.processes import Processes, free_port

    made = Deployment.init(tmp_path / "d", recipe(small, tmp_path / "sim"), "up")
    other = Deployment.init(tmp_path / "other", recipe(small, tmp_path / "sim"), "up")
    port = free_port()
    with Processes(made.logs, made.home) as processes:
        local.start_link(processes, made, "127.0.0.1", port)
        local.register(processes, made, ["c00"])
        keys.make_key(made.folder / "keys", "c01")  # never registered
        local.Node(made, "c01").start(processes, f"127.0.0.1:{port}", wait=5)
        assert processes.running["node-c01"].wait(60) != 0
        assert "SuperNode ID" not in processes.said("node-c01", 20)
        keys.make_certificates(other.folder / "tls")
        keys.make_key(other.folder / "keys", "c00")
        local.Node(other, "c00").start(processes, f"127.0.0.1:{port}", wait=5)
        assert processes.running["node-c00"].wait(60) != 0
        assert "certificate" in processes.said("node-c00", 20).lower()
        nodes = processes.flwr("supernode", "list", "ours").get("nodes", [])
        assert [node for node in nodes if node.get("status") == "online"] == []


def children(pid: int) -> list[int]:
    """All processes below one."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                found += [int(entry.name), *children(int(entry.name))]
    return found


def below(words: str) -> list[int]:
    """Processes that this test has started, by a word of their command line."""
    found = []
    for pid in children(os.getpid()):
        with contextlib.suppress(OSError):
            if words in Path(f"/proc/{pid}/cmdline").read_text():
                found.append(pid)
    return found


@contextlib.contextmanager
def killing(made: Deployment, victim: str, when: str):
    """A process whose command line has `victim` in it gets kill -9 as soon as a line of the run says `when`."""
    killed: list[int] = []

    def kill() -> None:
        end = time.monotonic() + 240
        while time.monotonic() < end and not killed:
            if made.rounds.exists() and when in made.rounds.read_text():
                for pid in below(victim)[-1:]:
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
            time.sleep(0.05)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    yield
    thread.join(1)
    assert killed


FOUR = {"rounds": 4, "deploy": {"timeout_s": 8.0, "min_replies": 1}, "clients": {"total": 2, "local_steps": 4}}


@pytest.mark.slow
@pytest.mark.parametrize("when", ["memory limit", "round 1/4"])  # while it asks in the first round; afterwards
@pytest.mark.parametrize("victim", ["flwr-serverapp", "deploy.resident", "deploy.node"])
def test_kill_9_of_a_process_costs_rounds_at_most_and_never_the_run(small, tmp_path, victim, when):
    made = Deployment.init(tmp_path / "d", recipe(small, tmp_path / "sim", **FOUR), "up")
    with killing(made, victim, when):
        bring_up(made)
    assert [record.round for record in read_history(made.run)] == [1, 2, 3, 4]
    if victim == "flwr-serverapp":  # a new run went on from the last whole round
        assert history(made) == simulated(recipe(small, tmp_path / "sim", **FOUR))


@pytest.mark.slow
def test_kill_9_of_the_superlink_ends_the_command_and_the_same_command_goes_on(small, tmp_path):
    made = Deployment.init(tmp_path / "d", recipe(small, tmp_path / "sim", **FOUR), "up")
    with killing(made, "deploy.link", "round 1/4"), pytest.raises(FedError, match="The same command goes on from"):
        bring_up(made)
    bring_up(made)
    assert history(made) == simulated(recipe(small, tmp_path / "sim", **FOUR))
