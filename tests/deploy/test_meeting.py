"""Who is there: nodes say which client they are, and one that does not, or lies, costs nobody else anything."""

from __future__ import annotations

import threading
import time
from functools import partial

import pytest

pytest.importorskip("flwr", reason="needs flwr, the extra `edge`")

from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict

from fedllm_sec.deploy.devices import Devices
from fedllm_sec.rounds.federation import run
from tests.deploy.nodes import Nodes, Silent
from tests.deploy.scripted import IDS, all_honest, federation, honest, over, recipe, unlimited


def test_who_claims_another_s_id_has_another_recipe_or_is_registered_otherwise_is_turned_away():
    def strange(message):
        return RecordDict({"hello": ConfigRecord({**message.content.config_records["hello"], "client": "c01",
                                                  "recipe": "0"})})  # fmt: skip

    nodes = {**all_honest(), 5: honest("c00", None), 6: strange, 7: honest("c02", "c99"), 8: lambda m: RecordDict({})}
    _, said, _ = over(nodes)
    told = "\n".join(said)
    assert "node 5 is turned away: client c00 is there already, as node 1" in told
    assert "node 6 is turned away: client c01 has recipe 0, the server" in told
    assert "node 7 is turned away: it says that it is client 'c99', which the recipe has not" in told
    assert "node 8 is turned away: its answer cannot be read: KeyError" in told
    _, said, _ = over(all_honest(), names={2: "c00", 1: "c00", 3: "c02", 4: "c03"}, timeout_s=1.0)
    assert any("node 2 is turned away: it is registered as 'c00' and says that it is 'c01'" in line for line in said)


def test_a_device_that_comes_back_as_another_node_is_asked_again():
    nodes = all_honest()
    made, grid = federation(), Nodes(nodes)
    made.source = partial(unlimited, Devices(grid, recipe(timeout_s=2.0), lambda line: None))
    rounds = run(made, 3)
    assert next(rounds).quarantined == {}
    gone = nodes.pop(2)
    assert next(rounds).quarantined == {"c01": "no device of it is online"}
    nodes[9] = gone
    assert next(rounds).quarantined == {}


def silent_at_the_door(message):
    raise Silent


def test_a_node_that_never_says_who_it_is_holds_up_no_round():
    records, _, seconds = over({**all_honest(), 9: silent_at_the_door}, timeout_s=20.0)
    assert seconds < 5
    assert [r.quarantined for r in records] == [{}, {}]
    nodes = all_honest(c01=silent_at_the_door)  # its device hangs, its node is online
    records, _, seconds = over(nodes, {i + 1: id for i, id in enumerate(IDS)}, timeout_s=1.0, min_replies=3)
    assert seconds < 8
    for found in records:
        assert list(found.losses) == ["c00", "c02", "c03"]
        assert found.quarantined == {"c01": "its device has not said who it is"}


def test_no_round_is_spent_on_waiting_for_clients_that_have_never_been_there(monkeypatch):
    monkeypatch.setattr("fedllm_sec.deploy.devices.QUIET", 0.1)
    nodes: dict[int, object] = {}
    threading.Timer(1.0, lambda: nodes.update(all_honest())).start()
    records, said, _ = over(nodes, timeout_s=0.2, min_replies=3)
    assert [record.skipped for record in records] == [None, None]
    assert said.count("waiting for 3 of 4 clients to connect (deploy.min_replies)") == 1


def test_who_is_away_in_the_first_round_costs_the_others_nothing():
    nodes = all_honest()
    del nodes[2]
    records, _, _ = over(nodes, timeout_s=1.0)
    for found in records:
        assert list(found.losses) == ["c00", "c02", "c03"]
        assert found.quarantined == {"c01": "no device of it is online"}


def test_a_device_that_was_turned_away_is_taken_up_once_it_is_mended(monkeypatch):
    monkeypatch.setattr("fedllm_sec.deploy.devices.AGAIN", 0.0)
    monkeypatch.setattr("fedllm_sec.deploy.devices.FIRST", 0.0)
    recipes = ["0"]

    def mended(message):
        found = honest("c01", None)(message)
        if message.metadata.message_type == "query":
            hello = dict(found.config_records["hello"])
            found = RecordDict({"hello": ConfigRecord({**hello, "recipe": recipes[0] or hello["recipe"]})})
        return found

    made, said = federation(), []
    grid = Nodes(all_honest(c01=mended), {2: "c01"})
    made.source = partial(unlimited, Devices(grid, recipe(timeout_s=1.0), said.append))
    rounds = run(made, 3)
    first = next(rounds)
    assert "its device is turned away: client c01 has recipe 0, the server" in first.quarantined["c01"]
    recipes[0] = ""  # the same node, with the right recipe: it is asked beside the next round
    next(rounds)
    time.sleep(0.2)
    assert next(rounds).quarantined == {}
    assert len(said) == 1


def test_words_of_a_client_reach_the_record_without_control_characters():
    def erring(message):
        return Message(Error(2, "\x1b[2J\r\nerror: hacked " + "x" * 10_000), reply_to=message)

    def odd(content):
        content["\x1b[31m"] = MetricRecord({"a": 1.0})
        return content

    train = honest("c01", None)
    nodes = all_honest(c02=honest("c02", None, odd))
    nodes[2] = lambda m: train(m) if m.metadata.message_type == "query" else erring(m)
    nodes[9] = erring
    records, said, _ = over(nodes)
    texts = [*said, *(why for record in records for why in record.quarantined.values())]
    assert len(records[0].quarantined) == 2
    assert any("hacked" in text for text in said)
    assert all(text.isprintable() and len(text) < 700 for text in texts)
