"""Scores and pictures of what was learnt, as privacy.json holds them: numbers, reasons, PNG files as text."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from fedllm_sec.evaluation.images import best_median_worst
from fedllm_sec.evaluation.intervals import bootstrap

RECOGNISED = 20.0  # dB from which on a person sees what is shown


@dataclass(frozen=True)
class Learnt:
    """What one attack made of one client's round, beside the truth; `reason` where it could not act."""

    client: str
    round: int
    seconds: float
    right: float | None = None  # share of the labels
    psnr: Sequence[float] | None = None  # of each true image
    ssim: Sequence[float] | None = None
    true: Tensor | None = None  # (n, ...)
    made: Tensor | None = None  # (n, ...), each the partner of a true one
    reason: str | None = None
    heard: Any = None  # of text: what `overheard` has made of it
    read: int | None = None  # of the images, how many show; the others stayed grey. None: the attack does not say

    def in_words(self) -> str:
        if self.reason is not None:
            return f"n/a: {self.reason}"
        if self.heard is not None:
            return f"{self.heard.in_words()}  {self.seconds:.1f} s"
        images = f"PSNR median {median(self.psnr):.1f} dB, best {max(self.psnr):.1f}; " if self.psnr else ""
        shown = "" if self.read is None else f"{self.read} of {len(self.psnr or ())} images read; "
        return f"{shown}{images}labels right {self.right:.2f}  {self.seconds:.1f} s"


def told(method: Mapping[str, Any], paper: str, learnt: Sequence[Learnt]) -> dict[str, Any]:
    """One attack on images, as privacy.json has it; scores that nothing was measured for are None."""
    acted = [one for one in learnt if one.reason is None]
    images = [(one, i) for one in acted if one.psnr is not None for i in range(len(one.psnr))]
    psnr = [one.psnr[i] for one, i in images if one.psnr is not None]
    ssim = [one.ssim[i] for one, i in images if one.ssim is not None]
    right = [one.right for one in acted if one.right is not None]
    pictures = {}
    if psnr and all(one.true is not None and _drawable(one.true) for one, _ in images):
        pictures = {which: _pair(*images[place]) for which, place in best_median_worst(psnr).items()}
    return {
        "name": method["name"],
        "paper": paper,
        "settings": {key: value for key, value in method.items() if key != "name"},
        "scores": {
            "psnr": _mean(psnr),
            "ssim": _mean(ssim),
            "over_20_db": sum(value > RECOGNISED for value in psnr) / len(psnr) if psnr else None,
            "labels": _mean(right),
        },
        "not_applicable": len(learnt) - len(acted),
        "seconds": sum(one.seconds for one in learnt),
        "observations": [
            {
                "client": one.client, "round": one.round, "reason": one.reason, "labels": one.right,
                "psnr": None if one.psnr is None else list(one.psnr),
                "ssim": None if one.ssim is None else list(one.ssim), "seconds": one.seconds,
                **({} if one.read is None else {"rows_read": one.read}),
            }
            for one in learnt
        ],
        "pictures": pictures,
    }  # fmt: skip


def _mean(values: Sequence[float]) -> dict[str, float] | None:
    """{value, low, high, n}: the mean with its bootstrap interval over images, or over observations for labels."""
    if not values:
        return None
    low, high = bootstrap(values)
    return {"value": fmean(values), "low": low, "high": high, "n": len(values)}


def _drawable(images: Tensor) -> bool:
    return images.ndim == 4 and images.shape[1] in (1, 3)


def _pair(one: Learnt, place: int) -> dict[str, Any]:
    assert one.true is not None
    assert one.made is not None
    assert one.psnr is not None
    return {
        "client": one.client, "round": one.round, "psnr": one.psnr[place],
        "ssim": one.ssim[place] if one.ssim is not None else None,
        "true": png(one.true[place]), "made": png(one.made[place]),
    }  # fmt: skip


def png(image: Tensor) -> str:
    """An image (channels, height, width) in [0, 1] as a PNG file in base 64."""
    from PIL import Image

    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()
