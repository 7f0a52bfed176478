"""Two hosts on this machine and a slow link between them: `python scripts/two_hosts.py RECIPE [key=value ...]` (root).

The server is in a network namespace of its own; the clients are in another, which does not see the server's folder and
holds copies of what docs/edge.md names. Between them is this script: packets wait their turn at RATE bits a second and
DELAY seconds after it, and LOSS of them are dropped (what tc netem does, which not every kernel has). Each client lives
under LIMIT: a cgroup with 2 GiB of memory and one core. Prints a line on the link's bytes, seconds and accuracy, and
one on each client's memory and seconds.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import fcntl
import json
import os
import random
import re
import select
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from fedllm_sec.deploy.command import main as deploy
from fedllm_sec.records.history import read_history

HOSTS = {"fed-server": "10.99.0.1", "fed-clients": "10.99.0.2"}
QUEUE = 64 * 1024  # bytes that wait at one end of the link; more are dropped, as a router does
CGROUPS = Path("/sys/fs/cgroup")
TRAINED = re.compile(r"^round (\d+): trained from ([\d.]+) to ([\d.]+)$", re.MULTILINE)


def ran(*words: str) -> None:
    subprocess.run(words, check=True)


def tunnel(host: str, address: str) -> int:
    """A network device whose other end is this process, as the only one of a namespace; gives what packets come by."""
    fd, name = os.open("/dev/net/tun", os.O_RDWR), f"t-{host}"[:15]
    fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH", name.encode(), 0x1001))  # TUNSETIFF: IFF_TUN | IFF_NO_PI
    ran("ip", "netns", "add", host)
    ran("ip", "link", "set", name, "netns", host)
    for words in (f"addr add {address}/24 dev {name}", f"link set {name} up", "link set lo up"):
        ran("ip", "-n", host, *words.split())
    return fd


class Link(threading.Thread):
    """Carries packets between two ends until it is told to stop; counts the bytes that each end has sent."""

    def __init__(self, ends: tuple[int, int], rate: float, delay: float, loss: float) -> None:
        super().__init__(daemon=True)
        self.ends, self.rate, self.delay, self.loss = ends, rate, delay, loss
        self.sent, self.dropped, self.over = [0, 0], 0, False

    def run(self) -> None:
        rng = random.Random(0)
        free = [0.0, 0.0]  # when each end's line is free
        way: list[collections.deque[tuple[float, bytes]]] = [collections.deque(), collections.deque()]
        while not self.over:
            due = min((queue[0][0] for queue in way if queue), default=time.monotonic() + 0.1)
            ready, _, _ = select.select(self.ends, [], [], max(0.0, due - time.monotonic()))
            now = time.monotonic()
            for i, end in enumerate(self.ends):
                if end in ready:
                    packet = os.read(end, 65536)
                    self.sent[i] += len(packet)
                    if rng.random() < self.loss or (free[i] - now) * self.rate / 8 > QUEUE:
                        self.dropped += 1
                        continue
                    free[i] = max(free[i], now) + 8 * len(packet) / self.rate
                    way[i].append((free[i] + self.delay, packet))
                while way[i] and way[i][0][0] <= now:
                    os.write(self.ends[1 - i], way[i].popleft()[1])


def limited(name: str) -> list[str]:
    """The beginning of a command that lives under 2 GiB and one core; made anew."""
    for kind, file, value in (("memory", "memory.limit_in_bytes", 2**31), ("cpu", "cpu.cfs_quota_us", 100_000)):
        group = CGROUPS / kind / name
        group.mkdir(exist_ok=True)
        (group / file).write_text(str(value))
    enter = " && ".join(f"echo $$ > {CGROUPS / kind / name}/cgroup.procs" for kind in ("memory", "cpu"))
    return ["sh", "-c", f'{enter} && exec "$@"', "sh"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--rate", type=float, default=2e6)
    parser.add_argument("--delay", type=float, default=0.02)
    parser.add_argument("--loss", type=float, default=0.01)
    given = parser.parse_intermixed_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    top = Path(tempfile.mkdtemp(prefix="two-hosts-"))
    here, there, running = top / "server" / "edge", top / "clients", list[subprocess.Popen[bytes]]()
    deploy(["init", str(here), "--recipe", given.recipe, *given.overrides])
    clients = sorted(path.stem for path in (here / "keys").glob("*.key"))
    for client in clients:  # a folder for each, as on a device of its own
        for name in ("recipe.yaml", "deployment.json", "tls/ca.pem", f"keys/{client}.key"):
            (to := there / client / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(here / name, to)
    sec = [sys.executable, "-m", "fedllm_sec", "deploy"]
    link = Link(tuple(tunnel(*host) for host in HOSTS.items()), given.rate, given.delay, given.loss)  # type: ignore
    link.start()
    try:
        server, address = ["ip", "netns", "exec", "fed-server"], HOSTS["fed-server"]
        named = ["--host", "0.0.0.0", "--port", "8000", "--name", address]
        serving = subprocess.Popen([*server, *sec, "server", str(here), *named])
        running.append(serving)
        while not (here / "home" / "config.toml").exists() and serving.poll() is None:
            time.sleep(0.5)
        blind = ["unshare", "-m", "sh", "-c", f'mount -t tmpfs none {top / "server"} && exec "$@"', "sh"]
        for client in clients:
            asked = ["client", str(there / client), "--client", client, "--superlink", f"{address}:8000"]
            enter = [*limited(f"fed-{client}"), "ip", "netns", "exec", "fed-clients", *blind]
            running.append(subprocess.Popen([*enter, *sec, *asked]))
        if serving.wait() != 0:
            sys.exit(f"the server ended with {serving.returncode}: {here / 'logs'}")
        told(here, there, clients, link)
    finally:
        for process in running:
            process.terminate()
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
        link.over = True
        link.join(1)
        for host in HOSTS:
            ran("ip", "netns", "del", host)
        for client in clients:
            for kind in ("memory", "cpu"):
                with contextlib.suppress(OSError):
                    (CGROUPS / kind / f"fed-{client}").rmdir()


def told(here: Path, there: Path, clients: list[str], link: Link) -> None:
    """What was measured, over the rounds but the first."""
    rows = [json.loads(line) for line in (here / "run" / "timings.jsonl").read_text().splitlines()]
    exchange = {row["round"]: row["train"] for row in rows}
    spans = collections.defaultdict(list)
    for client in clients:
        log = (there / client / "logs" / f"client-{client}.log").read_text()
        rounds = [(int(number), float(start), float(end)) for number, start, end in TRAINED.findall(log)]
        for number, start, end in rounds:
            spans[number].append((start, end))
        took = [end - start for _, start, end in rounds]
        peak = re.findall(r"peak memory so far (\d+) MiB", log)[-1]
        group = CGROUPS / "memory" / f"fed-{client}"
        used, failed = ((group / f"memory.{name}").read_text().strip() for name in ("max_usage_in_bytes", "failcnt"))
        print(
            f"{client}: resident process at most {peak} MiB; all of its processes, files read included, at most "
            f"{int(used) / 2**20:.0f} MiB of 2,048 ({failed} times at the limit); a round's training "
            f"{statistics.median(took[1:] or took):.1f} s on one core"
        )
    later = [r for r in sorted(exchange) if r > 1]
    training = [max(e for _, e in spans[r]) - min(s for s, _ in spans[r]) for r in later]
    over = [exchange[r] - took for r, took in zip(later, training, strict=True)]
    down, up = (sent / len(rows) for sent in link.sent)
    accuracy = (read_history(here / "run")[-1].quality or {}).get("accuracy")
    medians = [f"{statistics.median(values):.1f} s" for values in ([exchange[r] for r in later], training, over)]
    print(
        f"a round: {down:,.0f} bytes to the clients, {up:,.0f} from them ({link.dropped} packets lost in all); "
        f"exchange {medians[0]}, training {medians[1]}, over {medians[2]}; accuracy {accuracy}"
    )


if __name__ == "__main__":
    main()
