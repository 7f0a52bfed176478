"""Next characters: every position counts the same, and a flipped character is found where it is predicted."""

from __future__ import annotations

import pytest
import torch

from fedllm_sec.attacks.data.labels import LabelFlip
from fedllm_sec.build.characters import CharacterFlip, refuse_overlap
from fedllm_sec.data.characters import cut
from fedllm_sec.errors import AttackError
from fedllm_sec.evaluation.characters import CharEvaluation
from fedllm_sec.models.rnn import lstm
from fedllm_sec.tasks.next_char import NextChar


class Constant(torch.nn.Module):
    """Always predicts character `k`."""

    def __init__(self, k: int, characters: int) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(torch.eye(characters)[k] * 5)

    def forward(self, x):
        return self.logits.expand(*x.shape, -1)


def here(batches, width, score):
    return torch.cat([score(b) for b in batches])


TEXT = cut("abcabcabca" * 4, 3, 0.3, False, "here")


def test_loss_is_the_mean_over_positions_and_agrees_with_score():
    task = NextChar(lstm((3,), 3, hidden=4), torch.device("cpu"))
    rows = torch.tensor([0, 2, 3])
    sums = task.score(TEXT.train, rows)
    assert task.loss(TEXT.train, rows).item() == pytest.approx(sums[:, 0].sum().item() / 9, rel=1e-5)


def test_gradients_arrive_in_the_flat_vector():
    task = NextChar(lstm((3,), 3, hidden=4), torch.device("cpu"))
    task.loss(TEXT.train, torch.arange(4)).backward()
    for part in task.layout.split(task.parameters.grad).values():
        assert part.abs().sum() > 0


def test_quality_of_a_model_that_says_one_character():
    task = NextChar(Constant(1, 3), torch.device("cpu"))
    found = CharEvaluation(test=TEXT.test, batch_size=2).quality(task, here)
    share = (TEXT.test.y == 1).float().mean().item()
    assert found["accuracy"]["value"] == pytest.approx(share)
    assert found["accuracy"]["n"] == TEXT.test.y.numel()
    wrong, right = torch.tensor([5.0, 0.0, 0.0]).logsumexp(0).item(), 5.0
    assert found["loss"] == pytest.approx(wrong - right * share, rel=1e-5)


def test_a_flip_changes_what_is_to_be_predicted_and_nothing_else():
    flip = CharacterFlip(LabelFlip(mapping={"a": "b"}), TEXT.alphabet)
    poisoned = flip.poison(TEXT.train, torch.Generator().manual_seed(0))
    assert torch.equal(poisoned.x, TEXT.train.x)
    assert torch.equal(poisoned.y, torch.where(TEXT.train.y == 0, 1, TEXT.train.y))
    assert torch.equal(poisoned.poisoned, (TEXT.train.y == 0).any(1))
    assert not TEXT.train.poisoned.any()


def test_characters_are_compared_as_they_are():
    text = cut("aAeE\n " * 9, 3, 0.3, False, "here")
    flips = {"e": "a", "E": "A", "\n": " "}
    flip = CharacterFlip(LabelFlip(mapping=flips), text.alphabet)
    named = {text.alphabet[i]: text.alphabet[int(j)] for i, j in enumerate(flip.wanted) if j >= 0}
    assert named == flips


def test_success_is_the_substitute_in_the_place_of_the_flipped_character():
    flip = CharacterFlip(LabelFlip(mapping={"a": "b"}), TEXT.alphabet)
    evaluation = CharEvaluation(test=TEXT.test, batch_size=2, attacked=TEXT.test, wanted=flip.wanted)
    for k, rate in ((1, 1.0), (2, 0.0)):
        found = evaluation.attack(NextChar(Constant(k, 3), torch.device("cpu")), here)
        assert found["asr"]["value"] == rate
        assert found["asr"]["n"] == int((TEXT.test.y == 0).sum())
        assert found["false_trigger"]["value"] == rate
        assert found["false_trigger"]["n"] == int((TEXT.test.y == 2).sum())  # neither flipped nor a substitute
        assert found["left_out"] == {"characters that flipped ones are replaced by": int((TEXT.test.y == 1).sum())}
        assert found["reasons"] == {}


def test_a_swap_of_all_characters_leaves_none_on_which_it_could_show_falsely():
    wanted = torch.tensor([1, 0, -1])
    text = cut("ababababab" * 4, 3, 0.3, False, "here")
    found = CharEvaluation(test=text.test, batch_size=2, attacked=text.test, wanted=wanted).attack(
        NextChar(Constant(1, 3), torch.device("cpu")), here
    )
    assert found["false_trigger"] is None
    assert "neither flipped nor a substitute" in found["reasons"]["false_trigger"]


def test_a_model_that_is_not_finite_predicts_no_character():
    task = NextChar(Constant(0, 3), torch.device("cpu"))
    with torch.no_grad():
        task.parameters.fill_(float("nan"))
    evaluation = CharEvaluation(test=TEXT.test, batch_size=2, attacked=TEXT.test, wanted=torch.tensor([-1, 0, 0]))
    found = evaluation.quality(task, here)
    assert found["accuracy"]["value"] == 0.0
    assert found["loss"] != found["loss"]
    assert evaluation.attack(task, here)["asr"]["value"] == 0.0


def test_a_second_flip_of_what_the_first_has_taught_is_refused():
    first, second, apart = (CharacterFlip(LabelFlip(mapping=m), "abcd") for m in ({"a": "b"}, {"b": "c"}, {"d": "c"}))
    with pytest.raises(AttackError, match=r"attack.data.1.mapping: 'b' is flipped, or put in another's place"):
        refuse_overlap([first, second], "abcd")
    refuse_overlap([first, apart], "abcd")


def test_a_character_the_text_lacks_is_refused():
    with pytest.raises(AttackError, match="'x' is not in the text"):
        CharacterFlip(LabelFlip(mapping={"a": "x"}), TEXT.alphabet)
