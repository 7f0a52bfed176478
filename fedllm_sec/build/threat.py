"""The attackers of a recipe: who they are, in which rounds they attack, and what is wrong with that."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from fedllm_sec import attacks
from fedllm_sec.attacks.data.learnt import learner
from fedllm_sec.attacks.threat import Threat, choose_malicious
from fedllm_sec.build.kept import rounds_problem
from fedllm_sec.build.names import make
from fedllm_sec.errors import AttackError
from fedllm_sec.recipe.sections import Attack, Recipe
from fedllm_sec.rounds.cohort import Sure, cohorts, foreseen


def client_ids(recipe: Recipe) -> list[str]:
    """c00, c01, ..."""
    return list(every_id(recipe.clients.total))


@functools.lru_cache(maxsize=8)
def every_id(total: int) -> tuple[str, ...]:
    """c00, c01, ... of so many clients."""
    width = max(2, len(str(total - 1)))
    return tuple(f"c{i:0{width}d}" for i in range(total))


def make_threat(recipe: Recipe) -> Threat | None:
    """The attackers, without their poisoned data yet.

    With the attack switched off there is nobody malicious, but how often the clean model gives the attacker's
    answer is still measured: the base rate that an attack must beat.
    """
    block = recipe.attack
    if block is None or block.curious:  # an observer is no client: there are no attackers to tell from the others
        return None
    threat = _who_and_when(recipe)
    threat.knowledge, threat.collude = block.knowledge, block.collude
    threat.data, threat.local, threat.update = (
        [make(b, attacks.MENU, f"attack.{kind}.{i}") for i, b in enumerate(getattr(block, kind))]
        for kind in ("data", "local", "update")
    )
    if block.spread is not None and recipe.enable_attack:
        count = max(1, round(block.spread.clients * recipe.clients.total))
        threat.spread = choose_malicious(count, every_id(recipe.clients.total), recipe.seed)
    if learner(threat.data) is not None and not recipe.enable_attack:
        threat.planned = _who(block, True, recipe.clients.total, recipe.seed, recipe.before)
    if recipe.enable_attack and (threat.redrawn is not None or recipe.clients.per_round is not None):
        found = attacking(recipe)
        threat.ever = found.ids if found.complete else None
    return threat


def learning(recipe: Recipe) -> list[str]:
    """Where the recipe names data attacks whose trigger is learnt, and which; the attack may be switched off."""
    try:
        threat = make_threat(recipe)
    except AttackError:  # told by who makes it for a run
        return []
    if threat is None or recipe.attack is None:
        return []
    named = zip(threat.data, recipe.attack.data, strict=True)
    return [f"attack.data.{i}: {block['name']}" for i, (made, block) in enumerate(named) if hasattr(made, "tune")]


def learning_problems(recipe: Recipe) -> list[str]:
    """What attackers who learn their trigger cannot do with the recipe."""
    found = learning(recipe)
    if not found:
        return []
    assert recipe.attack is not None
    problems, where = list[str](), f"{found[0]} learns its trigger"
    if recipe.task != "classify" or recipe.algorithm["name"] == "fedgkt":
        problems.append(
            f"{where} against the classifier of images that clients are sent (task: classify, and not fedgkt). Choose "
            "another attack, such as pixel_trigger."
        )
    if len(recipe.attack.data) > 1:
        problems.append(f"{where} anew in each round and then poisons again. Name it alone under attack.data.")
    if recipe.enable_attack and recipe.attack.spread is not None:
        problems.append(
            f"{where} when a round of an attacker begins, and attack.spread has none. Choose another attack."
        )
    if recipe.enable_attack and not recipe.attack.collude:
        problems.append(f"{where} on the rows of all who attack in a round. Set attack.collude: true.")
    return problems


def _who_and_when(recipe: Recipe) -> Threat:
    """The attackers before they have any method."""
    assert recipe.attack is not None
    return _who(recipe.attack, recipe.enable_attack, recipe.clients.total, recipe.seed, recipe.before)


def _who(block: Attack, enabled: bool, total: int, seed: int, before: int) -> Threat:
    ids, who = every_id(total), block.malicious
    count = who.count or round((who.share or 0) * len(ids))
    redrawn = None
    if not enabled:
        malicious: frozenset[str] = frozenset()
    elif who.ids is not None:
        malicious = frozenset(ids[i] for i in who.ids)
    elif who.redraw:
        malicious, redrawn = frozenset(ids), count
    else:
        malicious = choose_malicious(count, ids, seed)
    return Threat(
        malicious=malicious,
        seed=seed,
        redrawn=redrawn,
        present=who.present if enabled else None,
        start=block.start,
        stop=block.stop,
        every=block.every,
        probability=block.probability,
        before=before,
    )


@dataclass(frozen=True)
class Attacking:
    """Who attacks in some round of the run: malicious, in the cohort, and in a round of the attack.

    All of it is drawn by the seed, so it is known beforehand, but a run may have too many rounds or clients for all
    draws to be made then: `looked` are the rounds that were looked at, of `rounds` that may be rounds of the attack.
    """

    ids: frozenset[str]
    looked: int
    rounds: int
    complete: bool  # whether `ids` are all that ever attack: every round was looked at, or everybody was found

    @property
    def note(self) -> str | None:
        """What was not looked at."""
        if self.complete:
            return None
        return (
            f"attack: who attacks was looked up in the first {self.looked:,} of {self.rounds:,} rounds of the attack "
            f"({len(self.ids):,} clients do). Later ones are drawn in the run: all malicious clients get poisoned data."
        )


def attacking(recipe: Recipe) -> Attacking:
    """Who attacks in some round of the run; nobody without an attack."""
    if recipe.attack is None or not recipe.enable_attack or recipe.attack.curious:
        return Attacking(frozenset(), 0, 0, True)
    clients, when = recipe.clients, recipe.attack.model_dump_json(include={"malicious", *WHEN})
    return _foreseen(recipe.seed, recipe.before, recipe.rounds, clients.total, clients.per_round, when)


def sure(recipe: Recipe) -> Callable[[int], Sure | None]:
    """For each round, who is sure to take part in it, as places: attackers who are present."""
    if not recipe.attacked:
        return lambda round: None
    return _sure(_who_and_when(recipe), recipe.clients.total)


def _sure(threat: Threat, total: int) -> Callable[[int], Sure | None]:
    def at(round: int) -> Sure | None:
        found = threat.sure(round)
        return None if found is None else ({_places(total)[id] for id in found[0]}, found[1])

    return at


@functools.lru_cache(maxsize=8)
def _places(total: int) -> dict[str, int]:
    return {id: place for place, id in enumerate(every_id(total))}


WHEN = ("start", "stop", "every", "probability")


@functools.lru_cache(maxsize=64)  # a plan asks several times
def _foreseen(seed: int, before: int, rounds: int, total: int, per_round: int | None, when: str) -> Attacking:
    threat = _who(Attack.model_validate_json(when), True, total, seed, before)
    possible = possible_rounds(threat, rounds)
    draws = total if per_round is not None and per_round < total else 0
    rounds_looked = foreseen(possible, draws + (10 * total if threat.redrawn is not None else 0))  # who costs more
    ids, found, looked = every_id(total), set[str](), 0
    for r in rounds_looked:
        looked += 1
        if not (attackers := threat.attackers(r)) <= found:
            for _, cohort in cohorts(seed, range(r, r + 1), total, per_round, before, _sure(threat, total)):
                found |= attackers & {ids[i] for i in cohort}
            if found == threat.malicious:
                break
    complete = looked == len(possible) or found == threat.malicious
    return Attacking(frozenset(found), looked, len(possible), complete)


def possible_rounds(threat: Threat, rounds: int) -> range:
    """The rounds that start, stop and every allow."""
    return range(threat.start, (rounds if threat.stop is None else min(rounds, threat.stop)) + 1, threat.every)


def attack_rounds(recipe: Recipe, most: int) -> list[tuple[int, frozenset[str]]]:
    """The first `most` rounds of the attack, each with who attacks in it if he takes part; [] without an attack.

    Of a long run with a small attack.probability only the first rounds are looked at.
    """
    if recipe.attack is None or not recipe.enable_attack or recipe.attack.curious:
        return []
    threat, found = _who_and_when(recipe), list[tuple[int, frozenset[str]]]()
    for r in foreseen(possible_rounds(threat, recipe.rounds), 0):
        if len(found) < most and threat.active(r):
            found.append((r, threat.attackers(r)))
    return found


def starts_in_round_1(recipe: Recipe) -> bool:
    """Whether an attacker takes part in the very first round; after those of `pretrain` there is a step before it."""
    if recipe.before or not (first := attack_rounds(recipe, 1)) or first[0][0] != 1:
        return False
    clients, ids = recipe.clients, every_id(recipe.clients.total)
    ((_, cohort),) = cohorts(recipe.seed, range(1, 2), clients.total, clients.per_round, 0)
    return not first[0][1].isdisjoint(ids[i] for i in cohort)


def active_rounds(recipe: Recipe) -> str:
    """How many rounds are rounds of the attack, in words: counted, or expected where they are too many to be drawn."""
    threat = _who_and_when(recipe)
    possible = possible_rounds(threat, recipe.rounds)
    if threat.probability >= 1:
        return f"{len(possible):,}"
    if len(drawn := foreseen(possible, 0)) == len(possible):
        return f"{sum(threat.active(r) for r in drawn):,}"
    return f"about {threat.probability * len(possible):,.0f}"


def attack_problems(recipe: Recipe) -> list[str]:
    """What the attack cannot do with what the recipe grants it, and whether it happens at all."""
    block = recipe.attack
    if not recipe.enable_attack or block is None or block.curious:
        return []
    problems = rounds_problem("attack.every", block.every, recipe)
    levels = ("own", "cohort", "cohort+defense")
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
    if starts_in_round_1(recipe):
        problems += [
            f"attack.local.{i}: pgd: an attacker takes part in round 1, which has no earlier global step for the "
            "radius to be relative to. Set pgd.radius, or attack.start to 2 or later."
            for i, method in enumerate(block.local)
            if method["name"] == "pgd" and method.get("radius") is None
        ]
        problems += [
            f"attack.local.{i}: anticipate: an attacker takes part in round 1, which has no earlier global step to "
            "guess the next ones by. Set anticipate.lr, or attack.start to 2 or later."
            for i, method in enumerate(block.local)
            if method["name"] == "anticipate" and method.get("lr") is None
        ]
    problems += [
        f"attack.local.{i}: {method['name']} acts on poisoned rows of classifiers of images. Set task: classify and "
        "attack.data, or choose another local attack."
        for i, method in enumerate(block.local)
        if method["name"] in ("chameleon", "anticipate", "f3ba") and not (recipe.task == "classify" and block.data)
    ]
    found = attacking(recipe)
    if found.complete and not found.ids and block.spread is None:
        problems.append(
            f"attack: it would not happen: {active_rounds(recipe)} of {recipe.rounds:,} rounds are rounds of the "
            "attack, and no malicious client takes part in any of them. Raise attack.probability, clients.per_round or "
            "the number of malicious clients, or change the seed."
        )
    return problems
