"""The parts of a run of a small model on arrays: rows, shards, the task, held-out rows."""

from __future__ import annotations

import functools
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedllm_sec.attacks.data.clean import innocent, success_table
from fedllm_sec.attacks.threat import Threat
from fedllm_sec.build.batches import need_evaluation
from fedllm_sec.build.loaded import Loaded, data_key, poison_key, probe_key, split_key
from fedllm_sec.build.names import model_block
from fedllm_sec.build.parts import Parts, Split, make_model, of_rows, poison
from fedllm_sec.build.tried import tried
from fedllm_sec.build.triggers import pairs
from fedllm_sec.data import arrays
from fedllm_sec.errors import AttackError, RecipeError
from fedllm_sec.evaluation.arrays import ArrayEvaluation
from fedllm_sec.evaluation.samples import Features, SampleEvaluation
from fedllm_sec.matrix.shown import only_shown
from fedllm_sec.models import pretrained
from fedllm_sec.models.darts import genotype
from fedllm_sec.protocols import Labelled, tensors_of
from fedllm_sec.recipe.sections import ArrayData, Recipe
from fedllm_sec.records.files import write_atomic, write_json
from fedllm_sec.rounds.compute import Machine
from fedllm_sec.seeds import generator_for, seed_for
from fedllm_sec.tasks.classify import Classify
from fedllm_sec.tasks.gan import Gan
from fedllm_sec.tasks.nas import Nas

GRID = 8  # generated images in a row and in a column of samples.png


def array_parts(recipe: Recipe, machine: Machine, threat: Threat | None, split: Split, loaded: Loaded) -> Parts:
    """Data are read, split and poisoned before the model is made; what `loaded` holds already is used again."""
    train, test = loaded.get("rows", data_key(recipe), lambda: load_rows(recipe))

    def deal() -> tuple[Labelled, dict[str, Labelled]]:
        root, shares = split(train.y.numpy())
        return arrays.subset(train, root), {id: arrays.subset(train, rows) for id, rows in shares.items()}

    def moved(part: Labelled) -> Labelled:
        return arrays.to_device(part, machine.device)

    root, shards = loaded.get("split", split_key(recipe), deal)
    poisoned = loaded.get(
        "poisoned shard", poison_key(recipe), lambda: poison(recipe.seed, threat, shards, test).each(moved)
    )
    task_key = recipe.model_dump_json(include={"task", "model", "data", "seed"})
    evaluation: Any
    triggered = None
    if recipe.task == "gan":
        task = loaded.get("task", task_key, lambda: gan_task(recipe, machine, train))
        evaluation = sample_evaluation(recipe, task, train, test)
    else:
        task = loaded.get("task", task_key, lambda: classify_task(recipe, machine, train))
        triggered = functools.partial(make_evaluation, recipe, test, threat, machine.device)
        evaluation = loaded.get("evaluation", probe_key(recipe), triggered)
        need_evaluation(task, evaluation, recipe.model["name"])
    return Parts(
        task=task,
        shards=loaded.get("shard", split_key(recipe), lambda: {id: moved(part) for id, part in shards.items()}),
        poisoned=poisoned,
        poisoned_share=poisoned.shares,
        root=moved(root) if len(root.y) else None,
        evaluation=evaluation,
        triggered=triggered,
    )


def load_rows(recipe: Recipe) -> tuple[Labelled, Labelled]:
    """Clean training and test rows."""
    data: ArrayData = recipe.data
    to = wanted_images(recipe)
    size = (data.size, data.size) if data.size is not None else None if to is None else to.size
    train, test = arrays.load(
        data.name, data.config, data.train, data.test, data.image, data.label, data.classes,
        size=size, test_share=data.test_share, seed=recipe.seed,
    )  # fmt: skip

    def drawn(part: str) -> np.random.Generator:
        return np.random.default_rng(seed_for(recipe.seed, "rows", part))

    train, test = (
        arrays.sample(train, data.train_rows, drawn("train")),
        arrays.sample(test, data.test_rows, drawn("test")),
    )
    if to is None and data.size is None:
        return train, test
    wanted = to or pretrained.Wanted(train.x.shape[1], size, None, None)
    return replace(train, x=pretrained.brought(train.x, wanted)), replace(test, x=pretrained.brought(test.x, wanted))


def wanted_images(recipe: Recipe) -> pretrained.Wanted | None:
    """How a classifier from a folder wants its images; None for every other model."""
    block = model_block(recipe.model)
    if block["name"] != pretrained.NAME:
        return None
    return pretrained.wanted(block["folder"], block.get("revision"), block.get("size"))


def classify_task(recipe: Recipe, machine: Machine, train: Labelled) -> Classify:
    """The classifier, or the search for one; its input is normalised by each channel's training mean and deviation."""
    if recipe.task == "nas" and recipe.clients.batch_size == 1:
        raise RecipeError(
            "clients.batch_size: 1: a search learns weights on the even rows of a batch and the architecture on the "
            "odd ones. Raise it to 2 or more."
        )
    axes = (0, *range(2, train.x.ndim))
    kind = Nas if recipe.task == "nas" else Classify
    to = wanted_images(recipe)
    mean, std = (train.x.mean(axes), train.x.std(axes).clamp_min(1e-3)) if to is None or to.std is None else (
        to.mean, to.std)  # fmt: skip
    made = kind(
        make_model(recipe, tuple(train.x.shape[1:]), train.classes),
        machine.device,
        mean=mean,
        std=std,
        flip=recipe.data.flip,
        crop=recipe.data.crop,
        buffers=recipe.model.get("buffers"),
    )
    if made.buffers is not None and machine.placement == "data" and machine.world > 1:
        raise RecipeError(
            "compute.placement: data: each process would keep running statistics of its own part of a batch. Set "
            "model.buffers: batch, or compute.placement: clients."
        )
    if kind is Classify:
        tried(made, train, recipe.model["name"])
    return made


def gan_task(recipe: Recipe, machine: Machine, train: Labelled) -> Gan:
    """Generator and discriminator; images of training are neither mirrored nor shifted."""
    if recipe.data.flip or recipe.data.crop:
        raise RecipeError("data: flip and crop do not act on a GAN's images. Remove them.")
    return Gan(make_model(recipe, tuple(train.x.shape[1:]), train.classes), machine.device)


def sample_evaluation(recipe: Recipe, task: Gan, train: Labelled, test: Labelled) -> SampleEvaluation:
    """Held-out images in the principal components of the training images, and fixed noise to compare them with."""
    settings = recipe.evaluate
    if len(test.y) < 2:
        raise RecipeError(
            f"data.test_rows: {len(test.y)} held-out image: a GAN is judged by the spread of its images and of the "
            "held-out ones, which needs at least 2. Raise it."
        )
    rng = generator_for(recipe.seed, "evaluation")
    features = Features.of(train.x)
    real = test.x[torch.randperm(len(test.y), generator=rng)[: settings.samples]]
    noise = torch.randn(settings.samples, task.model.noise, generator=rng)
    return SampleEvaluation(features, features(real), noise, settings.batch_size)


def make_evaluation(recipe: Recipe, test: Labelled, threat: Threat | None, device: torch.device) -> ArrayEvaluation:
    """Held-out rows for quality, and triggered and clean ones for the attack; there may be no clean ones."""
    settings = recipe.evaluate
    rng = np.random.default_rng(seed_for(recipe.seed, "evaluation"))
    quality = arrays.sample(test, settings.rows, rng)
    evaluation = ArrayEvaluation(test=arrays.to_device(quality, device), batch_size=settings.batch_size)
    if threat is None or not threat.data:
        return evaluation
    attack = threat.data[0]  # the first is the one whose success is measured
    with only_shown("attack.data.0", AttackError, **tensors_of(test)):
        probe = of_rows(attack.probe(test), test, "attack.data.0: probe")
    triggered = arrays.sample(probe, settings.attack_rows, rng)
    if len(triggered.y) == 0:
        raise AttackError("attack.data.0: the test set has no row on which its success could be measured.")
    evaluation.hits = success_table(attack, test.classes)
    evaluation.learnt = getattr(attack, "learnt", None) is not None
    rows, evaluation.left_out = innocent(attack, test, evaluation.hits)
    clean = arrays.sample(arrays.subset(test, rows), settings.attack_rows, rng)
    evaluation.triggered = arrays.to_device(triggered, device)
    evaluation.clean = arrays.to_device(clean, device)
    if (found := pairs(attack, test, recipe.seed)) is not None:
        evaluation.pairs = (arrays.to_device(found[0], device), arrays.to_device(found[1], device))
    return evaluation


def save_model(task: Any, folder: Path) -> None:
    """Write the model's parameters and buffers to model.safetensors, a GAN's samples.png, a search's genotype.json."""
    from safetensors.torch import save

    tensors = {name: t.detach().cpu().contiguous() for name, t in task.layout.split(task.parameters.detach()).items()}
    if getattr(task, "buffers", None) is not None:
        tensors |= {name: t.detach().cpu().contiguous() for name, t in task.buffers.tensors().items()}
    write_atomic(folder / "model.safetensors", save(tensors))
    if isinstance(task, Gan):
        task.model.eval()
        noise = torch.randn(GRID * GRID, task.model.noise, generator=generator_for(0, "grid"))
        write_atomic(folder / "samples.png", grid(task.samples(noise).cpu()))
    if isinstance(task, Nas):
        found = {kind: genotype(tensors[f"arch_{kind}"], task.model.nodes) for kind in ("normal", "reduce")}
        write_json(folder / "genotype.json", found)


def grid(images: torch.Tensor) -> bytes:
    """Images (GRID * GRID, channels, height, width) from 0 to 1 side by side, as a PNG file."""
    from PIL import Image

    _, channels, height, width = images.shape
    rows = images.view(GRID, GRID, channels, height, width).permute(0, 3, 1, 4, 2)
    pixels = (rows.reshape(GRID * height, GRID * width, channels) * 255).round().clamp(0, 255).to(torch.uint8).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(buffer, format="PNG")
    return buffer.getvalue()
