"""What became of a key of a FedML YAML, and the YAML as FedML reads it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fedllm_sec.errors import RecipeError

# translated: means the same here; differs: stands for the nearest thing here; ignored: has no effect on results;
# missing: was asked for and has no equivalent
Kind = Literal["translated", "differs", "ignored", "missing"]


@dataclass(frozen=True)
class Note:
    """One key of the YAML and what became of it."""

    kind: Kind
    key: str
    text: str


Part = tuple[dict[str, Any], list[Note]]  # a block of the recipe, and what it was made of


def same(key: str, place: str) -> Note:
    return Note("translated", key, f"is {place}")


def differs(key: str, place: str, how: str) -> Note:
    return Note("differs", key, f"becomes {place}, but {how}")


def ignored(key: str, why: str) -> Note:
    return Note("ignored", key, f"because {why}")


def missing(key: str, what: str) -> Note:
    return Note("missing", key, what)


# The keys a recipe is made of. Messages show the values of these and of no other key: any other may hold a secret.
READ = frozenset({
    "random_seed", "comm_round", "frequency_of_the_test", "enable_wandb", "dataset", "model", "partition_method",
    "partition_alpha", "client_num_in_total", "client_num_per_round", "epochs", "batch_size", "client_optimizer",
    "learning_rate", "weight_decay", "federated_optimizer", "server_optimizer", "server_lr", "server_momentum",
    "fedprox_mu", "feddyn_alpha", "enable_attack", "attack_type", "attack_mode", "attack_prob",
    "byzantine_client_num", "original_class_list", "target_class_list", "ratio_of_poisoned_client",
    "poison_start_round_id", "poison_end_round_id", "malicious_client_id", "scale_factor_S", "attack_training_rounds",
    "poisoned_training_round", "enable_defense", "defense_type", "krum_param_m", "norm_bound", "beta", "batch_num",
    "tau", "bucket_size", "use_memory", "trim_param_b", "option_type", "alpha", "robust_threshold", "stddev",
    "clip_threshold", "sigma", "bound_param", "pretraining_round_num", "to_keep_higher_scores",
    "bucketing_batch_size", "cosine_similarity_bound", "lambda_param", "thresh", "mode",
})  # fmt: skip

# of these, the ones that hold one word
WORDS = (
    "dataset", "model", "partition_method", "client_optimizer", "federated_optimizer", "server_optimizer",
    "attack_type", "attack_mode", "defense_type",
)  # fmt: skip


# a file that says none of these is no experiment
SAID = (
    "dataset", "model", "federated_optimizer", "comm_round", "client_num_in_total", "client_num_per_round",
    "enable_attack", "attack_type", "enable_defense", "defense_type",
)  # fmt: skip


def switched_on(flat: Mapping[str, Any], key: str) -> bool:
    """Whether a switch is on, as PyYAML reads it for FedML: yes and on are true there, and words to our reader."""
    value = flat.get(key)
    if value not in (0, 1) and not isinstance(value, (bool, str, type(None))):
        raise RecipeError(f"{key}: {value!r}: must be true or false.")
    return value is True or value == 1 or (isinstance(value, str) and value.lower() in ("yes", "on", "true"))


def switch(flat: Mapping[str, Any], key: str, made: bool, why: str) -> list[Note]:
    """The note on enable_attack or enable_defense: one that the recipe cannot follow is not `translated`."""
    if key not in flat:
        return []
    if switched_on(flat, key) and not made:
        return [differs(key, f"{key}: false", why)]
    return [same(key, key)]


def number(flat: Mapping[str, Any], key: str, default: float | None = None) -> Any:
    """A number of the YAML; text or a list in its place is an error."""
    value = flat.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RecipeError(f"{key}: {value!r}: must be a number.")
    if not math.isfinite(value):
        raise RecipeError(f"{key}: {value}: must be a finite number.")
    return value


@dataclass(frozen=True)
class Flat:
    """All keys in one space of names, as FedML reads them: a later section wins over an earlier one."""

    values: dict[str, Any]
    places: dict[str, str]  # key -> section it is taken from
    notes: list[Note]


def flatten(raw: Any) -> Flat:
    """The sections of a FedML YAML as one mapping; a key that stands twice with different values is noted."""
    if not isinstance(raw, dict) or not raw:
        raise RecipeError("a FedML YAML is a mapping of sections such as train_args and attack_args.")
    stray = [name for name, section in raw.items() if not isinstance(section, dict) and section is not None]
    if stray:
        kind = type(raw[stray[0]]).__name__  # its value may be a secret
        raise RecipeError(
            f"{stray[0]}: {kind}: must be a section, a mapping of keys to values, in a FedML YAML. Put the key into "
            "the section it belongs to, such as train_args, or give another file."
        )
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    notes: list[Note] = []
    for section, keys in raw.items():
        for name, value in (keys or {}).items():
            key = str(name)
            if key in values and values[key] != value:
                text = f"stands in {places[key]} too, with another value; as in FedML, the later one counts"
                if key in READ:
                    text = (
                        f"stands in {places[key]} as {values[key]!r} too; as in FedML, the later one counts: {value!r}"
                    )
                notes.append(Note("differs", key, text))
            values[key], places[key] = value, str(section)
    return Flat(values, places, notes)


def must_be_words(flat: Flat) -> None:
    """RecipeError, with the places, where a list or a mapping stands for one word."""
    wrong = [
        f"{flat.places[key]}.{key}: {flat.values[key]!r}: must be one word: a FedML YAML is one experiment. Write a "
        "file for each, or a grid afterwards (docs/benchmark.md)."
        for key in WORDS
        if isinstance(flat.values.get(key), (list, dict))
    ]
    if wrong:
        raise RecipeError(wrong)


def must_say_something(flat: Flat) -> None:
    """RecipeError for a gpu mapping, a job, another tool's file: nothing in it says what a recipe says."""
    if not any(key in flat.values for key in SAID):
        raise RecipeError(
            f"no FedML experiment: no section has any of {', '.join(SAID)}. Give the YAML that FedML is started with, "
            "usually fedml_config.yaml."
        )
