"""One saved adapter against a bank: what is known of clean and backdoored adapters of one base, in a small file."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fedllm_sec.api.folders import CONFIG, WEIGHTS, read_config, read_weights
from fedllm_sec.defenses.spectrum import STATISTICS, Scanner, spectral_features
from fedllm_sec.errors import DefenseError, reason
from fedllm_sec.evaluation.intervals import wilson
from fedllm_sec.matrix import Layout
from fedllm_sec.matrix.factors import product_pairs
from fedllm_sec.models.lora import source_of
from fedllm_sec.records.files import in_a_line

SHIPPED = Path(__file__).parent / "tiny_bank.json"
MOST = 1e6  # a probability's logit is no number any more where a weight or a mean of a bank is longer

Shapes = Mapping[str, Sequence[int]]  # of A (r, in) and B (out, r), by the names that peft's files have


@dataclass(frozen=True)
class Bank:
    """What a scan compares with; `shapes` and the base's hash say for which adapters it speaks."""

    base: str  # the base's name, for people
    sha256: str  # of its weights
    shapes: Shapes
    scanner: Scanner
    threshold: float  # above it an adapter is flagged
    clean: int  # adapters it was made of
    backdoored: int
    false_positives: int  # of the clean, each judged by a model that had not seen it
    found: int  # of the backdoored, likewise
    reach: float  # the largest mean of |deviation| of all of them
    made_of: str  # recipe and seeds

    def as_dict(self) -> dict[str, Any]:
        """For JSON; eight digits of a number."""

        def short(values: np.ndarray) -> list[float]:
            return [float(f"{value:.8g}") for value in values]

        model = self.scanner
        return {
            "base": self.base, "sha256": self.sha256, "made_of": self.made_of, "statistics": list(STATISTICS),
            "clean": self.clean, "backdoored": self.backdoored, "false_positives": self.false_positives,
            "found": self.found, "threshold": float(f"{self.threshold:.8g}"), "reach": float(f"{self.reach:.8g}"),
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "mean": short(model.mean), "std": short(model.std), "weights": short(model.weights),
            "intercept": float(f"{model.intercept:.8g}"),
        }  # fmt: skip

    @classmethod
    def read(cls, path: Path) -> Bank:
        """The bank of a file; an error in a line where it is none."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["statistics"] != list(STATISTICS):
                raise ValueError(f"its statistics are {in_a_line(found['statistics'])}, not {', '.join(STATISTICS)}")
            shapes = {str(name): tuple(map(int, shape)) for name, shape in found["shapes"].items()}
            pairs = product_pairs(Layout(tuple(shapes), tuple(shapes.values())))
            model = [np.array(found[key], dtype=np.float64) for key in ("mean", "std", "weights")]
            count = {key: int(found[key]) for key in ("clean", "backdoored", "false_positives", "found")}
            single = {key: float(found[key]) for key in ("intercept", "threshold", "reach")}
            wanted = (len(pairs) * len(STATISTICS),)
            if 2 * len(pairs) != len(shapes) or any(part.shape != wanted for part in model):
                raise ValueError("its numbers are not as many as its layers ask for")
            if not all(np.all(np.abs(part) < MOST) for part in (*model, *single.values())):  # nan is not below
                raise ValueError("it holds a number that is none, or is beyond all measure")
            if not (model[1] > 0).all() or not 0 < single["threshold"] < 1:
                raise ValueError("a std is not above 0, or the threshold is no probability")
            if not (0 <= count["false_positives"] <= count["clean"] and 0 <= count["found"] <= count["backdoored"]):
                raise ValueError("it counts more false positives or finds than adapters")
            base = {key: in_a_line(found[key]) for key in ("base", "sha256", "made_of")}
        except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise DefenseError(
                f"{path}: is no bank of adapters ({in_a_line(reason(error))}). Make one by fedllm-sec scan --calibrate."
            ) from error
        scanner = Scanner(*model, single.pop("intercept"))
        return cls(base["base"], base["sha256"], shapes, scanner, **single, **count, made_of=base["made_of"])


@dataclass(frozen=True)
class Verdict:
    """What a scan says of one adapter."""

    probability: float
    flagged: bool
    deviation: float  # the mean of |deviation| from the clean adapters, in their standard deviations
    unlike: bool  # whether that is beyond all adapters of the bank, clean and backdoored: then nothing is known


def weights_hash(name: str, revision: str | None = None) -> str:
    """SHA-256 of a base model's safetensors files, in the order of their names: a folder, "tiny", or one of the hub
    that lies in its cache here."""
    source = Path(source_of(name))
    if not source.is_dir():
        from huggingface_hub import snapshot_download

        try:
            source = Path(snapshot_download(name, revision=revision, local_files_only=True))
        except Exception as error:
            raise DefenseError(f"{in_a_line(name)}: lies nowhere here. Give its folder as --base.") from error
    files = sorted(path for path in source.glob("*.safetensors") if path.is_file())
    if not files:
        raise DefenseError(f"{source}: holds no weights (*.safetensors). Give the base model's folder as --base.")
    made = hashlib.sha256()
    for path in files:
        with path.open("rb") as opened:
            while part := opened.read(2**24):
                made.update(part)
    return made.hexdigest()


def factors_of(state: Mapping[str, Tensor], shapes: Shapes, place: str, bank: str) -> list[tuple[Tensor, Tensor]]:
    """The pairs (A, B) of an adapter's tensors, in the bank's order; an error where they are not those of the bank."""
    if odd := sorted({*state} ^ {*shapes}):
        has = "has" if odd[0] in state else "lacks"
        raise DefenseError(
            f"{place}: {has} {in_a_line(odd[0])}, {'which' if odd[0] in state else 'and'} the adapters of {bank} "
            f"{'lack' if odd[0] in state else 'have it'}: other layers are adapted. Calibrate a bank of such adapters."
        )
    for name, shape in shapes.items():
        tensor = state[name]
        if tuple(tensor.shape) != tuple(shape):
            raise DefenseError(
                f"{place}: {name} has shape {tuple(tensor.shape)}, in {bank} it is {tuple(shape)}: another rank or "
                "base. Calibrate a bank of such adapters."
            )
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise DefenseError(f"{place}: {name} holds what is no finite number. Such an adapter is broken: leave it.")
    return [(state[a], state[b]) for a, b in product_pairs(Layout(tuple(shapes), tuple(map(tuple, shapes.values()))))]


def scale_of(config: Mapping[str, Any], place: str) -> float:
    """By what an adapter's products count: alpha / r, or alpha / sqrt(r); an error where they do not count alike."""
    r, alpha = config.get("r"), config.get("lora_alpha")
    plain = [value for value in (r, alpha) if isinstance(value, (int, float)) and not isinstance(value, bool)]
    if len(plain) < 2 or not all(0 < value < MOST and math.isfinite(value) for value in plain):
        raise DefenseError(
            f"{place}: r: {in_a_line(r)}, lora_alpha: {in_a_line(alpha)}: must be numbers above 0 and below 1e6. Such "
            "an adapter is broken: leave it."
        )
    for key in ("rank_pattern", "alpha_pattern", "use_dora", "modules_to_save", "layer_replication", "fan_in_fan_out"):
        if config.get(key):
            raise DefenseError(f"{place}: {key}: {in_a_line(config[key])}: no bank has such adapters. None judges it.")
    return float(plain[1]) / (math.sqrt(plain[0]) if config.get("use_rslora") else float(plain[0]))


def scan(folder: str | Path, bank: Bank | str | Path = SHIPPED, base: str | None = None) -> Verdict:
    """How likely a saved peft adapter is to be backdoored, by the spectra of its products: no code and no model is run.

    `base` says where the base model lies, where the adapter's own word for it leads nowhere here. Refused is an adapter
    of another base (by the hash of its weights), other layers, another rank, or what cannot be read. See
    `defenses.spectrum` for what is looked at, and docs/lora.md for what it finds and who evades it.
    """
    folder, known = Path(os.path.expanduser(folder)), bank if isinstance(bank, Bank) else Bank.read(Path(bank))
    config = read_config(folder)
    state = read_weights(folder)
    named = base if base is not None else config.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise DefenseError(f"{folder / CONFIG}: names no base model. Give its folder as --base.")
    told = "--base" if base is not None else f"{folder / CONFIG}: base_model_name_or_path"
    try:
        hashed = weights_hash(named)
    except (ValueError, OSError) as error:
        raise DefenseError(
            f"{told}: {in_a_line(named)}: {in_a_line(reason(error))} If the base lies elsewhere, give its folder as "
            "--base."
        ) from error
    if hashed != known.sha256:
        raise DefenseError(
            f"{folder}: is an adapter of {in_a_line(named)}, whose weights are not those of the bank's base "
            f"({known.base}). Make a bank for it by fedllm-sec scan --calibrate RECIPE."
        )
    pairs = factors_of(state, known.shapes, str(folder / WEIGHTS), f"the bank ({known.base})")
    features = spectral_features(pairs, [scale_of(config, str(folder / CONFIG))] * len(pairs))
    return judged(features, known)


def judged(features: np.ndarray, bank: Bank) -> Verdict:
    """The verdict on an adapter's features (k,)."""
    probability = float(bank.scanner.probability(features))
    deviation = float(np.abs(bank.scanner.deviations(features)).mean())
    return Verdict(probability, probability > bank.threshold, deviation, deviation > bank.reach)


def in_words(place: str, verdict: Verdict, bank: Bank) -> list[str]:
    """The lines of a verdict."""
    rate = wilson(bank.false_positives, bank.clean)
    said = "flagged" if verdict.flagged else "not flagged"
    lines = [
        f"{place}: {verdict.probability:.3f} likely to be backdoored: {said} (threshold {bank.threshold:.3f})",
        f"bank: {bank.clean} clean and {bank.backdoored} backdoored adapters of {bank.base}, of {bank.made_of}",
    ]
    if rate is not None:
        lines.append(
            f"at this threshold {bank.false_positives} of {bank.clean} clean ones were flagged: false-positive rate "
            f"{rate['value']:.3f} (95 % interval {rate['low']:.3f} to {rate['high']:.3f}); {bank.found} of "
            f"{bank.backdoored} backdoored ones were"
        )
    if verdict.unlike:
        lines.append(
            f"note: its spectra lie {verdict.deviation:.3g} standard deviations from those of the clean ones, those of "
            f"the bank at most {bank.reach:.3g}: it was trained otherwise, and the probability says little"
        )
    return lines
