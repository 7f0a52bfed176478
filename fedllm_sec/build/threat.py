"""The attackers of a recipe: who they are, in which rounds they attack, and what is wrong with that."""

from __future__ import annotations

from fedllm_sec import attacks
from fedllm_sec.attacks.threat import Threat, choose_malicious
from fedllm_sec.build.names import make
from fedllm_sec.protocols import Client
from fedllm_sec.recipe.sections import Recipe
from fedllm_sec.rounds.cohort import sample
from fedllm_sec.seeds import generator_for


def client_ids(recipe: Recipe) -> list[str]:
    """c00, c01, ..."""
    width = max(2, len(str(recipe.clients.total - 1)))
    return [f"c{i:0{width}d}" for i in range(recipe.clients.total)]


def make_threat(recipe: Recipe) -> Threat | None:
    """The attackers, without their poisoned data yet.

    With the attack switched off there is nobody malicious, but how often the clean model gives the attacker's
    answer is still measured: the base rate that an attack must beat.
    """
    block = recipe.attack
    if block is None:
        return None
    threat = _who_and_when(recipe)
    threat.knowledge, threat.collude = block.knowledge, block.collude
    threat.data, threat.local, threat.update = (
        [make(b, attacks.MENU, f"attack.{kind}.{i}") for i, b in enumerate(getattr(block, kind))]
        for kind in ("data", "local", "update")
    )
    if recipe.enable_attack and (threat.redrawn is not None or recipe.clients.per_round is not None):
        threat.ever = attacking(recipe, threat)
    return threat


def _who_and_when(recipe: Recipe) -> Threat:
    """The attackers before they have any method."""
    block = recipe.attack
    assert block is not None
    ids, who = client_ids(recipe), block.malicious
    count = who.count or round((who.share or 0) * len(ids))
    redrawn = None
    if not recipe.enable_attack:
        malicious: frozenset[str] = frozenset()
    elif who.ids is not None:
        malicious = frozenset(ids[i] for i in who.ids)
    elif who.redraw:
        malicious, redrawn = frozenset(ids), count
    else:
        malicious = choose_malicious(count, ids, recipe.seed)
    return Threat(
        malicious=malicious,
        seed=recipe.seed,
        redrawn=redrawn,
        start=block.start,
        stop=block.stop,
        every=block.every,
        probability=block.probability,
    )


def attacking(recipe: Recipe, threat: Threat) -> frozenset[str]:
    """Who attacks in some round of the run: malicious, in the cohort, and in a round of the attack.

    All of this is drawn by the seed, so it is known beforehand.
    """
    clients, found = [Client(id, None) for id in client_ids(recipe)], set()
    for r in range(1, recipe.rounds + 1):
        if attackers := threat.attackers(r):
            cohort = sample(clients, recipe.clients.per_round, generator_for(recipe.seed, r, "cohort"))
            found |= attackers & {client.id for client in cohort}
        if found == threat.malicious:
            break
    return frozenset(found)


def attack_problems(recipe: Recipe) -> list[str]:
    """What the attack cannot do with what the recipe grants it, and whether it happens at all."""
    block = recipe.attack
    if not recipe.enable_attack or block is None:
        return []
    problems, levels = [], ("own", "cohort", "cohort+defense")
    for i, method in enumerate(block.update):
        needed = attacks.needs(method["name"], method)
        if levels.index(needed) > levels.index(block.knowledge):
            problems.append(
                f"attack.knowledge: {block.knowledge!r}: attack.update.{i} ({method['name']}) needs {needed!r}. "
                "Grant it or choose another attack."
            )
        if not block.collude and method.get("partial") is True:
            problems.append(
                f"attack.update.{i}.partial: {method['name']} then takes the attackers' own rows for the honest ones, "
                "and one that does not collude has one row. Set attack.collude: true, or partial: false and "
                "attack.knowledge: cohort."
            )
    problems += [
        f"attack.data.{i}: dba splits one trigger over attackers, who must agree on that. Set attack.collude: true, or "
        "use text_trigger or pixel_trigger."
        for i, method in enumerate(block.data)
        if method["name"] == "dba" and not block.collude
    ]
    threat = _who_and_when(recipe)
    if not attacking(recipe, threat):
        active = sum(threat.active(r) for r in range(1, recipe.rounds + 1))
        problems.append(
            f"attack: it would not happen: {active} of {recipe.rounds} rounds are rounds of the attack, and no "
            "malicious client takes part in any of them. Raise attack.probability, clients.per_round or the number of "
            "malicious clients, or change the seed."
        )
    return problems
