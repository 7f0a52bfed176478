"""The smoothed test counts what most noisy copies answer, and certifies what the votes allow."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedllm_sec.evaluation.certify import logistic_lipschitz
from fedllm_sec.evaluation.smoothed import Outcomes, Smoothing, shown, smoothed

FAR = 50.0  # what no noise of 1 changes


class Signs:
    """Row i is of class 1 where value i of the vector is above 0; the probe is row 0, the clean row is row 1."""

    def __init__(self, truth: list[int]) -> None:
        self.truth = torch.tensor(truth)

    def outcomes(self, task: Any, spread: Any) -> Outcomes:
        said = (task.parameters > 0).long()
        return Outcomes(2, said, self.truth, hits=said[:1] == 1, false_hits=said[1:2] == 1)


def test_votes_become_smoothed_rates_and_certified_accuracy_by_radius():
    vector = torch.tensor([FAR, -FAR, FAR, 0.05])
    task = SimpleNamespace(parameters=torch.zeros(4))
    test = Smoothing(sigma=1.0, copies=100, radius=lambda lower, upper: max(0.0, lower - upper))
    rng = torch.Generator().manual_seed(0)
    quality, attack = smoothed(Signs([1, 0, 0, -1]), task, vector, None, test, rng)
    assert quality["smoothed_accuracy"]["value"] == pytest.approx(2 / 3)  # row 2 is wrong, row 3 has no class
    assert quality["smoothed_accuracy"]["n"] == 3
    # both right rows have all 100 votes: lower 1 - slack, upper slack, with slack = sqrt(ln(1000) / 200) = 0.1858
    assert {radius: rate["value"] for radius, rate in quality["certified"].items()} == {
        "0": pytest.approx(2 / 3), "0.157": pytest.approx(2 / 3), "0.314": pytest.approx(2 / 3),
        "0.471": pytest.approx(2 / 3), "0.628": pytest.approx(2 / 3),
    }  # fmt: skip
    assert (attack["smoothed_asr"]["value"], attack["smoothed_false_trigger"]["value"]) == (1.0, 0.0)
    assert torch.equal(task.parameters, vector)  # the model is left as it was


def test_where_no_radius_is_known_the_reason_stands_in_its_place():
    task = SimpleNamespace(parameters=torch.zeros(2))
    quality, _ = smoothed(
        Signs([1, 0]), task, torch.tensor([FAR, -FAR]), None, Smoothing(1.0, 5, why="no constant"), torch.Generator()
    )
    assert quality["certified"] is None
    assert quality["reasons"] == {"certified": "no constant"}


def test_without_classes_and_without_an_attack_there_is_nothing_to_smooth():
    empty = SimpleNamespace(outcomes=lambda task, spread: Outcomes(0))
    task = SimpleNamespace(parameters=torch.zeros(1))
    assert smoothed(empty, task, torch.zeros(1), None, Smoothing(1.0, 5), torch.Generator()) == ({}, {})


def test_radii_are_rounded_down():
    assert shown([0.0, 0.0]) == [0.0]
    assert shown([0.0012399, float("inf")]) == pytest.approx([0.0, 0.000309, 0.000619, 0.000929, 0.00123])


def test_no_gradient_of_logistic_regression_changes_faster_than_its_constant():
    rng = torch.Generator().manual_seed(0)

    def gradient(w: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.outer(torch.softmax(w @ x, 0) - y, x)

    for rho in (0.1, 1.0, 20.0):
        for _ in range(200):
            w, x, move = (torch.randn(*shape, generator=rng).double() for shape in ((3, 4), (4,), (4,)))
            w, x = rho * w / w.norm(), 2.0 * x / x.norm()
            other = 2.0 * (x + move) / (x + move).norm()
            one, two = torch.eye(3).double()[torch.randperm(3, generator=rng)[:2]]
            for y in (one, two):
                change = (gradient(w, other, y) - gradient(w, x, one)).norm()
                size = torch.cat([other - x, y - one]).norm()
                assert change <= logistic_lipschitz(rho, length=2.0) * size * (1 + 1e-9)
