"""Which tokens a client trained on: by the embeddings that moved, or by what the first layer's values were fed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fedllm_sec.attacks.privacy.adam import is_first_step, widest_span
from fedllm_sec.attacks.privacy.reading import MOST_TOKENS
from fedllm_sec.attacks.privacy.seen import Observation, Recovered, need_finite
from fedllm_sec.attacks.privacy.spans import Span, fed_to, spans_of
from fedllm_sec.errors import AttackError

OUTSIDE = 1e-8  # share of the squared length: a ten-thousandth of the length
NOISY = 1e-2  # the same, of a span that is known up to rounding


def token_set(seen: Observation, *, outside: Annotated[float, Field(gt=0, lt=1)] = OUTSIDE) -> Recovered:
    """The tokens that were fed to the model (Petrov et al. 2024, the first stage of DAGER).

    Where the whole model is trained and its head is not tied to the embeddings, those whose embedding moved. Else
    those whose input to the first layer's `v_proj` lies in the span of what was sent of that layer, all but a share
    `outside` of its squared length. With rotary positions that input is the normed embedding, whatever the position.
    A span of LoRA has r dimensions at most, that of a whole layer `hidden`, and neither more than there are
    outputs: where the distinct tokens fill it, nothing can be told. There are no more of them than directions, so
    those that lie closest are taken. The queries and keys of the first position get no gradient, so values are read.
    The last token of a row is not fed. Deviation: a share of the squared length in place of the paper's distance.
    """
    need_finite(seen)
    need_embeddings(seen, "token_set")
    seen = undecayed(seen)
    moved = moved_embeddings(seen)
    if moved is not None:
        return Recovered(moved)
    layer = value_layers(seen, "token_set")[0]
    if is_first_step(seen):
        return _behind_adam(seen, layer)
    spans = roomy(seen, layer, "token_set")
    return Recovered(nearest(share_outside(spans, inputs_of_tokens(seen, layer)), outside, directions_of(spans)))


def _behind_adam(seen: Observation, layer: str) -> Recovered:
    """The tokens by the gradient behind AdamW's first step: as many as it shows directions, the closest."""
    span = widest_span(seen, [layer.removesuffix("v_proj") + name for name in ("v_proj", "q_proj", "k_proj")])
    if span is None:
        raise AttackError(
            f"token_set: behind AdamW's step, rounding hides what {layer} was fed, or tokens fill all its dimensions. "
            "Observe what: gradient, smaller batches, larger r."
        )
    return Recovered(nearest(span.residual(inputs_of_tokens(seen, layer)), NOISY, len(span.basis)))


def need_embeddings(seen: Observation, method: str) -> None:
    """An error for what is no language model."""
    if not hasattr(seen.model, "get_input_embeddings"):
        raise AttackError(f"{method}: reads what a language model was fed. Observe a run of task causal_lm.")


def undecayed(seen: Observation) -> Observation:
    """A delta without what weight decay did to it, at a rate that stays the same."""
    if seen.what != "delta" or seen.training is None or seen.training.weight_decay == 0:
        return seen
    lost = 1 - (1 - seen.learning_rate() * seen.training.weight_decay) ** seen.steps
    return replace(seen, sent=seen.sent + lost * seen.start)


def moved_embeddings(seen: Observation) -> list[int] | None:
    """Tokens whose rows of the embedding moved by more than rounding; None where that tells nothing.

    So it is where embeddings are frozen, where a tied head moves them all, and where noise does.
    """
    table, head = _embedding(seen), seen.model.get_output_embeddings()  # type: ignore[operator]
    names = [name for name, p in seen.model.named_parameters() if p is table and name in seen.layout.names]
    if not names or (head is not None and head.weight is table):
        return None
    rows, begun = seen.parts()[names[0]], seen.layout.split(seen.start)[names[0]]
    rounding = 4 * torch.finfo(torch.float32).eps * begun.abs() if seen.what == "delta" else torch.zeros_like(begun)
    moved = (rows.abs() > rounding).any(-1).nonzero().flatten().tolist()
    return moved if 0 < len(moved) < len(rows) else None


def _embedding(seen: Observation) -> Tensor:
    weight: Tensor = seen.model.get_input_embeddings().weight  # type: ignore[operator]
    return weight


def value_layers(seen: Observation, method: str) -> list[str]:
    """The names of the attention layers' values, in the order of the model."""
    found = [name for name, _ in seen.model.named_modules() if name.rpartition(".")[2] == "v_proj"]
    if not found:
        raise AttackError(f"{method}: the model has no v_proj, whose input could be told. Observe a Llama or its kin.")
    return found


def roomy(seen: Observation, layer: str, method: str) -> list[Span]:
    """The spans of a layer that do not fill their dimensions; an error where there is none."""
    found = spans_of(seen, [layer])
    if not found:
        raise AttackError(
            f"{method}: nothing that was sent of {layer} moved. Let clients train it (model.lora.target_modules)."
        )
    spans = [span for span in found if span.exact and len(span.basis) < span.most]
    if not spans:
        raise AttackError(
            f"{method}: what was sent of {layer} fills all {max(span.most for span in found)} dimensions: too many "
            "distinct tokens or prefixes, AdamW's steps, or noise. Observe what: gradient, smaller batches, larger r."
        )
    return spans


def directions_of(spans: Sequence[Span]) -> int:
    """As many independent inputs as the spans can come from."""
    return max(len(span.basis) for span in spans)


def share_outside(spans: Sequence[Span], inputs: Tensor) -> Tensor:
    """What share of the squared length of inputs (n, in) lies outside the spans, of that which holds least: (n,)."""
    return torch.stack([span.residual(inputs) for span in spans]).amax(0)


def nearest(shares: Tensor, outside: float, most: int) -> list[int]:
    """The numbers of the least shares that are below `outside`, `most` of them at most, in order of number."""
    found = [i for i in shares.argsort(stable=True).tolist()[:most] if shares[i] < outside]
    return sorted(found)


def inputs_of_tokens(seen: Observation, layer: str) -> Tensor:
    """What the first layer is fed for every token of the vocabulary: (vocabulary, in)."""
    once, again = fed_to(seen, [layer], torch.zeros(1, 2, dtype=torch.long))[layer][0]
    if not torch.allclose(once, again, rtol=1e-4, atol=1e-6):
        raise AttackError(
            f"token_set: {layer} is fed positions with the tokens, so that tokens alone cannot be told. "
            "Observe a model with rotary positions."
        )
    ids = torch.arange(len(_embedding(seen))).unsqueeze(1)
    return torch.cat([fed_to(seen, [layer], part)[layer][:, 0] for part in torch.split(ids, MOST_TOKENS)])
