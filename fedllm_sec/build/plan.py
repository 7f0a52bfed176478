"""Checked recipe -> plan: everything that follows from a recipe without data or a model.

`--check` and `--explain` stop here. All that cannot work is found while the plan is made, and told together.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from fedllm_sec import algorithms, defenses
from fedllm_sec.algorithms.gkt import KnowledgeTransfer
from fedllm_sec.attacks.threat import Threat
from fedllm_sec.build.averaging import BY_PRODUCTS, averaging_problems, way_of
from fedllm_sec.build.drawn import drawn_problems, named_clients
from fedllm_sec.build.indicator import indicator_problems
from fedllm_sec.build.judging import evaluation_problems
from fedllm_sec.build.kept import save_problems
from fedllm_sec.build.names import make, outside, told_in_a_line
from fedllm_sec.build.rehearsal import UNNAMED, Rehearsal
from fedllm_sec.build.repair import repair_problems
from fedllm_sec.build.space import PAIRED, space_problems, spaced
from fedllm_sec.build.start import start_problems
from fedllm_sec.build.threat import attack_problems, attacking, client_ids, every_id, learning_problems, make_threat
from fedllm_sec.build.transfer import transfer_problems
from fedllm_sec.defenses.layers import LayerByLayer
from fedllm_sec.defenses.pipeline import Pipeline
from fedllm_sec.defenses.space import Space
from fedllm_sec.errors import AttackError, DefenseError, RecipeError
from fedllm_sec.matrix import Layout
from fedllm_sec.protocols import Algorithm, LocalRule, LocalTraining
from fedllm_sec.recipe.places import folder_problem
from fedllm_sec.recipe.sections import Recipe


@dataclass
class Methods:
    """What one run is made with. Methods remember rounds and are used up by it."""

    algorithm: Algorithm | KnowledgeTransfer
    defense: Pipeline
    guards: tuple[LocalRule, ...]  # what clients do for their own defense
    threat: Threat | None


@dataclass(frozen=True)
class Plan:
    """A recipe that can work. `methods` are there to be read; a run takes `fresh` ones."""

    recipe: Recipe
    ids: tuple[str, ...]  # all clients
    training: LocalTraining  # how they train, before the FL method adapts it
    methods: Methods

    def fresh(self) -> Methods:
        """The methods once more, as they are before the first round."""
        return Methods(
            make_algorithm(self.recipe), make_defense(self.recipe), make_guards(self.recipe), make_threat(self.recipe)
        )

    def attackers(self) -> frozenset[str]:
        """Who attacks in some round: the seed draws who is malicious, who takes part, and which rounds are attacked."""
        return attacking(self.recipe).ids

    def notes(self) -> list[str]:
        """What was not looked at before the run, since it is too much."""
        return [*filter(None, [attacking(self.recipe).note, _rehearsal(self.recipe, UNNAMED).note])]

    def rehearse(self, layout: Layout) -> None:
        """Try defense and attack on random rows of the model's layout, now that there is a model."""
        tried = self.fresh()
        if problems := _rehearsal(self.recipe, layout).problems(tried.defense, tried.threat):
            raise RecipeError(problems)


UNREAD = {"seed", "output", "model", "data", "evaluate", "compute"}  # what a rehearsal does not read of a recipe


def planned(recipe: Recipe, rehearsed: dict[str, list[str]] | None = None) -> Plan:
    """The plan of a checked recipe, or one RecipeError with all that could not work.

    `rehearsed` remembers what rehearsals found: their rows are random, so recipes whose seed differs share one.
    """
    problems = algorithm_problems(recipe) + attack_problems(recipe) + evaluation_problems(recipe)
    problems += learning_problems(recipe) + start_problems(recipe) + space_problems(recipe) + save_problems(recipe)
    problems += repair_problems(recipe) + indicator_problems(recipe)
    if recipe.output.folder:  # a cell of a grid has none before all are known
        problems += filter(None, [folder_problem(recipe.output.folder)])
    defense = threat = None
    guards: tuple[LocalRule, ...] = ()
    try:
        guards, defense = make_guards(recipe), make_defense(recipe)
    except DefenseError as error:
        problems.append(f"defense: {error}")
    try:
        threat = make_threat(recipe)
    except AttackError as error:
        problems.append(f"attack: {error}")
    problems += averaging_problems(recipe, _if_known(recipe), defense)
    if defense is not None:  # tried even where something else is wrong, so that all is told at once
        tried = make_threat(recipe) if not problems else None
        known, rehearsal = {} if rehearsed is None else rehearsed, _rehearsal(recipe, UNNAMED)
        key = f"{tried is None} {replace(rehearsal, seed=0, ids=[])} {recipe.model_dump_json(exclude=UNREAD)}"
        if key not in known:
            known[key] = rehearsal.problems(make_defense(recipe), tried)
        problems += known[key] or drawn_problems(recipe, defense, lambda id: _tried_without(recipe, id))
    if problems or defense is None:
        raise RecipeError(problems)
    methods = Methods(make_algorithm(recipe), defense, guards, threat)
    return Plan(recipe, tuple(client_ids(recipe)), local_training(recipe), methods)


def _if_known(recipe: Recipe) -> Algorithm | KnowledgeTransfer | None:
    """The FL method, where it can be made; why not is told elsewhere."""
    try:
        return make_algorithm(recipe)
    except RecipeError:
        return None


def _tried_without(recipe: Recipe, id: str) -> list[str]:
    """What the defense cannot do in a round in which this client is not drawn."""
    whole = _rehearsal(recipe, UNNAMED)
    others = [other for other in client_ids(recipe) if other != id][: len(whole.ids)]
    return replace(whole, ids=others).problems(make_defense(recipe), None)


def _rehearsal(recipe: Recipe, layout: Layout) -> Rehearsal:
    """Of as many clients as a round has, those that the defense names among them."""
    clients, block = recipe.clients, recipe.defense if recipe.enable_defense else None
    return Rehearsal(
        ids=list(_of_a_round(clients.total, clients.per_round, tuple(named_clients(recipe)))),
        total=clients.total,
        rounds=recipe.rounds,
        seed=recipe.seed,
        root=block is not None and bool(block.root_rows),
        images=recipe.task == "classify",
        layout=PAIRED if layout is UNNAMED and spaced(recipe) else layout,
        weighs=way if (way := way_of(recipe)) in BY_PRODUCTS else None,
        code=bool(outside(recipe.model_dump(include={"task", "attack", "defense"}))),
    )


@functools.lru_cache(maxsize=8)  # a plan asks several times, of up to a million clients
def _of_a_round(total: int, per_round: int | None, named: tuple[str, ...]) -> tuple[str, ...]:
    ids = every_id(total)
    first = set(list(dict.fromkeys([*named, *ids]))[:per_round])
    return tuple(id for id in ids if id in first)


# ---------------------------------------------------------------- one block of the recipe -> one method


def make_algorithm(recipe: Recipe) -> Algorithm | KnowledgeTransfer:
    """The FL method of the recipe."""
    name = recipe.algorithm["name"]
    makes = make(recipe.algorithm, algorithms.MENU, "algorithm")
    with told_in_a_line(recipe.algorithm, "algorithm"):
        made = makes()
    if not isinstance(made, (Algorithm, KnowledgeTransfer)):
        raise RecipeError(
            f"algorithm.name: {name}: gives {type(made).__name__}, no FL method (fedllm_sec.protocols.Algorithm)."
        )
    return made


def make_defense(recipe: Recipe) -> Pipeline:
    """The defense of the recipe, or the plain mean where it is switched off."""
    block = recipe.defense if recipe.enable_defense else None
    if block is None:
        return Pipeline(before=[], rule=make({"name": "mean"}, defenses.MENU, "defense.rule"), after=[])
    kind = Pipeline if block.scope == "model" else LayerByLayer
    return kind(
        before=[make(b, defenses.MENU, f"defense.before.{i}") for i, b in enumerate(block.before)],
        rule=make(block.rule, defenses.MENU, "defense.rule"),
        after=[make(b, defenses.MENU, f"defense.after.{i}") for i, b in enumerate(block.after)],
        enter=None if block.space == "factors" else Space(block.space),
    )


def make_guards(recipe: Recipe) -> tuple[LocalRule, ...]:
    """The rules by which clients defend themselves."""
    blocks = recipe.defense.client if recipe.enable_defense and recipe.defense is not None else []
    return tuple(make(b, defenses.CLIENT_MENU, f"defense.client.{i}") for i, b in enumerate(blocks))


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
        momentum=clients.momentum,
        nesterov=clients.nesterov,
        lr_schedule=clients.lr_schedule,
        lr_in_round=clients.lr_in_round,
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
