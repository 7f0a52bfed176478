"""The round loop on quadratics: what each round must give can be computed by hand."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from fedllm_sec.algorithms import fedavg
from fedllm_sec.attacks.threat import Threat, choose_malicious
from fedllm_sec.defenses import MENU, nnm, weak_dp, weak_dp_client
from fedllm_sec.defenses.pipeline import Pipeline
from fedllm_sec.errors import AttackError, DefenseError, FedError
from fedllm_sec.protocols import Client, ThreatView
from fedllm_sec.recipe.resolve import resolve
from fedllm_sec.rounds.client import LocalTraining
from fedllm_sec.rounds.cohort import sample
from fedllm_sec.rounds.compute import Machine
from fedllm_sec.rounds.federation import Federation, run
from fedllm_sec.seeds import generator_for
from tests.toy import Quadratic

ONE_STEP = LocalTraining(batch_size=10, steps=1, optimizer="sgd", lr=1.0, max_grad_norm=None)


def federation(
    targets: list[list[float]], rule: str = "mean", threat: Threat | None = None, **settings: Any
) -> Federation:
    """Each client's one step from w moves it right onto its target: delta = target - w."""
    task = Quadratic(len(targets[0]))
    return Federation(
        task=task,
        clients=[Client(f"c{i}", torch.tensor([t])) for i, t in enumerate(targets)],
        training=ONE_STEP,
        machine=Machine(Accelerator(cpu=True)),
        algorithm=fedavg(),
        defense=Pipeline([], resolve(rule, settings, MENU, "defense.rule"), []),
        threat=threat,
        evaluation=None,
        vector=torch.zeros(len(targets[0])),
    )


def flip(view: ThreatView) -> torch.Tensor:
    return -view.own


def nan(view: ThreatView) -> torch.Tensor:
    return torch.full_like(view.own, float("nan"))


def threat(update=(), **settings: Any) -> Threat:
    return Threat(malicious=frozenset({"c0"}), seed=0, update=update, **settings)


def test_one_round_of_fedavg_moves_to_the_mean_target():
    fed = federation([[1.0, 0.0], [3.0, 0.0], [5.0, 3.0]])
    (record,) = run(fed, 1)
    assert fed.vector.tolist() == [3.0, 1.0]
    assert record.cohort == ["c0", "c1", "c2"]
    assert record.norms["c1"] == 3.0
    assert record.update_norm == pytest.approx(10**0.5)
    assert record.quality is None
    assert record.attack is None
    assert record.detection is None


def test_the_attackers_row_is_what_the_server_sees():
    fed = federation([[3.0], [3.0], [3.0]], threat=threat((flip,)))
    (record,) = run(fed, 1)
    assert fed.vector.tolist() == [1.0]
    assert record.malicious == ["c0"]
    assert record.attacking


def test_a_defense_that_selects_is_scored_against_the_truth():
    targets = [[3.0], [3.1], [2.9], [3.0], [3.05]]
    fed = federation(targets, "multi_krum", threat((flip,)), f=1)
    (record,) = run(fed, 1)
    assert record.kept == ["c1", "c2", "c3", "c4"]
    assert record.detection == {"tpr": 1.0, "weight_share": 0.0, "fpr": 0.0, "auc": 1.0}
    assert fed.vector.item() == pytest.approx(3.0125)


def test_a_row_that_holds_attackers_is_not_told_as_attackers_that_were_dropped():
    # Among honest 1, 1.1, 1.2, 1.3, 1.4 the attackers send 1.15 and 1.25: all means of five neighbours (nnm, f=2) hold
    # both. Krum takes one of the seven mixed rows: it has dropped nobody whose share is a fifth.
    targets = [[-1.15], [-1.25], [1.0], [1.1], [1.2], [1.3], [1.4]]
    fed = federation(targets, "krum", Threat(malicious=frozenset({"c0", "c1"}), seed=0, update=(flip,)), f=2)
    fed.defense = Pipeline([partial(nnm, f=2)], fed.defense.rule)
    (record,) = run(fed, 1)
    assert sorted(record.weights.values()) == pytest.approx([0, 0, 0.2, 0.2, 0.2, 0.2, 0.2])
    assert record.kept == [id for id, weight in record.weights.items() if weight > 0]
    assert record.detection["tpr"] == 0.0
    assert record.detection["weight_share"] == pytest.approx(0.4)  # a plain mean gives them 2 of 7: 0.286
    assert record.detection["fpr"] == pytest.approx(2 / 5)
    assert record.scores is None  # the rows' scores, not the clients'
    assert record.detection["auc"] is None


def test_a_round_under_attack_says_how_far_off_the_update_was_and_how_much_the_attacker_stood_out():
    # honest 1 and 3: mean 2, variance 1; the attacker sends -0.5, so the mean of all is 7/6: (2 - 7/6)^2
    fed = federation([[0.5], [1.0], [3.0]], threat=threat((flip,)))
    (record,) = run(fed, 1)
    assert record.robustness == pytest.approx((5 / 6) ** 2)
    assert record.stealth == {"norm_rank": 0.0, "cosine_rank": 0.0}
    (record,) = run(federation([[6.0], [1.0], [3.0]]), 1)
    assert record.robustness is None
    assert record.stealth is None


@pytest.mark.filterwarnings("ignore:weak_dp")
def test_the_record_has_how_long_noise_was_beside_the_step_whichever_stage_added_it():
    fed = federation([[1.0, 2.0], [1.5, 2.5], [2.0, 3.0]])
    noise = {"sigma": 0.5, "absolute": False}
    fed.defense = Pipeline([partial(weak_dp_client, **noise)], fed.defense.rule, [partial(weak_dp, **noise)])
    for record in run(fed, 2):
        assert 0 < record.notes["weak_dp_client_noise_to_step"] < 1
        assert record.notes["weak_dp_noise_to_step"] == pytest.approx(0.5)


def test_a_round_that_was_skipped_has_no_robustness():
    fed = federation([[float(i)] for i in range(5)], "krum", threat((nan,)), f=1)
    (record,) = run(fed, 1)
    assert record.skipped is not None
    assert record.robustness is None


def test_attackers_rest_outside_their_rounds():
    plan = threat((flip,), start=2, stop=5, every=2)
    fed = federation([[3.0], [3.0], [3.0]], threat=plan)
    assert [r.attacking for r in run(fed, 7)] == [False, True, False, True, False, False, False]


def test_an_attacker_owns_its_poisoned_shard_only_while_it_attacks():
    plan = threat(start=2)
    plan.poisoned = {"c0": torch.tensor([[-9.0]])}
    fed = federation([[3.0], [3.0], [3.0]], threat=plan)
    rounds = run(fed, 2)
    assert next(rounds).norms["c0"] == 3.0
    assert next(rounds).norms["c0"] == 12.0  # from 3 to -9


def test_a_client_that_sends_nan_is_quarantined_and_the_round_goes_on():
    fed = federation([[3.0], [1.0], [5.0]], threat=threat((nan,)))
    (record,) = run(fed, 1)
    assert "not finite" in record.quarantined["c0"]
    assert fed.vector.tolist() == [3.0]
    assert record.skipped is None
    assert "c0" not in record.weights


def test_a_round_with_too_few_usable_rows_is_skipped_and_the_model_kept():
    targets = [[float(i)] for i in range(5)]
    fed = federation(targets, "krum", threat((nan,)), f=1)
    records = list(run(fed, 2))
    assert all("krum" in r.skipped for r in records)
    assert fed.vector.tolist() == [0.0]
    assert fed.round == 2


def test_a_rule_that_can_never_hold_stops_the_run():
    with pytest.raises(DefenseError, match="krum"):
        list(run(federation([[1.0], [2.0], [3.0]], "krum", f=1), 1))


def test_an_attack_that_gives_the_wrong_shape_is_an_error():
    with pytest.raises(AttackError, match="must be \\(1, 1\\)"):
        list(run(federation([[1.0], [2.0]], threat=threat((lambda view: view.own[:, :0],))), 1))


@pytest.mark.parametrize(
    ("knowledge", "sees", "knows"), [("own", 0, False), ("cohort", 2, False), ("cohort+defense", 2, True)]
)
def test_attackers_see_what_their_knowledge_grants(knowledge, sees, knows):
    seen = []

    def look(view: ThreatView) -> torch.Tensor:
        seen.append((0 if view.others is None else len(view.others), view.defense is not None))
        return view.own

    list(run(federation([[1.0], [2.0], [3.0]], threat=threat((look,), knowledge=knowledge)), 1))
    assert seen == [(sees, knows)]


def test_trying_the_defense_does_not_move_its_memory():
    def probe(view: ThreatView) -> torch.Tensor:
        from fedllm_sec.matrix import UpdateMatrix

        for _ in range(3):
            view.defense(UpdateMatrix.of(torch.cat([view.own * 50, view.others]), ids=["c0", "c1", "c2"]))
        return view.own

    outcomes = []
    for attack in ((), (probe,)):
        fed = federation(
            [[1.0, 1.0], [2.0, -1.0], [3.0, 1.0]], "centered_clipping", threat(attack, knowledge="cohort+defense")
        )
        list(run(fed, 3))
        outcomes.append(fed.vector)
    assert torch.equal(*outcomes)


def test_a_restored_federation_goes_on_as_the_straight_one():
    def make() -> Federation:
        fed = federation([[1.0, 1.0], [2.0, -1.0], [3.0, 1.0], [0.0, 2.0]], "foolsgold", threat((flip,)))
        return replace(fed, algorithm=fedavg(server_momentum=0.5), per_round=3)

    straight = make()
    list(run(straight, 5))
    first, second = make(), make()
    list(run(first, 2))
    second.load_state_dict(first.state_dict())
    list(run(second, 5))
    assert torch.equal(straight.vector, second.vector)


def test_a_cohort_is_drawn_without_replacement_and_by_the_round():
    clients = [Client(f"c{i}", None) for i in range(20)]
    drawn = [tuple(c.id for c in sample(clients, 5, generator_for(0, r, "cohort"))) for r in range(10)]
    assert all(len(set(ids)) == 5 for ids in drawn)
    assert len(set(drawn)) > 5


def test_the_malicious_set_is_fixed_by_the_seed():
    ids = [f"c{i}" for i in range(10)]
    assert choose_malicious(3, ids, 0) == choose_malicious(3, ids, 0)
    assert len({choose_malicious(3, ids, s) for s in range(10)}) > 3


def test_a_defense_cannot_read_who_is_malicious():
    from fedllm_sec.matrix import UpdateMatrix
    from fedllm_sec.protocols import RoundContext

    for known in (RoundContext, UpdateMatrix):
        assert not [f for f in known.__dataclass_fields__ if "malicious" in f or "attack" in f]


def test_a_start_that_nobody_could_measure_is_an_error():
    fed = replace(federation([[1.0], [3.0]]), start=True)
    with pytest.raises(FedError, match="Give it an evaluation"):
        next(run(fed, 1))
