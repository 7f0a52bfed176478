"""Attacks on text: what each kind is shown, the truth beside what it made of that, and its part of privacy.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from fedllm_sec.attacks.privacy import Guessed, Observation, Recovered, Suspicion
from fedllm_sec.build import members, recovered, secrets
from fedllm_sec.build.pictures import Learnt
from fedllm_sec.errors import AttackError, RecipeError
from fedllm_sec.protocols import Client
from fedllm_sec.recipe.sections import Recipe
from fedllm_sec.rounds.federation import Federation

# what an attack answers with -> its kind
ANSWERS: dict[type, str] = {Suspicion: "membership", Guessed: "canary", Recovered: "tokens"}

# kind -> its part of privacy.json, of [(round, what was learnt), ...]
SUMMED: dict[str, Callable[[Sequence[tuple[int, Any]]], dict[str, Any]]] = {
    "membership": members.summed,
    "canary": secrets.summed,
    "tokens": recovered.summed,
}


def need_held_out(recipe: Recipe, evaluation: Any) -> None:
    """An error where there are too few held-out rows for the observer's own and for the others."""
    assert recipe.attack is not None
    assert recipe.attack.observe is not None
    seen, held = recipe.attack.observe, len(evaluation.fitted.encoded)
    if seen.own_rows + (seen.others or 1) > held:
        raise RecipeError(
            f"attack.observe: own_rows: {seen.own_rows} and others: {seen.others or 'at least 1'} of {held} held-out "
            "rows. Lower them, or raise data.test_rows."
        )


def heard(
    attack: Callable[[Observation], Any], kind: str | None, recipe: Recipe, federation: Federation, client: Client,
    seen: Observation, trained: Sequence[int], final: Tensor | None,
) -> Any:  # fmt: skip
    """What an attack learnt of a client that trained on these rows; code from outside is shown all there is."""
    given: dict[str, Any] = {}
    if kind in (None, "membership"):
        given["membership"] = members.lineup(recipe, federation, client, trained)
    if kind == "canary" or (kind is None and recipe.data.canaries is not None):
        given["canary"] = secrets.planted_in(recipe, federation, client)
    if kind in (None, "tokens"):
        given["tokens"] = recovered.written_by(recipe, client, trained, federation.task)
    shown = replace(seen, final=final)
    for one in given.values():
        shown = one.shown(shown)
    made = attack(shown)
    if ANSWERS.get(type(made)) not in given:
        raise AttackError(f"privacy: gave {type(made).__name__}, must be one of {[a.__name__ for a in ANSWERS]}.")
    return given[ANSWERS[type(made)]].judged(made)


def told_of_text(method: Mapping[str, Any], kind: str | None, paper: str, learnt: Sequence[Learnt]) -> dict[str, Any]:
    """One attack on text, as privacy.json has it."""
    acted = [one for one in learnt if one.heard is not None]
    judged = kind or next((k for k, of in KINDS.items() if any(isinstance(one.heard, of) for one in acted)), None)
    return {
        "name": method["name"],
        "kind": judged or "none",
        "paper": paper,
        "settings": {key: value for key, value in method.items() if key != "name"},
        **(SUMMED[judged]([(one.round, one.heard) for one in acted]) if judged is not None else {"scores": {}}),
        "not_applicable": len(learnt) - len(acted),
        "seconds": sum(one.seconds for one in learnt),
        "observations": [
            {
                "client": one.client, "round": one.round, "reason": one.reason, "seconds": one.seconds,
                **(one.heard.record() if one.heard is not None else {}),
            }
            for one in learnt
        ],
    }  # fmt: skip


KINDS = {"membership": members.Apart, "canary": secrets.Exposed, "tokens": recovered.Read}
