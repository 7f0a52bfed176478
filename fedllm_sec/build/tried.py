"""A classifier is tried once on two rows before anything starts; nothing of it is changed by that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fedllm_sec.data.arrays import subset, to_device
from fedllm_sec.errors import FedError, RecipeError, reason
from fedllm_sec.protocols import Labelled
from fedllm_sec.tasks.classify import Classify

CLOSE = 1e-4  # how far a row's logits alone may lie from those in a batch, absolute and relative


def tried(task: Classify, rows: Labelled, name: str) -> None:
    """Raise where the model cannot be trained or judged on such rows: a RecipeError with what came back.

    In evaluation mode its output must be finite logits (rows, classes), a row's the same alone as in a batch, and its
    buffers must stay; in training the loss must be finite and its gradient must reach a trained parameter.
    """
    place = f"model.name: {name}"
    two = to_device(subset(rows, [0, min(1, len(rows.y) - 1)]), task.device)
    images = task.images_of(two)
    model, held = task.model, [(b, b.clone()) for b in task.model.buffers()]
    own = [(part, dict(part._buffers)) for part in model.modules()]
    training = model.training
    with torch.random.fork_rng():
        try:
            model.eval()
            with torch.no_grad():
                said = _called(place, task.logits, images, f"in evaluation on images of shape {tuple(images.shape)}")
                _need_logits(place, said, two)
                now = zip(model.named_buffers(), held, strict=True)
                if changed := [name for (name, b), (_, old) in now if not torch.equal(b, old)]:
                    raise RecipeError(
                        f"{place}: its buffer {changed[0]} changes in evaluation, so what it answers depends on what "
                        "it was asked before. Let it keep statistics in training mode alone."
                    )
                if task.kept != "batch":
                    again = task.logits(images)
                    if (apart := float((again - said).abs().max())) > 0:
                        raise RecipeError(
                            f"{place}: in evaluation the same images score {apart:.2g} apart from call to call: a "
                            "layer draws, as dropout that is always on, or remembers. Let it do so in training alone."
                        )
                    shape = (1, *images.shape[1:])
                    alone = _called(
                        place, task.logits, images[:1], f"in evaluation on one image alone, of shape {shape}"
                    )
                    if (apart := float((alone[0] - said[0]).abs().max())) > CLOSE * (1 + float(said[0].abs().max())):
                        raise RecipeError(
                            f"{place}: in evaluation an image alone scores {apart:.2g} apart from the same in a batch: "
                            "a layer looks at the other rows. Keep running statistics, or set model.buffers: batch."
                        )
            model.train()
            before = _buffers(model)
            _need_gradient(place, task, two)
            _need_in_place(place, before, model)
            _called(
                place, lambda at: task.loss(two, at).backward(), torch.tensor([0, 1]), "in a second step of training"
            )
        finally:
            model.train(training)
            for part, kept in own:
                part._buffers.update(kept)
            for buffer, old in held:
                buffer.copy_(old)
            if task.parameters.grad is not None:
                task.parameters.grad.zero_()


def _called(place: str, call: Callable[[Any], Any], given: Any, when: str) -> Any:
    """What a call gives; whatever a stranger's model raises in it is a mistake in the recipe that names the model."""
    try:
        return call(given)
    except (FedError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if "not enough memory" in str(error):  # which torch calls a RuntimeError on the CPU: no fault of the model
            raise
        why = " ".join(reason(error).split())[:300]
        raise RecipeError(
            f"{place}: fails {when} ({type(error).__name__}: {why}). Change the model, or the data."
        ) from error


def _buffers(model: torch.nn.Module) -> dict[str, tuple[Tensor, Tensor, bool]]:
    """Each buffer by name, a copy of what it holds, and whether a state dict has it."""
    return {
        f"{prefix}.{key}".lstrip("."): (value, value.clone(), key not in part._non_persistent_buffers_set)
        for prefix, part in model.named_modules()
        for key, value in part._buffers.items()
        if value is not None
    }


def _need_in_place(place: str, before: Mapping[str, tuple[Tensor, Tensor, bool]], model: torch.nn.Module) -> None:
    """Raise where a step of training changed a buffer in a way in which no client's could travel."""
    for name, (now, _, _) in _buffers(model).items():
        if name not in before:
            continue
        held, old, persistent = before[name]
        if now is not held:
            raise RecipeError(
                f"{place}: training puts another tensor in the place of its buffer {name}, so that one client's would "
                f"go on to the next. Change it in place: self.{name.rpartition('.')[2]}.copy_(...)."
            )
        if not torch.equal(now, old) and (not persistent or now.dtype == torch.bool):
            raise RecipeError(
                f"{place}: training changes its buffer {name}, which "
                f"{'is a mask (bool)' if persistent else 'no state dict has (persistent=False)'}, so that it cannot "
                "travel, and one client's would go on to the next. Make it a persistent buffer of numbers."
            )


def _need_logits(place: str, said: Any, rows: Labelled) -> None:
    if tuple(said.shape) != (2, rows.classes):
        raise RecipeError(
            f"{place}: gives {tuple(said.shape)} for two images, must be (2, {rows.classes}), a logit for each class "
            "of the data. Change its output layer, or set data.classes."
        )
    if not bool(said.isfinite().all()):
        raise RecipeError(f"{place}: its logits of two images are not finite. Change how its weights begin.")
    if rows.classes > 1 and bool((said >= 0).all()) and bool((said.sum(-1) - 1).abs().max() < CLOSE):
        raise RecipeError(
            f"{place}: gives probabilities (each row's {rows.classes} values sum to 1), must give logits: the loss "
            "takes their softmax itself. Leave out the model's own."
        )


def _need_gradient(place: str, task: Classify, rows: Labelled) -> None:
    loss = _called(
        place,
        lambda at: task.loss(rows, at),
        torch.tensor([0, 1]),
        f"in training on images of shape {tuple(rows.x.shape)}",
    )
    if not bool(loss.isfinite()):
        raise RecipeError(f"{place}: its loss on two images is not finite. Change how its weights begin.")
    if loss.grad_fn is not None:
        _called(place, lambda _: loss.backward(), None, "in its backward pass")
    grad = task.parameters.grad
    if loss.grad_fn is None or grad is None or not bool(grad.any()):
        raise RecipeError(
            f"{place}: the gradient of the loss on two images is 0 in every trained parameter, so nothing would be "
            "learnt. Does it detach its input, or return something else than what it computes?"
        )
