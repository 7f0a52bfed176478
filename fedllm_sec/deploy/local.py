"""A deployment's processes: the SuperLink with its run, and nodes with their resident clients."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedllm_sec.deploy import keys
from fedllm_sec.deploy.folder import Deployment
from fedllm_sec.deploy.processes import Forked, Processes, beside, free_port, listens, refuse_taken
from fedllm_sec.errors import FedError

LINK = "superlink"
RESIDENTS = "residents"
ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # every address of a machine -> one at which the machine itself finds it
AGAIN = 3  # times that a run whose server app died is begun again without a new round


def start_link(processes: Processes, made: Deployment, host: str, port: int, names: Sequence[str] = ()) -> None:
    """A SuperLink over TLS that lets nodes in by their key; ready when it answers, not when it listens."""
    refuse_taken(host, port)
    tls, here = made.folder / "tls", ANY.get(host, host)
    keys.make_certificates(tls, [*names, here])
    made.home.mkdir(parents=True, exist_ok=True)
    (made.home / "config.toml").write_text(
        f'[superlink]\ndefault = "ours"\n\n[superlink.ours]\naddress = "{beside(here, port)}"\n'
        f'root-certificates = "{tls / "ca.pem"}"\n',
        encoding="utf-8",
    )
    processes.start(
        LINK, sys.executable, "-m", "fedllm_sec.deploy.link", "--host", host, "--port", str(port),
        "--ssl-ca-certfile", str(tls / "ca.pem"), "--ssl-certfile", str(tls / "server.pem"),
        "--ssl-keyfile", str(tls / "server.key"), "--enable-supernode-auth",
        "--disable-runtime-dependency-installation",
        env={"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5"},
    )  # fmt: skip

    def answers() -> bool:
        return listens(here, port) and bool(processes.flwr("ls", "ours").get("success"))

    processes.wait(answers, "the SuperLink", 90, LINK)


def register(processes: Processes, made: Deployment, clients: Sequence[str]) -> None:
    """Let the nodes with these clients' keys in, under the clients' names."""
    for client in clients:
        public = keys.make_key(made.folder / "keys", client).with_suffix(".pub")
        answer = processes.flwr("supernode", "register", str(public), "ours", "--name", client)
        if not answer.get("success"):
            raise FedError(f"keys/{public.name}: cannot be registered: {answer.get('text', answer)}")


@dataclass(frozen=True)
class Node:
    """One client's two processes: its resident, which holds model and rows, and its SuperNode. They meet at `port`."""

    made: Deployment
    client: str
    attack: bool = False
    data: str | None = None
    port: int = field(default_factory=free_port)

    @property
    def served(self) -> tuple[str, str]:
        """What its resident is told: where its node is, and who it is."""
        config = {"deployment": str(self.made.folder), "client": self.client, "attack": self.attack, "data": self.data}
        return f"127.0.0.1:{self.port}", json.dumps(config)

    def start_resident(self, processes: Processes) -> None:
        """What trains; it may start before its node does."""
        processes.start(f"client-{self.client}", sys.executable, "-m", "fedllm_sec.deploy.resident", *self.served)

    def start(self, processes: Processes, superlink: str, wait: float = 120.0) -> None:
        """The SuperNode, with the client's key; it gives up after so many seconds without a SuperLink."""
        processes.start(
            f"node-{self.client}", sys.executable, "-m", "fedllm_sec.deploy.node", "--superlink", superlink,
            "--port", str(self.port), "--root-certificates", str(self.made.folder / "tls" / "ca.pem"),
            "--auth-supernode-private-key", str(self.made.folder / "keys" / f"{self.client}.key"),
            "--max-wait-time", str(wait), "--isolation", "process",
        )  # fmt: skip


def start_residents(processes: Processes, nodes: Sequence[Node]) -> Callable[[], None]:
    """Start all residents; what is returned waits until they are in `processes`, and is called after other beginnings.

    On Linux one process imports for all of them and forks, which saves seconds of work for each.
    """
    if sys.platform != "linux":
        for node in nodes:
            node.start_resident(processes)
        return lambda: None
    pids = processes.logs / "residents.json"
    pids.unlink(missing_ok=True)
    specs = [[*node.served, str(processes.logs / f"client-{node.client}.log")] for node in nodes]
    processes.start(RESIDENTS, sys.executable, "-m", "fedllm_sec.deploy.residents", str(pids), json.dumps(specs))

    def adopt() -> None:
        processes.wait(pids.exists, "the clients", 180, RESIDENTS)
        for node, pid in zip(nodes, json.loads(pids.read_text(encoding="utf-8")), strict=True):
            processes.running[f"client-{node.client}"] = Forked(pid)

    return adopt


@dataclass
class Tending:
    """Starts a node's processes again where one has ended, at most so often; its client is away in between.

    A SuperLink holds a killed node for online for a minute, and refuses its key until then: hence the pause.
    """

    processes: Processes
    nodes: Sequence[Node]
    superlink: str
    say: Callable[[str], None]
    left: int = 20
    pause: float = 10.0  # seconds between two starts of one process
    begun: dict[str, float] = field(default_factory=dict)  # when each was last started

    def __call__(self) -> None:
        for node in self.nodes:
            for name, start in (
                (f"client-{node.client}", node.start_resident),
                (f"node-{node.client}", lambda processes, node=node: node.start(processes, self.superlink)),
            ):
                rested = time.monotonic() - self.begun.get(name, -self.pause) >= self.pause
                if self.left and rested and self.processes.running[name].poll() is not None:
                    self.left, self.begun[name] = self.left - 1, time.monotonic()
                    self.say(f"{name} has ended and is started again: {self.processes.said(name, 1)}")
                    start(self.processes)


def wait_for_nodes(processes: Processes, clients: Sequence[str], seconds: float = 180.0) -> None:
    """Until each node is connected and its client has its model; an error where one ends before."""

    def ready(client: str) -> bool:
        log = processes.logs / f"client-{client}.log"
        return log.exists() and "ready" in log.read_text(encoding="utf-8", errors="replace").splitlines()

    mine = [name for name in processes.running if name.startswith(("node-", "client-"))]
    mine += [LINK] if LINK in processes.running else []
    processes.wait(lambda: all(map(ready, clients)), "the clients", seconds, *mine)

    def connected(client: str) -> bool:
        return "SuperNode ID" in (processes.logs / f"node-{client}.log").read_text(encoding="utf-8", errors="replace")

    processes.wait(lambda: all(map(connected, clients)), "the nodes", seconds, *mine)


def run_to_the_end(
    processes: Processes,
    made: Deployment,
    say: Callable[[str], None],
    tend: Callable[[], None] = lambda: None,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Run what is left of the deployment's recipe, with a line for each round as it is done.

    Flower cannot take up a run whose server app died: a new run goes on from the last whole round of the run folder.
    `tend` is called once in a while; `ready` once, as soon as the server app starts, which takes as long as clients do.
    """
    failures, where, once = 0, 0, [ready]
    if made.rounds.exists():
        where = made.rounds.stat().st_size
    while True:
        begun = processes.flwr("run", str(made.folder), "ours", "--run-config", f'deployment="{made.folder}"')
        if not begun.get("success"):
            raise FedError(f"the run was refused: {begun.get('text', begun)}")
        number, rounds_before = str(begun["run-id"]), _rounds(made)
        while once:
            once.pop()()
        looked = time.monotonic()
        status: dict[str, Any] = {}
        while not str(status.get("status", "")).startswith("finished"):
            where = follow(made.rounds, where, say)
            if (why := processes.ended(LINK)) is not None:
                raise FedError(f"the SuperLink: {why}. The same command goes on from the last whole round.")
            tend()
            time.sleep(0.1)
            finished = (made.run / "summary.json").exists()
            if time.monotonic() - looked > (1.0 if finished else 5.0):
                runs = processes.flwr("ls", "ours").get("runs", [])
                status = next((run for run in runs if str(run["run-id"]) == number), status)
                looked = time.monotonic()
        where = follow(made.rounds, where, say)
        if status["status"] == "finished:completed":
            return
        failures = 0 if _rounds(made) > rounds_before else failures + 1
        last = made.rounds.read_text(encoding="utf-8").splitlines()[-1:] if made.rounds.exists() else []
        if failures >= AGAIN or (last and last[0].startswith("error:")):
            raise FedError(
                f"the server app failed ({status.get('status-details') or status['status']}): "
                f"{' '.join(last) or processes.said(LINK)} (all of it: {made.logs / LINK}.log)"
            )
        why = status.get("status-details") or "killed"
        say(f"the server app ended ({why}); a new run goes on from round {_rounds(made)}")


def _rounds(made: Deployment) -> int:
    history = made.run / "history.jsonl"
    return history.read_bytes().count(b"\n") if history.exists() else 0


def follow(path: Path, where: int, say: Callable[[str], None]) -> int:
    """Say what has been added in whole lines since byte `where`; gives the new place."""
    if not path.exists():
        return where
    with path.open("rb") as file:
        file.seek(where)
        added = file.read()
    whole = added[: added.rfind(b"\n") + 1]
    for line in whole.decode("utf-8", "replace").splitlines():
        say(line)
    return where + len(whole)
