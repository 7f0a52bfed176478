"""A device: one client with its own rows, which trains as in a simulation and sends one flat delta.

Everything that is drawn depends on (seed, round, client id), so that a deployment with the shards of a simulation has
its history, byte for byte where the wire is float32 and the threads are as many.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedllm_sec.attacks.threat import Threat
from fedllm_sec.build.federation import assemble
from fedllm_sec.build.loaded import Loaded
from fedllm_sec.build.plan import Methods, Plan, planned
from fedllm_sec.build.running import make_machine
from fedllm_sec.build.threat import client_ids
from fedllm_sec.defenses.columns import mean
from fedllm_sec.deploy.problems import layout_hash, recipe_hash, refuse_undeployable
from fedllm_sec.errors import RecipeError
from fedllm_sec.matrix import UpdateMatrix
from fedllm_sec.protocols import Client, LocalResult
from fedllm_sec.recipe.sections import Recipe
from fedllm_sec.rounds.client import make_optimizer
from fedllm_sec.rounds.federation import Federation, train_client


@dataclass(frozen=True)
class OnDevice(Plan):
    """The plan of one device: nobody is malicious but perhaps this client."""

    attacker: str | None = None

    def fresh(self) -> Methods:
        methods = super().fresh()
        methods.defense.rule = mean  # what the server decides by, and what it plants for that, is its own affair
        return dataclasses.replace(methods, threat=self._alone(methods.threat))

    def _alone(self, threat: Threat | None) -> Threat | None:
        if self.attacker is None or threat is None:
            return None
        threat.ever = frozenset({self.attacker})  # whose rows are poisoned: the others' are not here
        if threat.redrawn is None or self.attacker not in threat.malicious:
            threat.malicious, threat.redrawn = threat.ever, None
        threat.collude = False
        return threat


class Device:
    """One client of a recipe. `data` is where its own rows lie; without it, it takes its share of the recipe's."""

    def __init__(self, recipe: Recipe, id: str, *, attack: bool = False, data: str | None = None) -> None:
        refuse_undeployable(recipe)
        ids = client_ids(recipe)
        if id not in ids:
            raise RecipeError(f"client: {id!r} is none of the clients {ids[0]} to {ids[-1]}. Give one of them.")
        if attack and recipe.attack is None:
            raise RecipeError("--attack: the recipe of this device has no attack block. Add one: what is it to do?")
        if data is not None and not Path(data).expanduser().exists():
            raise RecipeError(f"--data: {data}: there is no such file or folder on this device.")
        self.id, self.recipe_hash, self.per_round = id, recipe_hash(recipe), recipe.clients.per_round or len(ids)
        alone = {"output": recipe.output.model_copy(update={"tracker": None})}  # what is tracked, the server measures
        own = recipe.model_copy(update={"enable_attack": attack, **({} if attack else {"attack": None}), **alone})
        if data is not None:  # all of it is this client's
            clients = own.clients.model_copy(update={"partition": {"name": "iid"}})
            own = own.model_copy(update={"data": own.data.model_copy(update={"name": data}), "clients": clients})
        plan = planned(own)
        plan = OnDevice(own, plan.ids if data is None else (id,), plan.training, plan.methods, id if attack else None)
        machine = make_machine(own, Path(own.output.folder))
        made = assemble(plan, machine, Loaded())
        assert isinstance(made, Federation)  # fedgkt is refused
        sizes = [made.task.size(client.shard) for client in made.clients]
        made.training = made.algorithm.prepare(made.training, sizes)
        made.clients = [client for client in made.clients if client.id == id]
        made.evaluation = None
        self.federation, self.optimizer = made, make_optimizer(made.task, made.training)
        self.seen: dict[int, Tensor] = {}  # what it received, in the last round it took part in and the one before that
        # of the last round, which a server that was killed asks for again: what it had when that began
        self.began: tuple[int, dict[str, Any]] = (0, {})  # the memory of its attacks
        self.lost: tuple[int, Tensor | None, Tensor | None] = (0, None, None)  # by the wire (int8), before it and after

    def introduction(self) -> dict[str, str]:
        """Who it is and by what the server knows that both mean the same."""
        layout = layout_hash(self.federation.task.layout)
        return {"client": self.id, "recipe": self.recipe_hash, "layout": layout, "version": version("fedllm_sec")}

    def train(self, vectors: Mapping[str, Tensor], r: int, rounds: int) -> LocalResult:
        """What it sends in round r for what it received: start (d,), and what the FL method sends beside it."""
        made = self.federation
        client, threat, at = made.clients[0], made.threat, made.machine.device
        start = vectors["start"].to(at)
        known = vectors.get("last_update")
        if known is None and r - 1 in self.seen:
            known = start - self.seen[r - 1]  # every client sees how the model moved
        self.seen = {**{k: then for k, then in self.seen.items() if k == r - 1}, r: start}
        made.vector, made.last_update = start, None if known is None else known.to(at)
        if made.buffers is not None:
            made.buffers = vectors["buffers"].cpu().double()
        memory = {name.removeprefix("memory."): v.to(at) for name, v in vectors.items() if name.startswith("memory.")}
        client.memory = memory
        control = vectors["control"].to(at) if "control" in vectors else None
        dressed = threat.dress(client, r) if threat is not None else client
        result = train_client(made, dressed, start, self.optimizer, made.guards, control, r, rounds)
        return result if threat is None else self._forged(result, threat, client, r)

    def lost_before(self, r: int) -> Tensor | None:
        """What the wire has lost of the rounds before r; a round that is asked for again begins from the same."""
        at, before, after = self.lost
        return after if r > at else before if r == at else None

    def _forged(self, result: LocalResult, threat: Threat, client: Client, r: int) -> LocalResult:
        """The row that a malicious device sends instead: it knows its own alone."""
        made = self.federation
        if self.began[0] == r:
            threat.alone = copy.deepcopy(self.began[1])
        self.began = (r, copy.deepcopy(threat.alone))
        own = UpdateMatrix.of(
            result.delta[None].clone(), ids=(client.id,), counts=[result.count], layout=made.task.layout
        )
        forged = threat.forge(
            own,
            vector=made.vector,
            last_update=made.last_update,
            round=r,
            defense=None,
            server_lr=made.algorithm.server_lr,
            cohort_size=self.per_round,
        )
        buffers: Any = result.buffers
        if buffers is not None:
            buffers = threat.forge_buffers(buffers[None], (client.id,), made.task.buffers.layout, r)[0]
        delta = result.delta if forged is None else forged[1][0]
        return dataclasses.replace(result, delta=torch.clone(delta), buffers=buffers)
