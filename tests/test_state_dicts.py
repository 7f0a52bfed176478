"""State dicts of whole models: every kind of tensor comes out as a person expects, and no client is trusted."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import fedllm_sec
from fedllm_sec.errors import DefenseError
from fedllm_sec.models.resnet import resnet

QUIET = pytest.mark.filterwarnings("ignore:aggregate_state_dicts")


def trained(model: nn.Module, seed: int, far: float = 0.01) -> dict[str, torch.Tensor]:
    """The state of a client that moved every parameter a little and saw 3 batches."""
    client = copy.deepcopy(model)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in client.parameters():
            if parameter.requires_grad:
                parameter.add_(far * torch.randn(parameter.shape, generator=rng).to(parameter.dtype))
        for name, buffer in client.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(torch.randn(buffer.shape, generator=rng))
            elif name.endswith("running_var"):
                buffer.mul_(1 + torch.rand(buffer.shape, generator=rng))
            elif name.endswith("num_batches_tracked"):
                buffer.add_(3 + seed)
    return client.state_dict()


def net() -> nn.Module:
    torch.manual_seed(0)
    return resnet((3, 8, 8), 4, depth=8, norm="batch")


@pytest.mark.parametrize("rule", ["mean", "median", "multi_krum"])
def test_a_resnet_with_batchnorm_equals_the_float64_reference(rule: str):
    model = net()
    start = model.state_dict()
    before = {key: value.clone() for key, value in start.items()}
    states = [trained(model, seed) for seed in range(7)]
    settings = {"f": 2} if rule == "multi_krum" else {}
    found = fedllm_sec.aggregate_state_dicts(states, start, rule, **settings)
    weights = found.decision.weights
    assert list(found.state) == list(start)
    for key, value in found.state.items():
        rows = torch.stack([state[key].double() for state in states])
        if key.endswith("num_batches_tracked"):
            taken = list(range(7)) if weights is None else weights.nonzero().flatten().tolist()
            assert int(value) == 3 + taken[len(taken) // 2]
            continue
        expected = rows.median(0).values if weights is None else torch.einsum("n,n...->...", weights, rows)
        torch.testing.assert_close(value.double(), expected, atol=2e-6, rtol=1e-5)
        assert value.dtype == start[key].dtype
    assert all(torch.equal(before[key], value) for key, value in start.items())
    assert not found.refused
    model.load_state_dict(found.state)


@QUIET
def test_poisoned_statistics_are_refused_and_their_row_still_counts():
    model = net()
    states = [trained(model, seed) for seed in range(5)]
    key = next(key for key in states[0] if key.endswith("running_var"))
    states[3][key] = states[3][key] * -1
    found = fedllm_sec.aggregate_state_dicts(states, model.state_dict(), "mean", ids=list("abcde"))
    assert set(found.refused) == {"d"}
    assert "negative" in found.refused["d"]
    rows = [state[key].double() for state in states]
    rows[3] = model.state_dict()[key].double()
    torch.testing.assert_close(found.state[key].double(), torch.stack(rows).mean(0), atol=1e-6, rtol=1e-6)
    assert found.decision.weights.tolist() == pytest.approx([0.2] * 5)


def test_tied_embeddings_stay_tied_and_frozen_parameters_stay():
    config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                         tie_word_embeddings=True)  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.model.norm.weight.requires_grad_(False)
    start = model.state_dict()
    assert start["lm_head.weight"].data_ptr() == start["model.embed_tokens.weight"].data_ptr()
    states = [trained(model, seed, far=0.1) for seed in range(3)]
    states[2]["model.norm.weight"] = states[2]["model.norm.weight"] + 5  # a client that trains what is frozen
    found = fedllm_sec.aggregate_state_dicts(states, start, "mean")
    assert found.frozen == ["model.norm.weight"]
    assert torch.equal(found.state["model.norm.weight"], start["model.norm.weight"])
    assert found.trained.count("model.embed_tokens.weight") + found.trained.count("lm_head.weight") == 1
    assert found.state["lm_head.weight"].data_ptr() == found.state["model.embed_tokens.weight"].data_ptr()
    expected = torch.stack([state["lm_head.weight"].double() for state in states]).mean(0)
    torch.testing.assert_close(found.state["lm_head.weight"].double(), expected, atol=0.02, rtol=0.02)
    assert {value.dtype for value in found.state.values()} == {torch.bfloat16}
    model.load_state_dict(found.state)


def small() -> dict[str, torch.Tensor]:
    return {"w": torch.zeros(3, 2), "mask": torch.tensor([True, False]), "steps": torch.tensor(4)}


def moved(by: float, **changes: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**small(), "w": torch.full((3, 2), by), **changes}


def test_other_integers_stay_where_most_have_them_so_and_else_take_the_median():
    states = [moved(1.0), moved(2.0, steps=torch.tensor(9)), moved(3.0, mask=torch.tensor([False, False]))]
    found = fedllm_sec.aggregate_state_dicts(states, small(), "mean")
    assert found.state["mask"].tolist() == [True, False]
    assert int(found.state["steps"]) == 4
    assert found.state["w"].unique().tolist() == pytest.approx([2.0])
    apart = [moved(1.0, steps=torch.tensor(k)) for k in (7, 9, 8)]
    assert int(fedllm_sec.aggregate_state_dicts(apart, small(), "mean").state["steps"]) == 8


@QUIET
@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ({"w": torch.ones(3, 2)}, "other names"),
        (None, "other names"),
        (moved(1.0, w=torch.ones(2, 2)), r"its w is \(2, 2\) instead of \(3, 2\)"),
        (moved(1.0, w=torch.ones(3, 2, dtype=torch.int64)), "its w is torch.int64 instead of torch.float32"),
        (moved(1.0, w=[[1.0]]), "its w is list"),
        (moved(float("nan")), "6 of 6 values are not finite"),
        (moved(1e38), "beyond the limit"),
    ],
)
def test_a_clients_state_that_cannot_be_used_is_set_aside(bad, why):
    found = fedllm_sec.aggregate_state_dicts([moved(1.0), bad, moved(3.0)], small(), "mean", ids=["a", "bad", "c"])
    assert list(found.refused) == ["bad"]
    import re

    assert re.search(why, found.refused["bad"])
    assert found.state["w"].unique().tolist() == pytest.approx([2.0])
    assert found.decision.weights.tolist() == [0.5, 0.0, 0.5]


@QUIET
def test_tied_tensors_that_differ_are_no_state_of_this_model():
    w = torch.zeros(2, 2)
    start = {"a": w, "b": w}
    good, bad = {"a": torch.ones(2, 2), "b": torch.ones(2, 2)}, {"a": torch.ones(2, 2), "b": torch.zeros(2, 2)}
    found = fedllm_sec.aggregate_state_dicts([good, bad], start, "mean")
    assert found.refused == {"1": "its b and a differ, which are one tensor"}
    assert torch.equal(found.state["b"], torch.ones(2, 2))


def test_what_cannot_be_aggregated_is_said():
    with pytest.raises(DefenseError, match="most clients send every parameter back as it was"):
        fedllm_sec.aggregate_state_dicts([small()] * 3, small(), "mean")
    with pytest.raises(DefenseError, match="give each its own id"):
        fedllm_sec.aggregate_state_dicts([moved(1.0)] * 2, small(), "mean", ids=["a", "a"])
    with pytest.raises(DefenseError, match="none of the states can be used"):
        fedllm_sec.aggregate_state_dicts([{}], small(), "mean")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fedllm_sec.aggregate_state_dicts([moved(float(k)) for k in range(1, 8)], small(), "multi_krum", f=2)


@QUIET
@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (moved(1.0, w=torch.ones(3, 2, dtype=torch.float8_e4m3fn)), "float8"),
        (moved(1.0, w=torch.ones(3, 2, device="meta")), "holds no values"),
        ({"w": torch.ones(3, 2), 3: 1}, "other names"),
        (moved(1.0, steps=torch.tensor(4.0)), "its steps is torch.float32 instead of torch.int64"),
    ],
)
def test_states_that_torch_itself_stumbles_over_are_set_aside(bad, why):
    found = fedllm_sec.aggregate_state_dicts([moved(1.0), bad, moved(3.0)], small(), "median")
    assert list(found.refused) == ["1"]
    assert why in found.refused["1"]


@QUIET
def test_a_value_that_the_global_dtype_cannot_hold_is_set_aside():
    start = {"w": torch.zeros(2, dtype=torch.float16)}
    states = [{"w": torch.ones(2) * by} for by in (1.0, 1e30, 3.0)]
    found = fedllm_sec.aggregate_state_dicts(states, start, "mean")
    assert found.refused == {"1": "its w has values that torch.float16 cannot hold"}
    assert found.state["w"].tolist() == [2.0, 2.0]


@QUIET
@pytest.mark.parametrize("count", [2**63 - 1, 2**53, -1])
def test_a_counter_that_nobody_reaches_is_set_aside(count: int):
    model = net()
    states = [trained(model, seed) for seed in range(5)]
    key = next(key for key in states[0] if key.endswith("num_batches_tracked"))
    states[2][key] = torch.tensor(count)
    found = fedllm_sec.aggregate_state_dicts(states, model.state_dict(), "mean")
    assert list(found.refused) == ["2"]
    assert int(found.state[key]) == 3 + 3


def test_float64_stays_exact_where_nothing_is_changed():
    start = {"w": torch.tensor([1 / 3, 1e8 + 0.5], dtype=torch.float64)}
    states = [{"w": start["w"] + torch.tensor([0.0, 0.25])} for _ in range(3)]
    found = fedllm_sec.aggregate_state_dicts(states, start, "mean")
    assert found.state["w"].tolist() == [1 / 3, 1e8 + 0.75]
    with pytest.raises(DefenseError, match="2 counts for 3 states"):
        fedllm_sec.aggregate_state_dicts(states, start, "mean", counts=[1, 2])
