"""The server over a Grid of scripted nodes: whatever a client does costs that client its row, and is in the record."""

from __future__ import annotations

import os
import time
from io import BytesIO

import numpy as np
import pytest
import torch

pytest.importorskip("flwr", reason="needs flwr, the extra `edge`")

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from fedllm_sec.build.names import checked
from fedllm_sec.deploy.problems import FLOWER, deploy_problems
from fedllm_sec.errors import RecipeError
from fedllm_sec.rounds.federation import run
from tests.conftest import ROOT
from tests.deploy.never import no_unpickling
from tests.deploy.nodes import Blocks, Silent
from tests.deploy.scripted import IDS, D, all_honest, federation, honest, over, raising, recipe


def record(name, made):
    def change(content):
        content[name] = made
        return content

    return change


def replayed():
    """Sends the reply of the first round again."""
    kept = []

    def change(content):
        kept.append(content)
        return kept[0]

    return change


def arrays(**changes):
    def change(content):
        array = content["delta"]["flat"]
        given = {"dtype": array.dtype, "shape": array.shape, "stype": array.stype, "data": array.data} | changes
        content["delta"] = ArrayRecord({"flat": Array(**given)})
        return content

    return change


def number_of_examples(value):
    return record("claims", MetricRecord({"num-examples": value, "steps": 2, "loss": 0.5}))


def numpys(shape, dtype="<f4"):
    """numpy's format, with a header that says more than there is."""
    file = BytesIO()
    np.lib.format.write_array_header_1_0(file, {"shape": shape, "fortran_order": False, "descr": dtype})
    return arrays(stype="numpy.ndarray", shape=shape, data=file.getvalue() + bytes(4 * D))


def one_more(content):
    content["delta"] = ArrayRecord({"flat": content["delta"]["flat"], "more": Array(torch.ones(1))})
    return content


HOSTILE = {
    "nan values": (arrays(data=torch.full((D,), float("nan")).numpy().tobytes()), "not finite"),
    "infinite values": (arrays(data=torch.full((D,), float("inf")).numpy().tobytes()), "not finite"),
    "another shape": (arrays(shape=(D + 1,)), "shape"),
    "a shape (1,)": (arrays(shape=(1,), data=bytes(4)), "shape (1,), must be (4,)"),
    "float64": (arrays(dtype="float64"), "type 'float64'"),
    "int8": (arrays(dtype="int8", data=bytes(D)), "type 'int8'"),
    "strings": (arrays(dtype="<U1"), "type '<U1'"),
    "complex": (arrays(dtype="complex64"), "type 'complex64'"),
    "objects": (arrays(dtype="object"), "type 'object'"),
    "big-endian": (arrays(dtype=">f4"), "type '>f4'"),
    "an unknown kind": (arrays(stype="cloudpickle"), "of kind 'cloudpickle'"),
    "373 GiB announced": (numpys((10**11,)), "of kind 'numpy.ndarray'"),
    "empty bytes": (arrays(data=b""), "holds 0 bytes, must be 16"),
    "garbage bytes": (arrays(data=b"\xff\x00garbage" * 3), "holds 27 bytes, must be 16"),
    "one array more": (one_more, "arrays"),
    "a pickle": (arrays(data=b"\x80\x04K\x01."), "5 bytes"),
    "10 GB announced": (arrays(shape=(2_500_000_000,)), "shape"),
    "numpy's format": (record("delta", ArrayRecord({"flat": Array(torch.ones(D))})), "of kind"),
    "another key": (record("delta", ArrayRecord({"w": Array(torch.ones(D))})), "arrays"),
    "2000 arrays": (record("delta", ArrayRecord({str(i): Array(torch.ones(1)) for i in range(2000)})), "2000 of them"),
    "1e308 examples": (number_of_examples(1e308), "not between"),
    "2^62 examples": (number_of_examples(2**62), "not between"),
    "-1 examples": (number_of_examples(-1.0), "not between"),
    "NaN examples": (number_of_examples(float("nan")), "not finite"),
    "a list of examples": (number_of_examples([1.0]), "is a list"),
    "0 examples": (number_of_examples(0), "claims 0 examples"),
    "no number of examples": (record("claims", MetricRecord({"steps": 2, "loss": 0.5})), "must be"),
    "no claims": (record("claims", ConfigRecord({})), "metric records"),
    "a replay": (replayed(), "round: '1': must be 2"),
    "no JSON": (raising(ValueError("Expecting value: line 1 column 1")), "cannot be pulled: ValueError"),
    "a bomb": (raising(MemoryError()), "cannot be pulled: MemoryError"),
    "junk": (lambda content: RecordDict({}), "array records"),
}


@pytest.fixture(scope="module")
def simulated():
    """Two rounds in one process."""
    return list(run(federation(), 2))


def test_devices_give_the_simulation_s_rounds_and_replies_are_pulled_in_threads_of_their_own(simulated):
    records, _, _ = over(all_honest())
    for found, wanted in zip(records, simulated, strict=True):
        assert (found.cohort, found.losses, found.norms, found.update_norm, found.quarantined) == (
            wanted.cohort, wanted.losses, wanted.norms, wanted.update_norm, {})  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_reply_costs_its_sender_and_is_recorded_with_its_reason(kind, simulated, monkeypatch):
    no_unpickling(monkeypatch)
    change, why = HOSTILE[kind]
    records, _, seconds = over(all_honest(c02=honest("c02", None, change)))
    last = records[-1]
    assert list(last.quarantined) == ["c02"]
    assert why in last.quarantined["c02"]
    assert last.cohort == list(IDS)
    assert last.skipped is None
    assert last.update_norm > 0
    assert seconds < 5


def test_a_device_that_errs_is_silent_or_blocks_costs_the_deadline_and_no_more():
    nodes = all_honest(
        c01=honest("c01", None, raising(Silent())),
        c02=honest("c02", None, raising(Blocks())),
    )
    erring = honest("c03", None)
    nodes[4] = lambda m: erring(m) if m.metadata.message_type == "query" else Message(Error(2, "no rows"), reply_to=m)
    records, _, seconds = over(nodes, timeout_s=1.0)
    assert seconds < 5
    for found in records:
        assert list(found.losses) == ["c00"]
        assert found.quarantined == {
            "c01": "no reply within 1 s",
            "c02": "no reply within 1 s",
            "c03": "its device answers with an error: no rows",
        }


def test_a_reply_after_its_round_or_by_another_node_is_not_taken():
    train = honest("c01", None)

    def late(message):
        if message.metadata.message_type != "query":
            time.sleep(1.3)
        return train(message)

    def forged(message):
        made = Message(train_02(message), reply_to=message)
        if message.metadata.message_type != "query":
            made.metadata.__dict__["_src_node_id"] = 4
        return made

    train_02, nodes = honest("c02", None), all_honest(c01=late)
    nodes[3] = forged
    records, _, _ = over(nodes, timeout_s=1.0)
    for found in records:
        assert list(found.losses) == ["c00", "c03"]
        assert found.quarantined == {"c01": "no reply within 1 s", "c02": "the reply comes from another node"}


def test_too_few_replies_skip_the_round_and_say_so():
    nodes = all_honest(
        c01=honest("c01", None, lambda c: RecordDict({})), c02=honest("c02", None, raising(ValueError()))
    )
    records, _, _ = over(nodes, min_replies=3)
    assert [r.skipped for r in records] == ["2 of 4 clients sent a usable reply; deploy.min_replies: 3"] * 2
    assert [r.update_norm for r in records] == [0.0, 0.0]


def test_of_four_asked_two_are_waited_for():
    slow = {id: honest(id, None, raising(Silent())) for id in ("c00", "c03")}
    records, _, seconds = over(all_honest(**slow), wait_for=2)
    assert seconds < 4
    assert list(records[0].losses) == ["c01", "c02"]
    assert records[0].quarantined["c03"] == "was not waited for: 2 of 4 had answered"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"pretrain": {"rounds": 2}}, "pretrain: its rounds would be trained at the server"),
        ({"knowledge": "cohort"}, "attack.knowledge: 'cohort': a device sees its own row alone"),
        ({"collude": True}, "attack.collude: true"),
        ({"wait_for": 9}, "deploy.wait_for: 9 is more than the 4 clients"),
        ({"wait_for": 1, "min_replies": 2}, "every round would be skipped"),
    ],
)
def test_what_devices_cannot_do_is_said_before_anything_runs(change, why):
    raw = recipe().model_dump()
    attack = {key: change[key] for key in ("knowledge", "collude") if key in change}
    raw["attack"] = {"malicious": {"count": 1}, "update": [{"name": "byzantine_flip"}], "collude": False, **attack}
    raw["enable_attack"] = True
    raw["pretrain"] = change.get("pretrain")
    raw["deploy"] |= {key: change[key] for key in ("wait_for", "min_replies") if key in change}
    assert any(why in problem for problem in deploy_problems(checked(raw)))


def test_without_flower_the_command_says_what_to_install(monkeypatch, capsys):
    import importlib.util

    from fedllm_sec.deploy.command import main

    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.43.1")
    assert main(["up", "quickstart"]) == 2
    said = capsys.readouterr().err
    assert said.startswith('error: deploy: needs Flower 1.42, and 1.43.1 is installed. pip install "flwr~=1.42.0"')
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["up", "quickstart"]) == 2
    assert 'which is not installed. pip install "flwr~=1.42.0" (the extra `edge`)' in capsys.readouterr().err
    assert f'edge = ["flwr>={FLOWER},<1.43"]' in (ROOT / "pyproject.toml").read_text()


def test_the_memory_limit_is_said_and_follows_from_the_layout(monkeypatch):
    import resource

    from fedllm_sec.deploy.memory import limited

    set_to = []
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: set_to.append(limits[0]))
    monkeypatch.setattr(resource, "getrlimit", lambda which: (-1, -1))
    said = limited(10, 1_000_000, 4_000_000)
    larger = limited(20, 1_000_000, 4_000_000)
    assert "10 replies of 3.81 MiB" in said
    assert "20 replies" in larger
    assert set_to[1] - set_to[0] == pytest.approx(
        10 * (6 * 4_000_000 + 12 * 1_000_000 + 3 * 8 * 2**20), abs=20 * 2**20
    )  # three threads for each reply, 8 MiB of stack each


def test_a_taken_port_is_said_at_once():
    import socket

    from fedllm_sec.deploy.processes import refuse_taken
    from fedllm_sec.errors import FedError

    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        with pytest.raises(FedError, match="Give another"):
            refuse_taken("127.0.0.1", busy.getsockname()[1])
    with pytest.raises(FedError, match=r"--host, --port: 203.0.113.9:0: .* Give an address of this machine"):
        refuse_taken("203.0.113.9", 0)
    with pytest.raises(FedError, match=r"--host, --port: 127.0.0.1:99999: .* a port from 1024 on"):
        refuse_taken("127.0.0.1", 99999)


def test_a_folder_that_is_no_deployment_is_an_error_in_words(tmp_path):
    from fedllm_sec.deploy.folder import Deployment

    with pytest.raises(RecipeError, match="deploy init FOLDER --recipe RECIPE"):
        Deployment.at(tmp_path)


@pytest.mark.parametrize("server", ["server.local", "server.local:", ":8000", "server.local:99999", "a:b"])
def test_a_server_without_a_host_or_a_port_is_refused_before_anything_starts(server, capsys):
    from fedllm_sec.deploy.command import main

    assert main(["client", "nowhere", "--client", "c00", "--superlink", server]) == 2
    assert f"--superlink {server}: must be HOST:PORT" in capsys.readouterr().err


def test_two_ups_on_one_folder_do_not_touch_each_other_s_configuration(tmp_path, capsys):
    from fedllm_sec.deploy.command import main
    from fedllm_sec.deploy.folder import held

    words = ["init", str(tmp_path / "d"), "--recipe", str(ROOT / "recipes" / "edge" / "quickstart.yaml")]
    assert main(words) == 0
    written = {path: path.read_bytes() for path in (tmp_path / "d").glob("*.*")}
    with held(tmp_path / "d"):
        for again in (["up", str(tmp_path / "d")], ["server", str(tmp_path / "d")], words):
            assert main(again) == 2
            said = capsys.readouterr().err
            assert f"{tmp_path / 'd'}: it is being run by process {os.getpid()}. Wait for it" in said
    assert {path: path.read_bytes() for path in (tmp_path / "d").glob("*.*")} == written
    with held(tmp_path / "d", "c01"):  # another client of a copy of the folder may run beside it
        client = ["client", str(tmp_path / "d"), "--superlink", "127.0.0.1:1", "--client", "c01"]
        assert main(client) == 2
    assert "client c01 of it is being run by process" in capsys.readouterr().err


def test_a_certificate_that_does_not_fit_is_named_with_the_way_out(tmp_path):
    from fedllm_sec.deploy.processes import Processes

    why = "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: unable to get local issuer certificate"
    ended = f"ERROR: Exit Code: 305\nFailed to connect.\n{why}\nNo connection.\n\nINFO: Shutting down\nINFO: Finished\n"
    (tmp_path / "node-c00.log").write_text(ended)
    (tmp_path / "node-c01.log").write_text("ERROR: Exit Code: 304\n[code: 2004] Failed to activate SuperNode.\n")
    assert "copy keys/ID.key of this client" in Processes(tmp_path, tmp_path).said("node-c01")
    assert Processes(tmp_path, tmp_path).said("node-c00") == (
        f"Failed to connect. / {why} / No connection. The certificate is of another root: copy tls/ca.pem from the "
        "server's folder."
    )
