"""Questions to nodes and their replies, each pulled alone, by a deadline of our own.

Flower's `send_and_receive` pulls all replies at once in the caller's thread: one that is no JSON raises there, one that
is announced and never sent blocks there whatever the timeout. Here a thread pulls one reply and catches all that can
come out of that, memory errors included; one that hangs is left behind.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from queue import Empty, Queue
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from fedllm_sec.errors import printable

POLL = 0.05  # seconds between two looks for a reply at first; up to ten times that while clients train
Span = tuple[float, float]  # time.time() at which something began and ended
Answers = Generator[tuple[int, Message | None, str], None, None]
Say = Callable[[list[Span]], None]
LONGEST = 200  # characters of what a client says that go into a record


def in_short(text: str) -> str:
    """What a client has said, fit for a line of a record."""
    return printable(text)[:LONGEST]


class Questions:
    """Messages that are sent, each with a thread that pulls its reply until it comes or `close` is called."""

    def __init__(self, grid: Grid, messages: Sequence[Message]) -> None:
        began, self.messages = time.time(), messages
        self.sent = list(grid.push_messages(messages)) if messages else []
        self.spans: list[Span] = [(began, time.time())]  # of sending the questions, and of reading each reply
        self.came: Queue[tuple[int, Message | None, str]] = Queue()
        self.stop = threading.Event()
        self.left = len(messages)  # which have neither a reply nor a reason yet
        for place in range(len(messages)):
            if place >= len(self.sent) or self.sent[place] is None:
                self.came.put((place, None, "its question could not be sent"))
                continue
            given = (grid, place, self.sent[place], self.came, self.stop, self.spans)
            try:
                threading.Thread(target=_pull, args=given, daemon=True).start()
            except RuntimeError as error:  # no room for one more
                self.came.put((place, None, f"its reply cannot be waited for: {error}"))

    def next(self, seconds: float) -> tuple[int, Message | None, str] | None:
        """The number of a message with its reply, or why there is none; None where nothing comes in so many seconds.

        A reply with an error, from another node or to another message counts as none.
        """
        try:
            place, reply, why = self.came.get(timeout=max(0.0, seconds))
        except Empty:
            return None
        self.left -= 1
        why = why or foreign(reply, self.messages[place].metadata.dst_node_id, str(self.sent[place]))
        return place, None if why else reply, why

    def close(self) -> None:
        """Look for no more replies."""
        self.stop.set()


def replies(grid: Grid, messages: Sequence[Message], deadline: float, said: Say = lambda spans: None) -> Answers:
    """The number of a message with its reply, or why there is none, as they come until the deadline (monotonic).

    Who has not answered by the deadline is not given. Closing the iterator ends the looking; `said` is then told when
    the questions were sent and each reply was read.
    """
    asked = Questions(grid, messages)
    try:
        while asked.left and (found := asked.next(deadline - time.monotonic())) is not None:
            yield found
    finally:
        asked.close()
        said(asked.spans)


def _pull(grid: Grid, place: int, id: str, came: Queue[Any], stop: threading.Event, spans: list[Span]) -> None:
    began = time.monotonic()
    while not stop.is_set():
        looked = time.time()
        try:
            found = list(grid.pull_messages([id]))
        except BaseException as error:  # of a hostile reply: not JSON, out of memory, anything
            came.put((place, None, in_short(f"its reply cannot be pulled: {type(error).__name__}: {error}")))
            return
        if found:
            spans.append((looked, time.time()))
            came.put((place, found[0], "" if len(found) == 1 else f"{len(found)} replies came to one question"))
            return
        stop.wait(min(10 * POLL, POLL + (time.monotonic() - began) / 50))


def foreign(reply: Message | None, node: int, question: str) -> str:
    """Why a message is no reply of this node to this question; "" where it is one."""
    if reply is None:
        return "no reply"
    if reply.has_error():
        return in_short(f"its device answers with an error: {reply.error.reason}")
    if reply.metadata.src_node_id != node:
        return "the reply comes from another node"
    if reply.metadata.reply_to_message_id != question:
        return "the reply is to another question"
    return ""


class CarefulGrid(Grid):
    """A Grid whose `send_and_receive` gives the replies that could be read in time, and raises for none."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.missing: dict[int, str] = {}  # node -> why no reply of it came, of the last questions

    def set_run(self, run: Any) -> None:
        self.grid.set_run(run)

    @property
    def run(self) -> Any:
        return self.grid.run

    def create_message(self, *args: Any, **settings: Any) -> Message:
        return self.grid.create_message(*args, **settings)

    def get_node_ids(self) -> Iterable[int]:
        return self.grid.get_node_ids()

    def get_nodes(self) -> Any:
        return self.grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self.grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self.grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        asked, found = list(messages), list[Message]()
        late = "no reply in time"
        self.missing = {message.metadata.dst_node_id: late for message in asked}
        deadline = time.monotonic() + (timeout if timeout is not None else 10.0**8)
        for place, reply, why in replies(self.grid, asked, deadline):
            node = asked[place].metadata.dst_node_id
            if reply is not None:
                found.append(reply)
                self.missing.pop(node, None)
            else:
                self.missing[node] = why
        return found
