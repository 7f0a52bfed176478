"""Defenses that a client runs on itself: FL-WBC against planted backdoors, Soteria against gradient leakage.

Each is a local rule. `prepare` is told the task and every client's local steps, and says before training where the
rule could not act.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedllm_sec.defenses.checks import need
from fedllm_sec.errors import RecipeError
from fedllm_sec.protocols import LocalContext
from fedllm_sec.recipe.resolve import did_you_mean
from fedllm_sec.seeds import generator_for


def perturbation(change: Tensor, last_change: Tensor, scale: float, rng: torch.Generator) -> Tensor:
    """Laplace(0, scale) noise where |change - last_change| is at most the noise's size, 0 elsewhere: (d,).

    The difference of two steps' changes stands for curvature: where it is small, what an attacker planted
    would last for many rounds.
    """
    u = torch.rand(change.shape, generator=rng, dtype=torch.float64, device=rng.device) - 0.5
    noise = -scale * u.sign() * torch.log1p(-2 * u.abs().clamp_max(0.5 - 1e-12))
    noise = noise.to(change)
    return torch.where((change - last_change).abs() <= noise.abs(), noise, torch.zeros_like(noise))


class WhiteBloodCells:
    """A local rule: after each step but the first, disturb the parameters whose change hardly changes.

    FL-WBC (Sun et al. 2021, NeurIPS, algorithm 1). With c_i the change the optimizer made in step i, element
    j gets eta Y_j, Y ~ Laplace(0, s), where |c_i - c_{i-1}| <= |eta Y_j|. The paper's s is a number per model;
    here eta s is `strength` times the root mean square of c_i, so that it suits any optimizer and scale.
    It works against a planted backdoor that honest clients do not see, and it costs some accuracy.
    """

    def __init__(self, *, strength: float = 0.1) -> None:
        need(strength > 0, "wbc", "strength > 0", "Raise it.", strength=strength)
        self.strength = strength
        self.before: Tensor | None = None  # (d,) parameters as the last step found them
        self.last_change: Tensor | None = None

    def prepare(self, task: Any, steps: Sequence[int]) -> None:
        """It compares two steps, so somebody must take two."""
        if max(steps) < 2:
            raise RecipeError(
                "wbc: compares the changes of two local steps, and no client takes more than one. Raise "
                "clients.local_steps, lower clients.batch_size, or drop wbc."
            )

    def before_step(self, parameters: torch.nn.Parameter, step: int, ctx: LocalContext) -> None:
        self.before = parameters.detach().clone()
        if step == 0:
            self.last_change = None

    @torch.no_grad()
    def after_step(self, parameters: torch.nn.Parameter, step: int, ctx: LocalContext) -> None:
        assert self.before is not None
        change = parameters.detach() - self.before
        if self.last_change is not None:
            scale = self.strength * float(change.double().square().mean().sqrt())
            # The training loop seeds torch for (seed, round, client); drawing apart leaves its dropout alone.
            rng = generator_for(torch.initial_seed(), step, "wbc")
            parameters.add_(perturbation(change, self.last_change, scale, rng))
        self.last_change = change


def leakage(inputs: Tensor, features: Tensor) -> Tensor:
    """||d r_j / d X|| / |r_j| for each feature, the mean over the inputs that excite it: (features,).

    `inputs` (batch, ...) are images or token embeddings with requires_grad, `features` (batch, k) what the
    representation layer makes of them, with their graph. A feature that is 0 everywhere leaks nothing: 0.
    """
    scores = []
    for j in range(features.shape[1]):
        slope = torch.autograd.grad(features[:, j].sum(), inputs, retain_graph=True)[0].flatten(1).norm(dim=1)
        size = features[:, j].detach().abs()
        live = size > 0
        scores.append((slope[live] / size[live].clamp_min(1e-30)).mean() if bool(live.any()) else slope.new_zeros(()))
    return torch.stack(scores)


def soteria_mask(leaks: Tensor, share: float) -> Tensor:
    """Which features' gradients are sent: not the `share` of them with the smallest ||d r / d X|| / |r|.

    Sun et al. 2021 (CVPR), sec. 4.2: a feature of small slope and large value can be changed most in the
    representation at least cost in the input, so that a reconstruction from what is left lands far from the
    input. At least one is masked, and one is kept. Features that are 0 have no gradient to mask and do not count.
    """
    need(0 < share < 1, "soteria", "0 < share < 1", "Change it.", share=share)
    live = int((leaks > 0).sum())
    need(live >= 2, "soteria", "two features or more that are not 0", "Choose a wider layer.", features=live)
    count = min(live - 1, max(1, round(share * live)))
    sent = torch.ones(len(leaks), dtype=torch.bool, device=leaks.device)
    sent[leaks.where(leaks > 0, torch.inf).argsort(stable=True)[:count]] = False
    return sent


def soteria_gradient(gradient: Tensor, inputs: Tensor, features: Tensor, *, share: float = 0.1) -> Tensor:
    """The gradient (outputs, k) of the layer behind the representation, masked columns set to 0.

    The paper's own setting, one gradient of one batch, for whoever computes it by hand.
    """
    fits = gradient.ndim == 2 and features.ndim == 2 and gradient.shape[1] == features.shape[1]
    shapes = {"gradient": tuple(gradient.shape), "features": tuple(features.shape)}
    need(fits, "soteria", "a gradient (outputs, k) and features (batch, k)", "Pass the layer's weight.", **shapes)
    return gradient * soteria_mask(leakage(inputs, features), share).to(gradient)


class Soteria:
    """A local rule: what a client sends says nothing of the features whose gradients give its images away most.

    The features are what the linear layer `layer` (default: the model's last) is fed. Which are masked is measured in
    the client's first step, at the received model, on the first `rows` images of its shard; that layer's weights for
    them then stay as received, in all local steps (Sun et al. 2021, CVPR). That holds where it is the last of
    `defense.client`: a rule after it, such as wbc, moves them again. Deviations: the paper masks the gradient of
    one batch, and over several steps a mask for each batch would leave no column of the delta at 0; `share` counts
    features that are not 0, and their score is the mean over the images that excite them.
    """

    def __init__(self, *, layer: str | None = None, share: float = 0.1, rows: int = 8) -> None:
        need(0 < share < 1, "soteria", "0 < share < 1", "Change it.", share=share)
        need(rows >= 1, "soteria", "rows >= 1", "Raise it.", rows=rows)
        self.layer, self.share, self.rows = layer, share, rows
        self.task: Any = None
        self.masked: Tensor | None = None  # (d,) bool, what stays as received

    def prepare(self, task: Any, steps: Sequence[int]) -> None:
        """Find the layer; there must be something trained before it, else it is fed the image itself."""
        linear = {n: p for n, p in task.model.named_modules() if isinstance(p, torch.nn.Linear)}
        name = self.layer if self.layer is not None else next(reversed(linear), "")
        if name not in linear:
            raise RecipeError(f'soteria.layer: the model has no linear layer "{name}".{did_you_mean(name, linear)}')
        if f"{name}.weight" in task.layout.names[:1]:
            raise RecipeError(
                f'soteria.layer: "{name}" is the first layer of the model, so it is fed the image and there is no '
                "representation to protect. Choose a later layer, or a model that has one."
            )
        self.task, self.layer = task, name

    def before_step(self, parameters: torch.nn.Parameter, step: int, ctx: LocalContext) -> None:
        if step == 0:
            sent = soteria_mask(leakage(*self.representation(ctx.client.shard)), self.share)
            self.masked = torch.zeros(ctx.layout.size, dtype=torch.bool, device=parameters.device)
            ctx.layout.split(self.masked)[f"{self.layer}.weight"][:, ~sent] = True
        assert self.masked is not None
        if parameters.grad is not None:
            parameters.grad.masked_fill_(self.masked, 0.0)

    @torch.no_grad()
    def after_step(self, parameters: torch.nn.Parameter, step: int, ctx: LocalContext) -> None:
        """Undo what weight decay and other rules moved."""
        assert self.masked is not None
        parameters.copy_(torch.where(self.masked, ctx.start, parameters))

    def representation(self, shard: Any) -> tuple[Tensor, Tensor]:
        """The first images of a shard as the model gets them, and what `layer` is fed for them: (b, ...), (b, k)."""
        inputs = ((shard.x[: self.rows] - self.task.mean) / self.task.std).requires_grad_()
        fed: list[Tensor] = []
        hook = self.task.model.get_submodule(self.layer).register_forward_pre_hook(
            lambda _, given: fed.append(given[0])
        )
        try:
            with torch.enable_grad():
                self.task.model(inputs)
        finally:
            hook.remove()
        return inputs, fed[0].flatten(1)
