"""The threat model: who is malicious, when they attack, and what they can see."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedllm_sec.attacks.data.learnt import learner
from fedllm_sec.errors import AttackError, CohortError, IdleAttack
from fedllm_sec.kernels.usable import usable
from fedllm_sec.matrix import Layout, UpdateMatrix
from fedllm_sec.matrix.shown import copied, only_shown
from fedllm_sec.matrix.storage import taken
from fedllm_sec.protocols import Client, DataAttack, Decision, LocalRule, ThreatView, UpdateAttack
from fedllm_sec.seeds import generator_for, seed_for

LOCAL = "local:"  # begins the key of a local attack's memory; those of update attacks end in a number after "/", if any
TRIGGER = "trigger"  # its key in the state, where those of update attacks end in their number


@dataclass
class Threat:
    """The attackers of a run. Malicious clients are real: they train on their poisoned shard and submit their row.

    With `redrawn`, so many of the `malicious` are drawn anew for each round and the others are honest in it.
    """

    malicious: frozenset[str]
    seed: int
    spread: frozenset[str] = frozenset()  # honest clients who hold poisoned rows; then nobody is malicious
    redrawn: int | None = None
    present: int | None = None  # so many take part in each round of the attack; None: who is drawn
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
    before: int = 0  # rounds done before the first: draws of round r are those of round before + r
    planned: Threat | None = None  # of an attack that is switched off: who would attack, where that is asked for

    def active(self, round: int) -> bool:
        """Whether the attackers attack in this round."""
        late = self.stop is not None and round > self.stop
        if not self.malicious or round < self.start or late or (round - self.start) % self.every != 0:
            return False
        rng = generator_for(self.seed, self.before + round, "attacking")
        return self.probability >= 1 or float(torch.rand((), generator=rng, dtype=torch.float64)) < self.probability

    def who(self, round: int) -> frozenset[str]:
        """Who is malicious in this round, whether they attack or not."""
        if self.redrawn is None:
            return self.malicious
        drawn = seed_for(self.seed, self.before + round, "redrawn")
        return choose_malicious(self.redrawn, sorted(self.malicious), drawn)

    def attackers(self, round: int) -> frozenset[str]:
        """Who attacks in this round."""
        return self.who(round) if self.active(round) else frozenset()

    def sure(self, round: int) -> tuple[frozenset[str], int] | None:
        """Who attacks in this round, and how many of them take part; None where that is drawn."""
        return (self.who(round), self.present) if self.present is not None and self.active(round) else None

    def dress(self, client: Client, round: int) -> Client:
        """The client as it trains in this round: an active attacker owns its poisoned shard."""
        if client.id in self.poisoned and client.id in self.attackers(round):
            return Client(client.id, self.poisoned[client.id], client.memory)
        return client

    def see(self, last_update: Tensor | None) -> None:
        """The last global step (d,), which a local attack may have to remember whichever process trains its client."""
        for rule in self.local:
            if last_update is not None and hasattr(rule, "see"):
                rule.see(last_update.clone())  # it is the federation's

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
        server_lr: float | None = 1.0,
        cohort_size: int | None = None,
    ) -> tuple[list[int], Tensor] | None:
        """The attackers' places in the cohort and the rows (m, d) they submit; None where they send their own.

        Who does not collude forges alone, with a memory of its own: `own` is its one row, and the other attackers are
        clients like any other to it, whose rows, as they were trained, it sees where knowledge grants that. Rows that
        the server's screen would set aside are seen by nobody. `cohort_size` is n where `updates` are not all rows of
        the round, but the one row of an attacker's own device.
        """
        attackers = self.attackers(round)
        places = [i for i, id in enumerate(updates.ids) if id in attackers]
        if not places or not self.update:
            return None
        read = places if self.knowledge == "own" else range(updates.n)
        sound = {i for i, good in zip(read, usable(updates.select(read)), strict=True) if good}
        shown = _Shown(
            updates, sound, vector, last_update, defense if self.knowledge == "cohort+defense" else None, server_lr,
            cohort_size or updates.n,
        )  # fmt: skip
        if self.collude:
            return places, self._forged(self.update, shown, places, round)
        rows = []
        for place in places:
            attacks = self.alone.setdefault(updates.ids[place], copy.deepcopy(self.update))
            rows.append(self._forged(attacks, shown, [place], round))
        return places, torch.cat(rows)

    def _forged(self, attacks: Sequence[UpdateAttack], shown: _Shown, places: list[int], round: int) -> Tensor:
        """The rows (m, d) of attackers who act together."""
        updates, mine = shown.updates, set(places)
        sees = self.knowledge != "own"
        rest = [i for i in range(updates.n) if i not in mine and i in shown.sound] if sees else []
        own_ids, other_ids = tuple(updates.ids[i] for i in places), tuple(updates.ids[i] for i in rest)
        others = taken(updates.rows, rest) if sees else None  # a copy: the price of seeing the cohort
        own = stand_in(taken(updates.rows, places), [i in shown.sound for i in places])
        drawn = (self.seed, self.before + round, "attack")
        for number, attack in enumerate(attacks):
            view = ThreatView(
                own=own,
                others=others,
                global_vector=shown.vector.clone(),
                last_update=copied(shown.last_update),
                defense=shown.defense,
                layout=updates.layout,
                own_counts=tuple(updates.counts[i] for i in places),
                cohort_size=len(places) + len(rest) if sees else shown.cohort_size,
                round=round,
                rng=generator_for(*drawn, number, *(() if self.collude else own_ids)),
                own_ids=own_ids,
                other_ids=other_ids,
                other_counts=tuple(updates.counts[i] for i in rest) if sees else None,
                order=tuple(updates.ids[i] for i in sorted([*places, *rest])) if sees else (),
                server_lr=shown.server_lr,
            )
            try:
                with only_shown(f"attack.update.{number}", AttackError, own_rows=own, honest_rows=others):
                    rows = attack(view)
            except CohortError as error:  # who takes part is drawn: no reason to end a run
                what = f"attack.update.{number}: round {round}: {error} The attackers send what they have."
                warnings.warn(what, IdleAttack, stacklevel=2)
                continue
            if not isinstance(rows, Tensor):
                raise AttackError(
                    f"attack.update.{number}: gave back {type(rows).__name__}, must give a tensor of shape "
                    f"{tuple(own.shape)}." + " Return the rows." * (rows is None)
                )
            if tuple(rows.shape) != tuple(own.shape):
                raise AttackError(
                    f"attack.update.{number}: gave rows of shape {tuple(rows.shape)}, must be {tuple(own.shape)}."
                )
            own = rows.to(own)
        return own

    def forge_buffers(self, buffers: Tensor, ids: Sequence[str], layout: Layout, round: int) -> Tensor:
        """The buffers (n, b + c) with those that attackers submit instead of their own."""
        attackers = self.attackers(round)
        mine = torch.tensor([id in attackers for id in ids])
        for attack in self.update if bool(mine.any()) else ():
            if hasattr(attack, "forge_buffers"):
                buffers = buffers.clone()
                buffers[mine] = attack.forge_buffers(buffers[mine], layout)
        return buffers

    def state_dict(self) -> dict[str, Any]:
        """The memory of attacks that have one (lazy, mimic, poisonedfl; pgd), and a trigger that was learnt."""
        everyone = {"": self.update, **{f"{id}/": attacks for id, attacks in self.alone.items()}}
        memories = {
            f"{id}{i}": attack.state_dict()
            for id, attacks in everyone.items()
            for i, attack in enumerate(attacks)
            if hasattr(attack, "state_dict")
        }
        for i, rule in enumerate(self.local):
            if hasattr(rule, "state_dict"):
                memories[f"{LOCAL}{i}"] = rule.state_dict()
        known = getattr(learner(self.data), "learnt", None)
        return memories if known is None else {**memories, TRIGGER: {"learnt": known}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for key, memory in state.items():
            if key == TRIGGER:
                if (attack := learner(self.data)) is None:
                    raise KeyError("a learnt trigger, and no attack that learns one")
                attack.learnt = memory["learnt"]
                continue
            if key.startswith(LOCAL) and "/" not in key:
                self.local[int(key.removeprefix(LOCAL))].load_state_dict(memory)  # type: ignore[attr-defined]
                continue
            id, _, number = key.rpartition("/")
            attacks = self.alone.setdefault(id, copy.deepcopy(self.update)) if id else self.update
            attacks[int(number)].load_state_dict(memory)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class _Shown:
    """What there is to see in a round, before knowledge is asked."""

    updates: UpdateMatrix
    sound: Collection[int]  # places of the rows that the server's screen lets through, among those that are looked at
    vector: Tensor
    last_update: Tensor | None
    defense: Callable[[UpdateMatrix], Decision] | None
    server_lr: float | None
    cohort_size: int  # n of the round


def stand_in(own: Tensor, sound: Sequence[bool]) -> Tensor:
    """Attackers' own rows (m, d), the mean of the sound ones, or zero, in the place of one that is not: m answers.

    Training that ends in no numbers leaves an attacker nothing of its own to forge from, but it can still send a row.
    """
    if all(sound):
        return own
    good = torch.tensor(sound, device=own.device)
    mean = own[good].float().mean(0) if any(sound) else torch.zeros_like(own[0], dtype=torch.float32)
    return torch.where(good[:, None], own, mean.to(own))


def choose_malicious(count: int, ids: Sequence[str], seed: int) -> frozenset[str]:
    """`count` of the clients, fixed by the seed for the whole run."""
    order = torch.randperm(len(ids), generator=generator_for(seed, "malicious")).tolist()
    return frozenset(ids[i] for i in order[:count])
