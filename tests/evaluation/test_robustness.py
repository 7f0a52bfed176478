"""How far the aggregate was moved and how much attackers stand out, worked by hand."""

import math

import pytest
import torch

import fedllm_sec
from fedllm_sec.errors import DefenseError
from fedllm_sec.evaluation.robustness import breakdown, measure_rows, robustness_ratio, stealth
from fedllm_sec.matrix import UpdateMatrix


def measured(rows: list[list[float]], update: list[float], malicious: set[str]) -> dict:
    ids = [f"c{i}" for i in range(len(rows))]
    return measure_rows(UpdateMatrix.of(torch.tensor(rows), ids=ids), torch.tensor(update), malicious)


def test_the_ratio_is_the_squared_error_over_the_honest_variance() -> None:
    # honest (0, 0), (2, 0): mean (1, 0), variance (1 + 1) / 2 = 1; aggregate (1, 3) is off by 9
    assert measured([[0, 0], [2, 0], [9, 9.0]], [1, 3.0], {"c2"})["robustness"] == pytest.approx(9.0)


def test_the_honest_mean_has_ratio_zero_and_an_honest_row_one_on_average() -> None:
    rows = torch.randn(7, 50, generator=torch.Generator().manual_seed(0)).double() + 3
    ratios = []
    for update in [rows.mean(0), *rows]:
        everything = torch.cat([rows, update[None]])
        ratios.append(robustness_ratio(torch.cdist(rows, everything).square()))
    assert ratios[0] == pytest.approx(0.0, abs=1e-9)
    assert sum(ratios[1:]) / 7 == pytest.approx(1.0)


def test_a_common_part_of_the_rows_does_not_spoil_the_ratio() -> None:
    rows = torch.randn(6, 400, generator=torch.Generator().manual_seed(1)) * 1e-3
    update = rows[:4].mean(0) + 2e-3
    ids, bad = [f"c{i}" for i in range(6)], {"c4", "c5"}
    honest = rows[:4].double()
    truth = float((update.double() - honest.mean(0)).square().sum() / (honest - honest.mean(0)).square().sum(1).mean())
    for common in (0.0, 1.0):
        found = measure_rows(UpdateMatrix.of(rows + common, ids=ids), update + common, bad)["robustness"]
        assert found == pytest.approx(truth, rel=1e-3)


def test_fewer_than_two_honest_rows_nobody_malicious_or_equal_rows_have_no_ratio() -> None:
    assert measured([[0, 0], [2, 0.0]], [1, 0.0], {"c1"})["robustness"] is None
    assert measured([[0, 0], [2, 0.0]], [1, 0.0], set()) == {"robustness": None, "stealth": None}
    assert measured([[0, 0], [2, 0.0]], [1, 0.0], {"c0", "c1"}) == {"robustness": None, "stealth": None}
    assert measured([[1, 1], [1, 1], [5, 5.0]], [1, 1.0], {"c2"})["robustness"] is None


def test_an_update_that_is_not_finite_has_no_ratio_and_the_rows_still_have_their_ranks() -> None:
    found = measured([[1, 0], [2, 0], [3, 0.0]], [math.inf, 0.0], {"c2"})
    assert found["robustness"] is None
    assert found["stealth"]["norm_rank"] == 1.0


def test_ranks_are_shares_of_the_honest_rows() -> None:
    # norms 1, 3, 5 honest, 4 malicious: longer than two of three
    # directions: honest all along x, the malicious one against them: its cosine is the smallest
    found = measured([[1, 0], [3, 0], [5, 0], [-4, 0.0]], [0, 0.0], {"c3"})["stealth"]
    assert found == {"norm_rank": pytest.approx(2 / 3), "cosine_rank": 0.0}


def test_a_copy_of_an_honest_row_is_hidden_and_attackers_are_averaged() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [9.0, 0.0]])
    found = stealth(rows @ rows.T, [False, False, True, True])
    assert found["norm_rank"] == pytest.approx((0.5 + 1.0) / 2)


def test_a_zero_row_has_cosine_zero() -> None:
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 0.0]])
    assert stealth(rows @ rows.T, [False, False, True]) == {"norm_rank": 0.0, "cosine_rank": 0.0}


def test_lazily_mixed_rows_are_measured_as_they_stand() -> None:
    rows = torch.randn(5, 30, generator=torch.Generator().manual_seed(2))
    factors = torch.diag(torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0]).double())
    lazy = UpdateMatrix.of(rows).mix(factors)
    plain = UpdateMatrix.of((factors @ rows.double()).float())
    update = rows.mean(0)
    lazily, directly = (measure_rows(m, update, {"3", "4"}) for m in (lazy, plain))
    assert lazily["robustness"] == pytest.approx(directly["robustness"], rel=1e-5)
    assert lazily["stealth"] == directly["stealth"]


# honest rows of one coordinate, 0 and 2 in turn: their mean is near 1, their variance near 1
LINE = torch.tensor([[0.0], [2.0]] * 5)


def shout(honest: torch.Tensor, m: int) -> torch.Tensor:
    return torch.full((m, 1), 5.0)


def test_the_breakdown_point_is_the_first_m_beyond_the_limit() -> None:
    # the mean of n = 10 rows is m/10 (5 - honest mean) off. m = 2: mean 1, variance 1, (0.8)^2; m = 3: honest mean
    # 6/7, variance 48/49, (0.3 * 29/7)^2 = 1.545 and 1.577 times the variance
    found = breakdown(lambda rows, m: rows.mean(0), shout, [LINE])
    assert found.point == 3
    assert found.refused is None
    assert found.ratios == {
        1: pytest.approx(0.16 * 1.0, rel=0.3),
        2: pytest.approx(0.64),
        3: pytest.approx(1.577, 1e-3),
    }
    assert breakdown(lambda rows, m: rows.mean(0), shout, [LINE], limit=0.5).point == 2


def test_a_rule_that_holds_to_the_end_has_no_breakdown_point() -> None:
    found = breakdown(lambda rows, m: fedllm_sec.aggregate(rows, "trimmed_mean", f=m).update, shout, [LINE])
    assert found.point is None
    assert list(found.ratios) == [1, 2, 3, 4]
    assert list(breakdown(lambda rows, m: rows[0], shout, [LINE], limit=9.0, most=2).ratios) == [1, 2]


def test_a_rule_that_refuses_is_told_apart_from_one_that_breaks() -> None:
    found = breakdown(lambda rows, m: fedllm_sec.aggregate(rows, "bulyan", f=m).update, shout, [LINE])
    assert (found.point, found.refused) == (None, 2)  # bulyan needs 4 * 2 + 3 clients


def test_ratios_are_means_over_the_trials_and_nan_breaks() -> None:
    spread = torch.tensor([[-1.0], [3.0]] * 5)
    one, two, both = (
        breakdown(lambda rows, m: rows.mean(0), shout, t, most=2) for t in ([LINE], [spread], [LINE, spread])
    )
    assert both.ratios[2] == pytest.approx((one.ratios[2] + two.ratios[2]) / 2)

    def undecided(rows: torch.Tensor, m: int) -> torch.Tensor:
        return torch.tensor([math.nan])

    with pytest.raises(DefenseError, match="trials is empty"):
        breakdown(undecided, shout, [])
    assert breakdown(undecided, shout, [LINE]).point == 1
