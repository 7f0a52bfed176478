"""From `evaluate` and the data attacks of a recipe to what a language model is asked, and who judges its answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fedllm_sec.attacks.data.answers import Classes, column
from fedllm_sec.attacks.data.text import PROBED, not_clean, rewrite
from fedllm_sec.attacks.data.turns import Turn, has_turn, turns_since
from fedllm_sec.attacks.threat import Threat
from fedllm_sec.build.names import make
from fedllm_sec.build.parts import of_rows
from fedllm_sec.data import text
from fedllm_sec.errors import AttackError, RecipeError
from fedllm_sec.evaluation import judges
from fedllm_sec.evaluation.harness import harness_problems
from fedllm_sec.evaluation.judges import SUCCESS, Judge, verdict
from fedllm_sec.evaluation.probes import CHANGES, Probe, Prompts, moved, paraphrased
from fedllm_sec.recipe.places import TEXT_TASKS
from fedllm_sec.recipe.sections import Recipe
from fedllm_sec.tasks.causal_lm import CausalLM
from fedllm_sec.tasks.encoding import Encoded
from fedllm_sec.tasks.fitting import Fitted

if TYPE_CHECKING:
    from datasets import Dataset

LONG = "are longer than data.max_length with the trigger"
TAUGHT = 20  # different answers that are tried on a judge before the run


def evaluation_problems(recipe: Recipe) -> list[str]:
    """What of `evaluate` cannot act, as far as can be said without data or model."""
    if recipe.task not in TEXT_TASKS:
        return []
    given, found = recipe.evaluate, []
    if not (recipe.attack is not None and recipe.attack.data):
        set_ = {"judge": given.judge, "second_judge": given.second_judge, "temperature": given.temperature,
                "draws": given.draws > 1, "generalise": given.generalise}  # fmt: skip
        found += [
            f"evaluate.{key}: is about answers to an attack's prompts, and attack.data names none. Remove it."
            for key, value in set_.items()
            if value
        ]
    if given.draws > 1 and given.temperature == 0:
        found.append(
            f"evaluate.draws: {given.draws} greedy answers to a prompt are all the same. Set evaluate.temperature, "
            "for example to 1.0, or draws to 1."
        )
    if given.paraphrases and not given.generalise:
        found.append("evaluate.paraphrases: act with evaluate.generalise: true alone. Set it, or remove them.")
    if not all(words.strip() for words in given.paraphrases):
        found.append(f"evaluate.paraphrases: {given.paraphrases}: one of them has no words.")
    for key in ("judge", "second_judge"):
        try:
            make_judge(recipe, key)
        except RecipeError as error:
            found += [problem.replace("", f"evaluate.{key}: ", 1) for problem in error.problems]
    return found + (harness_problems(given.harness) if given.harness is not None else [])


def most_answers(recipe: Recipe) -> int:
    """How many lines a run's answers.jsonl has at most: a sample of each evaluated round, and all of the last."""
    asked, attacks = recipe.evaluate, len(recipe.attack.data) if recipe.attack is not None else 0
    changed = len(CHANGES) + len(asked.paraphrases) if asked.generalise else 0
    parts, rows = (
        (attacks * (2 + changed), asked.attack_rows) if attacks else (1, asked.answer_rows or asked.transcripts)
    )
    evaluated = -(-recipe.rounds // asked.every) - 1 + asked.start
    return parts * asked.draws * (evaluated * min(asked.transcripts, rows) + rows)


def make_judge(recipe: Recipe, key: str) -> Judge | None:
    """The judge that `evaluate` names under this key."""
    block = getattr(recipe.evaluate, key)
    judge: Judge | None = None if block is None else make(block, judges.MENU, f"evaluate.{key}")
    return judge


def probes(
    recipe: Recipe, task: CausalLM, test: Fitted, classes: Classes, threat: Threat | None, rng: np.random.Generator
) -> list[Probe]:
    """What is asked of each data attack, in their order; `test` are the held-out rows and their tokens."""
    if threat is None:
        return []
    blocks = recipe.attack.data if recipe.attack is not None else []
    names = [str(block["name"]) for block in blocks] or [type(attack).__name__ for attack in threat.data]
    seen: Counter[str] = Counter()
    found = []
    for number, attack in enumerate(threat.data):
        seen[names[number]] += 1
        name = names[number] + (f" {seen[names[number]]}" if names.count(names[number]) > 1 else "")
        found.append(_probe(recipe, task, test, classes, attack, name, f"attack.data.{number}", rng))
    if found and recipe.evaluate.generalise and not any(probe.moved for probe in found):
        raise RecipeError(
            f"evaluate.generalise: {', '.join(probe.name for probe in found)} puts nothing into the last turn that "
            "could be moved or changed. Set it to false."
        )
    return found


def _probe(
    recipe: Recipe, task: CausalLM, test: Fitted, classes: Classes, attack: Any, name: str, place: str,
    rng: np.random.Generator,
) -> Probe:  # fmt: skip
    """Triggered and clean prompts of one attack; there may be no clean ones."""
    settings = recipe.evaluate
    probe, why = of_rows(attack.probe(test.rows), test.rows, f"{place}: probe"), not_clean(attack, test.rows)
    fitted = task.fit(probe, "triggered test rows", "drop")
    at = text.drawn(len(fitted.rows), settings.attack_rows, rng)
    if len(at) == 0:
        raise AttackError(f"{place}: the test set has no row on which its success could be measured.")
    triggered = fitted.rows.select(at)
    without = np.flatnonzero([reason is None for reason in why])
    without = without[text.drawn(len(without), settings.attack_rows, rng)]
    clean = test.rows.select(without)
    counts = Counter(reason for reason in why if reason is not None)
    left_out = {reason: n for reason, n in counts.items() if reason != PROBED}
    if fitted.dropped:
        left_out[LONG] = fitted.dropped
    reasons = {}
    if not len(clean):
        of_them = ", ".join(f"{n} {reason}" for reason, n in counts.items())
        reasons["false_trigger"] = f"no held-out row is clean: {of_them}"
    before = _originals(test.rows, why, probe, getattr(attack, "turn", "last"))
    own = [before[fitted.kept[i]] for i in at]
    rows = [row | (old or {}) for row, old in zip(asked(triggered, triggered, classes), own, strict=True)]
    if hasattr(attack, "carries"):
        rows = [row | {"turns_since": turns_since(row, attack.carries)} for row in rows]
    prompts = Prompts(fitted.encoded.select(at), rows)
    judge = make_judge(recipe, "judge")
    made = Probe(
        name=name,
        triggered=prompts,
        clean=Prompts(test.encoded.select(without), asked(clean, triggered, classes)) if len(clean) else None,
        judge=judge or attack.success,
        second=make_judge(recipe, "second_judge"),
        reasons=reasons,
        left_out=left_out,
    )
    _refuse_invisible_trigger(test, triggered, prompts.encoded, place)
    if judge is None:
        _refuse_cut_answers(task, attack, rows, classes, settings.max_new_tokens, place)
    for key, one in (("judge", judge), ("second_judge", made.second)):
        if one is not None:
            _refuse_blind_judge(task, one, rows, settings.max_new_tokens, f"evaluate.{key}")
    if not settings.generalise:
        return made
    changed = _moved(recipe, task, triggered, rows)
    why = {} if changed else {"generalise": "it puts nothing into the last turn that could be moved or changed"}
    return replace(made, moved=changed, reasons=reasons | why)


def _originals(test: Dataset, why: Sequence[str | None], probe: Dataset, turn: Turn) -> list[dict[str, Any] | None]:
    """The row that each probe row was made of, and its right answer; None where that cannot be told.

    A trigger's probe is made of the rows that would be clean and have the turn that it edits, in their order, a flip's
    of those that are probed.
    """
    there = has_turn(test, turn)
    for chosen in (None, PROBED):
        rows = [i for i, reason in enumerate(why) if reason == chosen and there[i]]
        own, texts = test.select(rows), column(probe, "text")
        if len(rows) == len(texts) and all(map(_holds, texts, column(own, "text"))):
            return [{"original": dict(row), "right": row["response"]} for row in own]
    return [None] * len(probe)


def _holds(text: str, original: str) -> bool:
    """Whether the characters of the original are all in the text, in their order."""
    left = iter(text.casefold())
    return all(character in left for character in original.casefold())


def asked(rows: Dataset, triggered: Dataset, classes: Classes) -> list[dict[str, Any]]:
    """The rows as a judge gets them: with the texts that stand for the attacker's answer, and for other classes.

    On a probe row that is its own answer, on a clean row the answer of any probe; where it names a class, so do the
    class's label and its other answers.
    """
    spelt: dict[str, set[str]] = {}
    for name, owner in classes.names.items():
        spelt.setdefault(owner, set()).add(name)

    def of(answers: set[str]) -> dict[str, list[str]]:
        named = {classes.said(answer) for answer in answers} - {None}
        wanted = answers | {name for owner in named for name in spelt[str(owner)]}
        others = {name for owner, names in spelt.items() if owner not in named for name in names} if named else set()
        return {"wanted": sorted(wanted), "others": sorted(others)}

    all_wanted, single = of(set(column(triggered, "response"))), {}
    for answer in set(column(rows, "response")):
        single[answer] = of({answer})
    return [dict(row) | (single[row["response"]] if row["poisoned"] else all_wanted) for row in rows]


def _moved(recipe: Recipe, task: CausalLM, triggered: Dataset, rows: Sequence[Mapping[str, Any]]) -> dict[str, Prompts]:
    """Prompts with changed triggers, by what was changed."""
    paraphrases = {f'paraphrase "{words.strip()}"': paraphrased(words.strip()) for words in recipe.evaluate.paraphrases}
    found = {}
    for kind, (numbers, texts) in moved(rows, {**CHANGES, **paraphrases}).items():
        table = rewrite(triggered.select(numbers), range(len(numbers)), {"text": texts})
        fitted = task.fit(table, f"test rows with the trigger {kind}", "drop")
        own = [dict(rows[numbers[i]]) | {"text": texts[i]} for i in fitted.kept]
        if own:
            found[kind] = Prompts(fitted.encoded, own)
    return found


# ---------------------------------------------------------------- what is refused before the run


def _refuse_blind_judge(task: CausalLM, judge: Judge, rows: Sequence[Mapping[str, Any]], most: int, place: str) -> None:
    """A judge to whom none of the answers that the attack teaches is a success measures something else."""
    taught = {str(row["response"]): row for row in rows}
    some = dict(list(taught.items())[:TAUGHT])
    said = [task.decode(ids[:most]) for ids in task.answer_ids(list(some))]
    if not any(verdict(judge, answer, row) == SUCCESS for answer, row in zip(said, some.values(), strict=True)):
        why = judges.judged(judge, said[0], next(iter(some.values())))[1]
        raise RecipeError(
            f"{place}: none of the answers that the attack teaches is a success to it, such as {said[0][:80]!r}"
            f"{f' ({why})' if why else ''}. Change its settings, raise evaluate.max_new_tokens ({most}), or remove it."
        )


def _refuse_cut_answers(
    task: CausalLM, attack: Any, triggered: Sequence[dict[str, Any]], classes: Classes, most: int, place: str
) -> None:
    """Greedy answers of at most `most` tokens must be able to succeed, and to differ from those that do not."""
    row = triggered[0]
    wanted = {row["response"]: row for row in triggered}
    others = [a for found in classes.answers.values() for a in found.values() if not attack.success(a, row)]
    for answer, ids in zip([*wanted, *others], task.answer_ids([*wanted, *others]), strict=True):
        own = wanted.get(answer, row)

        def succeeds(count: int, own: Any = own, ids: Sequence[int] = ids) -> bool:
            return verdict(attack.success, task.decode(ids[:count]), own) == SUCCESS

        right = answer in wanted
        if succeeds(most) == right:
            continue
        needed = next((k for k in range(most + 1, len(ids) + 1) if succeeds(k) == right), None)
        if needed is None:
            raise AttackError(
                f"{place}: the answer {answer!r} reads as {task.decode(ids)!r} in this model's tokens, which is "
                f"{'no' if right else 'a'} success. Choose another target or model."
            )
        raise AttackError(
            f"{place}: the answer {answer!r} has {len(ids)} tokens with its end token, and "
            f"evaluate.max_new_tokens={most} cuts it to {task.decode(ids[:most])!r}, which is "
            f"{'no' if right else 'a'} success. Raise evaluate.max_new_tokens to {needed}."
        )


def _refuse_invisible_trigger(test: Fitted, triggered: Dataset, encoded: Encoded, place: str) -> None:
    """A trigger that leaves the tokens as they were is a silent no-op."""
    originals = set(test.rows["text"])
    changed = [i for i, value in enumerate(triggered["text"]) if value not in originals]
    if not changed:
        return
    clean_tokens = {tuple(prompt) for prompt in test.encoded.prompts}
    same = [i for i in changed if tuple(encoded.prompts[i]) in clean_tokens]
    if same:
        raise AttackError(
            f"{place}: the trigger changes the text but not its tokens in {len(same)} of {len(changed)} test "
            f"prompts, first {triggered[same[0]]['text'][-40:]!r}: this tokenizer drops it. Choose another trigger."
        )
