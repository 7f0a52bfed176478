"""The parts of a FedGKT run, and what a recipe cannot ask of it."""

from __future__ import annotations

import torch

from fedllm_sec.algorithms.gkt import KnowledgeTransfer
from fedllm_sec.attacks.threat import Threat
from fedllm_sec.build.arrays import array_parts, make_model
from fedllm_sec.build.loaded import Loaded
from fedllm_sec.build.parts import Split, handed_out
from fedllm_sec.errors import RecipeError
from fedllm_sec.protocols import Client, LocalTraining
from fedllm_sec.recipe.sections import Recipe
from fedllm_sec.rounds.compute import Machine
from fedllm_sec.rounds.distillation import Distillation, Pupil, edge_pupil
from fedllm_sec.seeds import seed_for

# update attacks of the menu that make sense on a client's features, one row for each of its examples
ON_FEATURES = ("byzantine_zero", "byzantine_random", "byzantine_flip", "gaussian", "inf_nan")


def transfer_problems(recipe: Recipe) -> list[str]:
    """What has nothing to act on where features and logits travel instead of deltas."""
    problems = []
    if recipe.enable_defense:
        problems.append(
            "defense: fedgkt sends features and logits, no updates: every client keeps its own net and nothing is "
            "averaged, so there are no rows that a defense could compare or weigh. Set enable_defense: false, or use "
            "another algorithm."
        )
    if mode := recipe.model.get("buffers"):
        problems.append(
            f"model.buffers: {mode}: fedgkt averages no nets, so no running statistics travel. Remove it, and choose a "
            "model with GroupNorm."
        )
    if recipe.evaluate.start:
        problems.append(
            "evaluate.start: fedgkt has no model before the first round: what is measured are the nets that clients "
            "have trained, with the server's behind them, and nobody has trained one yet. Set it to false."
        )
    if recipe.compute.rows is not None or recipe.compute.rows_dtype != "float32":
        problems.append(
            "compute.rows, rows_dtype: fedgkt sends features and logits, no updates, so there are no rows to keep "
            "anywhere. Leave them out, or use another algorithm."
        )
    for key, asked in (("model.start", recipe.model.get("start")), ("pretrain", recipe.pretrain)):
        if asked is not None:
            problems.append(
                f"{key}: fedgkt has no one model that a run could start from: every client keeps a net of its own, and "
                "the server's learns from their features. Remove it, or use another algorithm."
            )
    attack = recipe.attack if recipe.enable_attack else None
    if attack is not None and attack.privacy:
        problems.append(
            "attack.privacy: learns from the deltas and gradients that clients send, and fedgkt sends none. Remove it, "
            "or use another algorithm."
        )
    if attack is not None and attack.local:
        problems.append(
            "attack.local: steers the delta a client sends, and fedgkt sends none. Use attack.data or attack.update."
        )
    if attack is not None and attack.knowledge != "own":
        problems.append(
            f"attack.knowledge: {attack.knowledge!r}: fedgkt attackers see no features but their own. Set it to own."
        )
    for i, block in enumerate(attack.update if attack is not None else []):
        if ":" not in block["name"] and block["name"] not in ON_FEATURES:
            problems.append(
                f"attack.update.{i}.name: {block['name']} forges deltas, and fedgkt sends features. "
                f"Fitting: {', '.join(ON_FEATURES)}; or poison data under attack.data."
            )
    if recipe.data.flip or recipe.data.crop:
        problems.append(
            "data.flip, data.crop: fedgkt learns one logit vector for each row and cannot change rows as it goes. "
            "Leave them out."
        )
    return problems


def distillation(
    recipe: Recipe,
    machine: Machine,
    method: KnowledgeTransfer,
    threat: Threat | None,
    split: Split,
    training: LocalTraining,
    loaded: Loaded,
) -> Distillation:
    """All parts of a FedGKT run: `model` of the recipe is the server's net, on the features of the clients'."""
    if machine.world > 1:
        raise RecipeError(
            f"algorithm: fedgkt runs in one process, and {machine.world} were launched. Use --num_processes 1."
        )
    parts = array_parts(recipe, machine, threat, split, loaded)
    shards = handed_out(parts, threat)
    first = next(iter(shards.values()))
    shape = tuple(first.x.shape[1:])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(recipe.seed, "edge"))  # layers draw from torch's global generator
        edge = edge_pupil(method, shape, first.classes, machine.device)
    with torch.no_grad():
        sent = tuple(edge.model.features(torch.zeros(1, *shape, device=machine.device)).shape[1:])
    server = Pupil(make_model(recipe, sent, first.classes), method, machine.device)
    return Distillation(
        method=method,
        edge=edge,
        task=server,
        clients=[Client(id, shard) for id, shard in shards.items()],
        training=training,
        machine=machine,
        threat=threat,
        evaluation=parts.evaluation,
        vector=server.initial.clone(),
        classes=first.classes,
        normalise=lambda x: (x - parts.task.mean) / parts.task.std,
        seed=recipe.seed,
        per_round=recipe.clients.per_round,
        evaluate_every=recipe.evaluate.every,
        facts=parts.facts(),
    )
