"""Seeing is not writing: whoever is shown the rows or the model may not change them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor


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


def copied(tensor: Tensor | None) -> Tensor | None:
    """A copy to hand out, of what there is."""
    return None if tensor is None else tensor.clone()
