"""The passes that single rules have compiled: the same numbers as plain torch, on any number of threads."""

import os

import pytest
import torch

from fedllm_sec.defenses import MENU
from fedllm_sec.kernels import team
from fedllm_sec.matrix import Layout, UpdateMatrix
from fedllm_sec.protocols import RoundContext

N, D = 9, 140_000  # more than four segments of 32,768 columns, the last one short
LAYOUT = Layout(("a", "b", "c.lora_B.weight"), ((100,), (D - 200,), (10, 10)))
RULES = {
    "residual_reweighting": {}, "lasa": {}, "fltrust": {}, "monna": {"f": 2}, "robust_learning_rate": {"theta": 3},
    "signguard": {}, "freqfed": {}, "deepsight": {}, "caf": {"f": 2}, "cross_round": {}, "fldetector": {},
}  # fmt: skip


def rows_of(turn):
    rows = torch.randn(N, D, generator=torch.Generator().manual_seed(turn)) * torch.linspace(0.5, 2, N)[:, None]
    rows[:, ::7] = 0
    rows[1] = rows[0]
    return rows


def decided(name, rounds, chunk_mb=None):
    """The last of some rounds; rules without memory see one."""
    make, settings = MENU[name].make, RULES[name]
    rule = make(**settings) if isinstance(make, type) else None
    for turn in range(1, rounds + 1 if rule else 2):
        rows = rows_of(turn)
        start = torch.full((D,), 0.01 * turn * turn)
        rng = torch.Generator().manual_seed(turn)
        ctx = RoundContext(turn, start, LAYOUT, rng, last_update=rows[2], root_update=rows[3:].mean(0))
        updates = UpdateMatrix.of(rows, layout=LAYOUT, chunk_mb=chunk_mb)
        made = rule(updates, ctx) if rule else make(updates, ctx, **settings)
    return made


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", RULES)
def test_the_compiled_pass_of_a_rule_decides_as_plain_torch_does(name, monkeypatch):
    if os.environ.get("FEDLLM_SEC_KERNELS") == "torch":
        pytest.skip("nothing is compiled")
    fast = decided(name, 4)
    monkeypatch.setattr(team, "size", lambda: 1)
    assert torch.equal(decided(name, 4, chunk_mb=3).update, fast.update) or name == "deepsight"
    monkeypatch.setenv("FEDLLM_SEC_KERNELS", "torch")
    plain = decided(name, 4)
    assert float((fast.update - plain.update).abs().max()) <= 1e-5 * float(plain.update.abs().max())
    if fast.scores is not None:
        assert torch.allclose(fast.scores, plain.scores, rtol=1e-5, atol=1e-5)
    if fast.kept is not None:
        assert torch.equal(fast.kept, plain.kept)


@pytest.mark.parametrize("forked", [False, True])
def test_the_team_gives_results_in_order_and_raises_what_a_job_raises(forked, monkeypatch):
    monkeypatch.setattr(team, "_forked", forked)
    jobs = [lambda i=i: i * i for i in range(600)]  # more than two regions
    assert list(team.results(jobs, 3)) == [i * i for i in range(600)]

    def broken():
        raise ValueError("job 7")

    with pytest.raises(ValueError, match="job 7"):
        list(team.results([*jobs[:7], broken, *jobs[7:20]], 2))


def test_as_many_threads_as_cores_unless_torch_was_told_otherwise(monkeypatch):
    cores = len(os.sched_getaffinity(0))
    monkeypatch.setattr(team, "_wanted", None)
    assert team.size() == cores
    monkeypatch.setattr(torch, "get_num_threads", lambda: team._AT_START + 3)
    assert team.size() == team._AT_START + 3
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    team.use(1)  # compute.threads of a recipe, also where it is the number at the start
    assert team.size() == 1
