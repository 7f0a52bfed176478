"""`fedllm_sec.aggregate`: rows of any kind in, the same kind out."""

import copy
import math
import re

import numpy as np
import pytest
import torch

import fedllm_sec
from fedllm_sec.defenses import FoolsGold
from fedllm_sec.errors import DefenseError, FedError

ROWS = [[0.0, 0.0], [1.0, 1.0], [3.0, 3.0], [10.0, 10.0], [30.0, 30.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_torch_rows_give_a_torch_update_of_their_dtype(dtype):
    update = fedllm_sec.aggregate(torch.tensor(ROWS, dtype=dtype), "krum", f=1).update
    assert update.dtype == dtype
    assert update.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_numpy_rows_give_a_numpy_update_of_their_dtype(dtype):
    update = fedllm_sec.aggregate(np.array(ROWS, dtype=dtype), "krum", f=1).update
    assert isinstance(update, np.ndarray)
    assert update.dtype == dtype
    assert update.tolist() == [1.0, 1.0]


def test_a_list_of_vectors_gives_a_vector():
    assert fedllm_sec.aggregate([np.array(row) for row in ROWS], "median").update.tolist() == [3.0, 3.0]
    assert fedllm_sec.aggregate([torch.tensor(row) for row in ROWS], "median").update.tolist() == [3.0, 3.0]


def test_a_list_of_state_dicts_gives_a_state_dict():
    rows = [{"a": torch.full((2, 2), float(i)), "b": torch.tensor([-float(i)])} for i in (1, 2, 9)]
    update = fedllm_sec.aggregate(rows, "median").update
    assert torch.equal(update["a"], torch.full((2, 2), 2.0))
    assert torch.equal(update["b"], torch.tensor([-2.0]))


def test_the_callers_arrays_are_never_changed():
    for rows in (np.array(ROWS, dtype=np.float32), torch.tensor(ROWS)):
        before = copy.deepcopy(rows)
        for name, settings in (("norm_clipping", {}), ("weak_dp_client", {"sigma": 1.0})):
            fedllm_sec.aggregate(rows, "mean", before=[(name, settings)])
        assert (before == rows).all()


def test_a_read_only_numpy_array_is_fine():
    rows = np.array(ROWS)
    rows.setflags(write=False)
    assert fedllm_sec.aggregate(rows, "median").update.tolist() == [3.0, 3.0]


def test_bad_rows_are_set_aside_with_a_warning_and_told_in_place():
    rows = torch.tensor(ROWS)
    rows[0, 1] = math.nan
    with pytest.warns(UserWarning, match=r'1 of 5 rows are set aside. row "0": 1 of 2 values are not finite'):
        decision = fedllm_sec.aggregate(rows, "multi_krum", f=0, m=2)
    assert decision.weights.tolist() == [0.0, 0.5, 0.5, 0.0, 0.0]
    assert decision.kept.tolist() == [False, True, True, False, False]
    assert decision.scores[0] == math.inf
    assert decision.notes["set_aside"] == 1.0


def test_preconditions_count_the_rows_that_are_left():
    rows = torch.tensor(ROWS)
    rows[0, 0] = math.inf
    too_few = pytest.raises(DefenseError, match=r"krum: needs n >= 2f \+ 3 clients, got n=4, f=1")
    with pytest.warns(UserWarning, match="1 of 5 rows"), too_few:
        fedllm_sec.aggregate(rows, "krum", f=1)


def test_rows_in_a_file_are_read_from_there(tmp_path):
    updates = fedllm_sec.UpdateMatrix.of(torch.tensor(ROWS), ids=list("abcde"))
    updates.save(tmp_path / "rows.safetensors")
    stored = fedllm_sec.UpdateMatrix.open(tmp_path / "rows.safetensors")
    decision = fedllm_sec.aggregate(stored, "multi_krum", before=["norm_clipping"], f=1)
    wanted = fedllm_sec.aggregate(torch.tensor(ROWS), "multi_krum", before=["norm_clipping"], f=1)
    assert torch.equal(decision.update, wanted.update)
    assert torch.equal(decision.weights, wanted.weights)
    with pytest.raises(DefenseError, match="has its own ids"):
        fedllm_sec.aggregate(stored, "median", ids=list("abcde"))


def test_stages_before_the_rule_are_names_or_names_with_settings():
    rows = torch.tensor(ROWS)
    decision = fedllm_sec.aggregate(rows, "mean", before=["norm_clipping", ("nnm", {"f": 1})], weights="uniform")
    assert decision.update.shape == (2,)
    assert decision.weights.shape == (5,)


@pytest.mark.parametrize(
    "before",
    ["norm_clipping", ["norm_clipping"], {"name": "norm_clipping"}, [{"name": "norm_clipping", "radius": "median"}]],
)
def test_a_stage_is_a_name_or_as_in_a_recipe_and_may_stand_alone(before):
    wanted = fedllm_sec.aggregate(torch.tensor(ROWS), "mean", before=[("norm_clipping", {})]).update
    assert torch.equal(fedllm_sec.aggregate(torch.tensor(ROWS), "mean", before=before).update, wanted)


@pytest.mark.parametrize("name", ["krum", "multi_krum", "bulyan", "dnc", "foolsgold", "flame"])
def test_ids_may_be_numbers_as_other_libraries_have_them(name):
    rows = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    settings = {"f": 1} if name in ("krum", "multi_krum", "bulyan", "dnc") else {}
    got = fedllm_sec.aggregate(rows, name, ids=range(3, 11), **settings)
    assert torch.equal(got.update, fedllm_sec.aggregate(rows, name, ids=[*"3456789", "10"], **settings).update)


def test_a_list_of_arrays_for_each_client_gives_a_list_of_arrays():
    rows = [[np.full((2, 2), float(i)), np.array([-float(i)], dtype=np.float32)] for i in (1, 2, 9)]
    update = fedllm_sec.aggregate(rows, "median").update
    assert [part.tolist() for part in update] == [[[2.0, 2.0], [2.0, 2.0]], [-2.0]]
    assert [part.dtype for part in update] == [np.float64, np.float32]


@pytest.mark.parametrize("array", [torch.tensor, np.array])
def test_integers_and_booleans_of_a_state_dict_are_the_median_of_what_usable_rows_hold(array):
    def client(value, batches, on):
        return {"w": array([value, value]), "bn.num_batches_tracked": array(batches), "mask": array([on, not on])}

    rows = [client(1.0, 4, True), client(2.0, 5, True), client(9.0, 10**15, True), client(math.nan, -7, False)]
    with pytest.warns(UserWarning, match="1 of 4 rows"):
        update = fedllm_sec.aggregate(rows, "median").update
    assert list(update) == ["w", "bn.num_batches_tracked", "mask"]
    assert update["w"].tolist() == [2.0, 2.0]
    assert int(update["bn.num_batches_tracked"]) == 5
    assert update["mask"].tolist() == [True, False]
    assert {key: value.dtype for key, value in update.items()} == {key: value.dtype for key, value in rows[0].items()}


@pytest.mark.parametrize("name", ["foolsgold", "cross_round", "fldetector", "centered_clipping"])
def test_a_rule_by_name_says_in_a_later_round_that_it_remembers_nothing(name):
    rows = torch.tensor(ROWS)
    with pytest.warns(UserWarning, match=f"{name} remembers earlier rounds, .* in round 7 it knows nothing of them"):
        fedllm_sec.aggregate(rows, name, round=7)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("rule", ["three_sigma", "krum:f", FoolsGold()])
def test_a_rule_that_keeps_nothing_or_is_an_object_has_nothing_to_say(rule):
    name, settings = ("krum", {"f": 1}) if rule == "krum:f" else (rule, {})
    fedllm_sec.aggregate(torch.tensor(ROWS), name, round=7, **settings)


def test_an_instance_carries_its_memory_from_call_to_call():
    rule = FoolsGold()
    fedllm_sec.aggregate(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), rule)
    again = fedllm_sec.aggregate(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), rule)
    assert again.notes["all_alike"] == 1.0  # both sent the same in sum


def test_outside_code_is_called_by_name_with_settings():
    decision = fedllm_sec.aggregate(torch.tensor(ROWS), "fedllm_sec.defenses.krum:multi_krum", f=1, m=1)
    assert decision.update.tolist() == [1.0, 1.0]


def test_float32_common_part_and_chunk_size_do_not_change_the_answer():
    rows = torch.randn(8, 1000, generator=torch.Generator().manual_seed(0))
    wanted = fedllm_sec.aggregate(rows, "geometric_median").update
    got = fedllm_sec.aggregate(rows, "geometric_median", chunk_mb=0.001).update
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "list of rows is empty"),
        (torch.ones(3), r"shape \(n, d\)"),
        (torch.ones(0, 3), r"shape \(n, d\)"),
        (torch.ones(3, 0), r"shape \(n, d\)"),
        (torch.ones(3, 2, dtype=torch.int64), "dtype int64, needs a floating type"),
        (np.ones((3, 2), dtype=np.int32), "dtype int32, needs a floating type"),
        (np.ones((3, 2), dtype=bool), "dtype bool"),
        ([torch.ones(3), torch.ones(4)], r"row 1 has shape \(4,\), row 0 has \(3,\)"),
        ([{"a": torch.ones(2)}, {"b": torch.ones(2)}], r"row 1 differs from row 0 in \['a', 'b'\]"),
        ([[1.0, 2.0], [3.0, 4.0]], "is a list, needs a torch tensor or numpy array"),
        ([{"a": [1.0]}], "is a list"),
        ([{}, {}], "row 0 has no array of a floating type"),
        ([[], []], "row 0 has no array of a floating type"),
        ([{"a": torch.ones(1), "n": torch.tensor(1)}, {"a": torch.ones(1)}], r"row 1 differs from row 0 in \['n'\]"),
    ],
)
def test_rows_that_are_no_rows_are_refused_with_the_reason(rows, message):
    with pytest.raises(DefenseError, match=message):
        fedllm_sec.aggregate(rows, "median")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"name": "multi-krum", "f": 1}, 'Did you mean "multi_krum"'),
        ({"name": "multi_krum", "f": 1, "M": 2}, r"aggregate\.M: 2 is set, but there is no such setting"),
        ({"name": "krum"}, "f: is needed"),
        ({"name": "krum", "f": "two"}, "integer"),
        ({"name": "nnm", "f": 1}, 'is a stage of kind "before"'),
        ({"name": "median", "before": ["median"]}, 'is a stage of kind "rule"'),
        ({"name": "median", "before": {"f": 2}}, r"before\[0\]: \{'f': 2\} names no stage"),
        (
            {"name": "slsgd"},
            "slsgd: needs f, the number trimmed at each end, for option 2, got f=None. Set f, or option",
        ),
        ({"name": "median", "counts": [1.0]}, "counts has 1 entries for 5 rows"),
        ({"name": "median", "ids": ["a"] * 5}, "same id twice"),
        ({"name": "median", "global_vector": torch.ones(3)}, r"shape \(3,\)"),
    ],
)
def test_mistakes_in_the_call_are_defense_errors(call, message):
    call = dict(call)
    with pytest.raises(DefenseError, match=message):
        fedllm_sec.aggregate(torch.tensor(ROWS), call.pop("name"), **call)


def test_one_stage_with_its_settings_needs_no_list():
    rows = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    one = fedllm_sec.aggregate(rows, "krum", before=("norm_clipping", {"radius": 1.0}), f=1)
    same = fedllm_sec.aggregate(rows, "krum", before=[("norm_clipping", {"radius": 1.0})], f=1)
    assert torch.equal(one.update, same.update)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"before": None}, "must be a stage, or a list of stages"),
        ({"before": [3]}, "must be a name, a callable"),
        ({"before": [("norm_clipping",)]}, "must be a name, a callable"),
        ({"counts": [1e308] * 3}, "do not add up to a finite number"),
    ],
)
def test_what_is_no_stage_and_no_count_is_told(settings, told):
    with pytest.raises(DefenseError, match=told):
        fedllm_sec.aggregate(torch.ones(3, 2), "mean", **settings)


def test_sparse_rows_are_told_in_a_line():
    with pytest.raises(DefenseError, match=r"rows is not dense \(torch.sparse_coo\)"):
        fedllm_sec.aggregate(torch.eye(3).to_sparse(), "mean")


@pytest.mark.parametrize(
    "rows", [np.array(ROWS)[::-1], np.array(ROWS, dtype=">f4"), np.array(ROWS, dtype=np.longdouble)]
)
def test_numpy_rows_lie_in_memory_as_they_like(rows):
    assert fedllm_sec.aggregate(rows, "median").update.tolist() == [3.0, 3.0]
    assert fedllm_sec.forge(rows, "byzantine_zero", m=1).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: fedllm_sec.aggregate(None, "mean"), "rows is a NoneType, needs a matrix"),
        (lambda: fedllm_sec.aggregate({"a": torch.ones(2)}, "mean"), r"list\(rows.values\(\)\)"),
        (lambda: fedllm_sec.aggregate(torch.empty(3, 2, device="meta"), "mean"), "hold no numbers"),
        (lambda: fedllm_sec.aggregate(torch.tensor(ROWS), "mean", counts=["a"] * 5), "counts: could not convert"),
        (lambda: fedllm_sec.aggregate(torch.tensor(ROWS), "mean", ids=5), "ids has no entries for 5 rows"),
        (lambda: fedllm_sec.aggregate(torch.tensor(ROWS), "mean", round="1"), "round='1': must be a whole number"),
        (lambda: fedllm_sec.aggregate(torch.tensor(ROWS), "mean", chunk_mb="1"), "chunk_mb=1: a block needs"),
        (lambda: fedllm_sec.forge(torch.tensor(ROWS), "alie", m=1.5), "m=1.5: needs a whole number"),
        (lambda: fedllm_sec.forge(torch.tensor(ROWS), None, m=1), "forge: None: must be a name"),
        (lambda: fedllm_sec.forge(torch.tensor(ROWS).to_sparse(), "alie", m=1), "forge: honest: is not dense"),
        (lambda: fedllm_sec.forge(torch.tensor(ROWS).to_sparse_csr(), "alie", m=1), "forge: honest: is not dense"),
        (lambda: fedllm_sec.aggregate(torch.nested.nested_tensor(list(torch.tensor(ROWS))), "mean"), "is not dense"),
        (lambda: fedllm_sec.aggregate_state_dicts({"w": torch.ones(1)}, [], "mean"), "dict and list: must be a list"),
        (lambda: fedllm_sec.reveal_labels(None, torch.nn.Linear(4, 3), 1), "gradient is a NoneType"),
        (lambda: fedllm_sec.reveal_labels({}, torch.nn.ReLU(), 1), "no trained parameters"),
        (
            lambda: fedllm_sec.reveal_labels({"weight": "x", "bias": "x"}, torch.nn.Linear(4, 3), 1),
            "weight: str cannot",
        ),
        (
            lambda: fedllm_sec.reconstruct(torch.ones(15), torch.nn.Linear(4, 3), (1, 4), "dlg", labels="x"),
            "labels: str cannot be numbers",
        ),
        (
            lambda: fedllm_sec.forge(torch.tensor(ROWS), "byzantine_flip", m=1, global_vector="x"),
            "global_vector: cannot be a vector",
        ),
        (lambda: fedllm_sec.forge(torch.empty(3, 2, device="meta"), "byzantine_flip", m=1), "hold no numbers"),
        (lambda: fedllm_sec.audit(None), "audit: None: must be the path of a run's folder"),
    ],
)
def test_an_argument_of_another_kind_is_told_in_a_line(call, told):
    with pytest.raises(FedError, match=told):
        call()


def test_a_model_that_does_not_take_such_inputs_is_told_with_the_shape():
    model = torch.nn.LSTM(9, 4, batch_first=True)
    size = sum(parameter.numel() for parameter in model.parameters())
    with pytest.raises(FedError, match=r"reconstruct: the model cannot be run.*shape \(2, 3, 8, 8\)"):
        fedllm_sec.reconstruct(torch.ones(size), model, (2, 3, 8, 8), "dlg")
    with pytest.raises(FedError, match="reveal_labels: "):
        fedllm_sec.reveal_labels(torch.ones(size), model, 2)


# ---------------------------------------------------------------- what a round costs


def test_the_cost_of_a_round_is_counted_by_hand():
    found = fedllm_sec.cost(10, 2048, wire="int8", rows_dtype="bfloat16", processes=4)
    assert (found.received, found.sent) == (8192, 2048 + 2 * 4)  # two blocks of 1,024 numbers with a scale each
    assert found.wire == 10 * (8192 + 2056)
    assert found.matrix == 10 * 2048 * 2
    assert found.rank == 3 * 4096  # of 10 clients each of four processes trains two or three
    assert found.exchange == 7 * 4096 + 3 * 8192
    alone = fedllm_sec.cost(10, 2048)
    assert (alone.rank, alone.exchange, alone.sent) == (0, 0, 8192)
    assert alone.server - fedllm_sec.cost(10, 2048, rows="disk").server == 10 * 8192 - 2**28


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"n": 0}, "n: 0: must be a whole number from 1 on"),
        ({"d": 1.5}, "d: 1.5: must be"),
        ({"n": True}, "n: True: must be"),
        ({"wire": "float8"}, "wire: 'float8': unknown. Choose float32, bfloat16, int8"),
        ({"rows": "cloud"}, "rows: 'cloud': unknown. Choose memory, disk"),
    ],
)
def test_a_cost_that_nothing_can_have_is_refused(settings, said):
    with pytest.raises(FedError, match=re.escape(said)):
        fedllm_sec.cost(**{"n": 2, "d": 3, **settings})
