"""What all prompts of a batch begin with goes through the model once: its keys and values serve every row.

Chat templates begin every prompt with the same system turn: 24 of 47 tokens of a prompt in smollm2_alpaca_chat.yaml.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedllm_sec.models.selftest import rope_types

LEAST = 16  # tokens; a shorter beginning does not pay for a pass of its own
# Families in which a token's logits were found to be those of its row alone, with masked places before it. Not mpt and
# gpt_neo, which count distances and windows over masked places too, nor whatever nobody has tried.
TRIED = frozenset(
    [
        "apertus",
        "bloom",
        "codegen",
        "cohere",
        "deepseek_v3",
        "falcon",
        "gemma",
        "glm",
        "glm4",
        "gpt2",
        "gpt_bigcode",
        "gpt_neox",
        "gptj",
        "granite",
        "llama",
        "ministral3",
        "mistral",
        "mixtral",
        "nemotron",
        "olmo",
        "olmo2",
        "opt",
        "persimmon",
        "phi",
        "phi3",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "seed_oss",
        "smollm3",
        "stablelm",
    ]
)
BY_LENGTH = frozenset({"dynamic", "longrope"})  # rotary frequencies that depend on how long a row is


@dataclass(frozen=True)
class Beginning:
    """The tokens that rows have in common and, for each row, a copy of their keys and values."""

    ids: list[int]
    cache: Any  # a transformers.DynamicCache of as many rows as the batch has

    def ids_before(self, ids: Tensor) -> Tensor:
        """Rows (b, t) without their beginning, with it: (b, len(ids) + t)."""
        return torch.cat([torch.tensor(self.ids, device=ids.device).expand(len(ids), -1), ids], dim=1)

    def mask_before(self, mask: Tensor) -> Tensor:
        """The same of their mask: (b, len(ids) + t)."""
        return torch.cat([mask.new_ones(len(mask), len(self.ids)), mask], dim=1)


def common(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with; the last token of a prompt, after which is scored, is none of them."""
    first, last = min(prompts), max(prompts)  # in the order of words in a dictionary: what these share all share
    most = min(map(len, prompts)) - 1
    return next((k for k in range(most) if first[k] != last[k]), most)


@torch.no_grad()
def begun(model: Any, prompts: Sequence[list[int]], device: torch.device) -> Beginning | None:
    """The beginning of the prompts where sharing it pays and is right, else None.

    It is right where every layer attends to all earlier tokens and positions are those of tokens: the padding that
    stands between the beginning and a shorter row is masked, but would count in a window of the last few places, in a
    distance that is counted over places, and in a state that tokens pass on.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    length = common(prompts) if len(prompts) > 1 else 0
    if length < LEAST or not _told_by_tokens(model.config):
        return None
    ids = prompts[0][:length]
    found = model(
        input_ids=torch.tensor([ids], device=device),
        attention_mask=torch.ones(1, length, dtype=torch.long, device=device),
        position_ids=torch.arange(length, device=device)[None],
        logits_to_keep=1,
        use_cache=True,
    )
    cache = getattr(found, "past_key_values", None)
    if type(cache) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    cache.batch_repeat_interleave(len(prompts))
    return Beginning(ids, cache)


def _told_by_tokens(config: Any) -> bool:
    """Whether the family was tried, and its rotary frequencies are the same for rows of any length."""
    return config.model_type in TRIED and not rope_types(config) & BY_LENGTH
