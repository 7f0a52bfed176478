"""What a recipe that averages adapters by their products is told before anything is trained."""

import pytest

from fedllm_sec.build.averaging import ranks_of
from fedllm_sec.build.kept import save_problems
from fedllm_sec.build.names import checked
from fedllm_sec.build.plan import planned
from fedllm_sec.errors import RecipeError


def plan_of(average, lora=None, rule=None, **more):
    raw = {"clients": {"total": 6, "local_steps": 1}, "model": {"lora": {"average": average, **(lora or {})}}, **more}
    if rule is not None:
        raw |= {"enable_defense": True, "defense": {"rule": rule, **more.get("defense", {})}}
    return planned(checked(raw))


def test_rules_of_whole_rows_go_with_every_way_of_averaging():
    for average in ("factors", "freeze_a", "alternate", "stack", "exact", "svd", "pad", "core", "share_a"):
        plan_of(average, rule={"name": "multi_krum", "f": 1})
    plan_of("exact", rule={"name": "flame", "noise": 0.0})
    plan_of("freeze_b", {"init_lora_weights": "olora"})


def test_ranks_are_dealt_from_the_first_client_on_and_the_whole_one_is_not_cut():
    raw = {
        "clients": {"total": 4, "local_steps": 1, "ranks": {2: 1, 8: 2, 4: 1}},
        "model": {"lora": {"average": "pad"}},
    }
    recipe = checked(raw)
    assert ranks_of(recipe) == {"c00": 2, "c03": 4}


@pytest.mark.parametrize(
    ("ranks", "average", "more", "said"),
    [
        ({2: 3, 8: 3}, "exact", {}, "model.lora.average: exact needs one rank for all. Set average to pad or svd"),
        ({2: 3, 8: 2}, "pad", {}, "is for 5 clients, and clients.total is 6"),
        ({2: 3, 4: 3}, "svd", {}, "the largest is 4, and model.lora.r, the server's, is 8"),
        ({2: 3, 8: 3}, "svd", {"algorithm": {"name": "feddyn"}}, "has clients remember their rows"),
    ],
)
def test_ranks_that_cannot_be_are_an_error_with_the_reason(ranks, average, more, said):
    with pytest.raises(RecipeError) as error:
        plan_of(average, clients={"total": 6, "local_steps": 1, "ranks": ranks}, **more)
    assert said in str(error.value)


def test_ranks_without_an_adapter_are_an_error():
    raw = {"task": "classify", "data": {"name": "digits"}, "model": {"name": "logistic"}}
    with pytest.raises(RecipeError, match="are of LoRA adapters, and none is trained"):
        planned(checked({**raw, "clients": {"total": 2, "local_steps": 1, "ranks": {2: 2}}}))


@pytest.mark.parametrize(
    ("average", "lora", "rule", "more", "said"),
    [
        ("exact", {}, {"name": "median"}, {}, "median: model.lora.average: exact makes the mean of the products B A"),
        ("svd", {}, {"name": "flame"}, {}, "flame with noise: 0"),
        ("stack", {}, {"name": "centered_clipping"}, {}, "a vector into the update that no client of the round sent"),
        ("alternate", {"train": "B"}, None, {}, "train: B freezes A"),
        ("freeze_b", {}, None, {}, "B starts at 0, and with it A learns nothing"),
        ("exact", {"use_dora": True}, None, {}, "use_dora takes the lengths"),
        ("exact", {}, None, {"algorithm": {"name": "fedopt"}}, "needs a server that adds the mean"),
        ("exact", {}, {"name": "mean"}, {"defense": {"after": [{"name": "weak_dp"}]}}, "would be taken back"),
        ("svd", {}, {"name": "mean"}, {"defense": {"scope": "layer"}}, "gives a row no one weight"),
        ("share_a", {"train": "B"}, None, {}, "train: B freezes A"),
        ("share_a", {}, None, {"algorithm": {"name": "scaffold"}}, "remember whole rows, of which B never arrives"),
        ("share_a", {}, {"name": "mean"}, {"defense": {"after": [{"name": "weak_dp"}]}}, "in B reaches no client"),
        ("share_a", {}, {"name": "krum", "f": 1}, {"defense": {"space": "product"}}, "keeps its B to itself"),
        (
            "share_a",
            {},
            None,
            {
                "enable_attack": True,
                "attack": {"malicious": {"count": 1}, "update": [{"name": "lora_gauge"}]},
            },
            "B A stays the same only where both are sent",
        ),
        (
            "share_a",
            {},
            None,
            {
                "enable_attack": True,
                "attack": {
                    "observe": {"rounds": [1], "clients": [0], "what": "gradient"},
                    "privacy": [{"name": "membership"}],
                },
            },
            "is of B too, which never leaves a client",
        ),
        ("core", {"init_lora_weights": "pissa"}, None, {}, "would start from others. Set it to true"),
        ("core", {"use_dora": True}, None, {}, "use_dora trains lengths"),
        (
            "core",
            {},
            {"name": "krum", "f": 1},
            {"defense": {"space": "product"}},
            "its lengths and angles are those of products",
        ),
    ],
)
def test_what_does_not_go_with_a_way_of_averaging_is_an_error_with_the_reason(average, lora, rule, more, said):
    with pytest.raises(RecipeError) as error:
        plan_of(average, lora, rule, **more)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("model", "said"),
    [({"lora": None}, "there is no adapter to merge"), ({"load_in_4bit": True}, "the base model's weights are packed")],
)
def test_a_merged_model_that_cannot_be_is_an_error_before_training(model, said):
    raw = {"clients": {"total": 2, "local_steps": 1}, "output": {"save": "merged"}}
    assert save_problems(checked(raw)) == []
    with pytest.raises(RecipeError, match=f"output.save: merged: {said}"):
        planned(checked({**raw, "model": model}))
