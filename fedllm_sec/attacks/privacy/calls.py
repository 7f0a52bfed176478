"""Privacy attacks in one call, for notebooks and other frameworks."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedllm_sec.attacks.privacy.menu import PRIVACY_MENU
from fedllm_sec.attacks.privacy.reveal import reveal
from fedllm_sec.attacks.privacy.seen import Observation, Reconstruction
from fedllm_sec.errors import AttackError, FedError, reason
from fedllm_sec.matrix import Layout
from fedllm_sec.matrix.dense import need_dense
from fedllm_sec.recipe.resolve import did_you_mean


def reconstruct(
    gradient: Any,
    model: nn.Module,
    shape: Sequence[int],
    method: str = "invert_gradient",
    labels: Any = None,
    seed: int = 0,
    **settings: Any,
) -> Reconstruction:
    """The inputs of a batch from its gradient; `reconstruct(gradient, model, (1, 1, 28, 28)).inputs`.

    `gradient` is that of the mean cross-entropy at the model's present parameters: a flat vector (d,) in the order of
    `model.named_parameters()` (those that are trained), or a mapping by parameter name; torch or numpy. `shape` is
    (n, *input): the observer knows the size of the batch. `model` takes inputs in [0, 1] and is not changed. `labels`
    (n,), if known, are used by dlg and invert_gradient; else these find them. Gives a `Reconstruction` with `inputs`
    (n, *input) in [0, 1], `labels` (n,) and `loss`; the order of the batch is not in its gradient, so match before you
    compare. Other keywords are the method's settings. AttackError where the method cannot act.
    """
    known = {name: entry.make for name, entry in PRIVACY_MENU.items() if entry.kind == "images"}
    if method not in known:
        raise AttackError(f'reconstruct: there is no method "{method}".{did_you_mean(str(method), known)}')
    try:
        shape = tuple(int(side) for side in shape)
    except (TypeError, ValueError):
        shape = ()
    if len(shape) < 2 or min(shape) < 1:
        raise AttackError(f"reconstruct: shape {shape}: needs (n, *input), such as (1, 3, 32, 32).")
    takes = inspect.signature(known[method]).parameters
    if unknown := sorted(set(settings) - set(takes)):
        raise AttackError(f"reconstruct: {method} has no setting {unknown}.{did_you_mean(unknown[0], takes)}")
    settings |= {"seed": seed} if "seed" in takes else {}
    if labels is not None:
        if "labels" not in takes:
            raise AttackError(f"reconstruct: {method} finds the label itself. Leave labels out, or use dlg.")
        settings["labels"] = _read(labels, "reconstruct: labels").long()
        if tuple(settings["labels"].shape) != shape[:1]:
            raise AttackError(f"reconstruct: labels of shape {tuple(settings['labels'].shape)} for {shape[0]} rows.")
    seen = _observed(gradient, model, shape, "reconstruct")
    with _told("reconstruct", shape):
        made: Reconstruction = known[method](seen, **settings)
    return made


def reveal_labels(gradient: Any, model: nn.Module, n: int, shape: Sequence[int] | None = None) -> Tensor:
    """How often each class occurs in a batch of n rows, from its gradient: counts (classes,) int64 that sum to n.

    `gradient` and `model` as in `reconstruct`: iDLG for n = 1, iLRG with the model's own statistics above. `shape` is
    that of one input; it is needed for models whose first layer does not tell it (None: tried out).
    """
    if type(n) is not int or n < 1:
        raise AttackError(f"reveal_labels: n={n!r}: a batch has a whole number of rows, at least 1.")
    if not isinstance(model, nn.Module):
        raise AttackError(
            f"reveal_labels: model is a {type(model).__name__}, needs a torch module. Give gradient first."
        )
    one = tuple(shape) if shape is not None else _input_shape(model)
    seen = _observed(gradient, model, (n, *one), "reveal_labels")
    with _told("reveal_labels", (n, *one)):
        return reveal(seen, n)


@contextlib.contextmanager
def _told(place: str, shape: tuple[int, ...]) -> Iterator[None]:
    """What a model makes of inputs that it does not take, or cannot derive twice, in a line."""
    try:
        yield
    except FedError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise AttackError(
            f"{place}: the model cannot be run, or not be derived, on floating inputs of shape {shape} "
            f"({reason(error)}). Give the shape it takes, or another model."
        ) from error


def _observed(gradient: Any, model: nn.Module, shape: tuple[int, ...], place: str) -> Observation:
    named = [(name, p.detach()) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise AttackError(f"{place}: the model has no trained parameters, so there is no gradient.")
    layout = Layout.of(named)
    if isinstance(gradient, Mapping):
        missing = sorted(set(layout.names) - set(gradient))
        if missing:
            raise AttackError(f"{place}: gradient lacks {missing[0]} ({len(missing)} names). Give every parameter's.")
        parts = {name: _read(gradient[name], f"{place}: gradient of {name}") for name in layout.names}
        for name, wanted in zip(layout.names, layout.shapes, strict=True):
            if tuple(parts[name].shape) != wanted:
                raise AttackError(f"{place}: gradient of {name} has shape {tuple(parts[name].shape)}, needs {wanted}.")
        sent = layout.join(parts)
    else:
        if not isinstance(gradient, (Tensor, np.ndarray)):
            kind = type(gradient).__name__
            raise AttackError(f"{place}: gradient is a {kind}, needs {{name: array}} or one vector ({layout.size},).")
        sent = _read(gradient, f"{place}: gradient")
        if tuple(sent.shape) != (layout.size,):
            raise AttackError(f"{place}: gradient has shape {tuple(sent.shape)}, the model needs ({layout.size},).")
    if not sent.dtype.is_floating_point:
        raise AttackError(f"{place}: gradient has dtype {sent.dtype}, needs a floating type.")
    start = layout.join(dict(named)).float()
    return Observation(sent.to(start), "gradient", start, layout, model, shape[1:], rows=shape[0])


def _read(given: Any, place: str) -> Tensor:
    """Numbers of whoever calls, as a tensor."""
    try:
        made = torch.as_tensor(given if isinstance(given, Tensor) else np.asarray(given)).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise AttackError(f"{place}: {type(given).__name__} cannot be numbers ({reason(error)}).") from None
    need_dense(made, f"{place}:", AttackError)
    return made


SHAPES = ((1, 28, 28), (3, 32, 32), (1, 32, 32), (3, 28, 28), (1, 8, 8), (3, 64, 64), (3, 224, 224))


def _input_shape(model: nn.Module) -> tuple[int, ...]:
    """The first of the usual shapes of an image that the model takes; a model that starts linear says it itself."""
    layers = [part for part in model.modules() if isinstance(part, (nn.Linear, nn.Conv2d))]
    if layers and isinstance(layers[0], nn.Linear):
        return (layers[0].in_features,)
    probe = next(model.parameters(), None)
    if probe is None:
        raise AttackError("reveal_labels: the model has no trained parameters, so there is no gradient.")
    for shape in SHAPES:
        try:
            with torch.no_grad():
                model(torch.zeros(1, *shape, dtype=probe.dtype, device=probe.device))
        except (RuntimeError, ValueError, IndexError, TypeError):
            continue
        return shape
    raise AttackError("reveal_labels: the model takes none of the usual shapes. Give shape, that of one input.")
