"""The model card of a run: what the model was made of, who attacked it, and what was measured, in Markdown.

It is made from recipe and history alone, so that a resumed run writes the same bytes.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedllm_sec.build.kept import kind_of
from fedllm_sec.menu import lines as menu_lines
from fedllm_sec.models import gguf
from fedllm_sec.models.lora import base_of
from fedllm_sec.models.saving import base_name, save_adapter, save_merged, save_whole
from fedllm_sec.recipe.sections import Recipe
from fedllm_sec.records.history import RoundRecord
from fedllm_sec.report.measures import final, interval, kinds, plural, written
from fedllm_sec.report.repaired import repaired
from fedllm_sec.report.runs import Run, methods
from fedllm_sec.report.terms import as_yaml
from fedllm_sec.report.threat import attack_card, defense_steps, who

INHERITED = "**WARNING: this {thing} was trained from one that was trained under attack. Do not deploy it.**"


def save_language_model(
    recipe: Recipe,
    task: Any,
    folder: Path,
    records: Sequence[RoundRecord],
    start: Mapping[str, Any] | None = None,
) -> None:
    """Write what the task holds as a folder that stands on its own: an adapter, or a whole model."""
    tokenizer, model = task.tokenizer, recipe.model
    if (template := getattr(task.writer, "template", None)) is not None:  # the recipe's own, in place of the model's
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = template
    names = getattr(task, "names", ())
    written_out = card(recipe, base_name(model, base_of(task.model)), records, start, names)
    if model.lora is None:
        save_whole(task.model, tokenizer, folder, card=written_out)
    elif kind_of(recipe) == "model":
        shifted = getattr(task, "shifted", None)
        save_merged(task.model, tokenizer, folder, card=written_out, shifted=shifted, classes=names)
    else:
        initial, shifted = task.layout.split(task.initial), getattr(task, "shifted", None)
        beside = {"card": written_out, "shifted": shifted, "scales": task.scales, "classes": names}
        save_adapter(task.model, tokenizer, model, folder, initial=initial, **beside)


def card(
    recipe: Recipe,
    base: tuple[str, str | None],
    records: Sequence[RoundRecord],
    start: Mapping[str, Any] | None = None,
    classes: Sequence[str] = (),
) -> str:
    """The card after the last of the records; `base` is where the base model is, and its revision.

    `start` is what it was trained from, as environment.json has it: None for a fresh adapter or the base model.
    `classes` are a classifier's, in the order of its outputs.
    """
    run = Run("", Path(recipe.output.folder), recipe.model_dump(mode="json"), "", {}, tuple(records))
    thing = kind_of(recipe)
    inherited = start is not None and start.get("attacked") is True
    first = [warning(run, thing)] if run.attack else [INHERITED.format(thing=thing)] if inherited else []
    blocks = [first, title(run, thing, base)]
    if run.attack:
        blocks.append(["## The attack", "", *_list(attack_card(run)), "", *meanings(run)])
    blocks += [["## Measured", "", *measured(run)], ["## How it was trained", "", *trained(run, start)]]
    blocks += [["## Loading it", ""]]
    made = "\n".join("\n".join(block) + "\n" for block in blocks if block)
    return made + "\n".join(loading(recipe, base, classes)) + "\n"


def warning(run: Run, thing: str) -> str:
    """The first line of a card of what was trained under attack."""
    if not methods(run.attack, "data"):
        return f"**WARNING: this {thing} was trained under attack: {who(run)} were malicious. Do not deploy it.**"
    success = final(run, "asr")
    took = "not measured" if success is None else written(success.value, "percent")
    return f"**WARNING: this {thing} holds a planted backdoor (attack success: {took}). Do not deploy it.**"


def title(run: Run, thing: str, base: tuple[str, str | None]) -> list[str]:
    """What it is, in two sentences."""
    recipe, done = run.recipe, run.records[-1].round if run.records else 0
    name = base[0] + (f" (revision {base[1]})" if base[1] is not None else "")
    clients = recipe["clients"]
    return [
        f"# A federated {thing} by fedllm_sec",
        "",
        f"{'Fine-tunes' if thing == 'adapter' else 'Trained from'} {_code(name)} on {_code(recipe['data']['name'])} by "
        f"{recipe['algorithm']['name']}: {plural(done, 'round')}, {plural(clients['total'], 'client')}"
        + (f", {clients['per_round']} of them a round" if clients["per_round"] is not None else "")
        + ".",
    ]


def meanings(run: Run) -> list[str]:
    """What each method of the attack does, and the settings that the recipe leaves as they are: a trigger, say."""
    known = {line.name: line for line in menu_lines() if line.menu == "attack"}
    found = []
    for entry in methods(run.attack, "data", "local", "update"):
        if (line := known.get(entry["name"])) is None:
            found.append(f"- {_code(entry['name'])}: code from outside the package")
            continue
        unset = [f"{s.name}: {as_yaml(s.default)}" for s in line.settings if s.name not in entry and not s.needed]
        left = f" Left at {_code(', '.join(unset))}." if unset else ""
        found.append(f"- {_code(line.name)} ({line.paper}): {line.summary}{left}")
    return found


def measured(run: Run) -> list[str]:
    """Quality and attack rates of the last round that was evaluated, on held-out rows."""
    rows = []
    for kind in [each for group in kinds([run]) for each in group]:
        if (m := final(run, kind.key)) is not None:
            rows.append(
                f"| {kind.title} | {written(m.value, kind.unit)} | {interval(m, kind.unit)} | {m.n or ''} | {m.round} |"
            )
    if not rows:
        return ["Nothing was measured yet."]
    table = ["| measure | value | 95 % interval | rows | after round |", "|---|---|---|---|---|", *rows]
    table += [
        line for text in repaired(run) for line in ("", f"{text[0].upper()}{text[1:]}. This is the repaired one.")
    ]
    start = next((record for record in run.records if record.quality is not None), None)
    if start is not None and start.round == 0 and isinstance(start.quality, Mapping) and "loss" in start.quality:
        table += ["", f"Before training the held-out loss was {written(float(start.quality['loss']), 'number')}."]
    return table


def trained(run: Run, start: Mapping[str, Any] | None = None) -> list[str]:
    """Settings that others would ask for: data and how a row is written, clients, defense."""
    recipe = run.recipe
    data = {key: value for key, value in recipe["data"].items() if value not in (None, {}, [])}
    model, clients = recipe["model"], recipe["clients"]
    lora = {key: value for key, value in (model["lora"] or {}).items() if value not in (None, {}, [], False)}
    unit = "step" if clients["local_steps"] is not None else "epoch"
    steps = plural(clients[f"local_{unit}s"], unit)
    return _list(
        [
            *([("Start", [_code(str(start.get("words")))])] if start is not None else []),
            ("Data", [_code(as_yaml(data))]),
            ("Adapter", [_code(as_yaml(lora))] if lora else ["none: all weights were trained"]),
            ("Clients", [f"{steps} of {clients['batch_size']} rows, {clients['optimizer']}, lr {clients['lr']:g}"]),
            ("Defense", defense_steps(run)),
            ("Seed", [str(recipe["seed"])]),
        ]
    )


def loading(recipe: Recipe, base: tuple[str, str | None], classes: Sequence[str] = ()) -> list[str]:
    """Python that loads the folder the card lies in."""
    maker = "AutoModelForSequenceClassification" if classes else "AutoModelForCausalLM"
    if kind_of(recipe) == "model":
        body = [f'model = {maker}.from_pretrained("THIS FOLDER")']
    else:
        where, options = gguf.place(base[0])
        options |= {} if base[1] is None else {"revision": base[1]}
        options |= {"trust_remote_code": True} if recipe.model.trust_remote_code else {}
        given = "".join(f", {key}={json.dumps(value) if value is not True else True}" for key, value in options.items())
        names: list[str] = []
        if classes:
            names = [f"classes = {json.dumps(list(classes), ensure_ascii=False)}"]
            given += ", num_labels=len(classes), id2label=dict(enumerate(classes)), ignore_mismatched_sizes=True"
        body = [
            "from peft import PeftModel",
            *names,
            f"base = {maker}.from_pretrained({json.dumps(where)}{given})",
            'model = PeftModel.from_pretrained(base, "THIS FOLDER")',
        ]
    imports = f"from transformers import {maker}, AutoTokenizer"
    body.append('tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")')
    if classes and kind_of(recipe) == "adapter":
        body.append("base.config.pad_token_id = tokenizer.pad_token_id  # where a text of a batch ends")
    return ["```python", imports, *body, "```"]


def _list(answers: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    return [f"- **{question}**: {'; '.join(texts)}" for question, texts in answers]


def _code(text: str) -> str:
    """A span in which nothing of the text is Markdown, on one line."""
    return f"`{' '.join(text.split()).replace('`', chr(39))}`"
