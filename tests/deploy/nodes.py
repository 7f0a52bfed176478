"""A Flower Grid of nodes that are functions: what a message makes of each is its reply, an exception, or nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

from flwr.app import Message
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity


class Silent(Exception):
    """A node that never answers."""


class Blocks(Exception):
    """A reply that is announced and never sent: pulling it hangs."""


class Nodes(Grid):
    """`nodes` maps a node id to a function of the message's content; what it raises is raised where it is pulled."""

    def __init__(self, nodes: dict[int, Callable[[Any], Any]], names: dict[int, str] | None = None) -> None:
        self.nodes, self.names = nodes, names or {}
        self.asked: dict[str, Message] = {}
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1  # a ServerApp's process has one

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any:
        return SimpleNamespace(run_id=1)

    def create_message(self, *args: Any, **settings: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def get_nodes(self) -> Any:
        return [
            SimpleNamespace(node_id=n, name=self.names.get(n, ""), HasField=lambda field, n=n: n in self.names)
            for n in self.nodes
        ]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            id = str(uuid4())
            message.metadata.__dict__["_message_id"] = id
            self.asked[id] = message
            ids.append(id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        (id,) = message_ids  # one at a time
        assert threading.current_thread() is not threading.main_thread()
        message = self.asked[id]
        try:
            made = self.nodes[message.metadata.dst_node_id](message)
        except Silent:
            return []
        except Blocks:
            time.sleep(30)
            return []
        return [made if isinstance(made, Message) else Message(made, reply_to=message)]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise AssertionError("a plain send_and_receive pulls all replies in the caller's thread")
