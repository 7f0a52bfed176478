"""Recipe -> Federation. The only file that knows all menus."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedllm_sec import algorithms, attacks, defenses, models
from fedllm_sec.algorithms.gkt import KnowledgeTransfer
from fedllm_sec.build.arrays import array_parts, save_model
from fedllm_sec.build.characters import character_parts
from fedllm_sec.build.loaded import Loaded
from fedllm_sec.build.parts import Parts
from fedllm_sec.build.rehearsal import UNNAMED, Rehearsal, scaled_down
from fedllm_sec.build.text import text_parts
from fedllm_sec.build.threat import attack_problems, client_ids, make_threat
from fedllm_sec.build.transfer import distillation, transfer_problems
from fedllm_sec.data import partition
from fedllm_sec.defenses.pipeline import Pipeline
from fedllm_sec.errors import AttackError, DefenseError, RecipeError
from fedllm_sec.matrix.updates import Layout
from fedllm_sec.models.lora import save_adapter
from fedllm_sec.protocols import Algorithm, Client, LocalRule, LocalTraining
from fedllm_sec.recipe.reading import Recipe
from fedllm_sec.recipe.resolve import Menu, check_settings, find, resolve
from fedllm_sec.records.history import RoundRecord
from fedllm_sec.rounds import federation
from fedllm_sec.rounds.compute import Machine
from fedllm_sec.rounds.distillation import Distillation, distil
from fedllm_sec.rounds.federation import Federation
from fedllm_sec.seeds import seed_for

# place in the recipe -> menu, kinds that may stand there
PLACES: dict[str, tuple[Menu, tuple[str, ...]]] = {
    "clients.partition": (partition.MENU, ("",)),
    "algorithm": (algorithms.MENU, ("",)),
    "attack.local": (attacks.MENU, ("local",)),
    "attack.update": (attacks.MENU, ("update",)),
    "defense.before": (defenses.MENU, ("before",)),
    "defense.rule": (defenses.MENU, ("rule",)),
    "defense.after": (defenses.MENU, ("after",)),
}

# task of the recipe -> kinds of data attacks that act on its rows
DATA_ATTACKS: dict[str, tuple[str, ...]] = {
    "causal_lm": ("data", "data_text"),
    "classify": ("data", "data_image"),
    "nas": ("data", "data_image"),
    "next_char": ("data",),
    "gan": (),
}

# task of the recipe -> kinds of client-side defenses that can act in it, where it is not only "client"
CLIENT_DEFENSES: dict[str, tuple[str, ...]] = {"classify": ("client", "client_image")}


def places(task: Any) -> dict[str, tuple[Menu, tuple[str, ...]]]:
    """PLACES for one task of the recipe."""
    if task not in DATA_ATTACKS:
        return PLACES
    found = {
        **PLACES,
        "attack.data": (attacks.MENU, DATA_ATTACKS[task]),
        "defense.client": (defenses.CLIENT_MENU, CLIENT_DEFENSES.get(task, ("client",))),
    }
    return found if task == "causal_lm" else {"model": (models.MENU, (task,)), **found}


# ---------------------------------------------------------------- checks before anything is loaded


def menu_problems(raw: dict[str, Any]) -> list[str]:
    """What is wrong with the names and settings of methods in a raw recipe."""
    problems: list[str] = []
    for place, (menu, kinds) in places(raw.get("task", "causal_lm")).items():
        here: Any = raw
        for key in place.split("."):
            here = here.get(key) if isinstance(here, dict) else None
        if here is None:
            continue
        is_list = isinstance(here, list)
        for number, block in enumerate(here if is_list else [here]):
            where = f"{place}.{number}" if is_list else place
            if not isinstance(block, dict) or not isinstance(block.get("name"), str):
                problems.append(
                    f"{where}: {block!r}: must be a block with a name, e.g. {{name: {sorted(menu or ['x'])[0]}}}."
                )
                continue
            problems += _block_problems(block, menu, kinds, where)
    return problems


def _block_problems(block: dict[str, Any], menu: Menu, kinds: tuple[str, ...], where: str) -> list[str]:
    name = block["name"]
    if name in menu and menu[name].kind not in kinds:
        fitting = sorted(n for n, e in menu.items() if e.kind in kinds)
        kind = menu[name].kind
        return [
            f"{where}.name: {name} is of kind {kind!r} and cannot stand here. Fitting: {', '.join(fitting) or 'none'}."
        ]
    try:
        check_settings(find(name, menu, where), {k: v for k, v in block.items() if k != "name"}, where)
    except RecipeError as error:
        return error.problems
    return []


def _make(block: dict[str, Any], menu: Menu, place: str) -> Any:
    return resolve(block["name"], {k: v for k, v in block.items() if k != "name"}, menu, place)


def make_defense(recipe: Recipe) -> Pipeline:
    """The defense of the recipe, or the plain mean where it is switched off."""
    block = recipe.defense if recipe.enable_defense else None
    if block is None:
        return Pipeline(before=[], rule=_make({"name": "mean"}, defenses.MENU, "defense.rule"), after=[])
    return Pipeline(
        before=[_make(b, defenses.MENU, f"defense.before.{i}") for i, b in enumerate(block.before)],
        rule=_make(block.rule, defenses.MENU, "defense.rule"),
        after=[_make(b, defenses.MENU, f"defense.after.{i}") for i, b in enumerate(block.after)],
    )


def make_guards(recipe: Recipe, task: Any, steps: Sequence[int]) -> tuple[LocalRule, ...]:
    """The rules by which clients defend themselves; one that cannot act on this model or these steps says so."""
    guards = _guards(recipe)
    for guard in guards:
        if hasattr(guard, "prepare"):
            guard.prepare(task, steps)
    return guards


def _guards(recipe: Recipe) -> tuple[LocalRule, ...]:
    blocks = recipe.defense.client if recipe.enable_defense and recipe.defense is not None else []
    return tuple(_make(b, defenses.CLIENT_MENU, f"defense.client.{i}") for i, b in enumerate(blocks))


def rehearse(recipe: Recipe) -> None:
    """Try the defense, the FL method and the attack before anything is loaded."""
    problems = algorithm_problems(recipe) + attack_problems(recipe)
    defense = threat = None
    try:
        _guards(recipe)
        defense = make_defense(recipe)
    except DefenseError as error:
        problems.append(f"defense: {error}")
    try:
        threat = make_threat(recipe)
    except AttackError as error:
        problems.append(f"attack: {error}")
    if defense is not None:
        problems += _rehearsal(recipe).problems(defense, threat if not problems else None)
    if problems:
        raise RecipeError(problems)


def _rehearsal(recipe: Recipe, layout: Layout = UNNAMED) -> Rehearsal:
    ids, block = client_ids(recipe), recipe.defense if recipe.enable_defense else None
    return Rehearsal(
        ids=ids[: recipe.clients.per_round],
        total=len(ids),
        rounds=recipe.rounds,
        seed=recipe.seed,
        root=block is not None and bool(block.root_rows),
        layout=layout,
    )


# ---------------------------------------------------------------- parts


# task of the recipe -> what makes its parts
KINDS: dict[str, Callable[..., Parts]] = {
    "causal_lm": text_parts,
    "classify": array_parts,
    "next_char": character_parts,
    "gan": array_parts,
    "nas": array_parts,
}


def save(recipe: Recipe, task: Any, folder: Path) -> None:
    """Write the model that the task holds: a peft adapter, or the parameters of a small model."""
    if recipe.task == "causal_lm":
        save_adapter(task.model, folder)
    else:
        save_model(task, folder)


def run(parts: Federation | Distillation, rounds: int) -> Iterator[RoundRecord]:
    """The rounds of what `build` made."""
    return distil(parts, rounds) if isinstance(parts, Distillation) else federation.run(parts, rounds)


def build(recipe: Recipe, machine: Machine, loaded: Loaded | None = None) -> Federation | Distillation:
    """All parts of a run; models and data that `loaded` holds from earlier runs are used again."""
    rehearse(recipe)
    loaded = loaded if loaded is not None else Loaded()
    threat, algorithm, split = make_threat(recipe), make_algorithm(recipe), functools.partial(split_rows, recipe)
    if isinstance(algorithm, KnowledgeTransfer):
        return distillation(recipe, machine, algorithm, threat, split, local_training(recipe), loaded)
    parts = KINDS[recipe.task](recipe, machine, threat, split, loaded)
    if threat is not None:
        threat.poisoned = dict(parts.poisoned)
    named = _rehearsal(recipe, scaled_down(parts.task.layout))
    if problems := named.problems(make_defense(recipe), make_threat(recipe)):
        raise RecipeError(problems)
    training = local_training(recipe)
    sizes = [parts.task.size(shard) for shard in parts.shards.values()]
    steps = [algorithm.prepare(training, sizes).steps_of(size) for size in sizes]
    return Federation(
        task=parts.task,
        clients=[Client(id, shard) for id, shard in parts.shards.items()],
        training=training,
        machine=machine,
        algorithm=algorithm,
        defense=make_defense(recipe),
        guards=make_guards(recipe, parts.task, steps),
        threat=threat,
        evaluation=parts.evaluation,
        vector=parts.task.initial.clone(),
        seed=recipe.seed,
        per_round=recipe.clients.per_round,
        evaluate_every=recipe.evaluate.every,
        chunk_mb=recipe.compute.chunk_mb,
        root=Client("server", parts.root) if parts.root is not None else None,
    )


def split_rows(recipe: Recipe, labels: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Row numbers of the server's root set and of each client, drawn by the recipe's seed."""
    everyone, root = np.arange(len(labels)), np.arange(0)
    block = recipe.defense if recipe.enable_defense else None
    if block is not None and block.root_rows:
        if block.root_rows >= len(labels):
            raise RecipeError(f"defense.root_rows: {block.root_rows} of {len(labels)} training rows. Lower it.")
        drawn = np.random.default_rng(seed_for(recipe.seed, "root")).permutation(len(labels))
        root, everyone = np.sort(drawn[: block.root_rows]), np.sort(drawn[block.root_rows :])
    shares = partition.split_rows(
        _make(recipe.clients.partition, partition.MENU, "clients.partition"),
        labels[everyone],
        recipe.clients.total,
        np.random.default_rng(seed_for(recipe.seed, "partition")),
    )
    return root, {id: everyone[rows] for id, rows in zip(client_ids(recipe), shares, strict=True)}


def local_training(recipe: Recipe) -> LocalTraining:
    """How the recipe's clients train, before an FL method adapts it."""
    clients = recipe.clients
    return LocalTraining(
        batch_size=clients.batch_size,
        steps=clients.local_steps,
        epochs=clients.local_epochs,
        optimizer=clients.optimizer,
        lr=clients.lr,
        betas=clients.betas or (0.9, 0.999),
        lr_schedule=clients.lr_schedule,
        weight_decay=clients.weight_decay,
        max_grad_norm=clients.max_grad_norm,
    )


def algorithm_problems(recipe: Recipe) -> list[str]:
    """Why the FL method cannot work with this task or this local training, as far as can be said without data."""
    try:
        algorithm = make_algorithm(recipe)
        if algorithm.task not in (None, recipe.task):
            name = recipe.algorithm["name"]
            return [
                f"algorithm: {name} is for task: {algorithm.task}, this is {recipe.task}. Use fedavg or change task."
            ]
        algorithm.prepare(local_training(recipe), None)
    except RecipeError as error:
        return error.problems
    return transfer_problems(recipe) if isinstance(algorithm, KnowledgeTransfer) else []


def make_algorithm(recipe: Recipe) -> Algorithm | KnowledgeTransfer:
    """The FL method of the recipe."""
    made: Algorithm | KnowledgeTransfer = _make(recipe.algorithm, algorithms.MENU, "algorithm")()
    return made
