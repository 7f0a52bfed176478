"""Whether a row was trained on: scores of candidates by losses, and by how far they lie from an update's span."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedllm_sec.attacks.privacy.reading import asked, mean_losses, need_text, token_losses, trained_on
from fedllm_sec.attacks.privacy.seen import Observation, Suspicion, need_finite
from fedllm_sec.attacks.privacy.spans import residuals
from fedllm_sec.errors import AttackError, RecipeError
from fedllm_sec.seeds import generator_for

LOWEST = 0.2  # share of tokens that min_k takes
SHADOWS = 4


class Membership:
    """A score for each candidate row, of which only an observer without the shard has need.

    `score` is, with l(x; w) the mean log-loss of a row's scored tokens under the model w that is asked, `model`:
    loss: -l(x; w) (Yeom et al. 2018);
    drop: l(x; received) - l(x; w), the received model being the reference (Carlini et al. 2021, sec. 5);
    min_k: the mean log-probability of the share `k` of tokens that are least likely (Shi et al. 2024);
    reference: the mean of l(x; shadow) over `shadows` models that the observer has trained from the received one, on
    rows of its own, as the client trains, less l(x; w) (Carlini et al. 2022, offline; with so few shadows one variance
    for all rows, which leaves the order alone);
    residual: how little of a row's hidden vectors lies outside the span of what was sent (`spans.residuals`; Deng et
    al. 2026), which needs no loss.

    The `model` is the client's own (what it had received and what it sent), the global one after the last
    round, or the received one: nothing of this round is in that, so it shows what the rows tell without any training.
    """

    def __init__(
        self,
        *,
        score: Literal["drop", "loss", "min_k", "reference", "residual"] = "drop",
        model: Literal["client", "global", "received"] = "client",
        k: Annotated[float, Field(gt=0, le=1)] | None = None,
        shadows: Annotated[int, Field(ge=1, le=64)] | None = None,
        seed: int | None = None,
    ) -> None:
        idle = [name for name, value, of in (("k", k, "min_k"), ("shadows", shadows, "reference"),
                ("seed", seed, "reference")) if value is not None and score != of]  # fmt: skip
        if idle:
            raise RecipeError(f"membership.{idle[0]}: score: {score} does not use it. Remove it.")
        if model == "received" and score == "drop":
            raise RecipeError("membership.model: received: its loss has not dropped from itself. Choose another score.")
        if model != "client" and score == "residual":
            raise RecipeError(f"membership.model: {model}: a residual is that of what the client sent. Remove it.")
        self.score, self.model = score, model
        self.k, self.shadows, self.seed = k or LOWEST, shadows or SHADOWS, seed or 0

    def __call__(self, seen: Observation) -> Suspicion:
        need_finite(seen)
        need_text(seen, "membership", seen.candidates)
        if self.score == "residual":
            return Suspicion(-residuals(seen, seen.candidates))
        vector = asked(seen, self.model, "membership")
        if self.score == "min_k":
            return Suspicion(torch.stack([lowest(-x, self.k) for x in token_losses(seen, vector, seen.candidates)]))
        losses = mean_losses(seen, vector, seen.candidates)
        if self.score == "loss":
            return Suspicion(-losses)
        return Suspicion(self._reference(seen) - losses)

    def _reference(self, seen: Observation) -> Tensor:
        if self.score == "drop":
            return mean_losses(seen, seen.start, seen.candidates)
        need = min(seen.size or 1, (seen.rows or 1) * seen.steps)
        if len(seen.own) < need:
            raise AttackError(
                f"membership: shadows train on {need} rows of the observer's own, as the client did, and it has "
                f"{len(seen.own)}. Raise attack.observe.own_rows."
            )
        shadows = []
        for number in range(self.shadows):
            rng = generator_for(self.seed, "shadow rows", number)
            rows = [seen.own[i] for i in torch.randperm(len(seen.own), generator=rng)[:need].tolist()]
            shadows.append(mean_losses(seen, trained_on(seen, rows, self.seed, number), seen.candidates))
        return torch.stack(shadows).mean(0)


def lowest(values: Tensor, share: float) -> Tensor:
    """The mean of the lowest share of some values (n,), of one at least."""
    count = max(1, round(share * len(values)))
    return values.sort().values[:count].mean()
