"""FLDetector: forecasts, Hessian products, the gap statistic, and whom it drops."""

import numpy as np
import pytest
import torch

from fedllm_sec.defenses.prediction import FLDetector, hessian_times, split_in_two, two_groups
from fedllm_sec.errors import DefenseError
from fedllm_sec.matrix import UpdateMatrix
from fedllm_sec.seeds import generator_for
from tests.defenses.defense_rows import KINDS, assert_close, both, context, matrix, rows_of


def bfgs_reference(steps, changes, vector):
    """The dense BFGS matrix, updated pair by pair from sigma times the identity."""
    b = np.eye(len(vector)) * (steps[-1] @ changes[-1]) / (steps[-1] @ steps[-1])
    for s, y in zip(steps, changes, strict=True):
        b = b - np.outer(b @ s, b @ s) / (s @ b @ s) + np.outer(y, y) / (y @ s)
    return b @ vector


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("k", [1, 2, 5, 10])
def test_hessian_products_equal_dense_bfgs(k, sign):
    rng = generator_for(3, k)
    half = torch.randn(30, 30, generator=rng, dtype=torch.float64)
    hessian = sign * (half @ half.T / 30 + torch.eye(30))
    steps = torch.randn(k, 30, generator=rng, dtype=torch.float64)
    vector = torch.randn(30, generator=rng, dtype=torch.float64)
    got = hessian_times(steps, steps @ hessian, vector)
    assert_close(got, bfgs_reference(steps.numpy(), (steps @ hessian).numpy(), vector.numpy()), 1e-8)


def test_hessian_product_by_hand():
    # one pair: B maps the step (1, 0) to the change (2, 0) and is 2 elsewhere
    pair = (torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0]]))
    assert hessian_times(*pair, torch.tensor([3.0, 4.0])).tolist() == [6.0, 8.0]


def test_hessian_products_of_equal_or_empty_pairs_are_finite():
    steps = torch.ones(3, 4)
    assert torch.isfinite(hessian_times(steps, steps, torch.ones(4))).all()
    assert hessian_times(torch.zeros(1, 4), steps[:1], torch.ones(4)).tolist() == [0.0] * 4


def test_two_means_on_a_line_by_hand():
    assert split_in_two(torch.tensor([0.0, 1.0, 10.0, 11.0, 12.0])) == (2.5, 2)


def test_the_gap_statistic_finds_a_second_group_and_seldom_invents_one():
    alarms = 0
    for seed in range(20):
        rng = generator_for(seed, "gap")
        scores = torch.rand(12, generator=rng, dtype=torch.float64)
        scores[9:] += 3.0
        assert two_groups(scores, rng).tolist() == [False] * 9 + [True] * 3
        alarms += bool(two_groups(torch.randn(12, generator=rng, dtype=torch.float64), rng).any())
    assert alarms <= 3


def test_few_or_equal_scores_are_one_group():
    rng = generator_for(3)
    assert not two_groups(torch.tensor([0.0, 0.0, 9.0], dtype=torch.float64), rng).any()
    assert not two_groups(torch.full((9,), 0.2, dtype=torch.float64), rng).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 9, 64])
def test_scores_equal_their_reference(kind, n):
    """Round by round with dense BFGS; nobody is judged, so every update is the mean."""
    rule, scores, pairs, before = FLDetector(warmup=10), np.zeros(n), [], None
    w, shares = np.zeros(9), []
    for seed in range(4):
        updates, x = both(kind, n, 9, seed=seed)
        decision = rule(updates, context(9, global_vector=torch.from_numpy(w).float()))
        if before is not None:
            shift = np.zeros(9)
            if pairs:
                shift = bfgs_reference(*map(list, zip(*pairs, strict=True)), w - before[0])
            gaps = np.linalg.norm(x - before[1] - shift, axis=1)
            shares.append(gaps / gaps.mean())
            scores = np.mean(shares, axis=0)
            assert_close(decision.scores, scores, 1e-5)
            pairs.append((w - before[0], x.mean(axis=0) - before[1].mean(axis=0)))
        assert_close(decision.update, x.mean(axis=0))
        before, w = (w, x), (w + x.mean(axis=0)).astype(np.float32).astype(np.float64)


def erratic(round, honest=8, bad=3, d=43):
    """Clients that repeat themselves up to little noise, and some that jump about."""
    rows = rows_of("random", honest, d) + 0.05 * rows_of("random", honest, d, seed=round)
    jumps = 2 * rows_of("random", bad, d, seed=100 + round)
    ids = [f"c{i:02d}" for i in range(honest + bad)]
    return UpdateMatrix.of(torch.cat([rows, jumps]), ids=ids), rows


def test_clients_that_jump_about_are_dropped_after_the_warm_up():
    rule = FLDetector(warmup=2)
    for round in (1, 2, 3, 4):
        updates, honest = erratic(round)
        decision = rule(updates, context(round=round))
        wanted = [True] * 8 + [round <= 2] * 3
        assert decision.kept.tolist() == wanted
    assert_close(decision.update, honest.double().mean(0).numpy())


def test_a_client_is_not_marked_higher_because_few_of_its_round_are_known():
    # everybody repeats itself up to equal noise; two of the four of round 2 are known, all of round 3
    rule, base = FLDetector(warmup=1), torch.eye(6)

    def sent(round, *who):
        noise = torch.tensor([0.1, -0.1])[round % 2]
        rows = torch.stack([base[i] * (1 + noise) for i in who])
        return UpdateMatrix.of(rows, ids=[f"c{i}" for i in who])

    ctx = [context(6, round=r) for r in (1, 2, 3)]
    rule(sent(1, 0, 1), ctx[0])
    rule(sent(2, 0, 1, 2, 3), ctx[1])
    rule(sent(3, 0, 1, 2, 3), ctx[2])
    assert rule.marks["c0"] == pytest.approx([1.0, 1.0])  # of two known, of four known
    assert rule.marks["c2"] == pytest.approx([1.0])


@pytest.mark.slow
@pytest.mark.parametrize(("total", "per_round", "rounds", "least"), [(50, 50, 20, 0.9), (50, 10, 60, 0.5)])
def test_erratic_clients_are_found_under_sampling_too(total, per_round, rounds, least):
    found, honest, d = [], [], 60
    for seed in range(4):
        rule, rng = FLDetector(), generator_for(seed, "erratic")
        base, w = torch.randn(total, d, generator=rng), torch.zeros(d)
        for r in range(1, rounds + 1):
            who = torch.randperm(total, generator=rng)[:per_round]
            noise = torch.randn(per_round, d, generator=rng)
            bad = who < total // 5
            rows = base[who] + torch.where(bad[:, None], 1.5, 0.5) * noise
            updates = UpdateMatrix.of(rows, ids=[f"c{int(i)}" for i in who])
            decision = rule(updates, context(d, round=r, global_vector=w))
            w = w + decision.update
            if r > rounds // 2 and decision.notes["judged"] == per_round:
                found.append(float((~decision.kept[bad]).float().mean()) if bool(bad.any()) else 1.0)
                honest.append(float((~decision.kept[~bad]).float().mean()))
    assert sum(found) / len(found) >= least
    assert sum(honest) / len(honest) <= 0.02


def test_a_majority_is_never_dropped():
    # five attackers repeat one row exactly, eight honest clients jump about: the premise of the rule fails
    rule = FLDetector(warmup=1)
    for round in (1, 2, 3):
        updates, _ = erratic(round, honest=5, bad=8)
        decision = rule(updates, context(round=round))
    assert decision.notes["fallback"] == 1.0
    assert decision.kept.all()


def test_a_huge_row_gives_finite_scores_and_is_dropped():
    rule = FLDetector(warmup=1)
    for round in (1, 2, 3):
        updates, _ = erratic(round)
        updates.rows[-3:] *= 1e18 * (-1) ** round
        decision = rule(updates, context(round=round))
    assert torch.isfinite(decision.scores).all()
    assert not decision.kept[-1]


def test_a_restored_detector_goes_on_exactly():
    straight, resumed = FLDetector(warmup=1), FLDetector(warmup=1)
    for round in (1, 2, 3):
        straight(erratic(round)[0], context(round=round, global_vector=round * torch.ones(43)))
    resumed.load_state_dict(straight.state_dict())
    ctx = {"round": 4, "global_vector": 9 * torch.ones(43)}
    updates = erratic(4)[0].select([10, 3, 5, 1, 0])
    assert torch.equal(straight(updates, context(**ctx)).scores, resumed(updates, context(**ctx)).scores)


def test_no_tensor_of_the_state_is_there_twice_or_belongs_to_somebody_else():
    rule = FLDetector(warmup=1)
    vector = torch.ones(43)
    for round in (1, 2, 3):
        decision = rule(erratic(round)[0], context(round=round, global_vector=vector))
        vector = vector + decision.update
    state = rule.state_dict()
    parts = [*state["last"].values(), *state["vectors"].values(), *state["steps"], *state["changes"], *state["before"]]
    places = {part.data_ptr() for part in parts}
    assert len(places) == len(parts)
    assert vector.data_ptr() not in places
    assert decision.update.data_ptr() not in places


def test_all_zero_rows_have_score_zero():
    rule = FLDetector()
    for round in (1, 2, 3, 4, 5):
        decision = rule(matrix([[0.0, 0.0]] * 5), context(2, round=round))
    assert decision.scores.tolist() == [0.0] * 5
    assert decision.kept.all()


def test_a_run_too_short_to_judge_anybody_is_an_error():
    with pytest.raises(DefenseError, match=r"more rounds than warmup, got rounds=3, warmup=3\. Raise rounds"):
        FLDetector()(matrix([[1.0]]), context(1, rounds=3))
