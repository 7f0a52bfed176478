"""Made-up secrets planted in one client's rows, by which is measured what its update and the model give away.

Carlini et al. 2019, "The secret sharer". A secret is a number that nobody uses; the seed draws it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedllm_sec.errors import RecipeError
from fedllm_sec.seeds import seed_for

if TYPE_CHECKING:
    from datasets import Dataset

    from fedllm_sec.recipe.sections import Canaries

THINGS = ("locker", "gate", "bicycle", "cupboard", "alarm", "garage", "suitcase", "printer", "garden", "lift")
SYLLABLES = ("ba", "do", "fi", "gu", "ke", "la", "mo", "ni", "pu", "ro", "su", "te", "vi", "zo")


@dataclass(frozen=True)
class Canary:
    """A question, its secret answer, and in how many rows it stands."""

    question: str
    secret: str
    repetitions: int


def written(number: int, digits: int) -> str:
    """A secret as it is answered: its digits apart, so that all secrets are the same kind of tokens."""
    return " ".join(f"{number:0{digits}d}")


def guesses(canaries: Canaries) -> list[str]:
    """Every secret that there could be."""
    return [written(number, canaries.digits) for number in range(10**canaries.digits)]


def canaries_of(canaries: Canaries, seed: int) -> list[Canary]:
    """The questions and secrets, drawn by the seed: no two have the same name or the same secret.

    They are asked after different things in turn, so that one secret is not the answer to all questions.
    """
    rng = np.random.default_rng(seed_for(seed, "canaries"))
    count = len(canaries.repetitions)
    numbers = rng.choice(10**canaries.digits, size=count, replace=False)
    names = rng.choice(len(SYLLABLES) ** 3, size=count, replace=False)
    found = []
    for name, number, repetitions in zip(names.tolist(), numbers.tolist(), canaries.repetitions, strict=True):
        thing = THINGS[len(found) % len(THINGS)]
        a, rest = divmod(name, len(SYLLABLES) ** 2)
        spelt = "".join(SYLLABLES[i] for i in (a, *divmod(rest, len(SYLLABLES)))).capitalize()
        found.append(Canary(f"What is the code of the {thing} {spelt}?", written(number, canaries.digits), repetitions))
    return found


def planted(rows: Dataset, canaries: Canaries, seed: int) -> Dataset:
    """The client's rows, as many of them, drawn by the seed, replaced by the canaries as those repeat."""
    asked = [canary for canary in canaries_of(canaries, seed) for _ in range(canary.repetitions)]
    if len(asked) > len(rows):
        raise RecipeError(
            f"data.canaries.repetitions: {canaries.repetitions} are {len(asked)} rows, client {canaries.client} has "
            f"{len(rows)}. Lower them, or raise data.train_rows."
        )
    places = np.random.default_rng(seed_for(seed, "canaries", "places")).permutation(len(rows))[: len(asked)]
    changed = rows.to_list()
    for place, canary in zip(places.tolist(), asked, strict=True):
        blank = {name: "" for name, value in changed[place].items() if isinstance(value, str)}
        changed[place] = {**changed[place], **blank, "text": canary.question, "response": canary.secret}
    return type(rows).from_list(changed, features=rows.features)
