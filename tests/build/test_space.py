"""What a recipe that compares products is told before anything is trained."""

import pytest

from fedllm_sec.build.names import checked
from fedllm_sec.build.plan import planned
from fedllm_sec.errors import RecipeError


def plan_of(defense, **more):
    return planned(
        checked({"clients": {"total": 6, "local_steps": 1}, "enable_defense": True, "defense": defense, **more})
    )


def test_a_row_rule_in_product_space_can_work_and_the_spaces_reach_the_defense():
    for space in ("product", "aligned"):
        assert plan_of({"space": space, "rule": {"name": "krum", "f": 1}}).methods.defense.enter.kind == space
    assert plan_of({"rule": {"name": "krum", "f": 1}}).methods.defense.enter is None


@pytest.mark.parametrize(
    ("defense", "more", "said"),
    [
        ({"space": "product", "rule": {"name": "median"}}, {}, "median: reads single coordinates"),
        ({"space": "product", "before": [{"name": "weak_dp_client"}]}, {}, "weak_dp_client: reads single coordinates"),
        ({"space": "product"}, {"model": {"lora": None}}, "defense.space: product: is for LoRA adapters"),
        ({"scope": "layer"}, {"task": "classify"}, "defense.scope: layer: is for LoRA adapters"),
        ({"space": "aligned"}, {"model": {"lora": {"train": "B"}}}, "needs both factors of an adapter"),
    ],
)
def test_a_space_that_cannot_act_is_an_error_with_the_reason(defense, more, said):
    with pytest.raises(RecipeError) as error:
        plan_of(defense, **more)
    assert said in str(error.value)
