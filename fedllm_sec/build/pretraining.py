"""`pretrain`: a clean federation's rounds, run once and shared by whatever starts from them.

They are a run of their own, in `pretrain/HASH` beside the runs: killed, it goes on; damaged, it is made again. The hash
is of all that decides its model, so that who finds it there need not ask who made it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fedllm_sec
from fedllm_sec.build.names import outside
from fedllm_sec.build.start import start_of
from fedllm_sec.data import sources
from fedllm_sec.errors import ResumeError
from fedllm_sec.recipe import reading
from fedllm_sec.recipe.places import TEXT_TASKS
from fedllm_sec.recipe.sections import Compute, Output, Recipe
from fedllm_sec.records import files, inventory
from fedllm_sec.records.folder import RunFolder
from fedllm_sec.records.verify import look

if TYPE_CHECKING:
    from fedllm_sec.rounds.compute import Machine

MEASURED = ("rows", "batch_size", "max_new_tokens", "samples")  # of evaluate: what its last round is measured with
WAIT = 0.5  # seconds between looks at rounds that another process makes
LIBRARIES = ("torch", "transformers", "peft", "numpy")


def clean(recipe: Recipe) -> Recipe:
    """The rounds of `pretrain` as a recipe: nobody attacks, nobody defends, measured once at the end."""
    assert recipe.pretrain is not None
    rounds, own = recipe.pretrain.rounds, recipe.evaluate
    measured = {key: getattr(own, key) for key in MEASURED if key in type(own).model_fields}
    spare = {key: 0 for key in ("answer_rows", "transcripts") if key in type(own).model_fields}
    same = ("mixed_precision", "gradient_accumulation", "placement", "rows", "rows_dtype")
    compute = {key: getattr(recipe.compute, key) for key in same}
    return recipe.model_copy(
        update={
            "rounds": rounds, "pretrain": None, "enable_attack": False, "attack": None, "enable_defense": False,
            "defense": None, "evaluate": type(own)(every=rounds, **measured, **spare), "compute": Compute(**compute),
            "output": Output(folder=inventory.PRETRAIN), "variants": None,
        }
    )  # fmt: skip


def pretrained(
    recipe: Recipe, beside: Path, machine: Machine, run: Callable[[Recipe], None], tell: Callable[[str], None]
) -> dict[str, Any]:
    """The state after the last of the clean rounds; `run` makes them where nobody has.

    Of several processes one makes them, the others wait.
    """
    wanted = clean(recipe)
    folder = beside / inventory.PRETRAIN / key(wanted, machine)
    wanted = wanted.model_copy(update={"output": Output(folder=str(folder))})
    with _alone(folder) if machine.main else _with_the_first():
        if machine.main and (wrong := _wrong(folder, wanted)) is not None:
            tell(f"{folder} is damaged and made again: {wrong}")
            shutil.rmtree(folder)
        machine.accelerator.wait_for_everyone()
        there = look(folder)
        if not (there.finished and not there.wrong):
            tell(f"{wanted.rounds} attack-free rounds first, in {folder}")
            run(wanted)
        state = RunFolder(folder).resume(reading.dump(wanted))
        machine.accelerator.wait_for_everyone()
    assert state is not None
    return state


def _wrong(folder: Path, wanted: Recipe) -> str | None:
    """What is not as the clean rounds left it; None where they go on, begin, or are whole."""
    if (found := look(folder)).finished:
        return "; ".join(f"{name} {why}" for name, why in found.wrong.items()) or None
    try:
        RunFolder(folder).resume(reading.dump(wanted))
    except ResumeError as error:
        return files.in_a_line(error)
    return None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    for path in (folder, folder.parent):
        if path.is_symlink():
            raise ResumeError(f"{path}: is a link to elsewhere, through which nothing is written. Move it away.")
    while True:
        with files.locked(folder.parent / f".{folder.name}.lock") as mine:
            if mine:
                yield
                return
        time.sleep(WAIT)


@contextmanager
def _with_the_first() -> Iterator[None]:
    """The other ranks do what the first one's lock allows: it stands at every barrier with them."""
    yield


# ---------------------------------------------------------------- what decides the rounds


def key(recipe: Recipe, machine: Machine) -> str:
    """A hash of recipe, data, model and start, of the code, and of what computes: where one differs, so may a byte."""
    start = start_of(recipe)
    decided = {
        "recipe": recipe.model_dump(mode="json", exclude={"output"}),
        "files": [_content(path) for path in _files(recipe)],
        "start": start.sha256 if start is not None else None,
        "code": _code(),
        "libraries": [getattr(sys.modules.get(name), "__version__", None) for name in LIBRARIES],
        "machine": [machine.device.type, machine.accelerator.mixed_precision],
    }
    return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()[:16]


def _files(recipe: Recipe) -> list[Path]:
    """Files and folders of this disk that the recipe reads: data, model, and code from outside."""
    data, found = recipe.data, list[Path]()
    if recipe.task in TEXT_TASKS:
        found += [path for split in (data.train, data.test) if (path := sources.file_of(data.name, split)) is not None]
        found += [Path(data.chat_template)] if data.chat_template is not None else []
        names = [recipe.model.name]
    else:
        names = [data.name, str(recipe.model["name"])]
    found += [Path(name) for name in map(os.path.expanduser, names) if os.path.exists(name)]
    modules = [sys.modules.get(name.partition(":")[0]) for _, name in outside(recipe.model_dump())]
    code = [getattr(module, "__file__", None) for module in modules]
    return [*found, *(Path(file) for file in code if file is not None)]


def _content(path: Path) -> list[str]:
    """The hashes of a file, or of all files of a folder, each behind its name."""
    inside = sorted(part for part in path.rglob("*") if part.is_file()) if path.is_dir() else [path]
    return [f"{part.relative_to(path)} {_hash(part, part.stat().st_size, part.stat().st_mtime_ns)}" for part in inside]


@functools.lru_cache(maxsize=100_000)
def _hash(path: Path, size: int, changed: int) -> str:
    return files.sha256(path)


@functools.cache
def _code() -> str:
    """Of the package's own code, but for what reads finished runs."""
    here, digest = Path(fedllm_sec.__file__).parent, hashlib.sha256()
    for path in sorted(here.rglob("*.py")):
        if path.relative_to(here).parts[0] != "report":
            digest.update(path.read_bytes())
    return digest.hexdigest()
