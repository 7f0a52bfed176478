"""Attacks that must survive averaging know, or say what they assume of, the server's weights and step."""

import warnings

import pytest
import torch

import fedllm_sec
from fedllm_sec.attacks.threat import Threat
from fedllm_sec.attacks.update.simple import model_replacement
from fedllm_sec.attacks.update.spread import ipm
from fedllm_sec.defenses.columns import mean
from fedllm_sec.kernels.claims import CAP
from fedllm_sec.matrix import UpdateMatrix
from fedllm_sec.recipe.resolve import settings_of
from fedllm_sec.seeds import generator_for

BACKDOOR = torch.tensor([[1.0, -2.0, 3.0, 0.5]])
NINE = [100.0] * 9


def averaged(honest, rows, counts):
    return fedllm_sec.aggregate(torch.cat([honest, rows]), "mean", counts=counts).update


@pytest.mark.parametrize(("count", "gamma"), [(20.0, 46.0), (100.0, 10.0), (250.0, 4.6), (1e9, 4.0)])
def test_the_whole_backdoor_arrives_whatever_its_sender_claims(count, gamma):
    honest = torch.zeros(9, 4)
    rows = fedllm_sec.forge(honest, "model_replacement", m=1, own=BACKDOOR, counts=NINE, own_counts=[count])
    torch.testing.assert_close(rows, gamma * BACKDOOR)  # a claim of a billion counts as 3 times the median, 300
    torch.testing.assert_close(averaged(honest, rows, [*NINE, count]), BACKDOOR[0])


def test_attackers_of_unequal_counts_together_put_in_the_mean_of_their_backdoors():
    own = torch.tensor([[1.0, 0.0], [0.0, 4.0], [2.0, 2.0]])
    honest, counts, own_counts = torch.zeros(7, 2), [50.0, 60, 70, 80, 90, 100, 110], [10.0, 90.0, 5000.0]
    rows = fedllm_sec.forge(honest, "model_replacement", m=3, own=own, counts=counts, own_counts=own_counts)
    torch.testing.assert_close(averaged(honest, rows, [*counts, *own_counts]), torch.tensor([1.0, 2.0]))
    alone = fedllm_sec.forge(honest, "model_replacement", m=3, own=own, weights="uniform", own_counts=own_counts)
    torch.testing.assert_close(torch.cat([honest, alone]).mean(0), torch.tensor([1.0, 2.0]))


def test_the_servers_learning_rate_is_divided_out():
    honest = torch.zeros(9, 4)
    rows = fedllm_sec.forge(honest, "model_replacement", m=1, own=BACKDOOR, server_lr=0.5)
    torch.testing.assert_close(rows, 20 * BACKDOOR)
    torch.testing.assert_close(0.5 * torch.cat([honest, rows]).mean(0), BACKDOOR[0])


@pytest.mark.parametrize("count", [20.0, 100.0, 300.0])
def test_ipm_turns_the_sign_of_the_weighted_mean_and_not_by_far(count):
    honest = 1 + 0.3 * torch.randn(8, 50, generator=generator_for(0, "rows"))
    rows = fedllm_sec.forge(honest, "ipm", m=2, counts=[100.0] * 8, own_counts=[count] * 2)
    goal = honest.mean(0)
    along = float(averaged(honest, rows, [100.0] * 8 + [count] * 2) @ goal / (goal @ goal))
    assert -0.1 < along < 0.0


def threat(knowledge, attack):
    return Threat(malicious=frozenset({"c1", "c3"}), seed=0, knowledge=knowledge, update=[attack])


def forged(knowledge, attack=model_replacement, server_lr=1.0):
    updates = UpdateMatrix.of(
        torch.ones(5, 3), ids=[f"c{i}" for i in range(5)], counts=[100.0, 20.0, 200.0, 40.0, 300.0]
    )
    made = threat(knowledge, attack)
    return made.forge(
        updates, vector=torch.zeros(3), last_update=None, round=1, defense=None, server_lr=server_lr
    )[1][:, 0].tolist()  # fmt: skip


def test_counts_that_are_not_granted_are_assumed_and_it_is_said():
    with pytest.warns(UserWarning, match=r"other 3 clients claim are not granted; assumed are 30 examples each"):
        rows = forged("own")
    assert rows == pytest.approx([150 / (2 * 20), 150 / (2 * 40)])  # 20 + 40 + 3 * 30


def test_counts_that_are_granted_are_the_real_ones():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = forged("cohort")
    assert rows == pytest.approx([660 / (2 * 20), 660 / (2 * 40)])


def test_a_server_that_multiplies_by_no_one_number_is_said_to_be_assumed_to_add():
    with pytest.warns(UserWarning, match="does not multiply updates by one number"):
        assert forged("cohort", server_lr=None) == pytest.approx([660 / 40, 660 / 80])


def test_ipm_that_reads_its_own_rows_assumes_counts_too():
    with pytest.warns(UserWarning, match="assumed are 30 examples"):
        rows = forged("own", lambda view: ipm(view, partial=True))
    assert rows == pytest.approx([-1.1 * 90 / 60] * 2)


def test_the_cap_that_attacks_reckon_with_is_the_rules():
    assert settings_of(mean)["cap"].default == CAP
