"""F3BA: the signs of a model's least important weights are turned towards the trigger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedllm_sec.errors import AttackError
from fedllm_sec.models.function import Classifier, head_of
from fedllm_sec.protocols import Labelled, LocalContext


def least(importance: Tensor, share: float) -> Tensor:
    """The `share` of weights of the lowest importance, at least one: a mask of the same shape."""
    order = importance.flatten().argsort(stable=True)[: max(1, round(share * importance.numel()))]
    mask = torch.zeros(importance.numel(), dtype=torch.bool, device=importance.device)
    mask[order] = True
    return mask.view(importance.shape)


def pull(layer: nn.Module, difference: Tensor) -> Tensor:
    """How the sum of what a linear or convolutional layer makes of inputs (1, ...) changes with its weights."""
    weight = layer.weight.detach().clone().requires_grad_()
    said = torch.func.functional_call(layer, {"weight": weight}, (difference,)).sum()
    return torch.autograd.grad(said, weight)[0]


def turned(weight: Tensor, towards: Tensor, mask: Tensor) -> Tensor:
    """|w| sign(towards) where the mask is set; what is pulled nowhere stays."""
    return torch.where(mask & (towards != 0), weight.abs() * towards.sign(), weight)


def difference(classifier: Classifier, vector: Tensor, layer: nn.Module, triggered: Tensor, clean: Tensor) -> Tensor:
    """What a layer is given of images with the trigger, less what of the same without: the mean (1, ...)."""
    held: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda part, given: held.append(given[0]))
    try:
        with torch.no_grad():
            for x in (triggered, clean):
                classifier.logits(vector, x)
    finally:
        hook.remove()
    return (held[0] - held[len(held) // 2]).mean(0, keepdim=True)


class F3BA:
    """Focused flips: the least important weights get the sign by which the trigger moves their layer most.

    Fang and Chen 2023 (F3BA, AAAI), as in the authors' code (Attacks.py): importance is (w_t - w_(t-1)) w_t, which
    stands for -gradient * w, and the `share` of each layer's weights in which it is lowest are candidates; layer after
    layer, a candidate becomes |w| sign(delta), delta the difference the trigger makes to what the layer is given; the
    last layer stays; then the client trains on clean and poisoned rows as usual. Nothing but signs changes, so a row's
    length says little.

    Stated here: the trigger is the one of attack.data and is not tuned. A kernel's weights follow the gradient of the
    layer's summed difference, for which the authors shrink the difference, or the trigger's pattern, to the kernel's
    size; for a fully connected layer this is theirs. Differences are the attacker's own images before and after they
    were poisoned, at most `rows`. Signs are turned after the first local step, so there must be two. In round 1 there
    is no earlier model, and -gradient * w of the task's loss stands for the movement. `importance: size` takes the
    absolute value: weights that neither moved nor matter come first. One `share` for all layers (theirs: 0.02 of
    convolutions, 0.001 of the rest). Factors of LoRA have no signs of their own: refused.
    """

    def __init__(
        self, *, share: float = 0.02, importance: Literal["movement", "size"] = "movement", rows: int = 64
    ) -> None:
        if not 0 < share <= 1 or rows < 1:
            raise AttackError(f"f3ba: share={share}, rows={rows}: needs 0 < share <= 1 and rows >= 1.")
        self.share, self.importance, self.rows = share, importance, rows
        self.clean: dict[str, Tensor] = {}  # client id -> (k, ...) its images that are poisoned, as they were before
        self.moves: Tensor | None = None  # (d,) how the received model moved, of this round

    def prepare(self, task: Any, steps: Sequence[int]) -> None:
        """An error where no layer is below the last, where weights are factors, or where no step follows the flips."""
        if any("lora_" in name for name in task.layout.names):
            raise AttackError("f3ba: acts on weights, and the trained ones are factors of LoRA. Choose another attack.")
        if not layers_of(task.function()):
            raise AttackError("f3ba: the model is one linear layer, whose signs stay. Choose another model.")
        if any(each == 1 for each in steps):
            raise AttackError("f3ba: needs two local steps, as signs turn after the first. Raise clients.local_steps.")

    def brief(self, cohort: int, clean: Mapping[str, Any], poisoned: Mapping[str, Any]) -> None:
        """What is known before the first round: clients a round, and own rows before and after poisoning, by client."""
        for id, shard in poisoned.items():
            if isinstance(shard, Labelled) and isinstance(clean.get(id), Labelled):
                at = shard.poisoned.nonzero().flatten()[: self.rows]
                if len(at) and not torch.equal(clean[id].x[at], shard.x[at]):
                    self.clean[id] = clean[id].x[at]
        if not self.clean:
            raise AttackError(
                "f3ba: no image of the attackers carries a trigger, so there is nothing to turn signs towards. Choose "
                "a trigger for attack.data, such as pixel_trigger."
            )

    def before_step(self, parameters: torch.nn.Parameter, step: int, ctx: LocalContext) -> None:
        if ctx.classifier is None or not isinstance(ctx.client.shard, Labelled):
            raise AttackError("f3ba: acts on classifiers of images (task: classify). Choose another local attack.")
        if step == 0:
            assert parameters.grad is not None
            self.moves = -parameters.grad.clone() if ctx.last_update is None else ctx.last_update.to(parameters)

    def after_step(self, parameters: torch.nn.Parameter, step: int, ctx: LocalContext) -> None:
        if step != 0 or ctx.client.id not in self.clean:
            return
        assert ctx.classifier is not None
        assert self.moves is not None
        shard, clean = ctx.client.shard, self.clean[ctx.client.id]
        triggered = shard.x[shard.poisoned.nonzero().flatten()[: len(clean)]]
        importance = self.moves * ctx.start.to(parameters)
        importance = importance.abs() if self.importance == "size" else importance
        places = ctx.classifier.layout.slices()
        with torch.no_grad():
            for name, layer in layers_of(ctx.classifier):
                at = places[f"{name}.weight"]
                given = difference(ctx.classifier, parameters.detach(), layer, triggered, clean.to(triggered))
                with torch.enable_grad():
                    towards = pull(layer, given)
                weight = parameters[at].view(towards.shape)
                mask = least(importance[at].view(towards.shape), self.share)
                parameters[at] = turned(weight, towards, mask).flatten()


def layers_of(classifier: Classifier) -> list[tuple[str, nn.Module]]:
    """Linear and convolutional layers whose weights are trained, in the model's order, but the last linear one."""
    _, head = head_of(classifier.model)
    trained = set(classifier.layout.names)
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
    return [
        (name, part)
        for name, part in classifier.model.named_modules()
        if isinstance(part, kinds) and part is not head and f"{name}.weight" in trained
    ]
