"""Image classifiers of transformers, from a local folder or the hub, as small models.

A recipe names the folder itself in `model.name`. Images are brought once, for the whole set, to the size that the
folder's image processor ends with, and are normalised by its mean and deviation; attacks act on the images so brought.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pydantic
import torch
from torch import Tensor, nn

from fedllm_sec.errors import RecipeError, reason
from fedllm_sec.recipe import modelfolder, places
from fedllm_sec.recipe.section import Section

NAME = "image_classifier"  # its line in the menu of models
PROCESSOR = "preprocessor_config.json"
HEADS = ("classifier", "fc", "head")  # what the output layer is called in transformers
AT_ONCE = 1024  # images that are resized together


Pixels = Annotated[int, pydantic.Field(ge=1, le=4096)]


class ImageLora(Section):
    """An adapter on an image classifier; its output layer is trained in full beside it."""

    r: int = pydantic.Field(8, ge=1)
    alpha: float = pydantic.Field(16.0, gt=0)
    target_modules: list[str] | str = "all-linear"


def is_folder(name: Any) -> bool:
    """Whether a model's name means a folder or a hub name, not a line of a menu or outside code."""
    return isinstance(name, str) and ":" not in name and (places.is_local(name) or "/" in name or os.path.isdir(name))


def image_classifier(
    shape: tuple[int, ...],
    classes: int,
    *,
    folder: str,
    revision: str | None = None,
    pretrained: bool = True,
    size: Pixels | None = None,
    lora: ImageLora | None = None,
) -> nn.Module:
    """An image classifier of transformers, with an output layer of its own for the classes of the data.

    `pretrained: false` draws all weights by the seed. `size` brings images to size x size pixels instead of what the
    image processor says. `lora` trains an adapter and the output layer, else everything is trained.
    """
    from transformers import AutoConfig, AutoModelForImageClassification

    where: dict[str, Any] = {"trust_remote_code": False, "revision": revision}
    _need_weights(folder, pretrained)
    try:
        config = AutoConfig.from_pretrained(_place(folder), num_labels=classes, **where)
        if pretrained and torch.get_default_device().type != "meta":  # on which parameters are counted, not read
            model, found = AutoModelForImageClassification.from_pretrained(
                _place(folder), config=config, use_safetensors=True, ignore_mismatched_sizes=True,
                dtype=torch.float32, output_loading_info=True, **where,
            )  # fmt: skip
            _need_all(folder, found)
        else:
            model = AutoModelForImageClassification.from_config(config, dtype=torch.float32)
    except RecipeError:
        raise
    except Exception as error:  # anybody may have written the folder, and the hub's client raises many kinds
        kind = "has no image classifier in transformers" if "Unrecognized configuration" in str(error) else "cannot be"
        why = f"{kind}{'' if kind.startswith('has') else ' loaded'} ({reason(error)})"
        raise RecipeError(f"model.name: {folder}: {why}. Give the folder of an image classifier.") from error
    return model if lora is None else _adapted(model, lora)


def _place(folder: str) -> str:
    return os.path.expanduser(folder)


def need_folder(folder: str) -> None:
    """An error where a name that can only be a local folder leads to none, or to one without config.json."""
    path = Path(_place(folder))
    if not path.is_dir():
        if places.is_local(folder):
            raise RecipeError(f"model.name: {folder}: no such folder in {places.here()}. Give one that exists.")
    elif not (path / "config.json").is_file():
        raise RecipeError(f"model.name: {folder}: holds no config.json, so it is no model's folder. Give another.")


def _need_weights(folder: str, pretrained: bool) -> None:
    """An error where the folder lacks what is read of it, or a hub name cannot be asked for."""
    need_folder(folder)
    path = Path(_place(folder))
    if not path.is_dir():
        if problem := places.hub_problem():
            raise RecipeError(
                f'model.name: "{folder}": no such folder in {places.here()}, and {problem}. Give the path of a folder.'
            )
        return
    if pretrained and not any(path.glob("*.safetensors")):
        raise RecipeError(
            f"model.name: {folder}: holds no *.safetensors. Save its weights so, or set model.pretrained: false."
        )
    if pretrained and (wrong := modelfolder.wrong_weights(_place(folder))):
        raise RecipeError(f"model.name: {folder}: {wrong}")


def _need_all(folder: str, found: Mapping[str, Any]) -> None:
    """An error where the folder lacks weights other than the output layer's, which would be random."""
    mismatched = {name[0] if isinstance(name, tuple) else name for name in found.get("mismatched_keys", ())}
    lost = sorted(name for name in {*found.get("missing_keys", ()), *mismatched} if not {*name.split(".")} & {*HEADS})
    if lost:
        raise RecipeError(
            f"model.name: {folder}: lacks {len(lost)} weights of the model that its configuration describes, such as "
            f"{lost[0]}: they would be random. Mend the folder, or set model.pretrained: false."
        )


def _adapted(model: nn.Module, lora: ImageLora) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    heads = [name for name, _ in model.named_children() if name in HEADS]
    if not heads:
        known = ", ".join(name for name, _ in model.named_children())
        raise RecipeError(f"model.lora: none of {known} is known to be the output layer. Train it without lora.")
    layers = {name for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    names = sorted({name.rpartition(".")[2] for name in layers if not {*name.split(".")} & {*HEADS}})
    wanted = lora.target_modules
    if not names:
        raise RecipeError("model.lora: the model has no linear layer but its output layer. Train it without lora.")
    lost = [] if isinstance(wanted, str) else [name for name in wanted if name not in names]
    if lost or wanted == [] or (isinstance(wanted, str) and wanted != "all-linear"):
        raise RecipeError(
            f"model.lora.target_modules: {wanted}: must be all-linear, or some of the linear layers, which are called "
            f"{', '.join(names)}. Adapters on convolutions are none of these."
        )
    settings = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, target_modules=names if isinstance(wanted, str) else wanted,
        modules_to_save=heads, lora_dropout=0.0,
    )  # fmt: skip
    return get_peft_model(model, settings)


# ---------------------------------------------------------------- images as the model wants them


@dataclass(frozen=True)
class Wanted:
    """What the model is given: images of (channels, height, width) less `mean`, divided by `std`, (channels,) each."""

    channels: int
    size: tuple[int, int] | None  # height and width; None: as they are
    mean: Tensor | None
    std: Tensor | None


def wanted(folder: str, revision: str | None, size: int | None) -> Wanted:
    """What configuration and image processor of the folder say; a processor that makes other than pixels is refused."""
    channels = _read(folder, "config.json", revision).get("num_channels", 3)
    if type(channels) is not int or not 1 <= channels <= 64:
        raise RecipeError(f"model.name: {folder}: config.json: num_channels: {channels!r} is no number of channels.")
    found = _read(folder, PROCESSOR, revision)
    if found.get("model_input_names", ["pixel_values"]) != ["pixel_values"] or "patch_size" in found:
        raise RecipeError(f"model.name: {folder}: its image processor makes other than pixels of images. Give another.")
    if found.get("do_flip_channel_order"):
        raise RecipeError(
            f"model.name: {folder}: {PROCESSOR}: do_flip_channel_order: images here are red, green, blue. Give another."
        )
    ends = found.get("crop_size") if found.get("do_center_crop") else None
    own = _pair(ends or found.get("size")) if found.get("do_resize", bool(found)) else None
    mean, std = _normalisation(folder, found, channels) if found else (None, None)
    return Wanted(channels, (size, size) if size is not None else own, mean, std)


def _normalisation(folder: str, found: Mapping[str, Any], channels: int) -> tuple[Tensor | None, Tensor | None]:
    """Mean and deviation of pixels in [0, 1], (channels,), with which the processor's own arithmetic comes out.

    It multiplies bytes by rescale_factor, takes 1 away where there is a rescale_offset, then the mean, and divides.
    """
    given = [found.get(key) if found.get("do_normalize", True) else None for key in ("image_mean", "image_std")]
    factor = found.get("rescale_factor", 1 / 255) if found.get("do_rescale", True) else 1.0
    plain = [0.0] * channels, [1.0] * channels
    mean, std = (flat if value is None else value for value, flat in zip(given, plain, strict=True))
    right = all(
        isinstance(v, list) and len(v) == channels and all(type(x) in (int, float) and math.isfinite(x) for x in v)
        for v in (mean, std)
    )
    if not right or min(std) <= 0 or type(factor) not in (int, float) or not 0 < factor < math.inf:
        raise RecipeError(
            f"model.name: {folder}: {PROCESSOR}: image_mean, image_std and rescale_factor must be {channels} numbers, "
            f"{channels} above 0 and one above 0; they are {given[0]}, {given[1]} and {factor}. Mend it."
        )
    if given == [None, None] and factor == 1 / 255 and not found.get("rescale_offset"):
        return None, None
    scale, offset = 255 * factor, 1.0 if found.get("rescale_offset") else 0.0
    return (torch.tensor(mean) + offset) / scale, torch.tensor(std) / scale


def _pair(size: Any) -> tuple[int, int] | None:
    """Height and width as processors write them: a number, {height, width}, {shortest_edge}."""
    if isinstance(size, Mapping):
        edge = size.get("shortest_edge")
        size = (size.get("height", edge), size.get("width", edge))
    if size is None or size == []:
        return None
    pair = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    if len(pair) != 2 or not all(type(n) is int and 0 < n <= 4096 for n in pair):
        raise RecipeError(f"model.name: {PROCESSOR}: size {size!r} is no height and width. Set model.size.")
    return int(pair[0]), int(pair[1])


def _read(folder: str, name: str, revision: str | None) -> dict[str, Any]:
    """A JSON file of the folder or hub name; {} where there is none."""
    path = Path(_place(folder)) / name
    if not path.parent.is_dir():
        from transformers.utils.hub import cached_file

        if places.is_local(folder) or places.hub_problem():
            return {}
        there = cached_file(folder, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        path = Path(there) if there else path
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(f"model.name: {folder}: {name} is no JSON ({reason(error)}). Mend it.") from error
    if not isinstance(found, dict):
        raise RecipeError(f"model.name: {folder}: {name} holds no mapping. Mend it.")
    return found


@torch.no_grad()
def brought(x: Tensor, to: Wanted) -> Tensor:
    """Images (n, channels, height, width) in [0, 1] with the channels and the size that the model wants.

    Grey images are repeated for a model of colours. Sizes change by bilinear interpolation with antialiasing. Deviation
    from the processors: what lies at the edge is not cut off (their centre crop), and the shape is not kept.
    """
    if x.shape[1] != to.channels:
        if x.shape[1] != 1:
            raise RecipeError(
                f"model.name: the model takes images of {to.channels} channels, the data have {x.shape[1]}."
            )
        x = x.expand(-1, to.channels, -1, -1)
    if to.size is None or tuple(x.shape[2:]) == to.size:
        return x.contiguous()
    parts = [
        nn.functional.interpolate(part, to.size, mode="bilinear", antialias=True, align_corners=False).clamp(0, 1)
        for part in x.split(AT_ONCE)
    ]
    return torch.cat(parts)
