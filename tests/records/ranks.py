"""Two processes of one run, of which one fails at a message, over and over: nothing is imported anew.

`python -m tests.records.ranks` has imported what a run needs. For a line of JSON it forks both ranks, without a
launcher that would end the other one, and answers with a line: what became of each.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

IMPORTED = (  # what a start of the smallest run takes six of its seven seconds for
    *("datasets", "transformers", "accelerate", "torch._dynamo", "sklearn.datasets"),
    *(f"fedllm_sec.build.{name}" for name in ("federation", "measuring", "observing", "running")),
    *(f"fedllm_sec.kernels.{name}" for name in ("compiled", "compiled_columns", "compiled_pairs")),
    "fedllm_sec.report.page",
)
MESSAGES = ("broadcast", "all_gather", "all_reduce", "barrier", "send", "recv")
LONGEST = 60.0  # seconds after which a rank is said to hang


class Pair:
    """The process that forks the ranks; `play` is one start of the command."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.records.ranks"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=Path(__file__).parents[2], env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def play(self, folder: Path, rank: int | None = None, n: int = 0, kills: bool = False) -> list[dict[str, Any]]:
        """The code, output and messages of each rank (None: it hung); the n-th message of `rank` fails."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps([str(folder), rank, n, kills]), file=self.process.stdin, flush=True)
        found: list[dict[str, Any]] = json.loads(self.process.stdout.readline())
        return found

    def end(self) -> None:
        self.process.communicate()


def started(number: int, fails: int, kills: bool) -> int:
    """The command as rank `number`, whose message number `fails` is an error or its death; 0: none."""
    import torch.distributed

    from fedllm_sec.train import main
    from tests.records.smallest import plain_page

    sent, count = 0, Path(f"sent-{number}")
    count.write_text("0")

    def failing(real: Any) -> Any:
        def message(*given: Any, **named: Any) -> Any:
            nonlocal sent
            sent += 1
            count.write_text(str(sent))
            if sent == fails and kills:
                os.kill(os.getpid(), signal.SIGKILL)
            if sent == fails:
                raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection reset by peer [127.0.0.1]:1")
            return real(*given, **named)

        return message

    for name in MESSAGES:
        setattr(torch.distributed, name, failing(getattr(torch.distributed, name)))
    with plain_page():
        return main(["r.yaml"])


def be(number: int, port: int, folder: Path) -> None:
    """Become a rank, as a launcher would make it, that writes into out-NUMBER and err-NUMBER."""
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.chdir(folder)
    for handle, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{name}-{number}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), handle)


def both(folder: Path, rank: int | None, n: int, kills: bool) -> list[dict[str, Any]]:
    """Fork both ranks, and tell what became of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for number in (0, 1):
        if not (forked := os.fork()):
            be(number, port, folder)
            code = started(number, n if number == rank else 0, kills)
            sys.stdout.flush()
            os._exit(code)  # to take down what the parent has imported would take twice as long as the run
        ranks.append(forked)
    codes: dict[int, int | None] = {}
    end = time.monotonic() + LONGEST
    while len(codes) < 2:
        for process in ranks:
            if process not in codes and (ended := os.waitpid(process, os.WNOHANG))[0]:
                codes[process] = os.waitstatus_to_exitcode(ended[1])
            elif process not in codes and time.monotonic() > end:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
                codes[process] = None
        time.sleep(0.01)
    return [
        {"code": codes[process]} | {name: (folder / f"{name}-{k}").read_text() for name in ("out", "err", "sent")}
        for k, process in enumerate(ranks)
    ]


if __name__ == "__main__":
    for name in IMPORTED:
        importlib.import_module(name)
    for line in sys.stdin:
        where, *how = json.loads(line)
        print(json.dumps(both(Path(where), *how)), flush=True)
    os._exit(0)
