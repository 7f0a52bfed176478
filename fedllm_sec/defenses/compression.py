"""Defenses that a client runs on what it sends: small values dropped, signs alone, or a byte a value.

Each is a local rule that leaves training as it is and changes what comes of it: after the last step the delta (d,), and
after the first the gradient, which is what clients that share gradients would send.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fedllm_sec.defenses.checks import need
from fedllm_sec.matrix import Layout
from fedllm_sec.matrix.quantise import dequantise, quantise
from fedllm_sec.protocols import LocalContext


def pruned(sent: Tensor, share: float) -> Tensor:
    """(d,) with the `share` of values that are smallest in size set to 0; the first of equals go first."""
    count = round(share * len(sent))
    kept = torch.ones_like(sent, dtype=torch.bool)
    kept[sent.abs().argsort(stable=True)[:count]] = False
    return torch.where(kept, sent, torch.zeros_like(sent))


def signs(sent: Tensor, layout: Layout) -> Tensor:
    """(d,) with each value's sign times the mean size of its parameter's values; 0 stays 0."""
    made = torch.zeros_like(sent)
    parts = layout.split(made)
    for name, part in layout.split(sent).items():
        parts[name].copy_(part.sign() * part.abs().mean())
    return made


class Compressed:
    """What is sent, made smaller by a function (d,), layout -> (d,)."""

    def __init__(self, compress: Callable[[Tensor, Layout], Tensor]) -> None:
        self.compress = compress

    def before_step(self, parameters: torch.nn.Parameter, step: int, ctx: LocalContext) -> None:
        """Training is left as it is."""

    @torch.no_grad()
    def after_step(self, parameters: torch.nn.Parameter, step: int, ctx: LocalContext) -> None:
        if step == 0 and parameters.grad is not None:
            parameters.grad.copy_(self._made(parameters.grad, ctx))
        if step == ctx.steps - 1:
            parameters.copy_(ctx.start + self._made(parameters - ctx.start, ctx))

    def _made(self, sent: Tensor, ctx: LocalContext) -> Tensor:
        """A row that is not finite stays so: the server sets it aside."""
        return self.compress(sent, ctx.layout) if bool(sent.isfinite().all()) else sent


class PruneGradient(Compressed):
    """Only the largest values are sent: the `share` of all that is smallest in size is 0.

    Zhu et al. 2019, sec. 5.2, who prune gradients and see nothing of an image from 20 % on. Deviation: of several local
    steps it is the delta that is pruned.
    """

    def __init__(self, *, share: float = 0.7) -> None:
        need(0 < share < 1, "prune_gradient", "0 < share < 1", "Change it.", share=share)
        super().__init__(lambda sent, layout: pruned(sent, share))


class SignCompress(Compressed):
    """Only signs are sent, with one scale for each parameter: the mean size of its values.

    Bernstein et al. 2018 send signs; the scale is that of Karimireddy et al. 2019 (EF-SGD, sec. 5), by blocks as in
    Zheng et al. 2019. Deviation: no error feedback, and of several local steps it is the delta that is compressed.
    """

    def __init__(self) -> None:
        super().__init__(signs)


class Int8(Compressed):
    """A signed byte a value is sent, with a scale for each `block` of values (Dettmers et al. 2022, sec. 2.1).

    The row is what the server makes of those bytes; rounded to the nearest, so that a delta of the same training is the
    same row.
    """

    def __init__(self, *, block: int = 64) -> None:
        need(block >= 1, "int8", "block >= 1", "Raise it.", block=block)
        super().__init__(lambda sent, layout: dequantise(*quantise(sent, block), block).to(sent))
