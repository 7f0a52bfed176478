"""Planted secrets: the questions that an observer asks, the answers, and how exposed they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from fedllm_sec.attacks.privacy import Guessed, Observation, Question
from fedllm_sec.build.threat import client_ids
from fedllm_sec.data.canaries import Canary, canaries_of, guesses
from fedllm_sec.errors import AttackError
from fedllm_sec.evaluation.exposure import exposure
from fedllm_sec.evaluation.intervals import bootstrap
from fedllm_sec.protocols import Client
from fedllm_sec.recipe.sections import Recipe
from fedllm_sec.rounds.federation import Federation


@dataclass(frozen=True)
class Planted:
    """Questions as tokens; and the truth, for the metric alone: the secrets, and which guess each of them is."""

    questions: list[Question]
    canaries: list[Canary]
    secrets: list[int]
    task: Any

    def shown(self, seen: Observation) -> Observation:
        """The observation with the questions, and not the answers."""
        return replace(seen, questions=self.questions)

    def judged(self, made: Guessed) -> Exposed:
        """Exposure of each secret, and what was said for it."""
        found = []
        for canary, secret, losses, said in zip(self.canaries, self.secrets, made.losses, made.said, strict=True):
            text = " ".join(self.task.decode(said).split())
            bits = exposure(losses.double().cpu().numpy(), secret)
            found.append(Secret(canary.question, canary.secret, canary.repetitions, bits, text))
        return Exposed(found)


@dataclass(frozen=True)
class Secret:
    question: str
    secret: str
    repetitions: int
    exposure: float  # bits
    said: str

    @property
    def extracted(self) -> bool:
        return self.said == self.secret


@dataclass(frozen=True)
class Exposed:
    """What was learnt of a client's secrets."""

    secrets: list[Secret]

    def in_words(self) -> str:
        each = ", ".join(f"{one.exposure:.1f} (x{one.repetitions})" for one in self.secrets)
        return f"exposure {each} bits; {sum(one.extracted for one in self.secrets)} said"

    def record(self) -> dict[str, Any]:
        return {"secrets": [{**vars(one), "extracted": one.extracted} for one in self.secrets]}


def summed(learnt: Sequence[tuple[int, Exposed]]) -> dict[str, Any]:
    """Mean exposure and share of secrets that were said: of all, and by how often they were planted."""
    secrets = [secret for _, one in learnt for secret in one.secrets]
    times = sorted({secret.repetitions for secret in secrets})
    return {
        "scores": _measures(secrets),
        "repetitions": [{"repetitions": n, **_measures([s for s in secrets if s.repetitions == n])} for n in times],
    }


def _measures(secrets: Sequence[Secret]) -> dict[str, Any]:
    if not secrets:
        return {"exposure": None, "extracted": None}
    bits = [secret.exposure for secret in secrets]
    low, high = bootstrap(bits)
    said = fmean(secret.extracted for secret in secrets)
    return {"exposure": {"value": fmean(bits), "low": low, "high": high, "n": len(bits)}, "extracted": said}


def planted_in(recipe: Recipe, federation: Federation, client: Client) -> Planted:
    """The questions to this client's secrets; an error where it has none."""
    asked, task = recipe.data.canaries, federation.task
    if asked is None or client.id != client_ids(recipe)[asked.client]:
        raise AttackError(f"client {client.id} holds no planted secrets.")
    found, all_guesses = canaries_of(asked, recipe.seed), guesses(asked)
    questions = [_question(task, canary.question, all_guesses) for canary in found]
    return Planted(questions, found, [all_guesses.index(canary.secret) for canary in found], task)


def _question(task: Any, text: str, answers: Sequence[str]) -> Question:
    beside = dict.fromkeys(("context", "label", "system", "history"), "")
    encoded = task.writer.tokens([{**beside, "text": text, "response": answer} for answer in answers])
    if len({tuple(prompt) for prompt in encoded.prompts}) != 1:
        raise AttackError("canary: this tokenizer writes a question differently before different answers.")
    return Question(tuple(encoded.prompts[0]), tuple(tuple(answer[:-1]) for answer in encoded.answers))
