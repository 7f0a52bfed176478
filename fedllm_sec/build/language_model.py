"""The task of a language-model run: a base model, read once, and what is trained in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedllm_sec.build.loaded import Loaded
from fedllm_sec.build.selftest import tested
from fedllm_sec.errors import RecipeError
from fedllm_sec.models.lora import add_adapter, load_base
from fedllm_sec.models.saving import refuse_tied
from fedllm_sec.recipe.sections import Recipe
from fedllm_sec.rounds.compute import Machine
from fedllm_sec.seeds import seed_for
from fedllm_sec.tasks.causal_lm import CausalLM

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from fedllm_sec.recipe.sections import Model


@dataclass
class Base:
    """A base model, read once; it carries one adapter at a time, or is trained itself."""

    model: Any
    tokenizer: Any
    adapted: Any = None

    def adapt(self, settings: Model, seed: int) -> PeftModel | PreTrainedModel:
        """The model with a fresh adapter; the adapter it had is taken off, and with it the task that used it."""
        if self.adapted is not None:
            self.model, self.adapted = self.adapted.unload(), None
        self.adapted = add_adapter(self.model, settings, seed)
        return self.adapted  # type: ignore[no-any-return]


def need_whole(recipe: Recipe, machine: Machine) -> None:
    """An error where weights of the base model are to change and no process holds them whole."""
    if machine.sharded and recipe.model.changes_base:
        raise RecipeError(
            "model.lora: weights of the base model are to change, and under DeepSpeed ZeRO-3 no process holds them "
            "whole. Train an adapter alone that starts from nothing (init_lora_weights: true, no modules_to_save), or "
            "launch without ZeRO-3."
        )


def load_task(recipe: Recipe, machine: Machine, loaded: Loaded | None = None) -> CausalLM:
    """The base model with a fresh adapter, whose weights depend on the seed; runs of equal settings share it."""
    loaded, model = loaded if loaded is not None else Loaded(), recipe.model
    need_whole(recipe, machine)

    def read() -> Base:
        base, tokenizer = load_base(model, machine.device)
        return Base(machine.shard(base), tokenizer)

    def adapt() -> CausalLM:
        own = model.changes_base  # then no other task may have it
        base = loaded.get("base", key if own else model.model_dump_json(exclude={"lora", "start"}), read, keep=1)
        adapted: Any = base.adapt(model, seed_for(recipe.seed, "adapter") % 2**31)
        if not model.quantized:
            adapted = adapted.to(machine.device)
        made = CausalLM(adapted, base.tokenizer, recipe.data, machine.device)
        tested(made, recipe)
        return made

    whole, part = dict.fromkeys(("task", "model", "data", "seed"), True), {"batch_size"}  # of which the self-test asks
    key = recipe.model_dump_json(include={**whole, "clients": part, "evaluate": part})
    task = loaded.get("task", key, adapt, keep=1)
    if recipe.output.save == "merged":
        refuse_tied(task.model)
    return task
