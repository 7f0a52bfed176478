"""A FedML YAML as a recipe, and a note on each of its keys."""

from __future__ import annotations

from typing import Any

from fedllm_sec.fedml import setup
from fedllm_sec.fedml.defense import defense
from fedllm_sec.fedml.notes import READ, Note, flatten, ignored, missing, must_be_words, must_say_something
from fedllm_sec.fedml.threat import threat

# sections whose keys have no effect on results here, whatever they say
SECTIONS = {
    "environment_args": "the environment is pip's matter here",
    "device_args": "devices and processes are accelerate's matter: see configs/",
    "comm_args": "clients are simulated here, nothing is sent",
    "tracking_args": "a tracker is set up by its own tools; only enable_wandb is read",
}

# keys of the other sections that have none
KEYS = {
    "training_type": "clients are always simulated here",
    "scenario": "it is horizontal here",
    "using_mlops": "there is no such service here",
    "config_version": "a recipe has no versions",
    "backend": "clients are simulated here, nothing is sent",
    "ml_engine": "it is PyTorch here",
    "data_cache_dir": "data come from the hub's cache, or from the file data.name names",
    "model_file_cache_folder": "the run folder holds the model",
    "global_model_file_path": "the run folder holds the model",
    "client_id_list": "clients are numbered from 0",
    "worker_num": "processes are accelerate's matter: see configs/",
    "ci": "it only shortens FedML's own tests",
    "lr": "FedML's trainers read learning_rate",
    "wd": "FedML's trainers read weight_decay",
    "malicious_client_id": "only model_replacement reads it",
    "attack_mode": "only byzantine reads it",
    "ratio_of_poisoned_client": "only label_flipping reads it",
    "original_class_list": "only label_flipping reads it",
    "target_class_list": "only label_flipping reads it",
    "poison_start_round_id": "only label_flipping reads it",
    "poison_end_round_id": "only label_flipping reads it",
    "byzantine_client_num": "neither the attack nor the defense reads it",
    "poisoned_client_list": "FedML 0.9.6 fills it itself and does not read it: attackers come from the ratio",
    "krum_param_m": "only krum and multikrum read it",
    "norm_bound": "only norm_diff_clipping reads it",
    "stddev": "only weak_dp reads it",
    "tau": "only cclip reads it",
    "bucket_size": "only cclip reads it",
    "beta": "only trimmed_mean reads it",
    "robust_threshold": "only robust_learning_rate reads it",
    "batch_num": "only geo_median reads it",
    "clip_threshold": "only crfl reads it",
    "sigma": "only crfl reads it",
    "alpha": "only slsgd reads it",
    "option_type": "only slsgd reads it",
    "trim_param_b": "only slsgd reads it",
    "cosine_similarity_bound": "only anomaly_detection reads it",
    "lambda_param": "only residual_based_reweighting reads it",
    "thresh": "only residual_based_reweighting reads it",
    "use_memory": "FedML 0.9.6 does not read it",
    "attack_prob": "there is no attack",
    "scale_factor_S": "only model_replacement reads it",
    "attack_training_rounds": "only model_replacement reads it",
    "poisoned_training_round": "only model_replacement reads it",
    "bound_param": "FedML 0.9.6 does not read it",
    "pretraining_round_num": "only 3sigma_geo and 3sigma_foolsgold read it",
    "to_keep_higher_scores": "only 3sigma_geo and 3sigma_foolsgold read it",
    "bucketing_batch_size": "only 3sigma_foolsgold reads it",
    "mode": "only residual_based_reweighting reads it",
}


def translate(raw: Any) -> tuple[dict[str, Any], list[Note]]:
    """The recipe, unchecked, and a note on each key in the order of the YAML; RecipeError if it is no such YAML."""
    flat = flatten(raw)
    must_say_something(flat)
    must_be_words(flat)
    values = flat.values
    recipe: dict[str, Any] = {}
    notes = list(flat.notes)
    for part in (setup.run, setup.learner, setup.clients, setup.algorithm, threat, defense):
        block, more = part(values)
        recipe |= block
        notes += more
    noted = {note.key for note in notes}
    for key in values:
        if key not in noted:
            notes.append(_rest(key, flat.places[key], values))
    order = {key: place for place, key in enumerate(values)}
    return _ordered(recipe), sorted(notes, key=lambda note: order.get(note.key, len(order)))


def _rest(key: str, section: str, values: dict[str, Any]) -> Note:
    """What becomes of a key that no part of the recipe is made of."""
    if key == "enable_dp" and values[key] is True:
        return missing(key, "FedML's differential privacy has no counterpart; see weak_dp in docs/defenses.md")
    if section == "dp_args" and values.get("enable_dp") is not True:
        return ignored(key, "enable_dp is not true")
    if section in SECTIONS:
        return ignored(key, SECTIONS[section])
    if key.startswith("wandb_"):
        return ignored(key, SECTIONS["tracking_args"])
    if key in READ and values[key] is None:
        return ignored(key, "it is not set")
    if key in KEYS:
        return ignored(key, KEYS[key])
    if key in READ:
        return ignored(key, "nothing that this file asks for reads it")
    return missing(key, "is no key that FedML 0.9.6 or we know here")


def _ordered(recipe: dict[str, Any]) -> dict[str, Any]:
    """The sections in the order in which recipes are written."""
    keys = ("seed", "rounds", "task", "model", "data", "clients", "algorithm", "enable_attack", "attack",
            "enable_defense", "defense", "evaluate", "output")  # fmt: skip
    return {key: recipe[key] for key in keys if key in recipe}


def line(note: Note, sections: dict[str, str]) -> str:
    """A note as people read it. Values of ignored keys are not repeated: some are secrets."""
    place = f"{sections[note.key]}.{note.key}" if note.key in sections else note.key
    title = {"translated": "translated", "differs": "DIFFERS", "ignored": "ignored", "missing": "NO EQUIVALENT"}
    return f"{title[note.kind]:<14}{place} {note.text}"
