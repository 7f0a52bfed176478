"""FoundationFL against NumPy and by hand, and the three rows that make it copy one of them."""

import numpy as np
import pytest
import torch

from fedllm_sec.defenses.columns import foundationfl, median
from fedllm_sec.errors import DefenseError
from tests.defenses import references
from tests.defenses.defense_rows import assert_close, assert_repaired, attacked, both, context, matrix


def reference(x, m, f):
    """Fang et al. 2025: the row whose smaller distance to an extreme is largest stands in m times more."""
    high, low = x.max(axis=0), x.min(axis=0)
    scores = np.minimum(np.linalg.norm(x - high, axis=1), np.linalg.norm(x - low, axis=1))
    all_rows = np.concatenate([x, np.repeat(x[[scores.argmax()]], m, axis=0)])
    return references.median(all_rows) if f is None else references.trimmed_mean(all_rows, f)


@pytest.mark.parametrize("kind", ["random", "heavy_tailed", "tiny", "huge"])
@pytest.mark.parametrize(("n", "m", "f"), [(3, None, None), (8, None, 2), (11, 5, None), (11, 0, 3), (16, 1, 8)])
def test_it_equals_its_reference(kind, n, m, f):
    updates, x = both(kind, n)
    decision = foundationfl(updates, context(), m=m, f=f)
    assert_close(decision.update, reference(x, -(-n // 2) if m is None else m, f))


def test_the_copied_row_and_the_scores_by_hand():
    # extremes (9, 8) and (0, 0); distances to the nearer: 0, 5, sqrt(16 + 16), 0
    rows = matrix([[0.0, 0], [4, 3], [5, 4], [9, 8]], ids=["a", "c", "b", "d"])
    decision = foundationfl(rows, context(2))
    assert decision.scores.tolist() == pytest.approx([32**0.5, 32**0.5 - 5, 0, 32**0.5])
    assert decision.update.tolist() == [5.0, 4.0]  # of 0, 4, 5, 5, 5, 9 and 0, 3, 4, 4, 4, 8
    assert foundationfl(rows, context(2), m=0).update.tolist() == median(rows, context(2)).update.tolist()


def test_of_equal_scores_the_smallest_id_is_copied():
    rows = matrix([[0.0], [1.0], [3.0], [4.0]], ids=["d", "c", "b", "a"])  # 1 and 3 are 1 from an extreme
    assert foundationfl(rows, context(1), m=3).update.tolist() == [3.0]


@pytest.mark.parametrize("settings", [{}, {"f": 3}])
def test_three_of_thirteen_rows_far_away_do_not_lead_it_astray(settings):
    updates, honest = attacked()
    assert_repaired(foundationfl(updates, context(), **settings).update, honest)


def test_two_rows_on_the_extremes_make_it_copy_a_third_of_theirs():
    _, honest = attacked()
    signs = torch.tensor([1.0, -1.0]).repeat(22)[:43]
    rows = torch.cat([honest, torch.stack([torch.full((43,), 20.0), torch.full((43,), -20.0), 10 * signs])])
    decision = foundationfl(matrix(rows.tolist()), context())
    assert int(decision.scores.argmin()) == 12
    centre = honest.mean(0)
    led = float((decision.update - centre).norm())  # 8 of 20 rows are then the attackers', and two more span them
    assert led > 1.5 * float((median(matrix(rows.tolist()), context()).update - centre).norm())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"m": -1}, "foundationfl: needs m >= 0 synthetic rows, got m=-1"),
        ({"f": -1}, "foundationfl: needs f >= 0 assumed attackers"),
        ({"f": 3}, r"foundationfl: needs n \+ m > 2f rows, got n=4, f=3"),
    ],
)
def test_it_says_what_it_needs(settings, message):
    with pytest.raises(DefenseError, match=message):
        foundationfl(matrix([[1.0], [2], [3], [4]]), context(1), **settings)
