"""Recipe -> how adapters are averaged, and why some methods do not go with it."""

from __future__ import annotations

import os
from typing import Any

from fedllm_sec.algorithms.server import Sgd
from fedllm_sec.build.threat import client_ids
from fedllm_sec.defenses.geometric import CenteredClipping
from fedllm_sec.defenses.privacy import settings_if
from fedllm_sec.defenses.trust import fltrust, monna
from fedllm_sec.errors import RecipeError
from fedllm_sec.matrix.factors import Products
from fedllm_sec.models.shifted import Shifted
from fedllm_sec.protocols import Algorithm
from fedllm_sec.recipe.places import TEXT_TASKS
from fedllm_sec.recipe.sections import Recipe
from fedllm_sec.rounds.averaging import Averaging

BY_PRODUCTS = ("exact", "stack", "svd", "pad")
RANKED = ("pad", "svd")  # in which clients may have ranks of their own
ADAPTER = "adapter_config.json"  # which folders of adapters have


def way_of(recipe: Recipe) -> str:
    """How the recipe's adapters are averaged; `factors` where there are none."""
    lora = getattr(recipe.model, "lora", None) if recipe.task in TEXT_TASKS else None
    return "factors" if lora is None else str(lora.average)


def averaging_problems(recipe: Recipe, algorithm: Any, defense: Any) -> list[str]:
    """What does not go with the recipe's way of averaging."""
    way = way_of(recipe)
    if recipe.clients.ranks and (problem := _rank_problem(recipe, way, algorithm)) is not None:
        return [problem]
    if way == "factors":
        return []
    lora, block = recipe.model.lora, recipe.defense if recipe.enable_defense else None
    place = f"model.lora.average: {way}: "
    found = list[str]()
    if lora.train == "B":
        found.append(f"{place}model.lora.train: B freezes A, and then a mean of factors is exact. Remove one of them.")
    if way == "freeze_b" and not lora.starts_from_base:
        found.append(
            f"{place}B starts at 0, and with it A learns nothing. Set init_lora_weights: pissa or olora, or freeze_a."
        )
    if way == "share_a":
        found += [f"{place}{problem}" for problem in _personal_problems(recipe, algorithm)]
    if way == "core":
        found += [f"{place}{problem}" for problem in _core_problems(recipe.model)]
    if way not in BY_PRODUCTS:
        return found
    if lora.use_dora and lora.moves_base:
        found.append(f"{place}use_dora takes the lengths of base weights that would change. Remove one of them.")
    if block is not None and block.scope == "layer":
        found.append(f"{place}defense.scope: layer gives a row no one weight. Set it to model, or average: factors.")
    if block is not None and block.after:
        found.append(f"{place}what defense.after changes in the factors would be taken back. Remove it.")
    server = algorithm.server if isinstance(algorithm, Algorithm) else None
    if not isinstance(server, Sgd) or server.momentum:
        found.append(
            f"{place}needs a server that adds the mean, and algorithm {recipe.algorithm['name']} has an optimizer of "
            "its own. Use fedavg without server_momentum, fedprox or fedsgd."
        )
    rule = defense.rule if defense is not None else None
    named = settings_if(rule, monna)
    if isinstance(rule, CenteredClipping) or settings_if(rule, fltrust) is not None or (named and not named["trusted"]):
        found.append(
            f"{place}{recipe.defense.rule['name']} puts a vector into the update that no client of the round sent, and "
            "whose product is not known. Choose another rule, or average: factors."
        )
    return found


def _rank_problem(recipe: Recipe, way: str, algorithm: Any) -> str | None:
    """Why clients cannot have the ranks that the recipe gives them."""
    ranks, lora = recipe.clients.ranks, getattr(recipe.model, "lora", None)
    place = f"clients.ranks: {dict(ranks)}: "
    if recipe.task not in TEXT_TASKS or lora is None:
        return f"{place}are of LoRA adapters, and none is trained. Remove it, or set model.lora."
    if way not in RANKED:
        return (
            f"{place}model.lora.average: {way} needs one rank for all. Set average to pad or svd, or remove the ranks."
        )
    if sum(ranks.values()) != recipe.clients.total:
        given = sum(ranks.values())
        return f"{place}is for {given} clients, and clients.total is {recipe.clients.total}. Make them equal."
    if max(ranks) != lora.r:
        return f"{place}the largest is {max(ranks)}, and model.lora.r, the server's, is {lora.r}. Make them equal."
    if isinstance(algorithm, Algorithm) and algorithm.remember is not None:
        return (
            f"{place}algorithm {recipe.algorithm['name']} has clients remember their rows, which here also say what "
            "they cannot hold. Use fedavg, fedprox or fedsgd."
        )
    return None


def _personal_problems(recipe: Recipe, algorithm: Any) -> list[str]:
    """What does not go with a B that stays with its client."""
    found = []
    if isinstance(algorithm, Algorithm) and algorithm.remember is not None:
        found.append(
            f"algorithm {recipe.algorithm['name']} has clients remember whole rows, of which B never arrives. Use "
            "fedavg, fedprox or fedsgd."
        )
    if recipe.enable_defense and recipe.defense is not None and recipe.defense.after:
        found.append("what defense.after changes in B reaches no client. Remove it.")
    attack = recipe.attack if recipe.enable_attack else None
    if attack is not None and any(method["name"] == "lora_gauge" for method in attack.update):
        found.append("attack.update: lora_gauge: B A stays the same only where both are sent. Choose another attack.")
    if attack is not None and attack.observe is not None and attack.observe.what == "gradient":
        found.append("attack.observe.what: gradient: is of B too, which never leaves a client. Set it to delta.")
    return found


def ranks_of(recipe: Recipe) -> dict[str, int]:
    """The rank of each client that has not the whole: first those of the first rank given, then of the next."""
    dealt = [rank for rank, count in recipe.clients.ranks.items() for _ in range(count)]
    return {id: rank for id, rank in zip(client_ids(recipe), dealt, strict=True) if rank < max(dealt)} if dealt else {}


def _core_problems(model: Any) -> list[str]:
    """What does not go with fixed outer factors."""
    found = []
    if model.lora.init_lora_weights is not True:
        found.append(
            f"its fixed factors are singular vectors of the base weights, and init_lora_weights: "
            f"{model.lora.init_lora_weights} would start from others. Set it to true."
        )
    if model.lora.use_dora:
        found.append("use_dora trains lengths of the adapted weights beside the core. Remove one of them.")
    if getattr(model, "quantized", False):
        found.append(
            "its fixed factors are singular vectors of the base weights, which are packed here. Set load_in_4bit and "
            "load_in_8bit to false."
        )
    if model.start is not None and os.path.isfile(os.path.join(os.path.expanduser(model.start), ADAPTER)):
        found.append(
            f"model.start: {model.start}: brings factors of its own, and the outer ones are fixed here. Merge it into "
            "its base model, and give the folder of that as model.name."
        )
    return found


def make_averaging(recipe: Recipe, task: Any) -> Averaging | None:
    """For a federation of this task; None where factors are averaged.

    What an earlier run of this process has added to the base is taken off.
    """
    if (shifted := getattr(task, "shifted", None)) is not None:
        shifted.load_state_dict({})
    way = way_of(recipe)
    if way == "core":
        return Averaging(way, (), (), (), task.initial)
    if way not in (*BY_PRODUCTS, "alternate", "share_a"):
        return None
    products = Products.of(task.layout, task.initial, task.scales)
    if recipe.model.lora.moves_base:
        if odd := [pair.name for pair in products.pairs if ".lora_A." not in pair.name]:
            raise RecipeError(
                f"model.lora.average: {way}: {odd[0]} adapts an embedding, not a linear layer. Leave it out."
            )
        if shifted is None:
            shifted = task.shifted = Shifted(task.model, [pair.name for pair in products.pairs])
    first = task.initial[None]
    sizes = tuple((pair.tall(first).shape[1], pair.wide(first).shape[2]) for pair in products.pairs)
    held = shifted if recipe.model.lora.moves_base else None
    return Averaging(way, products.pairs, sizes, products.plain, task.initial, held, ranks_of(recipe))
