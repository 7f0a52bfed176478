"""What adapters of text give away: the built-in model, and numbers a person can check."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from fedllm_sec.attacks import PRIVACY_MENU
from fedllm_sec.attacks.privacy.membership import Membership, lowest
from fedllm_sec.attacks.privacy.reading import mean_losses, token_losses, trained_on
from fedllm_sec.attacks.privacy.seen import Observation, Row
from fedllm_sec.attacks.privacy.spans import Span, directions, rank_of, spans_of
from fedllm_sec.build.members import _alike, rows_of
from fedllm_sec.build.names import checked
from fedllm_sec.build.plan import planned
from fedllm_sec.build.secrets import _question
from fedllm_sec.data.canaries import canaries_of, guesses
from fedllm_sec.errors import AttackError, RecipeError
from fedllm_sec.evaluation.exposure import exposure
from fedllm_sec.evaluation.membership import auc
from fedllm_sec.protocols import Client, LocalTraining
from fedllm_sec.recipe.sections import Canaries
from fedllm_sec.rounds.client import make_optimizer, train_locally
from fedllm_sec.rounds.compute import Machine
from tests.conftest import SMALL

SGD = LocalTraining(batch_size=1, steps=1, optimizer="sgd", lr=0.1, max_grad_norm=None)


@pytest.fixture(scope="module")
def made() -> Any:
    """A federation with a LoRA adapter of rank 64 on the built-in model; four clients of 50 rows."""
    from fedllm_sec.build.federation import assemble

    raw = {**SMALL, "enable_attack": False, "enable_defense": False, "model": {"name": "tiny", "lora": {"r": 64}}}
    return assemble(planned(checked(raw)), Machine(Accelerator(), "sim"))


def seen_of(made: Any, rows: Sequence[Row], training: LocalTraining, vector: torch.Tensor | None = None) -> Observation:
    """The delta of the client's training on these rows."""
    task = made.task
    blank = Observation(
        torch.zeros_like(task.initial), "delta", task.initial, task.layout, task.model, rows=training.batch_size,
        steps=training.steps_of(len(rows)), size=len(rows), training=training,
    )  # fmt: skip
    after = trained_on(blank, rows, 0, 0) if vector is None else vector
    return replace(blank, sent=after - task.initial)


def test_losses_are_those_that_the_task_itself_measures(made: Any):
    shard = made.clients[0].shard
    task, rows = made.task, rows_of(shard, "response")[:5]
    with torch.no_grad():
        task.parameters.copy_(task.initial)
    wanted = task.score(shard, range(5))
    found = token_losses(seen_of(made, rows, SGD, task.initial), task.initial, rows)
    assert torch.allclose(torch.stack([x.sum() for x in found]), wanted[:, 0], atol=1e-4)
    assert [len(x) for x in found] == wanted[:, 1].tolist()


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_shadow_of_a_clients_own_rows_is_its_update(made: Any, optimizer: str):
    """Where each step is the whole shard there is no order: the observer repeats the training to the last digits."""
    task, shard = made.task, made.clients[0].shard.select(range(4))
    more = {"momentum": 0.9, "nesterov": True} if optimizer == "sgd" else {}
    training = LocalTraining(4, 3, optimizer=optimizer, lr=0.01, max_grad_norm=0.5, weight_decay=0.1, **more)
    result = train_locally(
        task, Client("c00", shard), task.initial, optimizer=make_optimizer(task, training), stepper=made.machine,
        training=training, round=1, rounds=1, seed=0,
    )  # fmt: skip
    copy = seen_of(made, rows_of(shard, "response"), training)
    assert float((copy.sent - result.delta).norm() / result.delta.norm()) < 0.01  # Adam makes signs of roundings


def test_a_residual_is_the_share_of_the_length_outside_the_span():
    span = Span("x", torch.eye(3, dtype=torch.float64)[:2], None, True, 3)
    assert span.residual(torch.tensor([[1.0, 1, 0], [0, 0, 2], [3, 0, 4]])).tolist() == pytest.approx([0, 1, 0.64])
    through = replace(span, factor=torch.tensor([[0.0, 0, 1], [0, 0, 0], [1, 0, 0]], dtype=torch.float64))
    assert through.residual(torch.tensor([[0.0, 0, 2], [5, 7, 0]])).tolist() == pytest.approx([0, 1])


def test_directions_end_where_rounding_begins():
    thin = torch.tensor([[1.0, 0, 0], [0, 1e-3, 0], [0, 0, 1e-9]])
    basis, exact = directions(thin, 0.0)
    assert (len(basis), exact) == (2, True)
    assert len(directions(thin, 1e-2)[0]) == 1
    full, exact = directions(torch.diag(torch.tensor([10.0, 1, 1])), 0.0)
    assert (len(full), exact) == (2, False)  # of three: 101 / 102 of the squared length, and m - 1 at most


def test_a_span_whose_values_fall_on_through_rounding_is_full():
    """As batches of SST-2 give them: 98 and 102 prefixes in 128 dimensions, and 142 that fill them."""
    assert rank_of([1, 2e-6, 6e-7, 2e-8, 1e-8, 1e-9], 0.0) == 3
    assert rank_of([1, 8e-6, 4e-6, 2e-8, 1e-8, 4e-12], 0.0) == 3
    assert rank_of([1, 2e-6, 1e-6, 6e-7, 4e-7, 2e-7, 9e-8, 4e-9], 0.0) == 8
    assert rank_of([1, 3e-2, 8e-3, 4e-3], 1e-2) == 4  # a difference whose noise hides where they end
    assert rank_of([1, 3e-2, 1e-3, 4e-4], 1e-2) == 2
    assert rank_of([0, 0], 0.0) == rank_of([], 0.0) == 0


def test_one_step_of_sgd_whose_prefixes_fit_in_r_gives_its_row_away(made: Any):
    rows = [row for client in made.clients for row in rows_of(client.shard, "response")]
    member = min(rows, key=lambda row: len(row.ids))
    assert len(member.ids) < 64
    seen = replace(seen_of(made, [member], SGD), candidates=[*list(dict.fromkeys(rows))[:60], member])
    scores = Membership(score="residual")(seen).scores.numpy()
    assert scores[-1] > -1e-6
    assert auc(scores[-1:], scores[[row != member for row in seen.candidates[:-1]] + [False]]) == 1.0
    assert any(span.exact for span in spans_of(seen))
    gradient = replace(seen, sent=-seen.sent / 0.1, what="gradient")
    assert Membership(score="residual")(gradient).scores[-1] > -1e-6


def test_trained_rows_lose_more_loss_than_others_and_a_reference_tells_them_better(made: Any):
    """The effect: scores on the received model know nothing, those of the client's own tell its rows."""
    rows = list(dict.fromkeys(row for client in made.clients for row in rows_of(client.shard, "all")))
    members, others, own = rows[:12], rows[12:52], rows[52:72]
    training = LocalTraining(batch_size=6, steps=15, optimizer="adamw", lr=0.01)
    seen = replace(seen_of(made, members, training), candidates=members + others, own=own, final=made.task.initial)

    def area(**settings: Any) -> float:
        scores = Membership(**settings)(seen).scores.numpy()
        return auc(scores[:12], scores[12:])

    assert abs(area(score="loss", model="received") - 0.5) < 0.25
    assert area(score="loss", model="global") == area(score="loss", model="received")
    assert area(score="loss") > 0.9
    assert area(score="min_k") > 0.9
    assert 0.75 < area(score="drop") < area(score="reference", shadows=1)


def test_a_secret_is_the_more_exposed_the_more_often_it_stood_in_the_rows_and_less_under_noise(made: Any):
    """The effect, of three secrets in one client's rows; and the losses of guesses are those of whole rows."""
    secret = Canaries(repetitions=[1, 4, 12], digits=2)
    task, found = made.task, canaries_of(secret, 0)
    questions = [_question(task, canary.question, guesses(secret)) for canary in found]
    truth = [guesses(secret).index(canary.secret) for canary in found]
    planted = [
        Row((*question.prompt, *question.guesses[i], task.writer.end), len(question.prompt))
        for question, i, canary in zip(questions, truth, found, strict=True) for _ in range(canary.repetitions)
    ]  # fmt: skip
    filler = rows_of(made.clients[0].shard, "response")[:7]
    seen = seen_of(made, [*planted, *filler], LocalTraining(batch_size=8, steps=9, optimizer="adamw", lr=5e-3))
    seen = replace(seen, questions=questions, final=task.initial)

    def exposed(given: Observation, **settings: Any) -> list[float]:
        told = PRIVACY_MENU["canary"].make(given, **settings)
        return [exposure(losses.numpy(), i) for losses, i in zip(told.losses, truth, strict=True)]

    bits = exposed(seen)
    assert bits[0] < bits[2]
    assert bits[2] > 5.5  # of 6.6
    assert exposed(seen, model="global") == exposed(seen, model="received")
    noise = 40 * float(seen.sent.std()) * torch.randn(5, len(seen.sent), generator=torch.Generator().manual_seed(0))
    assert fmean(exposed(replace(seen, sent=seen.sent + one))[2] for one in noise) < bits[2] - 1

    made_of = PRIVACY_MENU["canary"].make(seen)
    whole = [Row((*questions[2].prompt, *guess), len(questions[2].prompt)) for guess in questions[2].guesses[:5]]
    sums = torch.stack([losses.sum() for losses in token_losses(seen, seen.start + seen.sent, whole)])
    assert torch.allclose(made_of.losses[2][:5], sums, atol=1e-4)
    assert len(made_of.said[0]) == len(questions[0].guesses[0])
    with pytest.raises(AttackError, match="no questions to ask"):
        PRIVACY_MENU["canary"].make(replace(seen, questions=()))


def test_min_k_takes_the_least_likely_tokens():
    values = torch.tensor([-1.0, -5.0, -3.0, -2.0, -4.0])
    assert lowest(values, 0.4) == -4.5
    assert lowest(values, 0.01) == -5.0


def test_settings_that_contradict_each_other_and_observations_without_use_say_why(made: Any):
    for settings, words in (
        ({"k": 0.1}, "k: score: drop does not use it"),
        ({"score": "residual", "model": "global"}, "a residual is that of what the client sent"),
        ({"model": "received"}, "has not dropped from itself"),
    ):
        with pytest.raises(RecipeError, match=words):
            Membership(**settings)  # type: ignore[arg-type]
    row = Row((1, 2, 3), 1)
    seen = replace(seen_of(made, [row], SGD, made.task.initial), candidates=[row])
    for settings, given, words in (
        ({}, replace(seen, candidates=[]), "no rows of text"),
        ({}, replace(seen, what="gradient"), "a gradient is no model"),
        ({"model": "global"}, seen, "the last round is not there"),
        ({"score": "reference"}, seen, "Raise attack.observe.own_rows"),
        ({"score": "residual"}, seen, "no linear layer moved"),
        ({}, replace(seen, sent=seen.sent * torch.nan), "not finite"),
    ):
        with pytest.raises(AttackError, match=words):
            Membership(**settings)(given)  # type: ignore[arg-type]
    assert float(mean_losses(seen, made.task.initial, [row])) > 0


def test_others_have_the_members_mix_of_answers():
    """Else the classes of a client's rows would tell them, whatever it trained on."""

    def rows(counts: dict[int, int]) -> list[Row]:
        return [Row((100 + i, 7, answer), 2) for answer, n in counts.items() for i in range(n)]

    members, left = rows({1: 8, 2: 2}), rows({1: 30, 2: 30, 3: 30})
    drawn = _alike(left, members, 20)
    assert [sum(row.ids[2] == answer for row in drawn) for answer in (1, 2, 3)] == [16, 4, 0]
    assert len(_alike(rows({1: 4, 2: 30}), members, 20)) == 5  # as far as there are rows: 4 and 1
    with pytest.raises(AttackError, match="Lower it"):
        _alike(left, members, 91)


def test_others_are_drawn_by_answer_only_where_all_rows_have_few_answers():
    """Eight members have eight answers at most, also of free text: then others are drawn as they come."""
    free = [Row((1, i, 100 + i), 2) for i in range(50)]
    members = [*(Row((2, i, 500 + i), 2) for i in range(7)), Row((2, 7, 100), 2)]
    assert _alike(free, members, 30) == free[:30]
    classes = [Row((1, i, 7 + i % 2), 2) for i in range(50)]
    mine = [Row((2, i, 7 if i < 6 else 8), 2) for i in range(8)]
    assert Counter(row.ids[2] for row in _alike(classes, mine, 24)) == {7: 18, 8: 6}
