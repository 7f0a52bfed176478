"""The choice among answers and what is counted, on scripted probabilities a person can add up."""

from __future__ import annotations

import math

import pytest
import torch

from fedllm_sec.evaluation.text import Choices, TextEvaluation
from fedllm_sec.tasks.encoding import Encoded
from tests.stub_model import spread

END = 0


class Scripted:
    """A model by the probability of each next token after the answer's tokens so far; one table for all prompts."""

    def __init__(self, after: dict[tuple[int, ...], dict[int, float]]) -> None:
        self.after, self.scored = after, 0

    def score(self, shard, rows, first=None):
        self.scored += len(rows)
        found = []
        for i in rows:
            answer = shard.answers[i]
            losses = [-math.log(self.after[tuple(answer[:k])].get(token, 1e-9)) for k, token in enumerate(answer)]
            found.append([sum(losses), len(answer)])
        if first is not None:
            begun = [math.log(self.after[()].get(int(token), 1e-9)) for token in first]
            found = [row + begun for row in found]
        return torch.tensor(found, dtype=torch.float64)


def evaluation(answers: list[list[int]], own: list[int], truth: list[int], of: list[int] | None = None):
    """One row for each entry of `own`: the number of its answer."""
    rows = Encoded([[1]] * len(own), [answers[k] if k >= 0 else [8, END] for k in own])
    of = list(range(len(answers))) if of is None else of
    return TextEvaluation(
        test=rows,
        truths=["?"] * len(own),
        answer_rows=0,
        batch_size=2,
        max_new_tokens=4,
        labels=[f"label {k}" for k in range(max(of) + 1)],
        classes=torch.tensor(truth),
        choices=Choices(
            classes=torch.tensor(of),
            first=torch.tensor([answer[0] for answer in answers]),
            own=torch.tensor(own),
            answers=answers,
        ),
    )


def accuracy(model, *settings):
    found = evaluation(*settings).quality(model, spread)["accuracy"]
    return found and (found["value"], found["n"])


A, B, C, D, E = 2, 3, 4, 5, 6
SHORT, LONG, OTHER = [A, END], [A, B, C, D, END], [E, END]
SURE = {(A, B): {C: 1.0}, (A, B, C): {D: 1.0}, (A, B, C, D): {END: 1.0}, (E,): {END: 1.0}, (8,): {END: 1.0}}


@pytest.mark.parametrize("own", [0, 1, -1])
def test_the_likelier_of_two_labels_wins_whatever_their_lengths(own: int):
    model = Scripted({(): {A: 1.0}, (A,): {END: 0.6, B: 0.4}, **SURE})  # P(A) = 0.6, P(A B C D) = 0.4
    assert accuracy(model, [SHORT, LONG], [own], [0]) == (1.0, 1)
    assert accuracy(model, [SHORT, LONG], [own], [1]) == (0.0, 1)


def test_a_pair_of_labels_that_begin_alike_changes_nothing_for_the_others():
    model = Scripted({(): {A: 0.55, E: 0.45}, (A,): {END: 0.6, B: 0.4}, **SURE})  # 0.33, 0.22 and 0.45
    assert accuracy(model, [SHORT, LONG, OTHER], [2], [2]) == (1.0, 1)
    assert accuracy(model, [SHORT, OTHER], [1], [1]) == (1.0, 1)  # the same without the pair, though A begins likelier


def test_an_answer_that_cannot_win_is_not_scored():
    model = Scripted({(): {A: 0.01, E: 0.99}, (A,): {END: 0.6, B: 0.4}, **SURE})
    assert accuracy(model, [SHORT, LONG, OTHER], [2, 2], [2, 2]) == (1.0, 2)
    assert model.scored == 2  # the rows' own answers, for the loss


def test_a_class_with_two_answers_is_as_likely_as_the_likelier_one():
    model = Scripted({(): {A: 0.4, E: 0.6}, (A,): {END: 0.5, B: 0.5}, **SURE})
    assert accuracy(model, [SHORT, LONG, OTHER], [0], [0], [0, 1, 0]) == (1.0, 1)


def test_rows_without_a_class_are_not_counted_and_without_any_there_is_no_rate():
    model = Scripted({(): {A: 0.01, E: 0.99, 8: 0.0001}, (A,): {END: 1.0}, **SURE})
    assert accuracy(model, [SHORT, OTHER], [1, 0, -1], [1, 0, -1]) == (0.5, 2)
    assert accuracy(model, [SHORT, OTHER], [-1], [-1]) is None


def test_a_model_that_is_not_finite_has_chosen_nothing():
    class Broken(Scripted):
        def score(self, shard, rows, first=None):
            return super().score(shard, rows, first) * float("nan")

    model = Broken({(): {A: 0.5, E: 0.5}, (A,): {END: 1.0}, **SURE})
    assert accuracy(model, [SHORT, OTHER], [0, 1], [0, 1]) == (0.0, 2)


def test_accuracy_is_told_for_each_class():
    model = Scripted({(): {A: 0.2, E: 0.8}, (A,): {END: 1.0}, **SURE})
    found = evaluation([SHORT, OTHER], [0, 1, 1], [0, 1, 1]).quality(model, spread)["per_class"]
    assert {k: (v["value"], v["n"]) for k, v in found.items()} == {"label 0": (0.0, 1), "label 1": (1.0, 2)}


def test_the_smoothed_test_sees_the_answers_that_the_rates_count():
    model = Scripted({(): {A: 0.9, E: 0.1}, (A,): {END: 1.0}, **SURE})
    asked = evaluation([SHORT, OTHER], own=[0, 1, -1], truth=[0, 1, -1])
    found = asked.outcomes(model, spread)
    assert (found.classes, found.said.tolist(), found.truth.tolist()) == (2, [0, 0, 0], [0, 1, -1])
    assert asked.quality(model, spread)["accuracy"]["value"] == 0.5
    assert found.hits is found.false_hits is None
    asked.choices = None  # no row is answered: answer_rows is 0
    assert asked.outcomes(model, spread).said is None
