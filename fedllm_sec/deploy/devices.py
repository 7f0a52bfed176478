"""A source of rows: the devices behind a Flower Grid.

One question to each client of the round, one reply pulled by each of as many threads, a deadline of our own: an
unreadable, endless or missing reply costs its sender, nobody else.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from flwr.app import ConfigRecord, Message, RecordDict
from torch import Tensor

from fedllm_sec.deploy.exchange import LONGEST, Questions, Span, in_short, replies
from fedllm_sec.deploy.memory import limited
from fedllm_sec.deploy.problems import layout_hash, recipe_hash
from fedllm_sec.deploy.records import ask_records
from fedllm_sec.deploy.replies import Expected, read_reply
from fedllm_sec.deploy.sooner import Idle
from fedllm_sec.deploy.wire import Refused
from fedllm_sec.errors import printable
from fedllm_sec.matrix.quantise import bytes_of
from fedllm_sec.protocols import Client, LocalResult
from fedllm_sec.recipe.machines import Deploy
from fedllm_sec.recipe.sections import Recipe
from fedllm_sec.rounds.federation import Federation
from fedllm_sec.rounds.remembering import OWN_BUFFERS
from fedllm_sec.rounds.source import Asked, Came

FIRST = 180.0  # seconds, at least, for which the first round waits for its cohort, once enough of it are there
AGAIN = 30.0  # seconds after which a node that was turned away is asked again: it may have been mended
LOOK = 0.2  # seconds between two looks for who is online
QUIET = 10.0  # seconds for which it is not said that clients are waited for
NEW = 5.0  # seconds for which a round waits for a node to say who it is, where it could begin without


@dataclass
class Stranger:
    """A node that speaks for no client."""

    asked: float = 0.0  # when it was last asked who it is (monotonic)
    waited: bool = False  # whether its answer is waited for
    why: str = ""  # why it was turned away


@dataclass
class Devices:
    """Which node is which client, and how they are asked. `say` gets a line about who comes, goes or is turned away."""

    grid: Any  # flwr.serverapp.Grid
    recipe: Recipe
    say: Callable[[str], None]
    nodes: dict[str, int] = field(default_factory=dict)  # client id -> the node that speaks for it
    names: dict[int, str | None] = field(default_factory=dict)  # node that is online -> the name it is registered under
    strangers: dict[int, Stranger] = field(default_factory=dict)
    greetings: list[tuple[list[int], Questions]] = field(default_factory=list)  # whose answers are waited for
    begun: bool = False
    note: Callable[[str], None] = lambda line: None  # when a round was asked and its last reply read (time.time())

    @property
    def settings(self) -> Deploy:
        return self.recipe.deploy

    def __call__(self, federation: Federation, cohort: Sequence[Client], asked: Asked) -> Came:
        """The rows that come before the round closes, and why the others did not."""
        if first := not self.begun:
            self.begun = True
            self._limit(federation, len(cohort))
            self._gather(federation)
        self._meet(federation, cohort, first)
        deadline = time.monotonic() + self.settings.timeout_s
        known = {c.id: self.nodes[c.id] for c in cohort if c.id in self.nodes}
        absent = {c.id: self._away(c.id) for c in cohort if c.id not in known}
        expected = {
            id: Expected(id, asked.round, secrets.token_hex(16), federation.task.layout.size, asked.beside,
                         self.settings.wire)
            for id in known
        }  # fmt: skip
        memory = {c.id: c.memory for c in cohort}
        asks = {id: self._ask(federation, asked, expected[id], memory[id]) for id in known}
        results: dict[str, LocalResult] = {}

        def take(id: str, reply: Message) -> bool:
            try:
                results[id] = read_reply(reply.content, expected[id])
                return True
            except Refused as error:
                absent[id] = in_short(str(error))
            except Exception as error:  # whatever a strange reply makes of being looked at
                absent[id] = in_short(f"its reply cannot be read: {type(error).__name__}: {error}")
            return False

        wanted = min(self.settings.wait_for or len(cohort), len(known))
        missing = self._exchange(known, asks, str(asked.round), deadline, wanted, take)
        for id, why in missing.items():
            absent.setdefault(id, why)
        return self._came(federation, cohort, asked, results, absent)

    def _came(
        self, federation: Federation, cohort: Sequence[Client], asked: Asked, results: Mapping[str, LocalResult],
        absent: dict[str, str],
    ) -> Came:  # fmt: skip
        there = [c for c in cohort if c.id in results]
        d, device = federation.task.layout.size, federation.machine.device
        rows = federation.storage.rows(len(there), d, device)
        claims = torch.empty(len(there), 3, dtype=torch.float64)
        buffers = torch.zeros(len(there), asked.beside, dtype=torch.float64)
        for i, client in enumerate(there):
            result = results[client.id]
            rows[i] = result.delta
            claims[i] = torch.tensor([result.count, float(result.steps), result.loss], dtype=torch.float64)
            if result.buffers is not None:
                buffers[i] = result.buffers
        few = None
        if len(there) < (least := self.settings.min_replies):
            few = f"{len(there)} of {len(cohort)} clients sent a usable reply; deploy.min_replies: {least}"
        return Came(there, (rows, claims, buffers), {c.id: absent[c.id] for c in cohort if c.id in absent}, few)

    def _ask(
        self, federation: Federation, asked: Asked, expected: Expected, memory: Mapping[str, Tensor]
    ) -> RecordDict:
        rules = bool(federation.algorithm.local) or bool(federation.guards)
        vectors = {
            "start": asked.start,
            "last_update": asked.last_update if rules else None,
            "control": asked.control,
            "buffers": memory.get(OWN_BUFFERS, federation.buffers),
            **{f"memory.{name}": value for name, value in memory.items() if name != OWN_BUFFERS},
        }
        return ask_records(expected, asked.rounds, {name: v for name, v in vectors.items() if v is not None})

    # ------------------------------------------------------------ who is there

    def _gather(self, federation: Federation) -> None:
        """Before anything is trained, wait for as many clients as a round needs: rounds are not for waiting."""
        enough, wait = min(self.settings.min_replies, len(federation.clients)), Idle(LOOK)
        begun, told = time.monotonic(), False
        while True:
            self._look(federation)
            if len(self.nodes) >= enough:
                return
            if not told and time.monotonic() - begun > QUIET:
                told = True
                self.say(f"waiting for {enough} of {len(federation.clients)} clients to connect (deploy.min_replies)")
            time.sleep(wait.pause())

    def _meet(self, federation: Federation, cohort: Sequence[Client], first: bool) -> None:
        """Ask new nodes who they are; wait for the cohort at first, and later where too few of it are there.

        A node that does not answer is waited for beside the rounds: it holds up none of them.
        """
        first, enough, wait = first or not self.nodes, self.settings.min_replies, Idle(LOOK)
        deadline = time.monotonic() + max(self.settings.timeout_s, FIRST if first else 0.0)
        while True:
            self._look(federation)
            now, here = time.monotonic(), sum(c.id in self.nodes for c in cohort)
            new = any(not one.why and now - one.asked < NEW for one in self.strangers.values())
            if here == len(cohort) or now >= deadline or not (first or new or here < enough):
                return
            time.sleep(min(wait.pause(), deadline - now))

    def _look(self, federation: Federation) -> None:
        """Who is online, who answers, and who is still to be asked."""
        self.names = {node.node_id: node.name if node.HasField("name") else None for node in self.grid.get_nodes()}
        self.nodes = {id: node for id, node in self.nodes.items() if node in self.names}
        self.strangers = {node: one for node, one in self.strangers.items() if node in self.names}
        said = {
            "recipe": recipe_hash(self.recipe),
            "layout": layout_hash(federation.task.layout),
            "version": version("fedllm_sec"),
        }
        ids, now = {c.id for c in federation.clients}, time.monotonic()
        for nodes, questions in self.greetings:
            while (found := questions.next(0)) is not None:
                self._heard(nodes[found[0]], *found[1:], said, ids)
        self.greetings = [one for one in self.greetings if one[1].left]
        for node in self.names:
            if node not in self.nodes.values():
                self.strangers.setdefault(node, Stranger())
        new = [n for n, one in self.strangers.items() if not one.waited and (not one.why or now - one.asked >= AGAIN)]
        for node in new:
            self.strangers[node].asked, self.strangers[node].waited = now, True
        if new:
            hello = [
                Message(RecordDict({"hello": ConfigRecord(dict(said))}), n, "query", group_id="hello") for n in new
            ]
            self.greetings.append((new, Questions(self.grid, hello)))

    def _heard(self, node: int, reply: Message | None, why: str, said: Mapping[str, str], ids: set[str]) -> None:
        """A node has answered who it is, or cannot: it is a client's from now on, or turned away for a while."""
        if (one := self.strangers.get(node)) is None:  # it has gone meanwhile
            return
        one.waited = False
        if reply is not None:
            try:
                why = self._introduced(node, self.names.get(node), reply.content, said, ids)
            except Exception as error:
                why = f"its answer cannot be read: {type(error).__name__}"
        if not why:
            del self.strangers[node]
        elif (why := printable(why)[: 3 * LONGEST]) != one.why:
            one.why = why
            self.say(f"node {node} is turned away: {why}")

    def _away(self, id: str) -> str:
        """Why no node speaks for a client."""
        for node, one in self.strangers.items():
            if self.names.get(node) == id:
                return in_short(
                    f"its device is turned away: {one.why}" if one.why else "its device has not said who it is"
                )
        return "no device of it is online"

    def _introduced(self, node: int, name: str | None, content: Any, said: Mapping[str, str], ids: set[str]) -> str:
        """Take a node up as the client it says it is; or why not."""
        answer = content.config_records["hello"]
        id = answer["client"]
        for key in ("recipe", "layout", "version"):
            if answer[key] != said[key]:
                has = f"{key} {str(answer[key])[:40]}, the server {said[key]}"
                return f"client {str(id)[:40]} has {has}. Mend it there."
        if type(id) is not str or id not in ids:
            return f"it says that it is client {str(id)[:40]!r}, which the recipe has not"
        if name is not None and name != id:
            return f"it is registered as {name!r} and says that it is {id!r}"
        if self.nodes.get(id, node) != node:
            return f"client {id} is there already, as node {self.nodes[id]}"
        self.nodes[id] = node
        return ""

    def _exchange(
        self, nodes: Mapping[str, int], contents: Mapping[str, RecordDict], group: str, deadline: float, wanted: int,
        take: Callable[[str, Message], bool],
    ) -> dict[str, str]:  # fmt: skip
        """Send each its question and `take` replies until `wanted` are taken or it is late; gives who is missing."""
        keys = list(nodes)
        messages = [Message(contents[key], nodes[key], "train", group_id=group) for key in keys]
        missing = dict.fromkeys(keys, f"no reply within {self.settings.timeout_s:g} s")
        taken, waited = 0, set(keys)

        def said(spans: list[Span]) -> None:
            (began, ended), last = spans[0], spans[-1]
            self.note(f"round {group}: asked {began:.3f} {ended:.3f} read {last[0]:.3f} {last[1]:.3f}")

        came = replies(self.grid, messages, deadline, said)
        for place, reply, why in came:
            key = keys[place]
            waited.discard(key)
            if reply is None:
                missing[key] = why
            elif take(key, reply):
                taken += 1
                del missing[key]
            if taken >= wanted:
                missing |= dict.fromkeys(waited, f"was not waited for: {taken} of {len(keys)} had answered")
                break
        came.close()
        return missing

    def _limit(self, federation: Federation, n: int) -> None:
        reply = bytes_of(self.settings.wire, federation.task.layout.size) + 8 * len(
            federation.buffers if federation.buffers is not None else ()
        )
        self.say(limited(n, federation.task.layout.size, reply))
