"""What a recipe would do, in words and numbers: `python -m fedllm_sec.train --explain recipe.yaml`. Nothing trains."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedllm_sec.algorithms.gkt import KnowledgeTransfer
from fedllm_sec.build import text_classifier
from fedllm_sec.build.audit_cost import observer_in_words
from fedllm_sec.build.cost import FLOAT, Cost, cost, size
from fedllm_sec.build.federation import build
from fedllm_sec.build.judging import most_answers
from fedllm_sec.build.noise import noise_in_words, spent_in_words
from fedllm_sec.build.plan import Plan
from fedllm_sec.build.seen import first_row
from fedllm_sec.build.selftest import in_words
from fedllm_sec.build.start import entry as start_entry
from fedllm_sec.build.start import start_of
from fedllm_sec.build.storage import accelerator, kept_in_words
from fedllm_sec.build.text import rows_in_words
from fedllm_sec.build.threat import active_rounds
from fedllm_sec.errors import FedError, RecipeError
from fedllm_sec.menu import lines as menu_lines
from fedllm_sec.models.lora import load_tokenizer
from fedllm_sec.recipe import reading as recipes
from fedllm_sec.recipe.places import TEXT_TASKS
from fedllm_sec.recipe.sections import Recipe
from fedllm_sec.records import answers
from fedllm_sec.report.runs import Run, methods
from fedllm_sec.report.threat import attack_card, defense_steps
from fedllm_sec.rounds.compute import Machine
from fedllm_sec.tasks.chat import writer_of
from fedllm_sec.tasks.encoding import room

WIDTH = 110
MOST_NAMED = 100  # clients
# What of a recipe its cost depends on: variants that share it are counted once.
COUNTED = {"seed", "rounds", "task", "model", "data", "clients", "algorithm", "enable_defense", "defense"}
TRIED = {"task", "model", "data", "clients", "evaluate"}  # the same for what its model's self-test depends on
PRETRAINED = (
    "the rounds of pretrain, {n}, are made once, in the folder pretrain beside the runs, for all that start alike; the "
    "cost below is without them"
)
REFUSED = ("cannot be read: ", "will be refused: ")  # how what is said of data and model begins where a run would stop


def explain(plans: Mapping[str, Plan]) -> tuple[str, list[str]]:
    """The resolved recipe, then for each variant what differs, who attacks, what defends, and what it costs.

    And why runs would not begin: data that cannot be read, a model that would be refused.
    """
    first = next(iter(plans.values())).recipe
    out = [recipes.dump(first).rstrip()]
    counted: dict[str, Cost] = {}
    tried: dict[str, list[str]] = {}
    problems: list[str] = []
    for name, plan in plans.items():
        recipe = plan.recipe
        key = recipe.model_dump_json(include=COUNTED)
        if key not in counted:
            counted[key] = cost(plan)
        if (same_model := recipe.model_dump_json(include=TRIED)) not in tried:
            tried[same_model] = model(recipe)
        title = name or "this run"
        out += ["", f"{title}: {recipe.output.folder}", "=" * len(f"{title}: {recipe.output.folder}")]
        if recipe is not first:
            out += _section("Differs from the recipe above in", differences(first, recipe) or ["nothing"])
        if notes := plan.notes():
            out += _section("Not looked at", notes)
        rows, shown = data(recipe), tried[same_model]
        problems += [*_refusals(rows), *_refusals(shown), *counted[key].reasons]
        out += method(recipe) + start(recipe) + (_section("Data", rows) if rows else [])
        out += _section("Model, tried on two short rows", shown) if shown else []
        out += threat(plan) + _section_of_observer(recipe, counted[key]) + defense(plan, counted[key])
        out += bill(recipe, counted[key])
    return "\n".join(out), list(dict.fromkeys(problems))


def _refusals(texts: Iterable[str]) -> list[str]:
    return [text.removeprefix(sign) for text in texts for sign in REFUSED if text.startswith(sign)]


def differences(old: Recipe, new: Recipe) -> list[str]:
    """`key.sub: new value` for everything that is not the same; the folder is left out."""

    def walk(a: Any, b: Any, place: str) -> Iterable[str]:
        if isinstance(a, dict) and isinstance(b, dict):
            for key in dict.fromkeys([*a, *b]):
                if a.get(key) != b.get(key):
                    yield from walk(a.get(key), b.get(key), f"{place}.{key}" if place else key)
        else:
            yield f"{place}: {json.dumps(b, ensure_ascii=False)}"

    skip = {"output": {"folder"}}
    return list(walk(old.model_dump(mode="json", exclude=skip), new.model_dump(mode="json", exclude=skip), ""))


# ---------------------------------------------------------------- words


def _section(title: str, texts: Iterable[str]) -> list[str]:
    wrapped = [textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="    ") for text in texts]
    return [title, *(line for part in wrapped for line in part)]


def _as_run(recipe: Recipe) -> Run:
    """A run before its first round, as the report reads it."""
    content = recipe.model_dump(mode="json")
    return Run("", Path(recipe.output.folder), content, "", {}, ())


def threat(plan: Plan) -> list[str]:
    """Who attacks, when, what they see and what they do."""
    recipe, made = plan.recipe, plan.methods.threat
    run = _as_run(recipe)
    card = attack_card(run, took_part=False)
    if not card:
        block = recipe.attack
        watched = (
            " (its trigger is tried on the clean model: the base rate)" if block is not None and block.data else ""
        )
        return _section("Threat", [f"nobody attacks{watched}"])
    assert made is not None
    if made.spread:
        extra = {
            "Who attacks": [f"clients {named(made.spread)}"],
            "What they do": _meanings(run.attack, "data") + _targets(recipe),
        }
        return [line for title, texts in card for line in _section(title, [*texts, *extra.get(title, [])])]
    n, total = recipe.clients.per_round or recipe.clients.total, recipe.clients.total
    who, m = f"clients {named(made.malicious)}", len(made.malicious)
    if made.redrawn is not None:
        who, m = f"in some round of this run: clients {named(plan.attackers())}", made.redrawn
    extra = {
        "Who attacks": [who, *([f"about {n * m / total:.3g} of the {n} clients of a round"] if n < total else [])],
        "When": [f"active in {active_rounds(recipe)} of {recipe.rounds:,} rounds"],
        "What they do": _meanings(run.attack, "data", "local", "update") + _targets(recipe),
    }
    return [line for title, texts in card for line in _section(title, [*texts, *extra.get(title, [])])]


def _section_of_observer(recipe: Recipe, counted: Cost) -> list[str]:
    said = observer_in_words(recipe, counted)
    return _section("Observer", said) if said else []


def named(ids: Iterable[str]) -> str:
    """The ids in order, no more than fit a few lines."""
    order = sorted(ids)
    more = f" and {len(order) - MOST_NAMED:,} more" if len(order) > MOST_NAMED else ""
    return ", ".join(order[:MOST_NAMED]) + more


def _targets(recipe: Recipe) -> list[str]:
    """How many tokens the answers that an attack teaches have, and the room for them."""
    if recipe.task != "causal_lm" or recipe.attack is None:
        return []
    answers = [
        str(answer)
        for block in recipe.attack.data
        for answer in (*([block["target"]] if "target" in block else []), *(block.get("mapping") or {}).values())
    ]
    if not answers:
        return []
    try:
        tokenizer = load_tokenizer(recipe.model)
    except RecipeError as error:
        return [f"target: its tokens are not counted: {error}"]
    most = recipe.evaluate.max_new_tokens
    writer = writer_of(tokenizer, recipe.data)
    return [f"target {room(writer, recipe.data, answer, most)}" for answer in answers]


def defense(plan: Plan, counted: Cost) -> list[str]:
    """What clients do for their defense, and the server with the rows; how long its noise is on so many parameters."""
    if isinstance(plan.methods.algorithm, KnowledgeTransfer):
        return _section("Defense", ["none: clients keep their own nets, so there are no rows to aggregate"])
    run = _as_run(plan.recipe)
    noise = noise_in_words(plan.methods.defense, counted.weights.trained if counted.weights else None, counted.cohort)
    words = _meanings(run.defense, "client", "before", "rule", "after", "repair")
    spent = spent_in_words(plan.methods.guards, counted.sizes, plan.training, plan.recipe.rounds)
    return _section("Defense", [*defense_steps(run), *words, *noise, *spent])


def method(recipe: Recipe) -> list[str]:
    """The FL method, by its own documentation."""
    return _section("FL method", _meanings({"algorithm": recipe.algorithm}, "algorithm"))


def start(recipe: Recipe) -> list[str]:
    """What it starts from, where that is not the beginning."""
    said = start_entry(recipe, start_of(recipe))
    if said is None:
        return []
    more = [] if recipe.pretrain is None else [PRETRAINED.format(n=recipe.before)]
    return _section("Start", [said["words"], *more])


def data(recipe: Recipe) -> list[str]:
    """Which rows are trained on and which are held out; other kinds of task name both in their data sets."""
    if recipe.task not in TEXT_TASKS:
        return []
    said, train = rows_in_words(recipe)
    return said + (first_row(recipe, train) if train is not None else [])


def model(recipe: Recipe) -> list[str]:
    """What two short rows show of the language model, or of the classifier of texts, and its tokenizer."""
    if recipe.task == "classify_text":
        train = rows_in_words(recipe)[1]
        return [] if train is None else text_classifier.in_words(recipe, train)
    return in_words(recipe) if recipe.task == "causal_lm" else _begun(recipe)


def _begun(recipe: Recipe) -> list[str]:
    """Why a small model would not begin from its `model.start`, whose values are compared with the model's."""
    from accelerate import Accelerator

    if start_of(recipe) is None:
        return []
    try:
        build(recipe, Machine(Accelerator()))
    except FedError as error:
        return [f"will be refused: {error}"]
    return ["its start fits"]


def _meanings(block: Mapping[str, Any], *kinds: str) -> list[str]:
    """What each method of a block is, by its own documentation, with the settings that were left at their defaults."""
    known = {
        line.name: line
        for line in menu_lines()
        if line.menu in ("attack", "defense", "defense.client", "defense.repair", "algorithm")
    }
    found = []
    for entry in methods(block, *kinds):
        line = known.get(entry["name"])
        if line is None:
            found.append(f"{entry['name']}: code from outside the package")
            continue
        unset = [f"{s.name}={s.default!r}" for s in line.settings if s.name not in entry and s.default is not None]
        found.append(
            f"{line.name}: {line.summary} [{line.paper}]" + (f" Left at: {', '.join(unset)}." if unset else "")
        )
    return found


# ---------------------------------------------------------------- numbers


def beyond(count: float) -> str:
    """What is to be said of so many bytes, where this machine has not as many."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):  # a system that does not say
        return ""
    return f", MORE THAN THE {size(memory)} OF MEMORY OF THIS MACHINE" if count > memory else ""


def bill(recipe: Recipe, counted: Cost) -> list[str]:
    """The expected cost as aligned lines; what cannot be counted here says why."""
    n, rounds, weights = counted.cohort, recipe.rounds, counted.weights
    rows: list[tuple[str, str]] = []
    if weights is None:
        rows.append(("trained parameters d", "not counted (below)"))
    else:
        total = weights.trained + weights.frozen
        share = f" of {total:,} ({100 * weights.trained / total:.3g} %)" if weights.frozen else " (all)"
        rows.append(
            ("trained parameters d", f"{weights.trained:,}{share}" + ("" if counted.deltas else ", the server's net"))
        )
    if counted.sent is not None and counted.received is not None:
        both = counted.sent + counted.received
        ranked = dict(weights.by_rank) if weights is not None else {}
        mean = ", on average" if ranked else ""
        rows.append(("a client, a round", f"receives {size(counted.received)}, sends {size(counted.sent)}{mean}"))
        for rank, trained in sorted(ranked.items()):
            said = f"trains {trained:,} parameters, sends {size(FLOAT * trained)}"
            rows.append((f"  of rank {rank}", f"{recipe.clients.ranks[rank]} clients: each {said}"))
        rows.append(("all clients, a round", f"{n} x {size(both)} = {size(n * both)}"))
        rows.append(("all clients, the run", f"{rounds} rounds: {size(rounds * n * both)}"))
    if not counted.deltas:
        rows.append(("update matrix", "none: features and logits travel, not deltas"))
    elif weights is not None:
        d = weights.trained
        rows.append(("update matrix", f"{n} x {d:,} float32 = {size(FLOAT * n * d)}{beyond(FLOAT * n * d)}"))
        rows.append(("its rows are kept", kept_in_words(recipe, d, accelerator())))
        if recipe.enable_attack and recipe.attack is not None and recipe.attack.knowledge != "own":
            rows.append(("attackers' sight", f"a copy of the honest rows, up to {size(FLOAT * n * d)}"))
        if weights.frozen:
            bits = next((bits for bits in (4, 8) if getattr(recipe.model, f"load_in_{bits}bit")), None)
            kind = f"{bits} bits, the rest {recipe.model.dtype}" if bits is not None else recipe.model.dtype
            rows.append(("frozen base model", f"{size(weights.frozen_bytes)} ({kind})"))
    rows.append(("local steps", _steps(recipe, counted)))
    if counted.sizes is not None:
        low, high = min(counted.sizes), max(counted.sizes)
        rows.append(("rows of a client", f"{low:,}" if low == high else f"{low:,} to {high:,}"))
    if recipe.enable_defense and recipe.defense is not None and recipe.defense.root_rows:
        rows.append(("the server", f"trains once a round, on its own {recipe.defense.root_rows} clean rows"))
    if recipe.task in TEXT_TASKS and recipe.evaluate.transcripts:
        bound = f"up to {most_answers(recipe):,} lines; no text in it over {answers.MOST:,} characters"
        rows.append((answers.NAME, bound))
    texts = [f"{what:<22}{much}" for what, much in rows]
    texts += [f"not counted: {reason}" for reason in dict.fromkeys(counted.reasons)]
    return _section("Expected cost (activations and libraries come on top)", texts)


def _steps(recipe: Recipe, counted: Cost) -> str:
    if counted.steps is None:
        return "not counted (below)"
    about = "" if counted.exact else "about "
    each, total = counted.steps / counted.cohort, recipe.rounds * counted.steps
    steps = f"{each:,.4g} step" + ("s" if each != 1 else "")
    return f"{recipe.rounds} rounds x {counted.cohort} clients x {about}{steps} = {about}{total:,.0f}"
