"""The ServerApp: the one round loop, with devices as its source of rows. The run folder is that of a simulation."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedllm_sec.build.loaded import Loaded
from fedllm_sec.build.plan import Methods, Plan, planned
from fedllm_sec.build.running import make_machine, run_one
from fedllm_sec.deploy.devices import Devices
from fedllm_sec.deploy.folder import Deployment
from fedllm_sec.deploy.problems import refuse_undeployable
from fedllm_sec.deploy.resident import watch
from fedllm_sec.deploy.sooner import look_sooner
from fedllm_sec.train import in_words, quiet

app = ServerApp()


@dataclass(frozen=True)
class AtServer(Plan):
    """A plan whose attackers are elsewhere: what the recipe says of them serves evaluation alone."""

    def fresh(self) -> Methods:
        methods = super().fresh()
        if methods.threat is None:
            return methods
        return dataclasses.replace(methods, threat=dataclasses.replace(methods.threat, update=(), local=()))


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the deployment that the run's configuration names."""
    from flwr.superlink.grid import http_grid

    watch(os.getppid())  # where the SuperLink was killed, this process would hold the run's folder for a minute
    look_sooner(http_grid)
    made = Deployment.at(str(context.run_config["deployment"]))
    with made.rounds.open("a", encoding="utf-8") as lines:

        def say(line: str) -> None:
            print(line, file=lines, flush=True)

        try:
            serve(made, grid, say)
        except Exception as error:
            say(f"error: {in_words(error) or f'{type(error).__name__}: {error}'}")
            raise


def serve(made: Deployment, grid: Any, say: Callable[[str], None]) -> Path:
    """All rounds that are left of a deployment's recipe, over the nodes of a grid; gives the run folder."""
    made.enter()
    quiet()
    recipe = made.recipe()
    refuse_undeployable(recipe)
    plan = planned(recipe)
    machine = make_machine(recipe, Path(recipe.output.folder))
    with (made.logs / "exchange.log").open("a", encoding="utf-8") as times:
        source = Devices(grid, recipe, say, note=lambda line: print(line, file=times, flush=True))
        run_one(AtServer(**vars(plan)), machine, made.command, Loaded(), say, source=source)
    return Path(recipe.output.folder)
