"""What a deployment cannot do with a recipe, and by what both sides know that they have the same one."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from fedllm_sec.build.averaging import way_of
from fedllm_sec.build.threat import learning
from fedllm_sec.errors import RecipeError
from fedllm_sec.matrix import Layout
from fedllm_sec.recipe.language_model import BASE_MOVES
from fedllm_sec.recipe.sections import Recipe

# what a device may have otherwise than the server: where its rows lie, how it computes, whether it is malicious
OWN = {"attack", "enable_attack", "evaluate", "output", "compute", "deploy", "variants", "defense", "enable_defense"}
OWN_DATA = {
    *("name", "config", "train", "test", "train_where", "test_where", "test_share", "encoding", "columns", "format"),
    *("rename", "train_rows", "test_rows"),
}

FLOWER = "1.42"  # the version whose private parts resident, node and sooner speak
INSTALL = f'pip install "flwr~={FLOWER}.0" (the extra `edge`).'
TRAVEL = "factors, freeze_a, freeze_b, alternate, svd or pad"  # ways to average whose model is its factors alone


def need_flower() -> None:
    """An error in a line where Flower is not installed, or in a version whose private parts are not known here."""
    from importlib.metadata import version
    from importlib.util import find_spec

    if find_spec("flwr") is None:
        raise RecipeError(f"deploy: needs Flower, which is not installed. {INSTALL}")
    if not (found := version("flwr")).startswith(f"{FLOWER}."):
        raise RecipeError(f"deploy: needs Flower {FLOWER}, and {found} is installed. {INSTALL}")


def deploy_problems(recipe: Recipe) -> list[str]:
    """Why the recipe cannot be deployed: attacks that need the cohort, and what needs clients' rows at the server."""
    found, attack = [], recipe.attack if recipe.attacked else None
    if recipe.pretrain is not None:
        found.append(
            "pretrain: its rounds would be trained at the server, which holds no client's rows. Remove it, or begin "
            "with model.start."
        )
    if recipe.algorithm["name"] == "fedgkt":
        found.append("algorithm: fedgkt: features travel and no deltas, so devices cannot take part. Use another.")
    if recipe.enable_attack and recipe.attack is not None and recipe.attack.privacy:
        found.append(
            "attack.privacy: what an observer learnt is judged by the clients' rows, which do not leave their devices. "
            "Run it as a simulation: fedllm-sec train."
        )
    if (way := way_of(recipe)) in BASE_MOVES:
        found.append(
            f"model.lora.average: {way}: what the base gains at the server does not travel to the devices. Set it to "
            f"{TRAVEL}."
        )
    if way == "share_a":
        found.append(
            "model.lora.average: share_a: devices send whole rows, B too, and keep none between rounds. Run it as a "
            "simulation: fedllm-sec train."
        )
    if way == "core":
        found.append(
            "model.lora.average: core: its fixed factors are singular vectors, which other machines find with other "
            f"rounding. Set it to {TRAVEL}."
        )
    if recipe.enable_defense and any(block["name"] == "dp_sgd" for block in recipe.defense.client):
        found.append(
            "defense.client: dp_sgd: the server counts epsilon by the rows of each client, and devices keep theirs to "
            "themselves. Run it as a simulation: fedllm-sec train."
        )
    if learnt := learning(recipe):
        found.append(
            f"{learnt[0]}: its trigger is learnt by all who attack in a round and measured at the server, which no "
            "device tells it. Run it as a simulation: fedllm-sec train."
        )
    if attack is not None:
        if attack.spread is not None:
            found.append(
                "attack.spread: poisons rows before clients get them, and devices hold their own. Run it as a "
                "simulation: fedllm-sec train; or poison the devices' files."
            )
        if attack.knowledge != "own":
            found.append(
                f"attack.knowledge: {attack.knowledge!r}: a device sees its own row alone. Set it to own, with an "
                "attack that needs no more, or run a simulation: fedllm-sec train."
            )
        together = [f"attack.data.{i}: dba" for i, block in enumerate(attack.data) if block["name"] == "dba"]
        together += [f"attack.update.{i}: {block['name']}" for i, block in enumerate(attack.update)]
        if attack.collude and together:
            found.append(
                f"attack.collude: true ({', '.join(together)}): devices cannot put their rows together. Set it to "
                "false: each then forges alone."
            )
    per_round = recipe.clients.per_round or recipe.clients.total
    for name in ("wait_for", "min_replies"):
        if (given := getattr(recipe.deploy, name)) is not None and given > per_round:
            found.append(f"deploy.{name}: {given} is more than the {per_round} clients of a round. Lower it.")
    if recipe.deploy.wait_for is not None and recipe.deploy.wait_for < recipe.deploy.min_replies:
        found.append(
            f"deploy.wait_for: {recipe.deploy.wait_for} is less than deploy.min_replies={recipe.deploy.min_replies}: "
            "every round would be skipped. Raise it."
        )
    return found


def refuse_undeployable(recipe: Recipe) -> None:
    """Raise with all of them at once."""
    if problems := deploy_problems(recipe):
        raise RecipeError(problems)


def recipe_hash(recipe: Recipe) -> str:
    """Of what a client's row depends on: the same on both sides, or its row would be an update of something else.

    Which rows a device holds is its own affair, and so are its machine, its attack and where its output goes.
    """
    said: dict[str, Any] = recipe.model_dump(mode="json", exclude=OWN)
    said["data"] = {key: value for key, value in said["data"].items() if key not in OWN_DATA}
    blocks = recipe.defense if recipe.enable_defense else None
    said["guards"] = blocks.client if blocks is not None else []  # what honest clients run in their own training
    return _hash(said)


def layout_hash(layout: Layout) -> str:
    """Of the names and shapes of the trained parameters."""
    return _hash([layout.names, layout.shapes])


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
