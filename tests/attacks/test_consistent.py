"""PoisonedFL against its formula in NumPy, and what it does with the model's answer."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import binom

from fedllm_sec.attacks.conformance import example_view
from fedllm_sec.attacks.update.consistent import PoisonedFL
from fedllm_sec.errors import AttackError
from tests.attacks.test_effect_on_digits import CLEAN, MULTI_KRUM, accuracy


def reference(step, mine, signs, factor):
    """Algorithm 1, one row."""
    left = np.abs(step - np.linalg.norm(step) / np.linalg.norm(mine) * mine)
    return factor * np.linalg.norm(step) * left / np.linalg.norm(left) * signs


def test_the_second_row_is_the_papers_formula_of_the_step_and_the_first():
    view, attack = example_view(m=3), PoisonedFL(factor=8.0)
    first = attack(replace(view, last_update=None, round=1))
    assert torch.equal(first, view.own)
    signs = attack.signs.double().numpy()
    assert set(signs) == {-1.0, 1.0}
    assert abs(signs.mean()) < 0.3
    step = torch.randn(view.own.shape[1], generator=view.rng)
    rows = attack(replace(view, last_update=step, round=2))
    wanted = reference(step.double().numpy(), first[0].double().numpy(), signs, 8.0)
    np.testing.assert_allclose(rows.double().numpy(), np.tile(wanted, (3, 1)), rtol=1e-5, atol=1e-6)
    assert float(rows[0].norm()) == pytest.approx(8 * float(step.norm()), rel=1e-5)
    third = attack(replace(view, last_update=2 * step, round=3))
    wanted = reference(2 * step.double().numpy(), rows[0].double().numpy(), signs, 8.0)
    np.testing.assert_allclose(third[0].double().numpy(), wanted, rtol=1e-4, atol=1e-5)


def test_the_factor_falls_where_the_model_did_not_move_with_the_signs_and_not_below_half():
    view, attack = example_view(m=1), PoisonedFL(factor=1.0, every=2)
    vector = view.global_vector
    for round, (moved, factor) in enumerate(
        [(0, 1.0), (1, 1.0), (1, 1.0), (1, 1.0), (-1, 0.7), (-1, 0.7), (-1, 0.7)], 1
    ):
        if attack.signs is not None:
            vector = vector + 0.1 * moved * attack.signs
        attack(replace(view, global_vector=vector, round=round))
        assert attack.factor == pytest.approx(factor), round


def test_the_one_percent_point_is_that_of_the_authors_table():
    assert [int(binom.ppf(0.99, d, 0.5)) for d in (139960, 717924, 145212, 1204682)] == [70415, 359948, 73049, 603618]


def test_a_resumed_attacker_goes_on_with_its_signs():
    view, attack, resumed = example_view(m=2), PoisonedFL(every=1), PoisonedFL(every=1)
    attack(view)
    resumed.load_state_dict(attack.state_dict())
    later = replace(view, round=2, global_vector=view.global_vector - 0.1, last_update=view.last_update.flip(0))
    assert torch.equal(resumed(later), attack(later))
    assert resumed.factor == attack.factor


def test_settings_that_push_nowhere_are_refused():
    with pytest.raises(AttackError, match=r"poisonedfl\.factor: 0"):
        PoisonedFL(factor=0)
    with pytest.raises(AttackError, match=r"poisonedfl\.every: 0"):
        PoisonedFL(every=0)


def test_it_ruins_the_mean_without_an_honest_row_and_not_rules_that_look_at_length():
    attack = [{"name": "poisonedfl"}]
    assert accuracy(update=attack) <= 0.4
    assert accuracy(update=attack, rule=MULTI_KRUM) >= CLEAN - 0.03
    assert accuracy(update=attack, rule={"name": "alignins"}) >= 0.70
