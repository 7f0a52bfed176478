"""Plan -> parts -> federation: here data are read and a model is loaded, and everything is put together.

The whole way of a recipe: `names.checked` (raw to recipe), `plan.planned` (what needs no data), `assemble` (the rest).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedllm_sec.algorithms.gkt import KnowledgeTransfer
from fedllm_sec.build.arrays import array_parts, save_model
from fedllm_sec.build.averaging import make_averaging
from fedllm_sec.build.batches import need_batches, need_whole_batches
from fedllm_sec.build.begin import begin
from fedllm_sec.build.card import save_language_model
from fedllm_sec.build.characters import character_parts
from fedllm_sec.build.indicator import make_planting
from fedllm_sec.build.loaded import Loaded
from fedllm_sec.build.observing import make_observer
from fedllm_sec.build.parts import Parts, deal, handed_out
from fedllm_sec.build.plan import Plan, planned
from fedllm_sec.build.rehearsal import scaled_down
from fedllm_sec.build.repair import make_repair
from fedllm_sec.build.smoothing import smoothing
from fedllm_sec.build.storage import storage
from fedllm_sec.build.text import text_parts
from fedllm_sec.build.transfer import distillation
from fedllm_sec.defenses.dp_sgd import DpSgd
from fedllm_sec.defenses.latent import flare, need_views
from fedllm_sec.defenses.privacy import settings_if
from fedllm_sec.errors import RecipeError
from fedllm_sec.protocols import Client, Labelled
from fedllm_sec.recipe.places import TEXT_TASKS
from fedllm_sec.recipe.sections import Recipe
from fedllm_sec.records.history import RoundRecord
from fedllm_sec.rounds import federation
from fedllm_sec.rounds.compute import Machine
from fedllm_sec.rounds.distillation import Distillation, distil
from fedllm_sec.rounds.federation import Federation
from fedllm_sec.tasks.classify import Classify

# task of the recipe -> what makes its parts
KINDS: dict[str, Callable[..., Parts]] = {
    "causal_lm": text_parts,
    "classify_text": text_parts,
    "classify": array_parts,
    "next_char": character_parts,
    "gan": array_parts,
    "nas": array_parts,
}


def build(recipe: Recipe, machine: Machine, loaded: Loaded | None = None) -> Federation | Distillation:
    """All parts of a run, from a checked recipe."""
    return assemble(planned(recipe), machine, loaded)


def assemble(plan: Plan, machine: Machine, loaded: Loaded | None = None) -> Federation | Distillation:
    """All parts of a run; models and data that `loaded` holds from earlier runs are used again."""
    recipe, methods = plan.recipe, plan.fresh()
    loaded, threat, algorithm = loaded if loaded is not None else Loaded(), methods.threat, methods.algorithm
    split = functools.partial(deal, recipe, plan.ids)
    if isinstance(algorithm, KnowledgeTransfer):
        return distillation(recipe, machine, algorithm, threat, split, plan.training, loaded)
    parts = KINDS[recipe.task](recipe, machine, threat, split, loaded)
    shards = handed_out(parts, threat)
    if threat is not None:
        for number, attack in enumerate(threat.update):
            if hasattr(attack, "forge_buffers") and getattr(parts.task, "buffers", None) is None:
                raise RecipeError(
                    f"attack.update.{number}: {recipe.attack.update[number]['name']}: the model keeps no running "
                    "statistics that travel with an update. Choose another attack, or a model with BatchNorm."
                )
    plan.rehearse(scaled_down(parts.task.layout))
    sizes = [parts.task.size(shard) for shard in shards.values()]
    training = replace(plan.training, joins=getattr(parts.task, "normalises", False))
    prepared = algorithm.prepare(training, sizes)
    steps = [prepared.steps_of(size) for size in sizes]
    if recipe.clients.lr_in_round != "constant" and max(steps, default=1) == 1:
        raise RecipeError(
            f"clients.lr_in_round: {recipe.clients.lr_in_round}: clients take one step in a round, over which nothing "
            "can fall. Set it to constant, or let them take more."
        )
    if isinstance(parts.task, Classify):
        held = {**shards, **({} if parts.root is None else {"server": parts.root})}
        need_batches(parts.task, held, prepared, machine, recipe.model["name"])
    if methods.defense.enter is not None:
        methods.defense.enter.scales = getattr(parts.task, "scales", None)
    averaging = make_averaging(recipe, parts.task)
    vector, buffers = begin(recipe, parts.task)
    if settings_if(methods.defense.rule, flare) is not None and isinstance(parts.root, Labelled):
        need_views(parts.task.function(buffers), vector, parts.root.x[:2])
    for rule in threat.local if threat is not None and threat.malicious else ():
        if hasattr(rule, "prepare"):
            rule.prepare(parts.task, steps)
        if hasattr(rule, "brief"):
            rule.brief(recipe.clients.per_round or recipe.clients.total, parts.shards, threat.poisoned)
    for guard in methods.guards:
        if hasattr(guard, "prepare"):  # one that cannot act on this model or these steps says so
            guard.prepare(parts.task, steps)
        if isinstance(guard, DpSgd):
            need_whole_batches(machine)
            guard.plan(sizes, prepared, recipe.rounds)
    return Federation(
        task=parts.task,
        clients=[Client(id, shard) for id, shard in shards.items()],
        training=training,
        machine=machine,
        algorithm=algorithm,
        defense=methods.defense,
        guards=methods.guards,
        averaging=averaging,
        threat=threat,
        evaluation=parts.evaluation,
        triggered=parts.triggered,
        observer=make_observer(recipe, plan.ids, parts.evaluation, machine),
        vector=vector,
        buffers=buffers,
        seed=recipe.seed,
        before=recipe.before,
        per_round=recipe.clients.per_round,
        evaluate_every=recipe.evaluate.every,
        start=recipe.evaluate.start,
        chunk_mb=recipe.compute.chunk_mb,
        storage=storage(recipe, parts.task.layout.size, machine.device),
        root=Client("server", parts.root) if parts.root is not None else None,
        planting=make_planting(recipe, methods.defense, next(iter(shards.values())), machine.device),
        facts=parts.facts(),
        repair=make_repair(recipe),
        smoothing=smoothing(
            recipe,
            methods.defense,
            parts.task,
            parts.evaluation,
            dict(zip(shards, sizes, strict=True)),
            parts.poisoned_share,
            prepared,
        ),
    )


def run(made: Federation | Distillation, rounds: int) -> Iterator[RoundRecord]:
    """The rounds of what `assemble` made."""
    return distil(made, rounds) if isinstance(made, Distillation) else federation.run(made, rounds)


def save(
    recipe: Recipe,
    task: Any,
    folder: Path,
    records: Sequence[RoundRecord],
    start: Mapping[str, Any] | None = None,
) -> None:
    """Write the model that the task holds: a peft adapter or a whole model with its card, or a small model.

    `start` is what it was trained from, as environment.json has it.
    """
    if recipe.task in TEXT_TASKS:
        save_language_model(recipe, task, folder, records, start)
    else:
        save_model(task, folder)
