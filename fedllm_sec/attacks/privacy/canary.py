"""How much a model has memorised of planted secrets: the losses of all guesses, and what it says when it is asked."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fedllm_sec.attacks.privacy.reading import asked, batches, logits_of, padded, still
from fedllm_sec.attacks.privacy.seen import Guessed, Observation, Question, Row, need_finite
from fedllm_sec.errors import AttackError


def canary(seen: Observation, *, model: Literal["client", "global", "received"] = "client") -> Guessed:
    """The log-loss of every secret there could be, and the greedy answer (Carlini et al. 2019, sec. 4 and 6).

    The guess of the least loss is the attack's; that the questions are known is the audit's assumption, and the worst
    case. `model` is the one that is asked, as for membership.
    """
    need_finite(seen)
    if not seen.questions:
        raise AttackError("canary: there are no questions to ask. Plant secrets with data.canaries.")
    vector = asked(seen, model, "canary")
    own = next(seen.model.parameters())
    parts = seen.layout.split(vector.to(own.device))
    with torch.no_grad(), still(seen.model):
        losses = [guess_losses(seen, parts, question) for question in seen.questions]
        return Guessed(losses, [greedy(seen, parts, question) for question in seen.questions])


def next_losses(seen: Observation, parts: dict[str, Tensor], rows: list[tuple[int, ...]]) -> Tensor:
    """The log-loss of every token after each row: (rows, vocabulary) float64."""
    found: dict[int, Tensor] = {}
    for numbers in batches([Row(ids, 1) for ids in rows]):
        logits = logits_of(seen, parts, padded([rows[i] for i in numbers]))
        for k, i in enumerate(numbers):
            found[i] = -logits[k, len(rows[i]) - 1].double().log_softmax(-1).cpu()
    return torch.stack([found[i] for i in range(len(rows))])


def guess_losses(seen: Observation, parts: dict[str, Tensor], question: Question) -> Tensor:
    """The sum of the log-losses of each guess' tokens after the question: (guesses,) float64.

    Guesses that begin alike share their beginnings: of a thousand numbers of three digits 111 are looked at.
    """
    begun = sorted({guess[:k] for guess in question.guesses for k in range(len(guess))})
    after = next_losses(seen, parts, [(*question.prompt, *said) for said in begun])
    place = {said: i for i, said in enumerate(begun)}
    return torch.stack(
        [
            torch.stack([after[place[guess[:k]], token] for k, token in enumerate(guess)]).sum()
            for guess in question.guesses
        ]
    )


def greedy(seen: Observation, parts: dict[str, Tensor], question: Question) -> list[int]:
    """The likeliest token after the question, time and again, as many as a guess has."""
    said: list[int] = []
    for _ in range(max(map(len, question.guesses))):
        said.append(int(next_losses(seen, parts, [(*question.prompt, *said)])[0].argmin()))
    return said
