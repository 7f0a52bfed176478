"""A deployment on disk: a Flower app, the recipe, certificates and keys. What `deploy init` writes.

pyproject.toml  app/        the Flower app, to be run by `flwr run` as any other
recipe.yaml                 what is trained; the same file lies on every device
deployment.json             where it was made, and by which command
tls/                        a root of our own, the SuperLink's certificate
keys/                       one key for each client, on this machine's clients alone
run/                        the run folder, as `fedllm-sec train` writes it
logs/                       what the processes say; rounds.log has a line for each round, exchange.log its times
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from fedllm_sec.build.names import checked
from fedllm_sec.build.threat import client_ids
from fedllm_sec.deploy.problems import refuse_undeployable
from fedllm_sec.errors import FedError, RecipeError, reason
from fedllm_sec.recipe import reading
from fedllm_sec.recipe.sections import Recipe
from fedllm_sec.records.files import holder, locked

APP = """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "fedllm-sec-deployment"
version = "1.0.0"
description = "A fedllm_sec recipe on real clients"
license = {{ file = "LICENSE" }}
dependencies = ["flwr>={flower}"]

[tool.hatch.build.targets.wheel]
packages = ["app"]

[tool.flwr.app]
publisher = "local"
fab-format-version = 1
flwr-version-target = "{flower}"

[tool.flwr.app.components]
serverapp = "app.server:app"
clientapp = "app.client:app"

[tool.flwr.app.config]
deployment = "{folder}"
"""
README = """# {name}

A fedllm_sec recipe as a Flower app. All on this machine, over TLS with a key for each node:

    fedllm-sec deploy up {folder}

On machines of their own, the server first (it prints what the devices need):

    fedllm-sec deploy server {folder} --host 0.0.0.0 --port 8000

and on each device, with this folder's recipe.yaml, deployment.json, tls/ca.pem and its own keys/cXX.key copied to it:

    fedllm-sec deploy client {folder} --client c00 --superlink SERVER:8000 --data my_rows.jsonl

The run lies in run/ and is that of a simulation: fedllm-sec report {folder}/run
"""


def _whole(folder: str | Path) -> Path:
    """Where a folder lies, links followed; unlike Path's, without an error for a loop of links."""
    return Path(os.path.realpath(Path(folder).expanduser()))


@contextlib.contextmanager
def held(folder: str | Path, client: str | None = None) -> Iterator[None]:
    """Nobody else writes this deployment or brings it up here, or nobody else is this client of it."""
    path = _whole(folder) / (f".lock-{client}" if client else ".lock")
    with locked(path) as mine:
        if not mine:
            who = f"client {client} of it" if client else "it"
            raise FedError(
                f"{folder}: {who} is being run by process {holder(path) or 'unknown'}. Wait for it, stop it, or give "
                "another folder."
            )
        yield


@dataclass(frozen=True)
class Deployment:
    """The folder and what lies where in it."""

    folder: Path
    command: str = "fedllm-sec deploy"
    cwd: str = "."

    @classmethod
    def at(cls, folder: str | Path) -> Deployment:
        """A folder that `init` has made."""
        path = _whole(folder)
        try:
            found = json.loads((path / "deployment.json").read_text(encoding="utf-8"))
            return cls(path, str(found["command"]), str(found["cwd"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RecipeError(
                f"{folder}: is no deployment ({reason(error)}). Make one: fedllm-sec deploy init FOLDER"
                " --recipe RECIPE."
            ) from error

    @classmethod
    def init(cls, folder: str | Path, recipe: Recipe, command: str) -> Deployment:
        """Write a folder anew; what a run or another recipe has left there is an error."""
        refuse_undeployable(recipe)
        made = cls(_whole(folder), command, os.getcwd())
        out = recipe.output.model_copy(update={"folder": str(made.run)})
        text = reading.dump(recipe.model_copy(update={"output": out}))
        there = made.folder / "recipe.yaml"
        if there.exists() and there.read_text(encoding="utf-8") != text:
            raise RecipeError(
                f"{made.folder}: holds a deployment of another recipe. Give another folder, or remove it."
            )
        for path in (made.folder, made.folder / "app", made.logs, made.folder / "keys", made.folder / "home"):
            path.mkdir(parents=True, exist_ok=True)
        (made.folder / "keys").chmod(0o700)
        files = {
            "recipe.yaml": text,
            "pyproject.toml": APP.format(folder=made.folder, flower=version("flwr")),
            "app/__init__.py": "",
            "app/server.py": "from fedllm_sec.deploy import server\n\napp = server.app\n",
            "app/client.py": "from fedllm_sec.deploy import client\n\napp = client.app\n",
            "LICENSE": "Apache-2.0, as fedllm_sec itself: https://www.apache.org/licenses/LICENSE-2.0\n",
            "README.md": README.format(name=made.folder.name, folder=made.folder),
            "deployment.json": json.dumps({"command": command, "cwd": made.cwd}, indent=1) + "\n",
            ".gitignore": "keys/\ntls/*.key\nhome/\nlogs/\n.lock*\n",
        }
        for name, content in files.items():
            (made.folder / name).write_text(content, encoding="utf-8")
        return made

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    @property
    def rounds(self) -> Path:
        return self.logs / "rounds.log"

    @property
    def home(self) -> Path:
        return self.folder / "home"

    def recipe(self) -> Recipe:
        """The recipe, checked; paths in it lead from where the deployment was made."""
        return checked(reading.read(self.folder / "recipe.yaml"))

    def clients(self) -> list[str]:
        return client_ids(self.recipe())

    def enter(self) -> None:
        """Work where the recipe's relative paths lead from, where that folder is there."""
        if Path(self.cwd).is_dir():
            os.chdir(self.cwd)
