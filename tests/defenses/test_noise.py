"""Noise is as long as it says on models of any size, and the record has how long it is beside the step."""

import warnings
from functools import partial

import pytest
import torch

from fedllm_sec.build.noise import noise_in_words
from fedllm_sec.defenses import crfl, flame, mean, weak_dp, weak_dp_client
from fedllm_sec.defenses.pipeline import Pipeline
from fedllm_sec.matrix import UpdateMatrix
from fedllm_sec.seeds import generator_for
from tests.defenses.small import context

uniform = partial(mean, weights="uniform")


def played(pipeline, d, *, round=1, size=1e-3, n=10):
    """The update of one round on rows of this length around a common step, and all that was noted of it."""
    rng = generator_for(5, d)
    rows = size / d**0.5 * (torch.randn(d, generator=rng) + 0.3 * torch.randn(n, d, generator=rng))
    start = context(d, round=round)
    decision = pipeline.decide(UpdateMatrix.of(rows), start)
    step = pipeline.finish(start.global_vector + decision.update, context(d, round=round)) - start.global_vector
    return step, rows.mean(0), decision.notes | pipeline.noted


@pytest.mark.parametrize(
    ("pipeline", "note", "ratio"),
    [
        (Pipeline([weak_dp_client], uniform), "weak_dp_client_noise_to_step", 0.01 / 10**0.5),
        (Pipeline([], flame), "flame_noise_to_step", 0.01),
        (Pipeline([], uniform, [weak_dp]), "weak_dp_noise_to_step", 0.01),
    ],
)
def test_by_default_the_noise_is_a_hundredth_of_a_row_or_a_step_at_any_size(pipeline, note, ratio):
    for d in (1_000, 100_000):
        step, centre, notes = played(pipeline, d)
        assert notes[note] == pytest.approx(ratio, rel=0.1)
        assert float((step - centre).norm()) <= 0.2 * float(centre.norm())


@pytest.mark.parametrize(
    ("pipeline", "note"),
    [
        (Pipeline([partial(weak_dp_client, sigma=0.1, absolute=True)], uniform), "weak_dp_client_noise_to_step"),
        (Pipeline([], partial(flame, noise=0.1, absolute=True)), "flame_noise_to_step"),
        (Pipeline([], uniform, [partial(weak_dp, sigma=1e-4, absolute=True)]), "weak_dp_noise_to_step"),
        (Pipeline([], uniform, [partial(crfl, rho=1.0, sigma=1e-4)]), "crfl_noise_to_step"),
    ],
)
def test_noise_longer_than_the_step_is_in_the_record_and_said_in_the_first_round(pipeline, note):
    name = note.removesuffix("_noise_to_step")
    with pytest.warns(UserWarning, match=f"{name}: the noise is .* times as long as the step it is added to") as said:
        step, centre, notes = played(pipeline, 10_000)
    assert notes[note] == pytest.approx(float((step - centre).norm() / centre.norm()), rel=0.1)
    assert notes[note] > 1
    assert f"is {notes[note]:.3g} times" in str(said[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # later rounds say nothing
        assert played(pipeline, 10_000, round=2)[2][note] > 1


def test_a_note_belongs_to_its_round():
    pipeline = Pipeline([], uniform, [partial(crfl, rho=1.0, sigma=1e-4)])
    with pytest.warns(UserWarning, match="crfl"):
        assert "crfl_noise_to_step" in played(pipeline, 100, size=1e-4)[2]
    start = context(100, round=3, rounds=3)
    pipeline.decide(UpdateMatrix.of(torch.ones(2, 100)), start)
    assert pipeline.noted == {}
    pipeline.finish(torch.ones(100), start)  # the last round has no noise
    assert pipeline.noted == {}


def test_it_is_told_beforehand_how_long_noise_will_be():
    def told(d, n, *, before=(), rule=uniform, after=()):
        return noise_in_words(Pipeline(before, rule, after), d, n)

    drowned = told(1_000_000, 10, before=[partial(weak_dp_client, absolute=True)])
    assert drowned == [
        "weak_dp_client: its noise in the mean of 10 rows has 3.16 of the length that rows are clipped to (0.01 on "
        "each of 1,000,000 values), which is LONGER THAN ANY STEP: little is learnt. Lower it, or leave `absolute` out."
    ]
    assert "has 3.46 of the length" in told(12_000_000, 4, rule=partial(flame, noise=0.001, absolute=True))[0]
    assert told(None, 4, rule=partial(flame, noise=0.001, absolute=True))[0].endswith("d is not counted.")
    assert told(12_000_000, 4, rule=flame) == [
        "flame: its noise has 0.01 of the length that rows are clipped to, whatever the size of the model."
    ]
    assert "has the length 0.3" in told(900, 4, after=[partial(weak_dp, sigma=0.01, absolute=True)])[0]
    assert "in round 1 its noise has the length 0.4, 0.05 of rho" in told(900, 4, after=[partial(crfl, rho=8.0)])[0]
    assert told(900, 4, after=[weak_dp]) == told(900, 4, rule=partial(flame, noise=0.0)) == []
