"""Residual networks for small images."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from fedllm_sec.errors import RecipeError

Norm = Literal["group", "batch"]


def _norm(kind: Norm, groups: int, channels: int) -> nn.Module:
    if kind == "group":
        return nn.GroupNorm(min(groups, channels), channels)
    return nn.BatchNorm2d(channels)


class Block(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al. 2016, fig. 2)."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm, groups: int, project: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = _norm(norm, groups, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = _norm(norm, groups, outputs)
        self.stride, self.grow = stride, outputs - inputs
        self.project: nn.Module | None = None
        if project and (stride > 1 or self.grow):
            self.project = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), _norm(norm, groups, outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        if self.project is not None:
            x = self.project(x)
        elif self.stride > 1 or self.grow:
            # the paper's option A: every other pixel, missing channels are zero
            x = nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.grow))
        return torch.relu(out + x)


class ResNet(nn.Module):
    """A 3x3 convolution, stages of blocks that halve the image from the second on, mean over pixels, a linear layer."""

    def __init__(
        self, channels: int, classes: int, widths: list[int], blocks: int, norm: Norm, groups: int, project: bool
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.norm = _norm(norm, groups, widths[0])
        stages: list[nn.Module] = []
        before = widths[0]
        for number, width in enumerate(widths):
            for k in range(blocks):
                stride = 2 if number and k == 0 else 1
                stages.append(Block(before, width, stride, norm, groups, project))
                before = width
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(before, classes)
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(torch.relu(self.norm(self.conv(x))))
        out: Tensor = self.fc(x.mean((2, 3)))
        return out


def resnet(
    shape: tuple[int, ...],
    classes: int,
    *,
    depth: int = 20,
    norm: Norm = "group",
    groups: int = 8,
) -> nn.Module:
    """ResNet for CIFAR: 6k + 2 layers, 16, 32 and 64 maps, shortcuts without weights (He et al. 2016, sec. 4.2).

    269,722 parameters at depth 20 and 853,018 at depth 56, for three channels and 10 classes. GroupNorm (Wu and He
    2018) in the place of BatchNorm, which `norm: batch` is; `model.buffers` says how its statistics travel.
    """
    if depth < 8 or (depth - 2) % 6:
        raise RecipeError(f"model.depth: {depth}: must be 6k + 2, e.g. 20, 32, 44, 56.")
    return ResNet(shape[0], classes, [16, 32, 64], (depth - 2) // 6, norm, groups, project=False)


def resnet18(
    shape: tuple[int, ...],
    classes: int,
    *,
    norm: Norm = "group",
    groups: int = 32,
) -> nn.Module:
    """ResNet-18 with a 3x3 first layer for small images (He et al. 2016, table 1); GroupNorm as in `resnet`.

    11,173,962 parameters for three channels and 10 classes.
    """
    return ResNet(shape[0], classes, [64, 128, 256, 512], 2, norm, groups, project=True)
