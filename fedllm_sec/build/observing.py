"""From `attack.observe` and `attack.privacy` to an observer, and from what it kept to what was learnt from it.

An attack gets an `Observation` and nothing else; the rows that the client really trained on are looked up here, by the
seeds that drew them, and reach the metric alone.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedllm_sec.attacks import PRIVACY_MENU
from fedllm_sec.attacks.privacy import LabelCounts, Observation, Reconstruction
from fedllm_sec.build import overheard
from fedllm_sec.build.names import make
from fedllm_sec.build.pictures import Learnt, told
from fedllm_sec.build.threat import client_ids
from fedllm_sec.data import arrays
from fedllm_sec.errors import AttackError, FedError, RecipeError
from fedllm_sec.evaluation.images import counts_accuracy, matched
from fedllm_sec.protocols import Client, Labelled
from fedllm_sec.recipe.sections import Recipe
from fedllm_sec.records import observed
from fedllm_sec.records.history import RoundRecord, read_history
from fedllm_sec.rounds.client import batches_of, private_of
from fedllm_sec.rounds.compute import Machine
from fedllm_sec.rounds.federation import Federation
from fedllm_sec.rounds.observing import NOBODY, Observer
from fedllm_sec.seeds import generator_for


def make_observer(recipe: Recipe, ids: Sequence[str], evaluation: Any, machine: Machine) -> Observer:
    """Who keeps what in a run of this recipe: files in its folder."""
    block = recipe.attack if recipe.enable_attack else None
    if block is None or block.observe is None:
        return NOBODY
    seen = block.observe
    if seen.what == "gradient" and machine.world > 1:
        raise RecipeError(
            f"attack.observe.what: gradient: clients train in {machine.world} processes, and only what is sent travels "
            "between them. Start one process, or observe what: delta."
        )
    for number, method in enumerate(block.privacy):
        make(method, PRIVACY_MENU, f"attack.privacy.{number}")  # settings that contradict each other are told now
    if recipe.task == "causal_lm":
        overheard.need_held_out(recipe, evaluation)
    elif seen.others is not None:
        raise RecipeError("attack.observe.others: rows of text are told from others, images are not. Remove it.")
    elif seen.own_rows > len(evaluation.test.y):
        raise RecipeError(
            f"attack.observe.own_rows: {seen.own_rows} of {len(evaluation.test.y)} held-out rows. Lower it, or raise "
            "evaluate.rows."
        )
    keep = functools.partial(observed.keep, Path(recipe.output.folder), seen.what)
    return Observer(frozenset(seen.rounds), frozenset(ids[number] for number in seen.clients), seen.what, keep)


def audited(
    recipe: Recipe, federation: Any, folder: Path, say: Callable[[str], None], again: bool = False
) -> dict[str, Any] | None:
    """What the recipe's privacy attacks learnt from what was kept, as privacy.json has it; None where nobody looked.

    An audit that was made is read, not made again, unless `again`.
    """
    block = recipe.attack if recipe.enable_attack else None
    if block is None or block.observe is None:
        return None
    if not again and (known := observed.read_found(folder)) is not None and known.get("asked") == _asked(recipe):
        return known
    records = {record.round: record for record in read_history(folder)}
    ids = client_ids(recipe)
    places = [(r, ids[number]) for r in sorted(block.observe.rounds) for number in sorted(block.observe.clients)]
    found, final = [], observed.last_vector(folder)
    for number, method in enumerate(block.privacy):
        attack = make(method, PRIVACY_MENU, f"attack.privacy.{number}")
        entry, learnt = PRIVACY_MENU.get(method["name"]), []
        kind, paper = (entry.kind, entry.paper) if entry is not None else (None, "code from outside")
        once = kind == "canary" and method.get("model") == "global"  # which is the same after every round
        for r, id in (place for place in places if not once or place[0] == max(block.observe.rounds)):
            one = _one(attack, kind, recipe, federation, folder, records.get(r), id, r, final)
            say(f"audit: {method['name']}, round {r}, client {id}: {one.in_words()}")
            learnt.append(one)
        text = overheard.told_of_text(method, kind, paper, learnt) if recipe.task == "causal_lm" else None
        found.append(text or told(method, paper, learnt))
    made = {"asked": _asked(recipe), "what": block.observe.what, "attacks": found}
    observed.write_found(folder, made)
    return made


def _asked(recipe: Recipe) -> dict[str, Any]:
    assert recipe.attack is not None
    return dict(recipe.attack.model_dump(mode="json", include={"privacy", "observe"}))


def leakage(found: Mapping[str, Any] | None) -> dict[str, Any]:
    """The block of summary.json: each attack's scores; nothing where nobody looked."""
    if found is None:
        return {}
    return {
        "leakage": [
            {key: attack[key] for key in ("name", "settings", "scores", "not_applicable")}
            for attack in found["attacks"]
        ]
    }


# ---------------------------------------------------------------- one observation


def _one(
    attack: Callable[[Observation], Any], kind: str | None, recipe: Recipe, federation: Federation, folder: Path,
    record: RoundRecord | None, id: str, r: int, final: Tensor | None,
) -> Learnt:  # fmt: skip
    """One attack on what one client sent in one round; whatever hinders it is recorded as the reason for n/a."""
    begun = time.perf_counter()
    try:
        seen, client = observation(recipe, federation, folder, record, id, r)
        if recipe.task == "causal_lm":
            rows = truth(federation, client, seen, r)
            heard = overheard.heard(attack, kind, recipe, federation, client, seen, rows, final)
            return Learnt(id, r, time.perf_counter() - begun, heard=heard)
        made = attack(seen)
        if not isinstance(made, (Reconstruction, LabelCounts)):
            raise AttackError(f"privacy: gave {type(made).__name__}, must be a Reconstruction or LabelCounts.")
        taken = time.perf_counter() - begun
        at = torch.as_tensor(truth(federation, client, seen, r))
        x, y = client.shard.x.cpu()[at], client.shard.y.cpu()[at]
        classes = client.shard.classes
        counted = y.bincount(minlength=classes)
        if isinstance(made, LabelCounts):
            return Learnt(id, r, taken, right=counts_accuracy(made.counts, counted))
        pairs = matched(made.inputs, x)
        right = counts_accuracy(made.labels.bincount(minlength=classes), counted)
        read = int(made.notes["rows_read"]) if "rows_read" in made.notes else None
        paired = made.inputs[torch.tensor(pairs.partner)]
        return Learnt(id, r, taken, right, pairs.psnr, pairs.ssim, x, paired, read=read)
    except FedError as error:
        return Learnt(id, r, time.perf_counter() - begun, reason=str(error))


def observation(
    recipe: Recipe, federation: Federation, folder: Path, record: RoundRecord | None, id: str, r: int
) -> tuple[Observation, Client]:
    """What was kept of a client's round, and the client as it trained; an error says why there is nothing to attack."""
    assert recipe.attack is not None
    assert recipe.attack.observe is not None
    if record is None or id not in record.cohort:
        raise AttackError(f"client {id} took no part in round {r}.")
    if id in record.quarantined:
        raise AttackError(f"client {id} was quarantined in round {r}: {record.quarantined[id]}")
    threat = federation.threat
    what = recipe.attack.observe.what
    if threat is not None and threat.update and id in threat.attackers(r) and what == "delta":
        raise AttackError(f"client {id} forged its row in round {r}: no batch gave it.")
    state = observed.kept(folder, id, r)
    if state is None or state.get("what") != what:
        raise AttackError(f"nothing was kept of client {id} in round {r}.")
    client = next(c for c in federation.clients if c.id == id)
    client = threat.dress(client, r) if threat is not None else client
    task: Any = federation.task
    sizes = [task.size(c.shard) for c in federation.clients]
    training = federation.algorithm.prepare(federation.training, sizes)
    size = task.size(client.shard)
    own, images = None, recipe.task == "classify"
    if images and (count := recipe.attack.observe.own_rows):
        test: Labelled = federation.evaluation.test  # type: ignore[union-attr]
        drawn = torch.randperm(len(test.y), generator=generator_for(recipe.seed, "observer"))[:count]
        own = arrays.subset(test, drawn.numpy())
    seen = Observation(
        sent=state["sent"].float(),
        what=what,
        start=state["start"].float(),
        layout=task.layout,
        model=task.model,
        shape=tuple(client.shard.x.shape[1:]) if images else (),
        rows=min(training.batch_size or size, size),
        steps=training.steps_of(size) if what == "delta" else 1,
        size=size,
        training=training,
        lr=training.lr_at(r, recipe.rounds),
        mean=task.mean.cpu() if images else None,
        std=task.std.cpu() if images else None,
        auxiliary=own,
        client=id,
        round=r,
    )
    return seen, client


def truth(federation: Federation, client: Client, seen: Observation, r: int) -> list[int]:
    """Numbers of the rows that the client trained on, in order: of its first step, or of all that made the delta.

    A client whose every step is its whole shard has each row once, as `gradients.rows_to_find` has it.
    """
    task: Any = federation.task
    size = task.size(client.shard)
    batch = seen.training.batch_size if seen.training is not None else None
    rng = generator_for(federation.seed, federation.before + r, client.id, "batches")
    steps = 1 if (seen.rows or 0) >= size else seen.steps
    attacks = federation.threat is not None and client.id in federation.threat.attackers(r)
    own = private_of(() if attacks else federation.guards)
    drawn = islice(batches_of(task, client.shard, batch, rng, own), steps)
    return [int(row) for rows in drawn for row in rows]
