"""Run folders as the report reads them: files only, nothing in them trusted."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fedllm_sec.errors import FedError, ResumeError
from fedllm_sec.records import inventory
from fedllm_sec.records.files import sha256
from fedllm_sec.records.folder import read_recipe
from fedllm_sec.records.history import RoundRecord, read_history

try:
    VERSION = version("fedllm_sec")
except PackageNotFoundError:  # run from a source folder that is not installed
    VERSION = "of an unknown version"

MOST_WORDS = 300  # characters of what a file says of a run's start


class ReportError(FedError):
    """A folder from which no report can be made."""


@dataclass(frozen=True)
class Run:
    """One run folder. `records` may include round 0, the state before training."""

    name: str
    folder: Path
    recipe: Mapping[str, Any]
    recipe_text: str
    environment: Mapping[str, Any]
    records: tuple[RoundRecord, ...]
    warnings: tuple[str, ...] = ()

    @property
    def rounds(self) -> tuple[RoundRecord, ...]:
        """The records of training rounds, without round 0."""
        return tuple(record for record in self.records if record.round >= 1)

    @property
    def attacked(self) -> bool:
        """Whether clients are malicious; an observer alone (attack.privacy) is none."""
        block = _block(self.recipe, "attack")
        curious = bool(block.get("privacy")) and not methods(block, "data", "local", "update")
        return self.recipe.get("enable_attack") is True and not curious

    @property
    def start(self) -> str | None:
        """In words what the run started from; None: a fresh adapter, the base model, or weights that were drawn."""
        said = _block(self.environment, "start").get("words")
        if isinstance(said, str):
            return said[:MOST_WORDS]
        path, rounds = _block(self.recipe, "model").get("start"), _block(self.recipe, "pretrain").get("rounds")
        words = [f"from {str(path)[:MOST_WORDS]}"] if path is not None else []
        words += [f"after {rounds} attack-free rounds"] if type(rounds) is int else []
        return ", ".join(words) or None

    @property
    def attack(self) -> Mapping[str, Any]:
        """The attack block if it is switched on, else empty."""
        return _block(self.recipe, "attack") if self.attacked else {}

    @property
    def defense(self) -> Mapping[str, Any]:
        """The defense block if it is switched on, else empty."""
        return _block(self.recipe, "defense") if self.recipe.get("enable_defense") is True else {}

    @property
    def defended(self) -> bool:
        """Whether there is anything but plain training and a plain mean between the clients and the model."""
        rule = _block(self.defense, "rule").get("name", "mean")
        return any(self.defense.get(kind) for kind in ("client", "before", "after", "repair")) or rule != "mean"


def _block(parent: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    block = parent.get(key)
    return block if isinstance(block, Mapping) else {}


def methods(block: Mapping[str, Any], *kinds: str) -> list[Mapping[str, Any]]:
    """The {name, settings} entries of the named lists of an attack or defense block, in order."""
    found: list[Mapping[str, Any]] = []
    for kind in kinds:
        entries = block.get(kind)
        listed = entries if isinstance(entries, list) else [entries]
        found += [entry for entry in listed if isinstance(entry, Mapping)]
    return found


def command_of(run: Run) -> str:
    """What was typed to make the run, as far as it is known."""
    command = run.environment.get("command")
    return " ".join(str(part) for part in command) if isinstance(command, list) else str(command or "")


# ---------------------------------------------------------------- reading


def read_runs(folders: Iterable[Path]) -> list[Run]:
    """The runs of all folders: each is a run folder, a comparison, or a folder that holds run folders."""
    given = list(folders)
    runs: list[Run] = []
    for folder in given:
        found = _read_folder(folder)
        if len(given) > 1 and len(found) > 1:
            found = [replace(run, name=f"{folder.name}/{run.name}") for run in found]
        runs += found
    known: set[Path] = set()
    for run in runs:
        if (place := run.folder.resolve()) in known:
            raise ReportError(f"{run.folder}: is given twice, and would be compared with itself. Give it once.")
        known.add(place)
    names = [run.name for run in runs]
    return [replace(r, name=str(r.folder)) if names.count(r.name) > 1 else r for r in runs]


def _read_folder(folder: Path) -> list[Run]:
    if not folder.is_dir():
        raise ReportError(f"{folder}: no such folder. Give a run folder, for example runs/quickstart.")
    if (folder / "comparison.json").is_file():
        return _read_comparison(folder)
    if _is_run(folder):
        return [read_run(folder)]
    inside = sorted(child for child in folder.iterdir() if child.is_dir() and _is_run(child))
    if not inside:
        raise ReportError(
            f"{folder}: neither a run folder (no recipe.yaml, no history.jsonl) nor one that holds some. "
            "Give the folder that the run printed as its output."
        )
    return _read_parts(inside)


def _read_comparison(folder: Path) -> list[Run]:
    path = folder / "comparison.json"
    content = read_json(path)
    variants = content.get("variants")
    if not isinstance(variants, list) or not all(isinstance(v, str) for v in variants) or not variants:
        raise ReportError(f'{path}: must hold {{"variants": [names in order]}}, got {str(content)[:80]}.')
    outside = [name for name in variants if Path(name).name != name]
    if outside:
        raise ReportError(f"{path}: the variant {outside[0]!r} is not the name of a folder beside it.")
    return _read_parts([folder / name for name in variants])


def _read_parts(folders: list[Path]) -> list[Run]:
    """The runs that can be read; what is wrong with the others becomes a warning of the first one."""
    runs, problems = [], []
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except FedError as error:
            problems.append(f"left out: {error}")
    if not runs:
        raise ReportError("none of the runs can be read.\n" + "\n".join(f"  {problem}" for problem in problems))
    return [replace(runs[0], warnings=(*problems, *runs[0].warnings)), *runs[1:]]


def _is_run(folder: Path) -> bool:
    return (folder / "recipe.yaml").is_file() or (folder / "history.jsonl").is_file()


def read_run(folder: Path) -> Run:
    """One run folder; an error says what is missing or which line cannot be read."""
    if not folder.is_dir():
        raise ReportError(f"{folder}: no such folder; this run has not started.")
    missing = [name for name in ("recipe.yaml", "history.jsonl") if not (folder / name).is_file()]
    if missing:
        raise ReportError(
            f"{folder}: a half-written run folder, without {' and '.join(missing)}. "
            "Start the run again with the same command: it goes on where it stopped, or says what must be restored."
        )
    recipe, recipe_text = read_recipe(folder / "recipe.yaml"), _read_text(folder / "recipe.yaml")
    warnings = []
    environment: Mapping[str, Any] = {}
    try:
        environment = read_json(folder / "environment.json")
    except ReportError:  # the record stands without it
        gone = not (folder / "environment.json").exists()
        how = "is missing" if gone else "cannot be read"
        warnings.append(f"environment.json {how}: versions and command are not known.")
    records = _read_records(folder, environment.get("fedllm_sec"))
    last, planned = records[-1].round, recipe.get("rounds")
    if isinstance(planned, int) and last < planned:
        warnings.append(f"not finished: {last} of {planned} rounds are recorded.")
    closed = inventory.read_summary(folder)
    made = closed["made"].get("recipe.yaml") if isinstance(closed, dict) else None
    if made is not None and sha256(folder / "recipe.yaml") != made["sha256"]:
        warnings.append(
            "recipe.yaml is not as the run left it: what is said of attack and defense may be untrue. "
            "fedllm-sec verify names what has changed."
        )
    if isinstance(closed, str) and not warnings:
        warnings.append(
            f"summary.json {closed}: whether the other files are as the run left them is not known."
            if (folder / "summary.json").exists()
            else "summary.json is missing: the run was stopped before it closed its folder."
        )
    return Run(folder.resolve().name, folder, recipe, recipe_text, environment, records, tuple(warnings))


def _read_records(folder: Path, written_by: Any) -> tuple[RoundRecord, ...]:
    path = folder / "history.jsonl"
    try:
        records = read_history(folder)
        if not records:
            raise ReportError(f"{path}: no round is recorded yet. Wait for the first one.")
        return tuple(_finite_again(record) for record in records)
    except ReportError:
        raise
    except (FedError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        text = str(error) if isinstance(error, ResumeError) else f"{path}: cannot be read ({error})."
        if written_by is not None and written_by != VERSION:
            text += f" It was written by fedllm_sec {written_by}; this is {VERSION}. Read it with that."
        else:
            text += " If the run was killed while writing, the same command starts it again and repairs this,"
            text += " or says what must be restored."
        raise ReportError(text) from error


def _finite_again(record: RoundRecord) -> RoundRecord:
    """The strings "nan", "inf" and "-inf" back to numbers; other text in place of a number is an error."""
    return replace(
        record,
        losses=_numbers(record.losses, "losses"),
        norms=_numbers(record.norms, "norms"),
        quarantined={str(key): str(why) for key, why in record.quarantined.items()},
        weights=None if record.weights is None else _numbers(record.weights, "weights"),
        scores=None if record.scores is None else _numbers(record.scores, "scores"),
        notes=_numbers(record.notes, "notes"),
        update_norm=_number(record.update_norm, "update_norm"),
        lora_gap=None if record.lora_gap is None else _number(record.lora_gap, "lora_gap"),
        detection=None if record.detection is None else _numbers(record.detection, "detection"),
        quality=None if record.quality is None else _measures(record.quality, "quality"),
        attack=None if record.attack is None else _measures(record.attack, "attack"),
        robustness=None if record.robustness is None else _number(record.robustness, "robustness"),
        stealth=None if record.stealth is None else _numbers(record.stealth, "stealth"),
        seconds=_numbers(record.seconds, "seconds"),
        memory_mb=_numbers(record.memory_mb, "memory_mb"),
    )


NESTED = (
    "per_class",
    "certified",
    "draws",
    "second",
    "generalise",
    "turns_since",
)  # blocks of measures in a block of measures


def _number(value: Any, place: str) -> float:
    if isinstance(value, bool) or not (isinstance(value, (int, float)) or value in ("nan", "inf", "-inf")):
        raise ResumeError(f"history.jsonl, {place}: {value!r} is not a number.")
    return float(value)


def _numbers(values: Mapping[str, Any], place: str) -> dict[str, Any]:
    if all(type(v) is float for v in values.values()):  # nearly always, and there are very many
        return dict(values)
    return {key: None if v is None else _number(v, f"{place}.{key}") for key, v in values.items()}


def _measures(values: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Numbers, None, rates {value, low, high, n}, and DETAILS."""

    def number(key: str, value: Any) -> Any:
        if key == "reasons" and value is not None:
            return {str(name): str(why) for name, why in value.items()}
        if key in NESTED and value is not None:
            return _measures(value, f"{place}.{key}")
        if key in ("attacks", "per_client") and value is not None:
            return {str(name): _measures(own, f"{place}.{name}") for name, own in value.items()}
        return _numbers(value, f"{place}.{key}") if isinstance(value, dict) else _numbers({key: value}, place)[key]

    return {key: number(key, value) for key, value in values.items()}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"{path}: cannot be read ({error}).") from error


def read_json(path: Path) -> Mapping[str, Any]:
    """A JSON object from a file; an error says what it is instead."""
    text = _read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{path}: not JSON ({str(error)[:200]}).") from error
    if not isinstance(content, dict):
        raise ReportError(f"{path}: must hold an object, got {type(content).__name__}.")
    return content
