"""What `model.start` names: a run folder, a peft adapter folder, or a safetensors file of a state dict.

Anybody may have made these files: nothing in them is unpickled or run, and what is wrong with them is one line. Here is
what can be said without the model; `begin` then lays the tensors over it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedllm_sec.build.alike import refuse_other_adapter, refuse_other_layers, run_in_words
from fedllm_sec.errors import FedError, RecipeError, ResumeError, reason
from fedllm_sec.recipe.places import TEXT_TASKS, here, home
from fedllm_sec.recipe.sections import Recipe
from fedllm_sec.records import checkpoint
from fedllm_sec.records.files import in_a_line, sha256

PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".tar")
WAY_OUT = (
    "could run code when it is read. Where you trust it, write it anew: "
    "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'start.safetensors')"
)
CONFIG, FACTORS, WHOLE = "adapter_config.json", "adapter_model.safetensors", "model.safetensors"
MOST_CONFIG = 1_000_000  # bytes of an adapter_config.json; one has some hundreds


@dataclass(frozen=True)
class Start:
    """Where a run's model comes from, as far as its files say without a model."""

    path: str  # as the recipe has it
    kind: Literal["run", "adapter", "file"]
    file: Path  # that holds the tensors
    words: str  # "from adapter runs/x/adapter"
    attacked: bool  # whether its run was attacked, or one that this began from, as far as is known
    sha256: str  # of the files that decide it


def start_path(recipe: Recipe) -> str | None:
    """`model.start` of the recipe, whatever its task."""
    found = recipe.model.get("start") if isinstance(recipe.model, dict) else recipe.model.start
    return None if found is None else home(str(found))


def start_of(recipe: Recipe) -> Start | None:
    """What the recipe starts from, looked at without the model; None where it starts anew. An error in words."""
    path = start_path(recipe)
    if path is None:
        return None
    kind, files = _found(path)
    words, attacked = f"from {kind} {path}", False
    with told(path):
        if kind == "run":
            more, attacked = run_in_words(recipe, path, int(_marks(*_seen(files[0]))["round"]))
            words += more
        elif kind == "adapter":
            refuse_other_adapter(recipe, path, _config(Path(path) / CONFIG))
            names = _header(*_seen(files[0]))
            refuse_other_layers(recipe, path, names)
            attacked = _warned(Path(path))
            words += ", whose card warns of an attack" if attacked else ""
        else:
            if recipe.task in TEXT_TASKS and recipe.model.lora is not None:
                raise RecipeError(
                    f"model.start: {path}: is a file of tensors, and an adapter is trained (model.lora). Give the "
                    "adapter's folder, whose adapter_config.json says how its product counts."
                )
            _header(*_seen(files[0]))
        digest = hashlib.sha256("".join(_digest(*_seen(file)) for file in files).encode()).hexdigest()
    return Start(path, kind, files[0], words, attacked, digest)


def start_problems(recipe: Recipe) -> list[str]:
    """Why the recipe cannot start from there, as far as can be said without the model."""
    try:
        start = start_of(recipe)
    except RecipeError as error:
        return error.problems
    own = os.path.realpath(recipe.output.folder)
    if start is not None and os.path.commonpath([os.path.realpath(start.path), own]) == own:
        return [f"model.start: {start.path}: lies in the run's own output.folder. Give that another name."]
    return []


def _found(path: str) -> tuple[Literal["run", "adapter", "file"], list[Path]]:
    """The kind of what lies there, and the files that decide it, the tensors first."""
    there = Path(path)
    place = f"model.start: {path}: "
    if "\0" in path or not os.path.exists(there):
        raise RecipeError(
            f"{place}no such file or folder in {here()}. Give a run folder, an adapter folder or a .safetensors file."
        )
    if there.is_dir():
        if (there / CONFIG).is_file():
            if not (there / FACTORS).is_file():
                pickled = (there / "adapter_model.bin").exists()
                what = f"its adapter_model.bin is a pickle, which {WAY_OUT}" if pickled else f"has no {FACTORS}"
                raise RecipeError(f"{place}{what}.")
            return "adapter", [there / FACTORS, there / CONFIG]
        if (there / "recipe.yaml").is_file() or (there / "checkpoint.safetensors").is_file():
            if lost := [n for n in ("recipe.yaml", "checkpoint.safetensors") if not (there / n).is_file()]:
                raise RecipeError(
                    f"{place}is a run folder without {' and '.join(lost)}: none of its rounds is done, or it was lost."
                )
            return "run", [there / "checkpoint.safetensors"]
        raise RecipeError(f"{place}{_no_start(there)}")
    if there.suffix.lower() in PICKLED:
        raise RecipeError(f"{place}is a pickle, which {WAY_OUT}.")
    if there.suffix != ".safetensors" or not there.is_file():
        raise RecipeError(f"{place}is no .safetensors file. Give one, a run folder or an adapter folder.")
    if there.name == FACTORS:
        raise RecipeError(f"{place}is an adapter's tensors. Give its folder, where {CONFIG} says how they count.")
    if there.name == "checkpoint.safetensors":
        raise RecipeError(f"{place}is a run's checkpoint. Give the run's folder: its recipe says of which model it is.")
    return "file", [there]


def _no_start(folder: Path) -> str:
    if (folder / "config.json").is_file():
        return "is a model folder. Give it as model.name, and leave model.start out."
    if (folder / WHOLE).is_file():
        return f"holds no run and no adapter. Give {folder / WHOLE}."
    inside = sorted(child.name for child in folder.iterdir() if (child / "recipe.yaml").is_file())
    if inside:
        return f"holds several runs. Give one of them, such as {folder / in_a_line(inside[0])}."
    return "holds neither a run (recipe.yaml, checkpoint.safetensors) nor an adapter (adapter_config.json)."


@contextmanager
def told(path: str) -> Iterator[None]:
    """Whatever goes wrong while a start's files are read, as a RecipeError in a line."""
    from safetensors import SafetensorError

    try:
        yield
    except RecipeError:
        raise
    except FedError as error:
        raise RecipeError(f"model.start: {in_a_line(error)}") from error
    except (SafetensorError, OSError, *checkpoint.UNREADABLE) as error:
        raise RecipeError(
            f"model.start: {path}: cannot be read ({in_a_line(reason(error))}). It was cut or changed: restore it."
        ) from error


# ---------------------------------------------------------------- files, read once as long as they stay the same


def _seen(file: Path) -> tuple[Path, int, int]:
    found = file.stat()
    return file, found.st_size, found.st_mtime_ns


@functools.lru_cache(maxsize=64)
def _digest(file: Path, size: int, changed: int) -> str:
    return sha256(file)


@functools.lru_cache(maxsize=16)
def _header(file: Path, size: int, changed: int) -> Mapping[str, tuple[int, ...]]:
    """The shape of each tensor by name; the library compares what the header says with the file's length."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118


@functools.lru_cache(maxsize=16)
def _marks(file: Path, size: int, changed: int) -> Mapping[str, Any]:
    return checkpoint.marks(file.read_bytes())  # whose hash it compares


def _config(file: Path) -> Mapping[str, Any]:
    if file.stat().st_size > MOST_CONFIG:
        raise ValueError(f"{CONFIG} has {file.stat().st_size:,} bytes, so it is none")
    found = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"{CONFIG} holds no settings")
    return found


def _warned(folder: Path) -> bool:
    try:
        with (folder / "README.md").open(encoding="utf-8", errors="replace") as card:
            return card.readline(200).startswith("**WARNING")
    except OSError:
        return False


# ---------------------------------------------------------------- what a run is told to have started from


def entry(recipe: Recipe, start: Start | None) -> dict[str, Any] | None:
    """What environment.json and summary.json say of the start, in words and by hash; None where a run starts anew."""
    words = [start.words] if start is not None else []
    if recipe.pretrain is not None:
        words.append(f"after {recipe.before} attack-free round{'s' if recipe.before > 1 else ''}")
    if not words:
        return None
    known = {"sha256": start.sha256, "attacked": start.attacked} if start is not None else {}
    return {"words": ", ".join(words), **known}


def refuse_another(known: Any, start: Start | None) -> None:
    """An error where `model.start` is not what a run that goes on once began from, as its environment.json says."""
    said = known.get("sha256") if isinstance(known, dict) else None
    if start is not None and said is not None and said != start.sha256:
        raise ResumeError(
            f"model.start: {start.path}: is not what the run began from: its files have changed since. Restore them, "
            "or start anew with --fresh."
        )
