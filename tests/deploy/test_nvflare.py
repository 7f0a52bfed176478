"""RobustAggregator in NVFlare: its own Shareables by hand, and its simulator running ScatterAndGather."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("nvflare", reason="needs nvflare, which has an environment of its own")

from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.fl_constant import ReservedKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.model import make_model_learnable
from nvflare.app_common.app_constant import AppConstants

from fedllm_sec.deploy.nvflare import RobustAggregator
from fedllm_sec.records.history import read_history
from fedllm_sec.report.runs import read_runs
from tests.conftest import ROOT

TARGETS = (1.0, 1.1, 0.9, 1.05, 0.95)  # where each client's training leads every parameter


def model() -> dict[str, np.ndarray]:
    return {"weight": np.zeros((2, 3), np.float32), "bias": np.zeros(3, np.float32), "batches": np.array(0, np.int64)}


def context(number: int = 0) -> FLContext:
    made = FLContext()
    made.set_prop(AppConstants.GLOBAL_MODEL, make_model_learnable(model(), {}), private=True, sticky=True)
    made.set_prop(AppConstants.CURRENT_ROUND, number, private=True, sticky=True)
    return made


def contribution(name, data, kind=DataKind.WEIGHTS, number=0, **meta):
    made = DXO(kind, data=data, meta=meta).to_shareable()
    made.set_peer_props({ReservedKey.IDENTITY_NAME: name})
    made.add_cookie(AppConstants.CONTRIBUTION_ROUND, number)
    return made


def trained(target: float) -> dict[str, np.ndarray]:
    return {k: np.full_like(v, target) if v.dtype.kind == "f" else v + 3 for k, v in model().items()}


def but(**changes):
    return {**trained(1.0), **changes}


OBJECTS = np.array([object(), 1, 2], dtype=object)
HOSTILE = {
    "other names": lambda: contribution("bad", {"x": np.zeros(1, np.float32)}),
    "another shape": lambda: contribution("bad", but(bias=np.ones(1, np.float32))),
    "NaN": lambda: contribution("bad", but(bias=np.full(3, np.nan, np.float32))),
    "objects": lambda: contribution("bad", but(bias=OBJECTS)),
    "strings": lambda: contribution("bad", but(bias=np.array(["a", "b", "c"]))),
    "complex": lambda: contribution("bad", but(bias=np.ones(3, complex))),
    "big-endian": lambda: contribution("bad", but(bias=np.ones(3, ">f4"))),
    "integers": lambda: contribution("bad", but(bias=np.ones(3, np.int32))),
    "a list": lambda: contribution("bad", but(bias=[1.0, 1.0, 1.0])),
    "no arrays": lambda: contribution("bad", {}),
    "another round's": lambda: contribution("bad", trained(1.0), number=7),
    "1e308 steps": lambda: contribution("bad", trained(1.0), **{MetaKey.NUM_STEPS_CURRENT_ROUND: 1e308}),
    "NaN steps": lambda: contribution("bad", trained(1.0), **{MetaKey.NUM_STEPS_CURRENT_ROUND: float("nan")}),
    "-1 steps": lambda: contribution("bad", trained(1.0), **{MetaKey.NUM_STEPS_CURRENT_ROUND: -1}),
    "metrics": lambda: contribution("bad", {"loss": 1.0}, DataKind.METRICS),
    "a second one": lambda: contribution("site-1", trained(9.0)),
    "an error": lambda: _failed(),
}


def _failed():
    made = contribution("bad", trained(1.0))
    made.set_return_code(ReturnCode.EXECUTION_EXCEPTION)
    return made


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_contribution_is_rejected_and_the_round_is_the_others(kind, tmp_path):
    aggregator, at = RobustAggregator("median", log=str(tmp_path)), context()
    for i, target in enumerate(TARGETS):
        assert aggregator.accept(contribution(f"site-{i + 1}", trained(target)), at)
    assert not aggregator.accept(HOSTILE[kind](), at)
    found = from_shareable(aggregator.aggregate(at))
    assert found.data_kind == DataKind.WEIGHTS
    np.testing.assert_array_equal(found.data["weight"], np.ones((2, 3), np.float32))
    assert found.data["batches"] == 3
    assert {k: v.dtype for k, v in found.data.items()} == {k: v.dtype for k, v in model().items()}
    (record,) = read_history(tmp_path)
    assert list(record.quarantined) == ([] if kind == "a second one" else ["bad"])


def test_whoever_comes_first_with_differences_turns_nobody_away_who_sends_models(tmp_path):
    aggregator, at = RobustAggregator("median", log=str(tmp_path)), context()
    assert aggregator.accept(contribution("first", trained(-50.0), DataKind.WEIGHT_DIFF), at)
    for i, target in enumerate(TARGETS):
        assert aggregator.accept(contribution(f"site-{i + 1}", trained(target)), at)
    found = from_shareable(aggregator.aggregate(at))
    assert found.data_kind == DataKind.WEIGHTS
    assert abs(found.data["weight"] - 1).max() < 0.2


def test_multi_krum_drops_the_far_one_differences_come_back_as_differences_and_weights_are_steps(tmp_path):
    aggregator, at = RobustAggregator("multi_krum", {"f": 1}, log=str(tmp_path)), context()
    for i, target in enumerate((*TARGETS, -50.0)):
        assert aggregator.accept(contribution(f"site-{i + 1}", trained(target), DataKind.WEIGHT_DIFF), at)
    found = from_shareable(aggregator.aggregate(at))
    assert found.data_kind == DataKind.WEIGHT_DIFF
    assert abs(found.data["weight"] - 1).max() < 0.1
    (record,) = read_history(tmp_path)
    assert record.round == 1
    assert "site-6" not in record.kept
    (run,) = read_runs([tmp_path])
    assert run.defense["rule"]["name"] == "multi_krum"
    weighted, at = RobustAggregator("mean", {"weights": "counts"}), context()
    for name, target, steps in (("a", 1.0, 3), ("b", 5.0, 1)):
        weighted.accept(contribution(name, trained(target), **{MetaKey.NUM_STEPS_CURRENT_ROUND: steps}), at)
    assert from_shareable(weighted.aggregate(at)).data["bias"] == pytest.approx(2.0)  # (3 * 1 + 1 * 5) / 4


def test_where_nothing_can_be_used_the_model_stays_and_the_record_says_so(tmp_path):
    aggregator, at = RobustAggregator("multi_krum", {"f": 1}, log=str(tmp_path)), context()
    np.testing.assert_array_equal(from_shareable(aggregator.aggregate(at)).data["weight"], 0)
    assert aggregator.accept(contribution("site-1", trained(1.0)), at)  # too few for the rule
    np.testing.assert_array_equal(from_shareable(aggregator.aggregate(at)).data["weight"], 0)
    first, second = read_history(tmp_path)
    empty = FLContext()
    empty.set_prop(AppConstants.GLOBAL_MODEL, make_model_learnable({}, {}), private=True, sticky=True)
    empty.set_prop(AppConstants.CURRENT_ROUND, 0, private=True, sticky=True)
    assert not aggregator.accept(contribution("site-1", {}), empty)
    assert first.skipped == "no contribution can be used"
    assert "n >= 2f + 3" in second.skipped


JOB = """
import os

import numpy as np
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.executor import Executor
from nvflare.app_common.abstract.model import make_model_learnable
from nvflare.app_common.abstract.model_persistor import ModelPersistor
from nvflare.app_common.shareablegenerators.full_model_shareable_generator import FullModelShareableGenerator
from nvflare.app_common.workflows.scatter_and_gather import ScatterAndGather
from nvflare.job_config.api import FedJob

from fedllm_sec.deploy.nvflare import RobustAggregator


class Begin(ModelPersistor):
    def load_model(self, fl_ctx):
        return make_model_learnable({"weight": np.zeros((2, 3), np.float32)}, {})

    def save_model(self, model, fl_ctx):
        np.save(os.environ["HERE"] + "/last.npy", model["weights"]["weight"])


class Halfway(Executor):
    \"\"\"Goes half the way to 1; site-6 to -50.\"\"\"

    def execute(self, task_name, shareable, fl_ctx, abort_signal):
        sent, target = from_shareable(shareable).data, -50.0 if fl_ctx.get_identity_name() == "site-6" else 1.0
        data = {key: value + (target - value) / 2 for key, value in sent.items()}
        return DXO(DataKind.WEIGHTS, data=data).to_shareable()


if __name__ == "__main__":
    job = FedJob(name="robust", min_clients=6)
    workflow = ScatterAndGather(6, num_rounds=3, wait_time_after_min_received=0, persistor_id="persistor")
    job.to_server(workflow, id="controller")
    job.to_server(Begin(), id="persistor")
    job.to_server(FullModelShareableGenerator(), id="shareable_generator")
    job.to_server(RobustAggregator("multi_krum", {"f": 1}, log=os.environ["HERE"] + "/robust"), id="aggregator")
    job.to_clients(Halfway(), tasks=["train"])
    job.simulator_run(os.environ["HERE"] + "/workspace", n_clients=6)
"""


@pytest.mark.slow
def test_nvflare_s_simulator_runs_scatter_and_gather_with_it(tmp_path):
    (tmp_path / "robust_job.py").write_text(JOB)
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    ran = subprocess.run(
        [sys.executable, "robust_job.py"], cwd=tmp_path, env={**os.environ, "HERE": str(tmp_path), "PYTHONPATH": path},
        capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    records = read_history(tmp_path / "robust")
    assert [record.round for record in records] == [1, 2, 3]
    assert all("site-6" not in record.kept for record in records)
    assert np.load(tmp_path / "last.npy") == pytest.approx(0.875)
