"""Where a run keeps the rows of its rounds: where its recipe says, or by their size and the memory that is free."""

from __future__ import annotations

from pathlib import Path

import torch

from fedllm_sec.matrix.storage import Storage, available, fitting
from fedllm_sec.recipe.sections import Recipe

CPU = torch.device("cpu")


def rows_bytes(recipe: Recipe, d: int) -> int:
    """What the rows of one round take, with the copies that attackers are shown and try the defense on."""
    n = recipe.clients.per_round or recipe.clients.total
    block = recipe.attack if recipe.attacked else None
    copies = 1 if block is None else {"own": 1, "cohort": 2, "cohort+defense": 3}[block.knowledge]
    return copies * n * d * getattr(torch, recipe.compute.rows_dtype).itemsize


def storage(recipe: Recipe, d: int, device: torch.device) -> Storage:
    """Where rows of d numbers are kept in a run on this device."""
    place = recipe.compute.rows or fitting(rows_bytes(recipe, d), device)
    return Storage(place, getattr(torch, recipe.compute.rows_dtype), Path(recipe.output.folder))


def kept_in_words(recipe: Recipe, d: int, device: torch.device) -> str:
    """Where they are kept and why."""
    place = storage(recipe, d, device).place
    much = f"{rows_bytes(recipe, d) / 1e9:,.3g} GB of {recipe.compute.rows_dtype}"
    where = {
        "device": "on the training device",
        "host": "in host memory",
        "disk": f"on disk, in files without a name in {recipe.output.folder}",
    }[place]
    if recipe.compute.rows is not None:
        return f"{much} {where}, as compute.rows says"
    free = ", ".join(f"{available(d) / 1e9:,.3g} GB of {d.type} memory" for d in dict.fromkeys((device, CPU)))
    return f"{much} {where}: {free} are free, and rows take half of it at most"


def accelerator() -> torch.device:
    """What a run started now would train on, as far as torch says."""
    return torch.device("cuda") if torch.cuda.is_available() else CPU
