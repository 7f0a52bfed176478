"""The threat model: who is malicious, when they attack, and what they can see."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedllm_sec.errors import AttackError, CohortError, IdleAttack
from fedllm_sec.matrix import UpdateMatrix
from fedllm_sec.protocols import Client, DataAttack, Decision, LocalRule, ThreatView, UpdateAttack
from fedllm_sec.seeds import generator_for, seed_for


@dataclass
class Threat:
    """The attackers of a run. Malicious clients are real: they train on their poisoned shard and submit their row.

    With `redrawn`, so many of the `malicious` are drawn anew for each round and the others are honest in it.
    """

    malicious: frozenset[str]
    seed: int
    redrawn: int | None = None
    start: int = 1  # first and last round of the attack
    stop: int | None = None
    every: int = 1
    probability: float = 1.0  # of attacking in a round that start, stop and every allow; drawn by the seed
    collude: bool = True  # False: each forges alone, from its own row
    knowledge: str = "own"  # own | cohort | cohort+defense
    data: Sequence[DataAttack] = ()
    local: Sequence[LocalRule] = ()
    update: Sequence[UpdateAttack] = ()
    ever: frozenset[str] | None = None  # who attacks at all in this run and so needs poisoned data; None: all malicious
    poisoned: dict[str, Any] = field(default_factory=dict)  # id -> poisoned shard
    alone: dict[str, Sequence[UpdateAttack]] = field(default_factory=dict)  # id -> its own copies, if nobody colludes

    def active(self, round: int) -> bool:
        """Whether the attackers attack in this round."""
        late = self.stop is not None and round > self.stop
        if not self.malicious or round < self.start or late or (round - self.start) % self.every != 0:
            return False
        drawn = torch.rand((), generator=generator_for(self.seed, round, "attacking"), dtype=torch.float64)
        return self.probability >= 1 or float(drawn) < self.probability

    def who(self, round: int) -> frozenset[str]:
        """Who is malicious in this round, whether they attack or not."""
        if self.redrawn is None:
            return self.malicious
        return choose_malicious(self.redrawn, sorted(self.malicious), seed_for(self.seed, round, "redrawn"))

    def attackers(self, round: int) -> frozenset[str]:
        """Who attacks in this round."""
        return self.who(round) if self.active(round) else frozenset()

    def dress(self, client: Client, round: int) -> Client:
        """The client as it trains in this round: an active attacker owns its poisoned shard."""
        if client.id in self.poisoned and client.id in self.attackers(round):
            return Client(client.id, self.poisoned[client.id], client.memory)
        return client

    def rules(self, client: Client, round: int) -> Sequence[LocalRule]:
        """The local rules of the attack, for an active attacker."""
        return self.local if client.id in self.attackers(round) else ()

    def forge(
        self,
        updates: UpdateMatrix,
        *,
        vector: Tensor,
        last_update: Tensor | None,
        round: int,
        defense: Callable[[UpdateMatrix], Decision] | None,
    ) -> tuple[list[int], Tensor] | None:
        """The attackers' places in the cohort and the rows (m, d) they submit; None where they send their own.

        Who does not collude forges alone, with a memory of its own: `own` is its one row, and the other attackers are
        clients like any other to it, whose rows, as they were trained, it sees where knowledge grants that.
        """
        attackers = self.attackers(round)
        places = [i for i, id in enumerate(updates.ids) if id in attackers]
        if not places or not self.update:
            return None
        known = defense if self.knowledge == "cohort+defense" else None
        if self.collude:
            return places, self._forged(self.update, updates, places, vector, last_update, round, known)
        rows = []
        for place in places:
            attacks = self.alone.setdefault(updates.ids[place], copy.deepcopy(self.update))
            rows.append(self._forged(attacks, updates, [place], vector, last_update, round, known))
        return places, torch.cat(rows)

    def _forged(
        self,
        attacks: Sequence[UpdateAttack],
        updates: UpdateMatrix,
        places: list[int],
        vector: Tensor,
        last_update: Tensor | None,
        round: int,
        defense: Callable[[UpdateMatrix], Decision] | None,
    ) -> Tensor:
        """The rows (m, d) of attackers who act together."""
        own_ids, mine = tuple(updates.ids[i] for i in places), set(places)
        rest = [i for i in range(updates.n) if i not in mine] if self.knowledge != "own" else []
        others = updates.rows[rest] if self.knowledge != "own" else None  # a copy: the price of seeing the cohort
        own = updates.rows[places]
        for number, attack in enumerate(attacks):
            view = ThreatView(
                own=own,
                others=others,
                global_vector=vector,
                last_update=last_update,
                defense=defense,
                layout=updates.layout,
                own_counts=tuple(updates.counts[i] for i in places),
                cohort_size=updates.n,
                round=round,
                rng=generator_for(self.seed, round, "attack", number, *(() if self.collude else own_ids)),
                own_ids=own_ids,
                other_ids=tuple(updates.ids[i] for i in rest),
            )
            try:
                rows = attack(view)
            except CohortError as error:  # who takes part is drawn: no reason to end a run
                what = f"attack.update.{number}: round {round}: {error} The attackers send what they have."
                warnings.warn(what, IdleAttack, stacklevel=2)
                continue
            if tuple(rows.shape) != tuple(own.shape):
                raise AttackError(
                    f"attack.update.{number}: gave rows of shape {tuple(rows.shape)}, must be {tuple(own.shape)}."
                )
            own = rows.to(own)
        return own

    def state_dict(self) -> dict[str, Any]:
        """The memory of update attacks that have one (lazy, mimic)."""
        everyone = {"": self.update, **{f"{id}/": attacks for id, attacks in self.alone.items()}}
        return {
            f"{id}{i}": attack.state_dict()
            for id, attacks in everyone.items()
            for i, attack in enumerate(attacks)
            if hasattr(attack, "state_dict")
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for key, memory in state.items():
            id, _, number = key.rpartition("/")
            attacks = self.alone.setdefault(id, copy.deepcopy(self.update)) if id else self.update
            attacks[int(number)].load_state_dict(memory)  # type: ignore[attr-defined]


def choose_malicious(count: int, ids: Sequence[str], seed: int) -> frozenset[str]:
    """`count` of the clients, fixed by the seed for the whole run."""
    order = torch.randperm(len(ids), generator=generator_for(seed, "malicious")).tolist()
    return frozenset(ids[i] for i in order[:count])
