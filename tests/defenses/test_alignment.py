"""AlignIns against NumPy, and by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedllm_sec.defenses.alignment import alignins, principal_signs
from fedllm_sec.errors import DefenseError
from fedllm_sec.seeds import generator_for
from tests.defenses.defense_rows import context, matrix


def reference(x, vector, share, lambda_c, lambda_s):
    """Xu et al. 2025, algorithm 1, without ties: the update and who is kept."""
    most = np.sign(np.sign(x).sum(0))
    k = int(share * x.shape[1])
    top = [np.argsort(-np.abs(row))[:k] for row in x]
    signs = np.array([(np.sign(row[t]) == most[t]).mean() for row, t in zip(x, top, strict=True)])
    cosine = x @ vector / np.linalg.norm(x, axis=1) / np.linalg.norm(vector)
    z = [np.abs(v - np.median(v)) / v.std() for v in (cosine, signs)]
    kept = (z[0] <= lambda_c) & (z[1] <= lambda_s)
    norms = np.linalg.norm(x[kept], axis=1)
    clipped = x[kept] * np.minimum(1, np.median(norms) / norms)[:, None]
    return clipped.mean(0), kept


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("share", "lambdas"), [(0.3, (1.0, 1.0)), (0.1, (2.0, 0.8))])
def test_it_is_the_papers_algorithm(seed, share, lambdas):
    rows = torch.randn(11, 300, generator=generator_for(seed, "rows")) + 0.3
    rows[8:] *= -2
    vector = torch.randn(300, generator=generator_for(seed, "vector"))
    ctx = replace(context(300), global_vector=vector)
    update, kept = reference(rows.double().numpy(), vector.double().numpy(), share, *lambdas)
    decision = alignins(matrix(rows.tolist()), ctx, share=share, lambda_c=lambdas[0], lambda_s=lambdas[1])
    assert decision.kept.tolist() == kept.tolist()
    np.testing.assert_allclose(decision.update.numpy(), update, rtol=1e-4, atol=1e-5)
    assert ((decision.scores > 1 + 1e-9) == ~decision.kept).all()


def test_principal_signs_by_hand():
    # most signs: +, -, +, +; the two largest of each row: agree 2 of 2, 1 of 2, 0 of 2; ties all count, zeros never
    rows = [[4.0, -3, 1, 1], [1, -2, -3, 1], [-5, 6, 1, 1]]
    assert principal_signs(matrix(rows), 2).tolist() == [1.0, 0.5, 0.0]
    tied = [[2.0, -2, 2, 0], [2, -2, 2, 0], [0, 0, 0, 0]]
    assert principal_signs(matrix(tied), 1).tolist() == [1.0, 1.0, 0.0]


def test_two_clients_are_both_kept_and_nobody_is_a_zero_update():
    rows = torch.randn(2, 40, generator=generator_for(1, "two"))
    ctx = replace(context(40), global_vector=torch.ones(40))
    assert alignins(matrix(rows.tolist()), ctx).kept.tolist() == [True, True]
    none = alignins(matrix(rows.tolist()), ctx, lambda_c=0.5, lambda_s=0.5)
    assert not none.kept.any()
    assert float(none.update.abs().max()) == 0.0


def test_bounds_and_shares_that_mean_nothing_are_refused():
    with pytest.raises(DefenseError, match="alignins: needs 0 < share <= 1"):
        alignins(matrix([[1.0], [2.0]]), context(1), share=0.0)
    with pytest.raises(DefenseError, match="alignins: needs lambdas > 0"):
        alignins(matrix([[1.0], [2.0]]), context(1), lambda_s=0.0)
