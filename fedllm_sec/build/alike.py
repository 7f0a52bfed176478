"""Whether what a run would start from is of its recipe's own model, as far as settings tell without the model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedllm_sec.errors import RecipeError
from fedllm_sec.models.lora import source_of
from fedllm_sec.recipe.places import TEXT_TASKS
from fedllm_sec.recipe.sections import Recipe
from fedllm_sec.records.files import in_a_line
from fedllm_sec.records.folder import RunFolder, differences, read_recipe
from fedllm_sec.report.runs import Run

# Settings of an adapter that no tensor's shape shows, by peft's name for them and by the recipe's.
COUNTED = {"r": "r", "lora_alpha": "alpha", "use_rslora": "use_rslora", "use_dora": "use_dora"}
PATTERNS = ("rank_pattern", "alpha_pattern")
# What of `model` may be another in the run that a start is taken from: it changes no trained parameter's meaning.
FREE = (
    *("start", "buffers", "dtype", "load_in_4bit", "load_in_8bit", "attn_implementation", "trust_remote_code"),
    *("gradient_checkpointing", "lora.dropout", "name"),
)
# Starts of an adapter whose frozen part the seed draws.
DRAWN = ("pissa_niter_16",)


def run_in_words(recipe: Recipe, path: str, round: int) -> tuple[str, bool]:
    """What is to be said of the run, and whether it was attacked; an error where it trained another model."""
    theirs = read_recipe(Path(path) / "recipe.yaml")
    ours = recipe.model_dump(mode="json")
    place = f"model.start: {path}: "
    if theirs.get("task") != recipe.task:
        raise RecipeError(f"{place}is a run of task {in_a_line(theirs.get('task'))}, this is {recipe.task}.")
    was, now = _block(theirs), _block(ours)
    if recipe.task in TEXT_TASKS and (was.get("lora") is None) != (now.get("lora") is None):
        which = ["the whole model (lora: null)", "an adapter"]
        there, own = which if was.get("lora") is None else which[::-1]
        raise RecipeError(f"{place}trained {there}, here {own} is trained. Make model.lora equal.")
    found = {key: values for key, values in differences(was, now).items() if key not in FREE}
    said = [f"model.{key}: {in_a_line(repr(old))} there, {in_a_line(repr(new))} here"
            for key, (old, new) in found.items() if not _means_the_same(key, old, new)]  # fmt: skip
    if not _same_model(recipe, str(was.get("name")), str(now.get("name"))):
        said.insert(0, f"model.name: {in_a_line(was.get('name'))} there, {in_a_line(now.get('name'))} here")
    if said:
        raise RecipeError(f"{place}was made with another model: {'; '.join(said[:5])}. Make them equal.")
    if (wrong := _frozen_elsewhere(recipe, theirs)) is not None:
        raise RecipeError(f"{place}{wrong} Start from its folder adapter, which holds both factors, or use its seed.")
    run = Run("", Path(path), theirs, "", RunFolder(Path(path)).environment(), ())
    words = "attacked" if run.attacked else "attack-free"
    words += ", defended" if run.defended else ""
    began = run.environment.get("start")
    before = isinstance(began, dict) and began.get("attacked") is True
    words += ", begun from an attacked one" if before else ""
    return f", {words}, after its round {round}", run.attacked or before


def _block(recipe: Mapping[str, Any]) -> dict[str, Any]:
    found = recipe.get("model")
    return found if isinstance(found, dict) else {}


def _means_the_same(key: str, old: Any, new: Any) -> bool:
    """Both ways to draw a fresh factor are nothing to a start, which brings its own."""
    return key == "lora.init_lora_weights" and {old, new} <= {True, "gaussian"}


def _frozen_elsewhere(recipe: Recipe, theirs: Mapping[str, Any]) -> str | None:
    """Why the frozen part of the adapter is not what this run would draw: a checkpoint holds what was trained alone."""
    lora = recipe.model.lora if recipe.task in TEXT_TASKS else None
    if lora is None or (lora.frozen is None and lora.init_lora_weights not in DRAWN):
        return None
    if theirs.get("seed") != recipe.seed:
        return f"a part of its adapter is not trained but drawn by its seed, {in_a_line(theirs.get('seed'))}."
    if _block(theirs).get("start") is not None:
        return "a part of its adapter is not trained but came from its own start."
    return None


def _same_model(recipe: Recipe, old: str, new: str) -> bool:
    """Whether two names, or places, are of one model: a folder may have moved, or lie on another machine."""
    if old == new:
        return True
    if recipe.task not in TEXT_TASKS:
        return os.path.isdir(old) and os.path.isdir(new) and os.path.samefile(old, new)
    sources = [_place_of(name) for name in (old, new)]
    if all(map(os.path.exists, sources)):
        return os.path.samefile(*sources)
    ends = [source.rstrip("/").rpartition("/")[2].lower() for source in sources]
    return ends[0] == ends[1]


def _place_of(name: str) -> str:
    return source_of(name) if name == "tiny" else os.path.expanduser(name)


def refuse_other_adapter(recipe: Recipe, path: str, config: Mapping[str, Any]) -> None:
    """An error that names what of an adapter's settings is not what the recipe says."""
    place = f"model.start: {path}: "
    lora = recipe.model.lora if recipe.task in TEXT_TASKS else None
    if lora is None:
        way = "Merge it into its base model and give the folder of that as model.name, or train an adapter (model.lora)"
        other = "Give a run folder, or its model/model.safetensors"
        raise RecipeError(
            f"{place}is an adapter of a language model, and here is none: "
            + (f"lora: null trains the whole model. {way}." if recipe.task in TEXT_TASKS else f"{other}.")
        )
    if lora.starts_from_base:
        raise RecipeError(
            f"{place}brings its own factors, and init_lora_weights: {lora.init_lora_weights} takes them out of the "
            "base model, which it changes. Set init_lora_weights: true."
        )
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type: {in_a_line(config.get('peft_type'))}, must be LORA")
    if str(config.get("init_lora_weights")).partition("_")[0].lower() in ("pissa", "olora", "corda", "eva", "loftq"):
        problems.append(f"init_lora_weights: {in_a_line(config['init_lora_weights'])} has changed its base model")
    if config.get("bias", "none") != "none":
        problems.append(f"bias: {in_a_line(config['bias'])}, must be none")
    base = str(config.get("base_model_name_or_path"))
    if not _same_model(recipe, base, recipe.model.name):
        problems.append(f"base model {in_a_line(base)} there, {recipe.model.name} here")
    ours = lora.model_dump(mode="json")
    for theirs, key in (*COUNTED.items(), *((key, key) for key in PATTERNS)):
        was, now = config.get(theirs) or ({} if key in PATTERNS else False), ours[key]
        if was != now:
            problems.append(f"{key} {in_a_line(json.dumps(was))} there, {json.dumps(now)} here")
    was, now = sorted(map(str, config.get("modules_to_save") or [])), sorted(lora.modules_to_save)
    if was != now and recipe.task == "causal_lm":  # a classifier's hold its output: `begin` compares the tensors
        problems.append(f"modules_to_save {in_a_line(was)} there, {now} here")
    if problems:
        raise RecipeError(f"{place}is an adapter with other settings: {'; '.join(problems)}. Make them equal.")


def refuse_other_layers(recipe: Recipe, path: str, names: Mapping[str, Any]) -> None:
    """An error where the recipe names layers and the adapter's are others; `all-linear` is compared with the model."""
    wanted = recipe.model.lora.target_modules
    adapted = {name.partition(".lora_")[0].rpartition(".")[2] for name in names if ".lora_" in name}
    if isinstance(wanted, list) and adapted != {name.rpartition(".")[2] for name in wanted}:
        raise RecipeError(
            f"model.start: {path}: adapts other layers: {', '.join(map(in_a_line, sorted(adapted))) or 'none'} there, "
            f"{', '.join(sorted(wanted))} here. Name them in model.lora.target_modules."
        )
