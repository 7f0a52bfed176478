"""Seeing is not writing: whoever is shown the rows or the model may not change them, nor see what does not count."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor

from fedllm_sec.matrix.factors import NoColumns
from fedllm_sec.matrix.updates import UpdateMatrix, new_rows


@contextmanager
def only_shown(who: str, error: type[Exception], **seen: Tensor | None) -> Iterator[None]:
    """Raise `error` if `who` has written into a tensor that was only shown to it.

    A tensor, with all its views, counts the operations that wrote into it, so this costs nothing. Writing through
    `.data` or numpy is not counted: what is small enough is handed out as a copy besides.
    """
    shown = {name: tensor for name, tensor in seen.items() if tensor is not None and not tensor.is_inference()}
    before = {name: tensor._version for name, tensor in shown.items()}
    yield
    written = [name.replace("_", " ") for name, tensor in shown.items() if tensor._version != before[name]]
    if written:
        raise error(f"{who}: wrote into the {' and the '.join(written)} it was shown. Clone before you write.")


def plain(updates: UpdateMatrix) -> UpdateMatrix:
    """The same rows, with nothing else in `rows`: a copy where some were chosen, mixed or scaled, else the very matrix.

    Code that is not of this package may read `rows`, among which those that were set aside would still be.
    """
    if updates.mixing is None:
        return updates
    if updates.products is not None:
        if updates.picked is None:
            raise NoColumns("reads rows, and in product space a mix of rows has none. Drop the stages before it.")
        return replace(plain(replace(updates, products=None)), products=updates.products)
    rows = new_rows(updates.n, updates.d, device=updates.compute_device)
    for place, block in updates.blocks():
        rows[:, place] = block
    return replace(updates, rows=rows, mixing=None, file=None, owners=None, group=None)


def copied(tensor: Tensor | None) -> Tensor | None:
    """A copy to hand out, of what there is."""
    return None if tensor is None else tensor.clone()
