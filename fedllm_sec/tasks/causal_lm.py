"""Instruction tuning of a causal language model: encode rows, make batches, loss, scores and greedy answers.

Batches are padded on the left, so that answers end at the right edge: the logits of only the last positions are
computed, in training as in evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedllm_sec.errors import DataError
from fedllm_sec.matrix import Layout
from fedllm_sec.models.lora import base_of, scales
from fedllm_sec.tasks.beginning import Beginning, begun
from fedllm_sec.tasks.chat import Chat, writer_of
from fedllm_sec.tasks.encoding import Encoded, by_length, end_token
from fedllm_sec.tasks.fitting import Fits
from fedllm_sec.tasks.flat import flatten

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from fedllm_sec.recipe.sections import Data


@dataclass(frozen=True)
class Batch:
    """Left-padded rows; the last `keep` positions are those whose next token is scored."""

    ids: Tensor  # (b, t)
    mask: Tensor  # (b, t)
    targets: Tensor  # (b, keep) next tokens, -100 where not scored
    keep: int

    @property
    def positions(self) -> Tensor:
        return (self.mask.cumsum(1) - 1).clamp_(min=0)


class CausalLM(Fits):
    """A peft or transformers model whose trainable parameters are views of one flat vector.

    Greedy answers stop at the tokenizer's end token, at one of the stop tokens of the model folder's generation
    configuration, or at the mark with which the chat template ends an answer: `stop_tokens` has them, by where they are
    from. Nothing else is taken from that configuration.
    """

    def __init__(
        self, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, data: Data, device: torch.device
    ) -> None:
        self.model, self.tokenizer, self.data, self.device = model, tokenizer, data, device
        trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.layout = Layout.of(trainable)
        self.parameters = flatten([p for _, p in trainable])
        self.initial = self.parameters.detach().clone()  # (d,) the fresh adapter, or the whole model
        self.scales = scales(model)  # how often the product of each A factor counts
        end = end_token(tokenizer)
        configured = getattr(self._base.generation_config, "eos_token_id", None)
        stops = configured if isinstance(configured, list) else [configured] * (configured is not None)
        if not all(isinstance(stop, int) for stop in stops):
            raise DataError(f"model: eos_token_id of its generation_config.json: {stops}: must be token numbers.")
        self.writer = writer_of(tokenizer, data)
        self.max_length, self.too_long = data.max_length, data.too_long
        self.stop_tokens = {"tokenizer": [end], "generation_config": sorted(stops)}
        if isinstance(self.writer, Chat):
            self.stop_tokens["template"] = [self.writer.end]

    @property
    def _base(self) -> Any:
        """The base model with the adapter in it, without peft's shell."""
        return base_of(self.model)

    # ------------------------------------------------------------ encoding

    def tokens(self, rows: Dataset) -> Encoded:
        """Token ids of all rows, of any length."""
        return self.writer.tokens(rows.to_list())

    def answer_ids(self, responses: Sequence[str]) -> list[list[int]]:
        """The tokens of answers, each with its end token and uncut."""
        return self.writer.answer_ids(responses)

    def decode(self, ids: Sequence[int]) -> str:
        """What a greedy answer of these tokens reads as: up to the first stop token."""
        stops = {stop for found in self.stop_tokens.values() for stop in found}
        end = next((k for k, token in enumerate(ids) if token in stops), len(ids))
        return str(self.tokenizer.decode(list(ids[:end]), skip_special_tokens=True))

    # ------------------------------------------------------------ batches

    def collate(
        self,
        prompts: Sequence[list[int]],
        answers: Sequence[list[int]],
        whole: bool = False,
        earlier: Sequence[Sequence[tuple[int, int]]] = (),
    ) -> Batch:
        """Left-pad rows; score the answers, with what is said `earlier` in the prompts, or with `whole` every token."""
        rows = [p + a for p, a in zip(prompts, answers, strict=True)]
        spans = earlier or [()] * len(rows)
        first = [
            1 if whole else min([len(prompt), *(start for start, _ in said)])
            for prompt, said in zip(prompts, spans, strict=True)
        ]
        width, keep = max(map(len, rows)), max(len(row) - at for row, at in zip(rows, first, strict=True))
        ids = torch.full((len(rows), width), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        targets = torch.full((len(rows), keep), -100)
        for i, (row, prompt, said) in enumerate(zip(rows, prompts, spans, strict=True)):
            tokens = torch.tensor(row)
            ids[i, width - len(row) :] = tokens
            mask[i, width - len(row) :] = 1
            left = len(row) - keep  # the token that the first column scores, below 0 where the row is shorter
            for start, end in [(1, len(row))] if whole else [*said, (len(prompt), len(row))]:
                targets[i, start - left : end - left] = tokens[start:end]
        # the last token of a row is only ever a target, so it is not fed
        return Batch(ids[:, :-1].to(self.device), mask[:, :-1].to(self.device), targets.to(self.device), keep)

    def size(self, shard: Encoded) -> int:
        return len(shard)

    def batches(self, shard: Encoded, size: int, rng: torch.Generator) -> Iterator[list[int]]:
        """One epoch of row numbers: shuffled, grouped by length within a few batches, in shuffled order."""
        yield from by_length(shard.lengths, size, rng)

    def weight(self, shard: Encoded, rows: Sequence[int]) -> float:
        """How many tokens of these rows are scored: micro-batches are weighed by it."""
        if self.data.loss_on == "all":
            return float(sum(len(shard.prompts[i]) - 1 + len(shard.answers[i]) for i in rows))
        said = [end - start for i in rows if shard.earlier for start, end in shard.earlier[i]]
        return float(sum(len(shard.answers[i]) for i in rows) + sum(said))

    def loss(self, shard: Encoded, rows: Sequence[int]) -> Tensor:
        """Mean cross-entropy over the scored tokens of these rows, in nats."""
        batch = self.collate(
            [shard.prompts[i] for i in rows],
            [shard.answers[i] for i in rows],
            self.data.loss_on == "all",
            [shard.earlier[i] for i in rows] if shard.earlier else (),
        )
        logits = self.logits(batch)
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=-100
        )

    def logits(self, batch: Batch, after: Beginning | None = None) -> Tensor:
        """Logits of the last `keep` positions: (b, keep, vocabulary); of rows that go on `after` a beginning."""
        out: Tensor = self.model(
            input_ids=batch.ids,
            attention_mask=batch.mask if after is None else after.mask_before(batch.mask),
            position_ids=batch.positions + (0 if after is None else len(after.ids)),
            logits_to_keep=batch.keep,
            past_key_values=None if after is None else after.cache,
            use_cache=after is not None,
        ).logits
        return out

    def _rests(self, prompts: Sequence[list[int]]) -> tuple[Beginning | None, list[list[int]]]:
        """What the prompts begin with, where the model takes that once for all, and what is left of each."""
        shared = begun(self.model, prompts, self.device)
        return shared, list(prompts) if shared is None else [prompt[len(shared.ids) :] for prompt in prompts]

    # ------------------------------------------------------------ evaluation

    @torch.no_grad()
    def score(self, shard: Encoded, rows: Sequence[int], first: Tensor | None = None) -> Tensor:
        """Sum of answer log-losses and number of answer tokens of each row: (b, 2) float64.

        With `first` (k,) also the log-probability of each of these tokens right after the prompt, from the same pass:
        (b, 2 + k).
        """
        answers = [shard.answers[i] for i in rows]
        shared, prompts = self._rests([shard.prompts[i] for i in rows])
        batch = self.collate(prompts, answers)
        logits = self.logits(batch, shared)
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=-100, reduction="none"
        ).view_as(batch.targets)
        found = torch.stack([losses.double().sum(1), (batch.targets != -100).sum(1).double()], dim=1)
        if first is not None:
            at = torch.tensor([batch.keep - len(answer) for answer in answers], device=self.device)
            begun = logits[torch.arange(len(answers), device=self.device), at].float().log_softmax(-1)
            found = torch.cat([found, begun[:, first.to(self.device)].double()], dim=1)
        return found.cpu()

    def answer(self, shard: Encoded, rows: Sequence[int], max_new_tokens: int) -> list[str]:
        """Greedy answers as text."""
        return [self.decode(ids) for ids in self.generate(shard, rows, max_new_tokens)]

    @torch.no_grad()
    def generate(
        self,
        shard: Encoded,
        rows: Sequence[int],
        max_new_tokens: int,
        temperature: float = 0.0,
        seeds: Sequence[int] = (),
    ) -> list[list[int]]:
        """Answers as tokens, each with the stop token that ended it; generation stops when every row has ended.

        Greedy, or with a temperature drawn from softmax(logits / temperature): the row's own generator, made of its
        seed, gives Gumbel noise, and the largest sum is the token (Gumbel 1954; Maddison et al. 2014). So a row's
        answer does not depend on the batch it is in, as far as its logits do not. No setting of the model folder has a
        part in it. Where a logit is nan nothing is likeliest: the answer ends there.
        """
        from transformers import GenerationConfig

        pad = [self.tokenizer.eos_token_id]
        shared, prompts = self._rests([shard.prompts[i] for i in rows])
        batch = self.collate(prompts, [pad for _ in rows])
        ids, mask, after = batch.ids, batch.mask, {}
        if shared is not None:
            ids, mask, after = shared.ids_before(ids), shared.mask_before(mask), {"past_key_values": shared.cache}
        stops = sorted({stop for found in self.stop_tokens.values() for stop in found})
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            eos_token_id=stops,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        generators = [torch.Generator().manual_seed(seed) for seed in seeds] if temperature > 0 else []

        def drawn(_: Tensor, logits: Tensor) -> Tensor:
            if generators:
                drawn = [torch.empty(logits.shape[1]).exponential_(generator=own) for own in generators]
                logits = logits / temperature - torch.stack(drawn).log().to(logits.device)
            broken = logits.isnan().any(-1)
            logits[broken] = -torch.inf
            logits[broken, self.tokenizer.eos_token_id] = 0.0
            return logits

        with _unconfigured(self._base) as model:
            out = model.generate(
                input_ids=ids, attention_mask=mask, generation_config=settings, logits_processor=[drawn], **after
            )
        said = out[:, ids.shape[1] :].tolist()
        ends = [next((k + 1 for k, token in enumerate(ids) if token in stops), len(ids)) for ids in said]
        return [ids[:end] for ids, end in zip(said, ends, strict=True)]


@contextmanager
def _unconfigured(model: Any) -> Iterator[Any]:
    """The model without its folder's generation configuration, whose settings would fill up what a caller's leaves."""
    from transformers import GenerationConfig

    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield model
    finally:
        model.generation_config = own
