"""3DFed by hand: masks, verdicts, decoys, and what it learns from the global step alone."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from fedllm_sec.attacks.conformance import example_view
from fedllm_sec.attacks.update.threedfed import ThreeDFed, last_matrix, masks, quiet, verdicts
from fedllm_sec.errors import AttackError
from fedllm_sec.matrix import Layout
from fedllm_sec.seeds import generator_for


def test_one_step_on_the_masks_equals_its_formula():
    base = torch.tensor([[3.0, 0.0], [0.0, 4.0]], dtype=torch.float64)  # of length 5, rows of 3 and 4 in absolute sum
    drawn = torch.randn(2, 2, 2, generator=generator_for(1, "masks"), dtype=torch.float64) / 2
    at, rows = drawn - drawn.mean(0), base / 5
    total = (at[0] + at[1]).norm()  # 0: they begin by cancelling, and its gradient is taken as 0
    assert float(total) < 1e-12
    wanted = []
    for mask in at:
        gradient = torch.zeros(2, 2, dtype=torch.float64)
        for j in range(2):
            moved = rows[j] + mask[j]
            gradient[j] += 0.25 * -0.7 * moved.sign() / moved.abs().sum() ** 2 / 2
        gradient += 0.75 * mask / mask.norm()
        wanted.append(mask - 0.1 * gradient / 2)
    made = torch.stack(wanted)
    found = masks(base, 0.25, 2, generator_for(1, "masks"), steps=1)
    assert torch.allclose(found, (made - made.mean(0)) * 5, atol=1e-12)


def test_masks_cancel_and_disguise_makes_quiet_neurons_loud():
    base = torch.full((3, 4), 0.01)
    short, loud = (masks(base, alpha, 4, generator_for(2, "masks")) for alpha in (0.01, 0.99))
    for made in (short, loud):
        assert float(made.sum(0).abs().max()) < 1e-9
    assert float(loud.norm()) > float(short.norm())


@pytest.mark.parametrize(
    ("feedback", "wanted"),
    [
        ([0.1, 0.1, 0.0], ["accepted", "accepted", "rejected"]),
        ([0.1, 0.05, 0.001], ["accepted", "clipped", "rejected"]),
        ([0.0, 0.0], ["rejected", "rejected"]),
        ([0.1, -0.2], None),
        ([1.5, 0.1], None),
    ],
)
def test_what_is_left_of_a_mark_tells_what_became_of_the_row(feedback, wanted):
    assert verdicts(feedback, 0.01) == wanted


def test_marks_lie_where_nobody_moves_and_not_under_the_masks():
    update, honest = torch.tensor([0.0, 0.5, -0.1, 0.0, 0.2]), torch.tensor([0.0, 0.0, 0.1, 0.9, 0.1])
    assert quiet(update, honest, slice(0, 1), 2) == [2, 4]
    assert last_matrix(Layout(("conv", "w", "b"), ((2, 1, 3, 3), (4, 5), (4,)))) == (slice(18, 38), (4, 5))
    with pytest.raises(AttackError, match="no matrix"):
        last_matrix(Layout.single(9))


def played(view, attack, kept):
    """The rows, and the next view if the server takes the mean of all rows that are `kept`."""
    rows = attack(view)
    step = rows[kept].sum(0) / view.cohort_size if kept else torch.zeros_like(rows[0])
    following = generator_for(7, "draws", view.round + 1)
    return rows, replace(view, round=view.round + 1, last_update=step, rng=following)


def test_rows_carry_the_backdoor_in_their_mean_and_each_its_mark():
    view, attack = replace(example_view(m=4), others=None), ThreeDFed()
    rows = attack(view)
    free = torch.ones(rows.shape[1], dtype=torch.bool)
    free[[at for at, _ in attack.planted]] = False
    base = view.own.mean(0)
    base = base * max(1.0, float(view.own.norm(dim=1).quantile(0.5) / base.norm()))
    assert torch.allclose(rows.mean(0)[free], base[free], atol=1e-5)
    assert not torch.equal(rows[0][free], rows[1][free])
    for row, (at, number) in zip(rows, attack.planted, strict=True):
        assert row[at] == pytest.approx(number)


def test_a_decoy_joins_where_nothing_was_accepted_and_masks_stay_where_all_were():
    view, attack = replace(example_view(m=4), others=None), ThreeDFed()
    _, dropped = played(view, attack, [])
    first = list(attack.alphas)
    _, taken = played(dropped, attack, [0, 1, 2, 3])
    assert attack.decoys == 1
    assert attack.alphas != first  # drawn anew
    assert attack.sent[1] == 0  # an all-zero step shows no honest row to set a decoy out from
    second = list(attack.alphas)
    resumed = ThreeDFed()
    resumed.load_state_dict(attack.state_dict())
    rows = attack(taken)
    assert attack.alphas == second
    assert attack.sent[:2] == (4, 1)
    spread = rows[3] - taken.last_update * (rows[3].norm() / taken.last_update.norm())
    assert int(spread.abs().argmax()) >= 96  # the push is in the last matrix, which begins there
    assert torch.equal(resumed(replace(taken, rng=generator_for(7, "draws", 4))), rows)


def test_noise_on_the_server_ends_the_tuning():
    view, attack = replace(example_view(m=4), others=None), ThreeDFed()
    _, following = played(view, attack, [])
    following.last_update[attack.planted[0][0]] = -attack.planted[0][1]
    attack(following)
    assert attack.hidden
    assert attack.alphas == [0.1]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"neurons": 0}, "needs neurons >= 1 and group >= 2"),
        ({"alpha": 1.0}, "threedfed.alpha: 1.0"),
        ({"mark": float("nan")}, "needs most >= 1 and mark > 0"),
    ],
)
def test_settings_that_cannot_be_are_said(settings, said):
    with pytest.raises(AttackError, match=re.escape(said)):
        ThreeDFed(**settings)
