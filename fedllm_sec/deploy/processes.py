"""Flower's processes: started in sessions of their own, watched, ended whole. No Python API of it starts them."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from fedllm_sec.errors import FedError

BIN = Path(sys.executable).parent
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
WAYS_OUT = {
    "Hostname mismatch": "The certificate names other hosts: start the server with --name HOST.",
    "unable to get local issuer": "The certificate is of another root: copy tls/ca.pem from the server's folder.",
    "Failed to activate SuperNode": "Its key is not registered there, or is online already: copy keys/ID.key of this "
    "client, which no other device uses, from the server's folder.",
    "certificate has expired": "Remove server.pem from the server's tls folder and start it again.",
}
PACKAGE = Path(__file__).parents[2]  # what holds fedllm_sec, for processes that start elsewhere


def free_port() -> int:
    """A port of this machine that nobody listens on, by the kernel."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def listens(host: str, port: int) -> bool:
    """Whether somebody takes connections there: asked before anything that costs more."""
    try:
        socket.create_connection((host, port), timeout=2).close()
        return True
    except OSError:
        return False


def refuse_taken(host: str, port: int) -> None:
    """An error where nobody can listen there, or somebody does: Flower's own would come late and long."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((host, port))
        except (OSError, OverflowError) as error:
            at, why = beside(host, port), getattr(error, "strerror", None) or str(error)
            if getattr(error, "errno", None) == errno.EADDRINUSE:
                raise FedError(f"--port: {at}: {why}. Give another, or end what uses it.") from error
            way_out = "Give an address of this machine (0.0.0.0: all of them) and a port from 1024 on."
            raise FedError(f"--host, --port: {at}: {why}. {way_out}") from error


def beside(host: str, port: int) -> str:
    """HOST:PORT; in brackets where the host has colons itself."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@dataclass(frozen=True)
class Forked:
    """A process that another one of ours has made (Linux); as much of Popen as is asked of it here."""

    pid: int

    def poll(self) -> int | None:
        """None while it runs."""
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return 1
        return 1 if state in "ZX" else None

    def terminate(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)

    def wait(self, timeout: float) -> int:
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.05)
        return code


@dataclass
class Processes:
    """The processes of one command; leaving the block ends them all, with what they started."""

    logs: Path
    home: Path  # FLWR_HOME
    running: dict[str, subprocess.Popen[bytes] | Forked] = field(default_factory=dict)

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.running.values():
            if process.poll() is None:
                process.terminate()
        for process in self.running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # a node's children outlive it until it is reaped
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)

    def environment(self) -> dict[str, str]:
        path = os.pathsep.join(filter(None, [str(PACKAGE), os.environ.get("PYTHONPATH", "")]))
        return {
            "OMP_NUM_THREADS": "1",
            **os.environ,
            "PYTHONPATH": path,
            "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
            "PYTHONUNBUFFERED": "1",
            "FLWR_HOME": str(self.home),
            **QUIET,
        }

    def start(self, name: str, *command: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """A process in a session of its own, whose words go to logs/NAME.log."""
        self.logs.mkdir(parents=True, exist_ok=True)
        with (self.logs / f"{name}.log").open("ab") as log:
            made = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**self.environment(), **(env or {})},
                start_new_session=True,
            )
        self.running[name] = made
        return made

    def said(self, name: str, last: int = 5) -> str:
        """The last lines of a process's log; its error, or why Flower says that it ended, where it says that."""
        path = self.logs / f"{name}.log"
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        kept = [line for line in lines if line.strip()]
        errors = [line for line in kept if line.startswith("error:")][-1:]
        ends = [i for i, line in enumerate(kept) if "Exit Code:" in line]
        said = " / ".join(errors or (kept[ends[-1] + 1 : ends[-1] + 4] if ends else kept[-last:]))[-600:]
        return " ".join([said, *(way for sign, way in WAYS_OUT.items() if sign in said)])

    def ended(self, *names: str) -> str | None:
        """Which of them has ended, and what it said last."""
        for name in names or self.running:
            if (code := self.running[name].poll()) is not None:
                said = self.said(name)
                how = f"{name}: {said[7:]}" if said.startswith("error: ") else f"{name} ended with {code}: {said}"
                return f"{how} (all of it: {self.logs / name}.log)"
        return None

    def wait(self, done: Callable[[], bool], what: str, seconds: float, *watched: str) -> None:
        """Until something is so; an error where a process ends before, or it takes too long."""
        end = time.monotonic() + seconds
        while not done():
            if (why := self.ended(*watched)) is not None:
                raise FedError(f"{what}: {why}")
            if time.monotonic() > end:
                said = "; ".join(f"{name}: {self.said(name, 2)}" for name in watched or self.running)
                raise FedError(f"{what}: not within {seconds:g} s. {said} (logs in {self.logs})")
            time.sleep(0.3)

    def flwr(self, *words: str) -> dict[str, Any]:
        """What `flwr ... --format json` answers; {"success": False, "text": ...} where that is no JSON.

        The command runs in this process, since importing it anew takes seconds each time.
        """
        os.environ.update({key: self.environment()[key] for key in ("FLWR_HOME", *QUIET)})
        from flwr.cli.app import typer_click_object

        said, more = io.StringIO(), io.StringIO()
        kept = sys.__stdout__, sys.stdout, sys.stderr
        sys.__stdout__, sys.stdout, sys.stderr = said, more, more  # type: ignore[misc]  # it writes JSON to the first
        try:
            typer_click_object([*words, "--format", "json"], standalone_mode=False)
        except (Exception, SystemExit) as error:
            more.write(f" {error}")
        finally:
            sys.__stdout__, sys.stdout, sys.stderr = kept  # type: ignore[misc]
        try:
            found = json.loads(said.getvalue())
        except ValueError:
            found = None
        if isinstance(found, dict):
            return {**found, "text": found.get("error-message", "")}
        return {"success": False, "text": " ".join((said.getvalue() + more.getvalue()).split())[-600:]}
