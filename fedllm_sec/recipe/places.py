"""Where a name in a recipe leads: the home folder, a place on this disk, or the hub."""

from __future__ import annotations

import errno
import functools
import os
import re
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedllm_sec.errors import RecipeError
from fedllm_sec.recipe.modelfolder import lost_code, wrong
from fedllm_sec.recipe.resolve import did_you_mean

TEXT_TASKS = ("causal_lm", "classify_text")  # whose rows are texts, and whose models are those of transformers
PATIENCE = 3.0  # seconds in which the hub must give any answer at all


def home(path: str) -> str:
    """The path with `~` or `~user` at its beginning as that home folder."""
    made = os.path.expanduser(path)
    if made.startswith("~"):
        raise RecipeError(f"{path}: no home folder is known for this. Write the whole path, or ./{path}.")
    return made


def named(path: str) -> str:
    """The path; an error where it is empty, which would be the working directory."""
    if not path.strip():
        raise ValueError("is empty. Give a path or a name, or leave the key out")
    return path


def printable(path: str) -> str:
    """The path; an error where it holds control characters, or none that a file system can keep."""
    if not path.isprintable():
        raise ValueError("must not hold control characters, line breaks or lone surrogates")
    return path


def own_folder(path: str) -> str:
    """The path of a folder that a run may have to itself: not the working directory, nor one that this lies in."""
    made = os.path.realpath(path)
    if os.path.commonpath([made, os.path.realpath(here())]) == made:
        raise ValueError("is the working directory, or one that it lies in; a run has a folder of its own")
    return path


TOLD_BY_THE_SYSTEM = ("/proc", "/sys")  # look like folders that can be written to
LONGEST_NAME = 255  # bytes of a folder's name, on every file system in use


def folder_problem(path: str) -> str | None:
    """Why no folder can be made there, as far as looking tells; None where nothing speaks against it."""
    place = f"output.folder: {path}: "
    made = os.path.abspath(path)
    if any(len(os.fsencode(part)) > LONGEST_NAME for part in made.split(os.sep)):
        return f"{place}no folder's name is longer than {LONGEST_NAME} bytes. Choose another."
    while not os.path.lexists(made):
        made = os.path.dirname(made)
    if not os.path.isdir(made):
        kind = "a link that leads nowhere" if os.path.islink(made) else "a file"
        return f"{place}{made} is {kind}, where a folder must be. Choose another."
    if not os.access(made, os.W_OK | os.X_OK) or os.statvfs(made).f_flag & os.ST_RDONLY:
        return f"{place}{made} cannot be written to. Choose another."
    if any(os.path.commonpath([made, told]) == told for told in TOLD_BY_THE_SYSTEM):
        return f"{place}{made} holds what the system tells, no files. Choose another."
    return None


def need_folder(folder: Path) -> None:
    """An error where the folder of the runs is not there and cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise  # the disk, which may recover
        raise RecipeError(
            f"output.folder: {folder}: cannot be made ({error.strerror or error}). Choose another."
        ) from error


def here() -> str:
    """The working directory, from which relative paths of a recipe lead."""
    return os.getcwd()


def is_local(name: str) -> bool:
    """Whether a name can only be a path: hub names are NAME or OWNER/NAME."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or os.sep + os.sep in name or "\0" in name


@functools.cache
def hub_problem() -> str | None:
    """Why the hub cannot be asked, or None; this process then uses what was downloaded before and asks no more.

    The libraries would try for half a minute, and again for each file.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "the hub is switched off (HF_HUB_OFFLINE)"
    answered = threading.Event()

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=PATIENCE)
        except Exception:  # no answer, whatever kind the client of the day raises
            return
        answered.set()

    asking = threading.Thread(target=ask, daemon=True)  # looking up a host obeys no timeout
    asking.start()
    asking.join(PATIENCE)
    if answered.is_set():
        return None
    constants.HF_HUB_OFFLINE = True
    if "datasets.config" in sys.modules:
        sys.modules["datasets.config"].HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
    return "the hub cannot be reached"


# Short names of image sets: where they lie on the hub, their image column and their label column.
IMAGE_SETS: dict[str, tuple[str, str, str]] = {
    "mnist": ("ylecun/mnist", "image", "label"),
    "fashion_mnist": ("zalando-datasets/fashion_mnist", "image", "label"),
    "cifar10": ("uoft-cs/cifar10", "img", "label"),
    "cifar100": ("uoft-cs/cifar100", "img", "fine_label"),
    "femnist": ("flwrlabs/femnist", "image", "character"),
}


# What may follow "builtin:" in data.name; fedllm_sec.data.corpus makes them.
FAMILIES = ("all", "topic", "sentiment", "yesno", "arithmetic", "edit", "list")


def lost_family(name: str) -> str | None:
    """Why there are no built-in data of this name; None where there are, or where it is another kind of name."""
    family = name.removeprefix("builtin:")
    if family == name or family in FAMILIES:
        return None
    return f'data.name: {name}: there is no built-in family "{family}".{did_you_mean(family, FAMILIES)}'


def lost(raw: Mapping[str, Any], notes: list[str] | None = None) -> list[str]:
    """The names of model and data in a raw recipe that lead nowhere from here, said before anything heavy is imported.

    Only what is certain: a hub name passes where the hub answers, or where something of that name was downloaded.
    With a list of `notes` the hub is not asked, and names that only it can know are told there.
    """
    task, told = raw.get("task", "causal_lm"), []
    model, data = (_name(raw.get(section)) for section in ("model", "data"))
    if task in TEXT_TASKS and model is not None and model != "tiny" and (problem := lost_model(model, notes)):
        told.append(problem)
    if data is None or (task not in TEXT_TASKS and data == "digits"):
        return told
    if task in TEXT_TASKS and data.startswith("builtin:"):
        return [*told, *filter(None, [lost_family(data)])]
    there = os.path.exists(os.path.expanduser(data))
    if task == "next_char" or is_local(data) or data.lower().endswith(FILES):
        return told if there or not data else [*told, f"data.name: {data}: no such file or folder in {here()}."]
    name = IMAGE_SETS[data][0] if data in IMAGE_SETS else data
    if not there and (problem := _hub("data.name", data, notes, _downloaded_set(name))) is not None:
        known = ", ".join(("digits", *IMAGE_SETS) if task not in TEXT_TASKS else ("builtin:topic",))
        told.append(
            f'data.name: "{data}": no such file or folder in {here()}, not downloaded before, and {problem}. Give an '
            f"existing file, or one of {known}."
        )
    return told


def _hub(place: str, name: str, notes: list[str] | None, downloaded: bool) -> str | None:
    """Why a name that nothing here has cannot be had from the hub; None where it can, or is only noted."""
    if notes is None:
        problem = hub_problem()  # asked in any case: the libraries, too, then know that there is no hub
        return None if downloaded else problem
    if not downloaded:
        notes.append(f'{place}: "{name}": nothing of this name in {here()}, nor downloaded before: a run asks the hub.')
    return None


FILES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".npz", ".txt", ".gz")


def _name(section: Any) -> str | None:
    name = section.get("name") if isinstance(section, Mapping) else None
    return name if isinstance(name, str) else None


def lost_model(name: str, notes: list[str] | None = None) -> str | None:
    """Why there can be no language model of this name; None where there may be one."""
    folder = os.path.expanduser(name)
    if os.path.isdir(folder):
        lost = wrong(folder) or lost_code(folder)
        return None if lost is None else f"model.name: {name}: {lost}"
    if name.lower().endswith(".gguf") and os.path.isfile(folder):
        return None
    if os.path.isfile(folder):
        return f"model.name: {name}: is a file, and no GGUF file. Give the folder of config.json and weights."
    if is_local(name) or os.path.exists(folder):
        where = "" if os.path.isabs(folder) else f" in {here()}"
        return f"model.name: {name}: no such folder or GGUF file{where}. Give an existing one, a hub name or tiny."
    if (problem := _hub("model.name", name, notes, _downloaded_model(name))) is not None:
        return (
            f'model.name: "{name}": no such folder in {here()}, not downloaded before, and {problem}. Give an existing '
            "folder or tiny."
        )
    return None


def _downloaded_model(name: str) -> bool:
    """Whether the hub's cache on this machine has the model."""
    from huggingface_hub import try_to_load_from_cache

    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except ValueError:  # no hub name
        return False


def _downloaded_set(name: str) -> bool:
    """Whether a cache of the hub's libraries on this machine has a folder for the data set."""
    from huggingface_hub import constants

    prepared = os.environ.get("HF_DATASETS_CACHE", os.path.join(constants.HF_HOME, "datasets"))
    raw = os.path.join(constants.HF_HUB_CACHE, "datasets--" + name.replace("/", "--"))
    return os.path.isdir(raw) or os.path.isdir(os.path.join(prepared, name.replace("/", "___")))


def why(error: BaseException) -> str:
    """The first line of what a library said, without addresses; and the second, where the first announces it."""
    first, second = ([*str(error).splitlines(), "", ""])[:2]
    line = (f"{first} {second.strip()}" if first.endswith(":") else first).strip() or type(error).__name__
    return re.sub(r"\s*\(?https?://\S+", "", line)
