"""TPR, FPR and AUC of a rule's decision, worked by hand."""

import math

import pytest
from sklearn.metrics import roc_auc_score

from fedllm_sec.evaluation.detection import auc, detection

IDS = ["a", "b", "c", "d", "e"]


def test_half_of_the_malicious_and_a_third_of_the_honest_were_dropped() -> None:
    found = detection(kept=["b", "c", "d"], scores=None, ids=IDS, malicious={"a", "b"})
    assert found == {"tpr": 0.5, "weight_share": None, "fpr": pytest.approx(1 / 3), "auc": None}


def test_a_rule_that_does_not_select_measures_neither_rate() -> None:
    assert detection(None, None, IDS, {"a"}) == {"tpr": None, "weight_share": None, "fpr": None, "auc": None}


def test_a_round_without_malicious_clients_has_only_a_false_positive_rate() -> None:
    scores = dict.fromkeys(IDS, 1.0)
    found = detection(["a", "b"], scores, IDS, set(), dict.fromkeys(IDS, 0.2))
    assert found == {"tpr": None, "weight_share": None, "fpr": 0.6, "auc": None}


def test_a_round_of_malicious_clients_only_has_no_false_positive_rate() -> None:
    assert detection([], None, ["a"], {"a"}) == {"tpr": 1.0, "weight_share": None, "fpr": None, "auc": None}


def test_what_malicious_rows_weigh_is_told_beside_how_many_were_dropped() -> None:
    weights = {"a": 0.1, "b": 0.0, "c": 0.1, "d": 0.1, "e": 0.1}  # clipped: they add up to 0.4
    found = detection(["a", "c", "d", "e"], None, IDS, {"a", "b"}, weights)
    assert found["tpr"] == 0.5
    assert found["weight_share"] == pytest.approx(0.25)
    against = detection(None, None, ["a", "b"], {"a"}, {"a": -1.0, "b": 1.0})  # a row that is subtracted acts too
    assert against["weight_share"] == 0.5
    assert detection(None, None, ["a", "b"], {"a"}, {"a": 0.0, "b": 0.0})["weight_share"] is None


def test_a_malicious_client_that_is_not_in_the_round_does_not_count() -> None:
    assert detection(["b"], None, ["a", "b"], {"a", "z"})["tpr"] == 1.0


def test_auc_counts_pairs_and_gives_ties_one_half() -> None:
    # malicious 3, 1; honest 2, 1, 0: wins 3>2, 3>1, 3>0, 1>0 = 4, tie 1=1 = 0.5; 4.5 of 6 pairs.
    scores = {"a": 3.0, "b": 1.0, "c": 2.0, "d": 1.0, "e": 0.0}
    assert detection(None, scores, IDS, {"a", "b"})["auc"] == 0.75


def test_auc_agrees_with_scikit_learn() -> None:
    scores = [0.1, 0.4, 0.35, 0.8, 0.4, 0.0, 0.9]
    truth = [False, False, True, True, True, False, False]
    assert auc(scores, truth) == pytest.approx(roc_auc_score(truth, scores))


def test_an_infinite_score_is_the_highest_and_nan_is_no_score() -> None:
    assert auc([math.inf, 1.0], [True, False]) == 1.0
    assert auc([math.nan, 1.0], [True, False]) is None
