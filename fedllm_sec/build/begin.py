"""The tensors of a start over the recipe's own model: names, shapes, types and values are compared with its layout."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedllm_sec.build.start import FACTORS, Start, start_of, told
from fedllm_sec.errors import RecipeError
from fedllm_sec.models import pretrained
from fedllm_sec.models.saving import classes_of
from fedllm_sec.recipe.places import TEXT_TASKS
from fedllm_sec.recipe.sections import Recipe
from fedllm_sec.records import checkpoint
from fedllm_sec.records.files import in_a_line
from fedllm_sec.records.folder import read_recipe

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
TOLD = 3  # names in an error


def begin(recipe: Recipe, task: Any) -> tuple[Tensor, Tensor | None]:
    """The vector (d,), and the buffers (b,) float64 where the model has some, from which the first round starts.

    With `model.start` they are its own, in float32; parameters that are not trained are laid over the model too, where
    the start holds them.
    """
    start, buffers = start_of(recipe), getattr(task, "buffers", None)
    if start is None:
        return task.initial.clone(), buffers.initial.clone() if buffers is not None else None
    with told(start.path):
        _refuse_other_classes(task, start)
        if start.kind == "run":
            return _of_run(recipe, task, start)
        with torch.no_grad():
            task.parameters.copy_(task.initial)  # whatever an earlier run of this process left
            if start.kind == "adapter":
                _lay_adapter(task, start)
            else:
                _lay_state(task, start)
            vector = task.parameters.detach().clone()
            return vector, buffers.read().cpu() if buffers is not None else None


def _refuse_other_classes(task: Any, start: Start) -> None:
    """An adapter's output k is the class of its own data: an error where that is another here."""
    held = start.file if start.kind == "adapter" else Path(start.path) / "adapter" / FACTORS
    if not hasattr(task, "names") or start.kind == "file" or not held.is_file():
        return
    if (theirs := classes_of(held)) is not None and theirs != tuple(task.names):
        raise RecipeError(
            f"model.start: {start.path}: tells {in_a_line(', '.join(theirs))} apart, in this order; the data have "
            f"{in_a_line(', '.join(task.names))}. Its outputs would mean other classes: use data of its own classes."
        )


def _of_run(recipe: Recipe, task: Any, start: Start) -> tuple[Tensor, Tensor | None]:
    """The vector and the buffers of a run's last checkpoint."""
    place = f"model.start: {start.path}: "
    state = checkpoint.unpack(start.file.read_bytes())
    vector = state["vector"]
    if not isinstance(vector, Tensor) or tuple(vector.shape) != (task.layout.size,) or vector.dtype not in FLOATS:
        said = tuple(vector.shape) if isinstance(vector, Tensor) else type(vector).__name__
        raise RecipeError(f"{place}its model has {said} trained parameters, this one has ({task.layout.size},).")
    if state.get("base"):
        raise RecipeError(
            f"{place}its rounds changed the base model's weights (model.lora.average), which its vector does not hold. "
            "Merge its adapter folder into the base model, and give the folder of that as model.name."
        )
    _refuse_drawn(recipe, task, start)
    found = vector.to(task.device, torch.float32)
    _refuse_infinite(place, "its model", found)
    buffers = getattr(task, "buffers", None)
    if buffers is None:
        return found, None
    own = state.get("buffers")
    if not isinstance(own, Tensor) or own.shape != buffers.initial.shape:
        raise RecipeError(
            f"{place}holds no running statistics of this model (model.buffers there is another). Set model.buffers: "
            "batch, or start from a run that keeps them."
        )
    _refuse_infinite(place, "its running statistics", own)
    return found, own.cpu().double()


def _refuse_drawn(recipe: Recipe, task: Any, start: Start) -> None:
    """A checkpoint lacks what was not trained: an error where the seed drew that, and here draws something else."""
    frozen = any(not parameter.requires_grad for parameter in task.model.parameters())
    if recipe.task in TEXT_TASKS or not frozen or pretrained.is_folder(recipe.model["name"]):
        return
    if read_recipe(Path(start.path) / "recipe.yaml").get("seed") != recipe.seed:
        raise RecipeError(
            f"model.start: {start.path}: parts of its model are not trained but drawn by its seed, which is another. "
            "Use that seed."
        )


# ---------------------------------------------------------------- files with names


@contextmanager
def _opened(start: Start) -> Iterator[Any]:
    from safetensors import safe_open

    with safe_open(start.file, framework="pt", device="cpu") as file:
        yield file


def _lay_adapter(task: Any, start: Start) -> None:
    """The factors of a peft adapter folder over the task's own adapter; a frozen factor too.

    peft lays a copy of the base model's embeddings beside an adapter of them: it may be there where it is the base's.
    """
    from peft import get_peft_model_state_dict

    own = get_peft_model_state_dict(task.model, save_embedding_layers=False)
    with _opened(start) as file:
        held = set(file.keys())
        base = {name: t for name, t in task.model.state_dict().items() if name in held and name not in own}
        copies = {name for name, tensor in base.items() if torch.equal(file.get_tensor(name).to(tensor), tensor)}
        _lay(start.path, file, {name: name for name in held - copies}, own, needed=own)


def _lay_state(task: Any, start: Start) -> None:
    """A state dict over the whole model: each trained parameter and travelling buffer once, and no stranger."""
    own = task.model.state_dict()
    places = {name: tensor.data_ptr() for name, tensor in own.items()}  # of tied parameters the same
    buffers = task.buffers.tensors() if getattr(task, "buffers", None) is not None else {}
    needed = [*task.layout.names, *buffers]
    with _opened(start) as file:
        names = _without_prefix(list(file.keys()), needed)
        for name in list(names):  # the model normalises by the batch at hand: statistics have no place in it
            if name not in own and _of_batchnorm(task.model, name):
                del names[name]
        there = {places[name] for name in names if name in places}
        _refuse_unequal_ties(start.path, file, names, places)
        _lay(start.path, file, names, own, {name for name in needed if places.get(name) not in there or name in names})


def _without_prefix(names: list[str], needed: Sequence[str]) -> dict[str, str]:
    """{name in the model: name in the file}: one prefix before all of them, such as `module.`, is taken off."""
    if not set(names) & set(needed):
        first = needed[0]
        prefix = next((name.removesuffix(first) for name in names if name.endswith(f".{first}")), None)
        if prefix is not None and all(name.startswith(prefix) for name in names):
            return {name.removeprefix(prefix): name for name in names}
    return {name: name for name in names}


def _of_batchnorm(model: torch.nn.Module, name: str) -> bool:
    module, _, key = name.rpartition(".")
    parts = dict(model.named_modules())
    return key in STATISTICS and isinstance(parts.get(module), torch.nn.modules.batchnorm._NormBase)


def _refuse_unequal_ties(path: str, file: Any, names: Mapping[str, str], places: Mapping[str, int]) -> None:
    """One parameter that the model uses in two places cannot be two tensors."""
    first: dict[int, str] = {}
    for name in (name for name in names if places.get(name)):
        if (other := first.setdefault(places[name], name)) != name and not torch.equal(
            file.get_tensor(names[name]), file.get_tensor(names[other])
        ):
            raise RecipeError(f"model.start: {path}: {other} and {name} are one parameter of the model, two there.")


def _lay(path: str, file: Any, names: Mapping[str, str], own: Mapping[str, Tensor], needed: Collection[str]) -> None:
    """Write tensors over `own`, which are views of the model's, once all of them fit."""
    problems = []
    if missing := sorted(set(needed) - set(names)):
        problems.append(f"lacks {_some(missing)}")
    if strange := sorted(set(names) - set(own)):
        problems.append(f"holds {_some(strange)}, for which the model has no place")
    slices = {name: file.get_slice(names[name]) for name in names if name in own}
    shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
    if other := [f"{name} {shape} there, {tuple(own[name].shape)} here" for name, shape in shapes.items()
                 if shape != tuple(own[name].shape)]:  # fmt: skip
        problems.append(f"has other shapes: {_some(other)}")
    if problems:
        raise RecipeError(
            f"model.start: {path}: is of another model: it {'; it '.join(problems)}. Choose the model that it is of."
        )
    for name in slices:
        tensor, goal = file.get_tensor(names[name]), own[name]
        fits = tensor.dtype in FLOATS if goal.is_floating_point() else not tensor.is_floating_point()
        if not fits or tensor.is_complex():
            raise RecipeError(f"model.start: {path}: {in_a_line(name)} is {tensor.dtype}, the model's {goal.dtype}.")
        tensor = tensor.to(goal.dtype)
        _refuse_infinite(f"model.start: {path}: ", in_a_line(name), tensor)
        if name.endswith("running_var") and bool((tensor < 0).any()):
            raise RecipeError(f"model.start: {path}: {in_a_line(name)} is a variance below 0. Start from another file.")
        goal.copy_(tensor)


def _refuse_infinite(place: str, name: str, tensor: Tensor) -> None:
    if not bool(tensor.isfinite().all()):
        raise RecipeError(f"{place}{name} is not made of finite float32 numbers. Start from a round before it broke.")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - TOLD} more" if len(names) > TOLD else ""
    return ", ".join(map(in_a_line, names[:TOLD])) + more
