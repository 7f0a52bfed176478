"""RobustStrategy around Flower's own strategies, in an app like Flower's PyTorch quickstart: parameters travel, and
`num-examples` weighs. Flower's `Strategy.start` runs it, over a grid of scripted nodes."""

from __future__ import annotations

import struct
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("flwr", reason="needs flwr, the extra `edge`")

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvg

from fedllm_sec.deploy.flower import RobustStrategy
from fedllm_sec.errors import DefenseError
from fedllm_sec.records.history import read_history
from fedllm_sec.report.runs import read_runs
from tests.conftest import ROOT
from tests.deploy.never import no_unpickling
from tests.deploy.nodes import Blocks, Nodes, Silent

TARGETS = (1.0, 1.1, 0.9, 1.05, 0.95)  # to which each client's training leads every parameter, half way in a round


def net() -> torch.nn.Module:
    """A model with what real ones have: a kernel, a bias, running statistics and a counter."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(1, 2, 2), torch.nn.BatchNorm2d(2))


def trained(target: float, change: Callable[[RecordDict], Any] = lambda content: content, deltas: bool = False):
    """A client app: parameters in, parameters out."""

    def answer(message):
        if message.metadata.message_type == "evaluate":
            made = RecordDict({"metrics": MetricRecord({"num-examples": 10, "loss": target})})
            return change(made)
        sent = message.content["arrays"].to_torch_state_dict()
        state = {k: v + (target - v) / 2 if v.is_floating_point() else v + 3 for k, v in sent.items()}
        if deltas:
            state = {k: v - sent[k] if v.is_floating_point() else v for k, v in state.items()}
        metrics = MetricRecord({"num-examples": 10, "train_loss": target})
        return change(RecordDict({"arrays": ArrayRecord(state), "metrics": metrics}))

    return answer


def played(strategy, nodes, rounds=3):
    arrays = ArrayRecord(net().state_dict())
    grid = Nodes({i + 1: node for i, node in enumerate(nodes)})
    return strategy.start(grid, initial_arrays=arrays, num_rounds=rounds, timeout=1.0)


def all_but(change, n=1):
    return [*(trained(t) for t in TARGETS), *(trained(1.0, change) for _ in range(n))]


def far(state) -> float:
    """How far the parameters are from where honest clients lead them, 1."""
    return max(float((v - 1).abs().max()) for k, v in state.items() if k.endswith(("weight", "bias")))


def arrays_of(change):
    def altered(content):
        if "arrays" in content:
            content["arrays"] = ArrayRecord(change(dict(content["arrays"].items())))
        return content

    return altered


def metric(**values):
    def altered(content):
        content["metrics"] = MetricRecord({**content["metrics"], **{k.replace("_", "-"): v for k, v in values.items()}})
        return content

    return altered


def raises(error):
    def altered(content):
        raise error

    return altered


def with_header(shape, dtype="<f4", kind="numpy.ndarray"):
    """numpy's format with a header of the attacker's choice."""

    def change(arrays):
        file = BytesIO()
        np.lib.format.write_array_header_1_0(file, {"shape": shape, "fortran_order": False, "descr": dtype})
        arrays["0.bias"] = Array(
            dtype="float32", shape=(2,), stype=kind, data=file.getvalue() + struct.pack("<2f", 1, 1)
        )
        return arrays

    return change


def set_to(value):
    return lambda arrays: {
        k: Array(np.full_like(a.numpy(), value)) if "float" in a.dtype else a for k, a in arrays.items()
    }


HOSTILE = {
    "NaN": arrays_of(set_to(np.nan)),
    "infinite values": arrays_of(set_to(np.inf)),
    "1e30": arrays_of(set_to(1e30)),
    "other keys": arrays_of(lambda a: {"x" + k: v for k, v in a.items()}),
    "one array fewer": arrays_of(lambda a: dict(list(a.items())[1:])),
    "one array more": arrays_of(lambda a: {**a, "more": Array(np.ones(1))}),
    "2000 arrays": arrays_of(lambda a: {str(i): Array(np.ones(1, np.float32)) for i in range(2000)}),
    "a shape (1,)": arrays_of(lambda a: {k: Array(np.ones(1, np.float32)) for k in a}),
    "float64": arrays_of(lambda a: {k: Array(v.numpy().astype(np.float64)) for k, v in a.items()}),
    "int8": arrays_of(lambda a: {k: Array(v.numpy().astype(np.int8)) for k, v in a.items()}),
    "strings": arrays_of(lambda a: {k: Array(np.full(v.shape, "x")) for k, v in a.items()}),
    "complex": arrays_of(lambda a: {k: Array(v.numpy().astype(complex)) for k, v in a.items()}),
    "big-endian": arrays_of(with_header((2,), ">f4")),
    "objects": arrays_of(with_header((2,), "|O")),
    "373 GiB announced": arrays_of(with_header((10**11,))),
    "an unknown kind": arrays_of(with_header((2,), kind="cloudpickle")),
    "empty bytes": arrays_of(lambda a: {**a, "0.bias": Array("float32", (2,), "numpy.ndarray", b"")}),
    "garbage bytes": arrays_of(
        lambda a: {**a, "0.bias": Array("float32", (2,), "numpy.ndarray", b"\xff\x00garbage" * 8)}
    ),
    "a pickle": arrays_of(lambda a: {**a, "0.bias": Array("float32", (2,), "numpy.ndarray", b"\x80\x04K\x01." * 30)}),
    "2^62 examples": metric(num_examples=2**62),
    "1e308 examples": metric(num_examples=1e308),
    "-1 examples": metric(num_examples=-1),
    "NaN examples": metric(num_examples=float("nan")),
    "0 examples": metric(num_examples=0),
    "no number of examples": lambda c: RecordDict({**c, "metrics": MetricRecord({"train_loss": 1.0, "loss": 1.0})}),
    "a list of examples": metric(num_examples=[1, 2]),
    "a NaN metric": metric(train_loss=float("nan")),
    "no claims": lambda c: RecordDict({"arrays": c["arrays"]} if "arrays" in c else {}),
    "junk": lambda c: RecordDict({"x": ConfigRecord({})}),
    "no JSON": raises(ValueError("Expecting value")),
    "a bomb": raises(MemoryError()),
}


@pytest.fixture(scope="module")
def compiled():
    """The kernels of a round: numba keeps them on this machine's disk as pickles of its own."""
    played(RobustStrategy(FedAvg(), rule="multi_krum", f=1), all_but(lambda content: content), rounds=1)


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_client_neither_ends_the_app_nor_moves_its_model(kind, compiled, tmp_path, monkeypatch):
    no_unpickling(monkeypatch)
    strategy = RobustStrategy(FedAvg(), rule="multi_krum", f=1, log=tmp_path)
    result = played(strategy, all_but(HOSTILE[kind]), rounds=2)
    assert far(result.arrays.to_torch_state_dict()) < 0.5
    for record in read_history(tmp_path):
        assert record.skipped is None
        dropped = "6" in record.quarantined or (record.kept is not None and "6" not in record.kept)
        assert dropped
        assert len(record.kept) >= 3
    assert result.evaluate_metrics_clientapp[2]["loss"] == pytest.approx(1.0, abs=0.1)


def test_the_same_client_ends_or_takes_over_the_plain_strategy():
    plain = FedAvg()
    state = plain.start(_Plain(all_but(HOSTILE["1e30"])), ArrayRecord(net().state_dict()), num_rounds=1).arrays
    assert far(state.to_torch_state_dict()) > 1e28
    with pytest.raises(Exception, match=r"nconsistent|keys"):
        FedAvg().start(_Plain(all_but(HOSTILE["other keys"])), ArrayRecord(net().state_dict()), num_rounds=1)


class _Plain(Nodes):
    """Flower's own way: all replies in the caller's thread."""

    def __init__(self, nodes):
        super().__init__({i + 1: node for i, node in enumerate(nodes)})

    def send_and_receive(self, messages, *, timeout=None):
        asked = list(messages)
        self.push_messages(asked)
        return [Message(self.nodes[m.metadata.dst_node_id](m), reply_to=m) for m in asked]


def test_replies_are_always_screened():
    with pytest.raises(DefenseError, match="screen=False: replies are always screened"):
        RobustStrategy(FedAvg(), screen=False)


def test_without_an_attacker_the_mean_is_flower_s_own():
    nodes = [trained(t) for t in TARGETS]
    own = FedAvg().start(_Plain(nodes), ArrayRecord(net().state_dict()), num_rounds=3).arrays.to_torch_state_dict()
    ours = played(RobustStrategy(FedAvg(), rule="mean", weights="counts"), nodes).arrays.to_torch_state_dict()
    for name in ("0.weight", "0.bias", "1.running_mean", "1.running_var"):
        torch.testing.assert_close(ours[name], own[name], rtol=1e-5, atol=1e-6)
    assert ours["1.num_batches_tracked"] == 9  # a counter, which Flower's mean keeps in floats


def test_fedadam_steps_with_the_defended_update_and_clients_may_send_deltas():
    attacked = all_but(HOSTILE["1e30"])
    result = played(RobustStrategy(FedAdam(eta=0.1), rule="median", before=["norm_clipping"]), attacked, rounds=5)
    state = net().state_dict()
    assert far(result.arrays.to_torch_state_dict()) < far(state) < 10
    nodes = [trained(t, deltas=True) for t in TARGETS]

    class Adds(FedAvg):
        """An app whose clients send differences: its strategy adds the mean of them."""

        def configure_train(self, server_round, arrays, config, grid):
            self.held = arrays.to_torch_state_dict()
            return super().configure_train(server_round, arrays, config, grid)

        def aggregate_train(self, server_round, replies):
            arrays, metrics = super().aggregate_train(server_round, replies)
            delta = arrays.to_torch_state_dict()
            made = {k: v + delta[k] if v.is_floating_point() else delta[k] for k, v in self.held.items()}
            return ArrayRecord(made), metrics

    found = played(RobustStrategy(Adds(), rule="median", deltas=True), nodes).arrays.to_torch_state_dict()
    same = played(RobustStrategy(FedAvg(), rule="median"), [trained(t) for t in TARGETS]).arrays.to_torch_state_dict()
    for name in ("0.weight", "0.bias", "1.running_mean", "1.running_var"):
        torch.testing.assert_close(found[name], same[name], check_dtype=False)


def test_replies_that_block_never_come_err_or_are_another_node_s_cost_the_timeout_and_the_round_goes_on(tmp_path):
    strategy = RobustStrategy(FedAvg(fraction_evaluate=0.0), rule="median", log=tmp_path)

    def forged(message):
        made = Message(trained(1.0)(message), reply_to=message)
        made.metadata.__dict__["_src_node_id"] = 1
        return made

    others = [trained(1.0, raises(Silent())), lambda m: Message(Error(2, "no rows"), reply_to=m), forged]
    played(strategy, [*all_but(raises(Blocks())), *others], rounds=1)
    (record,) = read_history(tmp_path)
    late = "no reply in time"
    erred, foreign = "its device answers with an error: no rows", "the reply comes from another node"
    assert record.quarantined == {"6": late, "7": late, "8": erred, "9": foreign}
    assert record.skipped is None


def test_when_nobody_can_be_used_the_model_stays_and_the_round_is_said_to_be_skipped(tmp_path):
    strategy = RobustStrategy(FedAvg(), rule="multi_krum", f=1, log=tmp_path)
    result = played(strategy, [trained(1.0, HOSTILE["NaN"]) for _ in range(3)], rounds=1)
    assert result.arrays is None or len(result.arrays) == 0
    assert read_history(tmp_path)[0].skipped is not None


def test_the_report_reads_the_log_and_stages_after_the_step_act(tmp_path):
    seen = []

    def halved(vector, ctx):
        seen.append(ctx.round)
        return ctx.global_vector + (vector - ctx.global_vector) / 2

    nodes = [trained(t) for t in TARGETS]
    state = played(RobustStrategy(FedAvg(), rule="median", after=[halved], log=tmp_path), nodes, rounds=1)
    whole = played(RobustStrategy(FedAvg(), rule="median"), nodes, rounds=1)
    start, half = net().state_dict()["0.weight"], state.arrays.to_torch_state_dict()["0.weight"]
    torch.testing.assert_close(half - start, (whole.arrays.to_torch_state_dict()["0.weight"] - start) / 2)
    assert seen == [1]
    (run,) = read_runs([tmp_path])
    assert run.defense["rule"]["name"] == "median"
    assert len(run.records) == 1


def test_the_lines_of_the_page_are_an_app_that_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    block = next(b for b in (ROOT / "docs" / "edge.md").read_text().split("```")[1::2] if "RobustStrategy(" in b)
    names: dict[str, Any] = {}
    exec(compile(block, "docs/edge.md", "exec"), names)
    result = played(names["strategy"], all_but(HOSTILE["1e30"]), rounds=2)
    assert far(result.arrays.to_torch_state_dict()) < 0.5
    assert len(read_history(tmp_path / "robust")) == 2


def renamed(place):
    """Its arrays under another record's name, and a metric that nobody else sends instead of the usual one."""

    def change(content):
        if "arrays" in content:
            metrics = MetricRecord({"num-examples": 10, "odd": 1.0})
            return RecordDict({place: content["arrays"], "metrics": metrics})
        return content

    return change


def test_records_under_another_name_are_refused_and_metrics_are_those_that_most_replies_have(tmp_path):
    first = [trained(1.0, renamed("\x1b[31mmine")), *(trained(t) for t in TARGETS)]  # the first to be looked at
    strategy = RobustStrategy(FedAvg(), rule="multi_krum", f=1, log=tmp_path)
    result = played(strategy, first, rounds=1)
    (record,) = read_history(tmp_path)
    assert list(record.quarantined) == ["1"]
    assert record.quarantined["1"] == "its records are called \\x1b[31mmine, metrics, most replies' arrays, metrics"
    assert record.notes["examples"] == 50
    result = played(RobustStrategy(FedAvg(), rule="median"), [trained(1.0, renamed("arrays")), *first[1:]], rounds=1)
    assert result.train_metrics_clientapp[1] == {"train_loss": pytest.approx(1.0)}


def test_an_evaluation_under_another_record_or_of_1e9_examples_neither_ends_the_app_nor_decides_alone():
    def under_another_name(content):
        return content if "arrays" in content else RecordDict({"mine": content["metrics"]})

    def huge(content):
        return content if "arrays" in content else metric(num_examples=10**9, loss=100.0)(content)

    found = played(RobustStrategy(FedAvg(), rule="median"), all_but(under_another_name), rounds=1)
    assert found.evaluate_metrics_clientapp[1]["loss"] == pytest.approx(1.0)
    found = played(RobustStrategy(FedAvg(), rule="median"), all_but(huge), rounds=1)
    assert found.evaluate_metrics_clientapp[1]["loss"] == pytest.approx((50 + 30 * 100) / 80)  # 3 medians, not 1e9


def test_refused_statistics_of_the_only_reply_end_nothing_and_stand_beside_its_row_in_the_record(tmp_path):
    negative = arrays_of(lambda arrays: {**arrays, "1.running_var": Array(np.full(2, -1, np.float32))})
    alone = [*(Blocks() for _ in TARGETS), trained(1.0, negative)]
    played(RobustStrategy(FedAvg(fraction_evaluate=0.0), rule="mean", log=tmp_path), alone, rounds=1)
    (record,) = read_history(tmp_path)
    assert record.buffers_refused == {"6": "buffers: 1.running_var is negative"}
    assert "6" not in record.quarantined
    assert record.weights == {"6": 1.0}


@pytest.mark.parametrize("rule", ["median", "mean"])
def test_a_counter_that_one_client_makes_up_does_not_stop_the_rounds_after_it(rule, tmp_path):
    made_up = arrays_of(lambda arrays: {**arrays, "1.num_batches_tracked": Array(np.array(2**53 - 1))})
    found = played(RobustStrategy(FedAvg(fraction_evaluate=0.0), rule=rule, log=tmp_path), all_but(made_up))
    assert [record.skipped for record in read_history(tmp_path)] == [None] * 3
    assert found.arrays["1.num_batches_tracked"].numpy() == 9  # three batches in each of three rounds


@pytest.mark.parametrize(("dtype", "within"), [(np.float32, 1e-6), (np.float16, 1e-3)])
def test_small_differences_are_not_lost_beside_large_parameters(dtype, within):
    def differing(message):
        content = {"arrays": ArrayRecord({"w": Array(np.array([1e-4, -3e-5], dtype))})}
        return RecordDict({**content, "metrics": MetricRecord({"num-examples": 10})})

    strategy = RobustStrategy(FedAvg(fraction_evaluate=0.0), rule="mean", deltas=True)
    start = ArrayRecord({"w": Array(np.array([3.0, -300.0], dtype))})
    found = strategy.start(Nodes({1: differing, 2: differing}), initial_arrays=start, num_rounds=1, timeout=1.0)
    np.testing.assert_allclose(found.arrays["w"].numpy(), [1e-4, -3e-5], rtol=within)


def test_examples_are_claimed_where_the_strategy_inside_has_them_and_a_skipped_round_is_a_warning():
    def rows(content):
        return RecordDict({"arrays": content["arrays"], "metrics": MetricRecord({"rows": 10})})

    inner = FedAvg(fraction_evaluate=0.0, weighted_by_key="rows")
    found = played(RobustStrategy(inner, rule="median"), [trained(t, rows) for t in TARGETS], rounds=3)
    assert far(found.arrays.to_torch_state_dict()) < 0.3
    plain = FedAvg(fraction_evaluate=0.0)
    with pytest.warns(UserWarning, match=r"round 1 is skipped: no reply can be used\. node \d: claims no num-examples"):
        played(RobustStrategy(plain, rule="median"), [trained(t, rows) for t in TARGETS], rounds=1)
