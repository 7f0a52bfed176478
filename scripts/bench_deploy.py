"""What a deployment costs over the training itself: `python scripts/bench_deploy.py RECIPE [key=value ...]`.

Runs the recipe by `fedllm-sec deploy up` in a folder of its own, then as a simulation, and prints seconds over the
rounds but the first, as clients' and server's logs have them:

exchange    from the question to the last row
training    from the first client's first step to the last one's last
sending     the server hands its questions to its SuperLink, until the first client looks at its own
way there   from there until the first client looks at its question, if that is later: its node and it wait
receiving   that client takes its question from its node
returning   the client that ended last hands its reply to its node
way back    until the server begins to read that reply: its node takes it there, and the server waits
reading     the server reads it

`over` is what an exchange takes over its training: the last six together. Transfer is what bytes take at both ends of
a way (sending, receiving, returning, reading), waiting the two ways.

With --default, nodes are as Flower has them: each starts a process for every message, and no client is resident. Then
the clients' times are in no log, and `over` is what the exchange takes over the simulation's training.
"""

from __future__ import annotations

import json
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fedllm_sec.deploy import local
from fedllm_sec.deploy.command import bring_up, one_recipe
from fedllm_sec.deploy.folder import Deployment
from fedllm_sec.matrix.quantise import bytes_of
from fedllm_sec.records.history import read_history

NUMBER = r"(\d+\.\d+)"
TRAINED = re.compile(rf"^round (\d+): trained from {NUMBER} to {NUMBER}$", re.MULTILINE)
MOVED = re.compile(rf"^train (\d+): received {NUMBER} {NUMBER} sent {NUMBER} {NUMBER}$", re.MULTILINE)
ASKED = re.compile(rf"^round (\d+): asked {NUMBER} {NUMBER} read {NUMBER} {NUMBER}$", re.MULTILINE)
TRANSFER, WAITING = ("sending", "receiving", "returning", "reading"), ("way there", "way back")


def times(pattern: re.Pattern[str], text: str) -> dict[int, list[float]]:
    """The numbers of each round's line."""
    return {int(number): list(map(float, found)) for number, *found in pattern.findall(text)}


def parts(made: Deployment) -> dict[int, dict[str, float]]:
    """Seconds of each part of each round."""
    asked = times(ASKED, (made.logs / "exchange.log").read_text())
    logs = [log.read_text() for log in made.logs.glob("client-*.log")]
    trained, moved = [times(TRAINED, log) for log in logs], [times(MOVED, log) for log in logs]
    found = {}
    for r, (begun, sent, looked, read) in asked.items():
        if not any(moved):  # a process for each message, whose words are in no log
            found[r] = {"exchange": read - begun}
            continue
        first = min((i for i in range(len(logs)) if r in moved[i]), key=lambda i: trained[i][r][0])
        last = max((i for i in range(len(logs)) if r in moved[i]), key=lambda i: trained[i][r][1])
        start, end = trained[first][r][0], trained[last][r][1]
        taken, handed = moved[first][r][0], moved[last][r][3]
        sent, looked = min(sent, taken), max(looked, handed)  # the first is asked while questions to others are sent
        found[r] = {
            "exchange": read - begun,
            "training": end - start,
            "over": read - begun - (end - start),
            "sending": sent - begun,
            "way there": taken - sent,
            "receiving": start - taken,
            "returning": handed - end,
            "way back": looked - handed,
            "reading": read - looked,
        }
    return found


def as_flower_has_it() -> None:
    """SuperNodes with Flower's own sleeps, each of which starts a process for every message; no resident clients."""

    def start(node: local.Node, processes: local.Processes, superlink: str, wait: float = 120.0) -> None:
        processes.start(
            f"client-{node.client}", "flower-supernode", "--superlink", superlink, "--port", str(node.port),
            "--root-certificates", str(node.made.folder / "tls" / "ca.pem"),
            "--auth-supernode-private-key", str(node.made.folder / "keys" / f"{node.client}.key"),
            "--max-wait-time", str(wait),
            "--node-config", f'deployment="{node.made.folder}" client="{node.client}"',
        )  # fmt: skip

    def wait_for_nodes(processes: local.Processes, clients: list[str], seconds: float = 180.0) -> None:
        def connected(client: str) -> bool:
            return "SuperNode ID" in (processes.logs / f"client-{client}.log").read_text(errors="replace")

        processes.wait(lambda: all(map(connected, clients)), "the nodes", seconds)

    local.Node.start = start  # type: ignore[method-assign]
    local.start_residents = lambda processes, nodes: lambda: None
    local.wait_for_nodes = wait_for_nodes  # type: ignore[assignment]
    local.Tending.__call__ = lambda self: None  # type: ignore[method-assign]


def simulated(path: str, overrides: list[str], folder: Path) -> list[float]:
    """Seconds of training of each round of the same recipe in one process."""
    words = [sys.executable, "-m", "fedllm_sec", "train", path, *overrides, f"output.folder={folder}"]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return [json.loads(line)["train"] for line in (folder / "timings.jsonl").read_text().splitlines()]


def main() -> None:
    path, *overrides = [word for word in sys.argv[1:] if word != "--default"]
    if "--default" in sys.argv:
        as_flower_has_it()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes it started end with it
    folder = Path(tempfile.mkdtemp(prefix="bench-deploy-"))
    recipe = one_recipe(Path(path), [*overrides, f"output.folder={folder}/sim"])
    made = Deployment.init(folder / "d", recipe, "scripts/bench_deploy.py")
    began = time.time()
    bring_up(made)
    whole = time.time() - began
    rounds = parts(made)
    later = [rounds[r] for r in sorted(rounds) if r > 1]
    training = simulated(path, overrides, folder / "simulated")
    print(f"\nfolder {made.folder}, {recipe.clients.total} clients, wire {recipe.deploy.wire}, {len(later)} rounds")
    for name in later[0]:
        values = [one[name] for one in later]
        print(f"{name:9} median {statistics.median(values):.2f} s, least {min(values):.2f}, most {max(values):.2f}")
    for what, names in (("transfer", TRANSFER), ("waiting", WAITING)) if "over" in later[0] else ():
        print(f"{what:9} median {statistics.median(sum(one[name] for name in names) for one in later):.2f} s")
    alone = statistics.median(training[1:])
    over = statistics.median(one.get("over", one["exchange"] - alone) for one in later)
    print(f"simulation's training of a round: median {alone:.2f} s; over it are {over:.2f} s, {over / alone:.2f} of it")
    start = float(ASKED.findall((made.logs / "exchange.log").read_text())[0][1]) - began
    print(f"start of processes, until round 1 is asked: {start:.1f} s; whole command {whole:.1f} s")
    quality = (read_history(made.run)[-1].quality or {}).get("accuracy")
    print(
        f"accuracy after the last round {quality}; wire: {bytes_of(recipe.deploy.wire, 10**6) / 1e6:.3f} bytes a number"
    )


if __name__ == "__main__":
    main()
