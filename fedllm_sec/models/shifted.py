"""What a federation has added to frozen base weights: products kept beside them, whatever the weights are packed in."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

if TYPE_CHECKING:
    from peft import LoraConfig

NOTHING = 1e-7  # of the largest singular value: what float32 factors do not hold anyway


class Shifted:
    """y = W x + S x in each adapted layer, S a product of low rank, or a whole matrix where that is smaller.

    Where W is float32 it becomes W + S, which costs a step of training nothing; W as it was is kept beside it, so that
    sums of many rounds are rounded once. A W of 4 bits, or of 16, which would round S away, is never written to.
    """

    def __init__(self, adapted: Any, names: Sequence[str]) -> None:
        """For the layers of these A factors, by parameter name."""
        modules = dict(adapted.named_modules())
        self.layers = {name: modules[name.partition(".lora_A.")[0]] for name in names}
        self.parts: dict[str, tuple[Tensor, ...]] = {}  # (U (out, k), V (k, in)), or (S (out, in),)
        self.published: dict[str, Tensor] = {}  # W of layers whose weight is W + S
        for name, layer in self.layers.items():
            layer.get_base_layer().register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        def add(module: Any, inputs: Any, output: Tensor) -> Tensor:
            x = inputs[0]
            if name not in self.parts or name in self.published:
                return output
            *low, tall = reversed(self.parts[name])
            for wide in low:
                x = linear(x.to(wide.dtype), wide)
            return output + linear(x.to(tall.dtype), tall).to(output.dtype)

        return add

    def add(self, name: str, tall: Tensor, wide: Tensor) -> None:
        """Add U V, (out, k) and (k, in), to a layer; what is left out of 0 takes no room."""
        if not (bool(tall.any()) and bool(wide.any())):
            return
        factor = self.layers[name].lora_A["default"].weight
        tall, wide = tall.to(factor.device, torch.float32), wide.to(factor.device, torch.float32)
        part = self.parts.get(name, ())
        if len(part) == 2:
            tall, wide, part = torch.cat([part[0], tall], 1), torch.cat([part[1], wide]), ()
        rank, size = tall.shape[1], tall.shape[0] * wide.shape[1]
        if not part and rank * (len(tall) + wide.shape[1]) < size:
            self.parts[name] = tall, wide
        else:
            whole = (tall.double() @ wide.double()).float()
            self.parts[name] = ((part[0] + whole) if part else whole,)
        self._write(name)

    def _write(self, name: str) -> None:
        """Make a float32 weight W + S."""
        layer, part = self.layers[name], self.parts[name]
        weight = layer.get_base_layer().weight
        if weight.dtype != torch.float32:
            return
        whole = part[0] if len(part) == 1 else part[0] @ part[1]
        kept = self.published.setdefault(name, weight.detach().clone())
        torch.add(kept, whole.T if layer.fan_in_fan_out else whole, out=weight.data)

    def state_dict(self) -> dict[str, Any]:
        return {name: {str(i): tensor for i, tensor in enumerate(part)} for name, part in self.parts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, kept in self.published.items():
            self.layers[name].get_base_layer().weight.data.copy_(kept)
        self.parts, self.published = {}, {}
        for name, part in state.items():
            device = self.layers[name].lora_A["default"].weight.device
            self.parts[name] = tuple(part[key].to(device) for key in sorted(part))
            self._write(name)


def folded(
    tensors: Mapping[str, Tensor], config: LoraConfig, shifted: Shifted, scales: Mapping[str, float]
) -> tuple[dict[str, Tensor], LoraConfig]:
    """Factors of all that a layer gained, s B A + S, and the settings of that adapter on the base as it is published.

    All layers get the largest rank that one of them needs; lora_alpha equals it, so that the product counts once.
    """
    made, found = dict(tensors), dict[str, tuple[Tensor, Tensor]]()
    for name in shifted.layers:
        a, b = (name.replace(".default", "").replace("lora_A", f"lora_{f}") for f in "AB")
        tall, wide = [scales[name] * tensors[b].double()], [tensors[a].double()]
        part = [tensor.double().to(tall[0].device) for tensor in shifted.parts.get(name, ())]
        if len(part) == 1:
            part = [part[0], torch.eye(part[0].shape[1], dtype=torch.float64, device=part[0].device)]
        left, upper = torch.linalg.qr(torch.cat([*tall, *part[:1]], 1))
        right, lower = torch.linalg.qr(torch.cat([*wide, *part[1:]]).T)
        u, sizes, v = torch.linalg.svd(upper @ lower.T)
        rank = max(1, int((sizes > NOTHING * sizes[0]).sum()))
        root = sizes[:rank].sqrt()
        found[name] = (left @ u[:, :rank]) * root, root[:, None] * (v[:rank] @ right.T)
    most = max(wide.shape[0] for _, wide in found.values())
    for name, (left, right) in found.items():
        a, b = (name.replace(".default", "").replace("lora_A", f"lora_{f}") for f in "AB")
        made[a] = pad(right, (0, 0, 0, most - len(right))).float()
        made[b] = pad(left, (0, most - len(right))).float()
    config = copy.deepcopy(config)
    config.init_lora_weights, config.use_rslora = True, False
    config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern = most, most, {}, {}
    return made, config
