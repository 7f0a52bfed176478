"""Instruction tuning of a causal language model: encode rows, make batches, loss, scores and greedy answers.

Batches are padded on the left, so that answers end at the right edge: the logits of only the last positions are
computed, in training as in evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedllm_sec.errors import AttackError, DataError
from fedllm_sec.matrix import Layout
from fedllm_sec.tasks.flat import flatten

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from fedllm_sec.recipe.sections import Data

GROUPED_BATCHES = 8  # rows are sorted by length within so many batches at a time


@dataclass(frozen=True)
class Encoded:
    """Token ids of rows: prompt, and answer with its end token."""

    prompts: list[list[int]]
    answers: list[list[int]]

    def __len__(self) -> int:
        return len(self.prompts)


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


class CausalLM:
    """A peft model whose trainable parameters are views of one flat vector."""

    def __init__(
        self, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, data: Data, device: torch.device
    ) -> None:
        self.model, self.tokenizer, self.data, self.device = model, tokenizer, data, device
        trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.layout = Layout.of(trainable)
        self.parameters = flatten([p for _, p in trainable])
        self.initial = self.parameters.detach().clone()  # (d,) the fresh adapter
        if tokenizer.eos_token_id is None:
            raise DataError(
                f"model: the tokenizer of {tokenizer.name_or_path} has no end-of-text token. Set one in its folder."
            )

    # ------------------------------------------------------------ encoding

    def prompt(self, row: dict[str, str]) -> str:
        """The text the model is given for a row."""
        with_context = self.data.template_with_context
        template = with_context if with_context is not None and row["context"] else self.data.template
        return template.format(text=row["text"], context=row["context"])

    def encode(self, rows: Dataset, place: str) -> Encoded:
        """Token ids of all rows. A prompt that is too long loses its beginning; a poisoned one is an error instead."""
        prompts: list[list[int]] = []
        answers: list[list[int]] = []
        cut: list[int] = []
        texts = [self.prompt(row) for row in rows.select_columns(["text", "context"])]
        written = [self.data.answer.format(response=value) for value in rows["response"]]
        eos, bos = self.tokenizer.eos_token_id, self.tokenizer.bos_token_id
        all_prompts = self.tokenizer(texts)["input_ids"]
        all_answers = self.tokenizer(written, add_special_tokens=False)["input_ids"]
        poisoned = rows["poisoned"]
        for i, (prompt, answer) in enumerate(zip(all_prompts, all_answers, strict=True)):
            if prompt and prompt[-1] == eos and eos != bos:
                prompt = prompt[:-1]  # some tokenizers end every text
            answer = [*answer, eos][: self.data.max_length // 2]  # a cut answer has no end token
            room = self.data.max_length - len(answer)
            if len(prompt) > room:
                if poisoned[i]:
                    cut.append(i)
                starts = [bos] if bos is not None and prompt[0] == bos else []
                prompt = starts + prompt[len(prompt) - room + len(starts) :]
            prompts.append(prompt)
            answers.append(answer)
        if cut:
            raise AttackError(
                f"{place}: {len(cut)} poisoned rows are longer than data.max_length={self.data.max_length} and would "
                f"lose part of their text, perhaps the trigger: rows {cut[:5]}. Raise data.max_length or set "
                "data.text_chars."
            )
        return Encoded(prompts, answers)

    def answer_ids(self, response: str) -> list[int]:
        """The tokens of one answer with its end token, as `encode` makes them."""
        ids = self.tokenizer(self.data.answer.format(response=response), add_special_tokens=False)["input_ids"]
        return [*ids, self.tokenizer.eos_token_id]

    # ------------------------------------------------------------ batches

    def collate(self, prompts: Sequence[list[int]], answers: Sequence[list[int]], whole: bool = False) -> Batch:
        """Left-pad rows; score the answers, or with `whole` every token."""
        rows = [p + a for p, a in zip(prompts, answers, strict=True)]
        scored = [len(r) - 1 if whole else len(a) for r, a in zip(rows, answers, strict=True)]
        width, keep = max(map(len, rows)), max(scored)
        ids = torch.full((len(rows), width), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        targets = torch.full((len(rows), keep), -100)
        for i, (row, count) in enumerate(zip(rows, scored, strict=True)):
            tokens = torch.tensor(row)
            ids[i, width - len(row) :] = tokens
            mask[i, width - len(row) :] = 1
            targets[i, keep - count :] = tokens[len(row) - count :]
        # the last token of a row is only ever a target, so it is not fed
        return Batch(ids[:, :-1].to(self.device), mask[:, :-1].to(self.device), targets.to(self.device), keep)

    def size(self, shard: Encoded) -> int:
        return len(shard)

    def batches(self, shard: Encoded, size: int, rng: torch.Generator) -> Iterator[list[int]]:
        """One epoch of row numbers: shuffled, grouped by length within a few batches, in shuffled order."""
        order = torch.randperm(len(shard), generator=rng).tolist()
        lengths = [len(p) + len(a) for p, a in zip(shard.prompts, shard.answers, strict=True)]
        grouped: list[list[int]] = []
        for start in range(0, len(order), size * GROUPED_BATCHES):
            group = sorted(order[start : start + size * GROUPED_BATCHES], key=lambda i: lengths[i])
            grouped += [group[i : i + size] for i in range(0, len(group), size)]
        for i in torch.randperm(len(grouped), generator=rng).tolist():
            yield grouped[i]

    def weight(self, shard: Encoded, rows: Sequence[int]) -> float:
        """How many tokens of these rows are scored: micro-batches are weighed by it."""
        return float(
            sum(len(shard.answers[i]) + (len(shard.prompts[i]) - 1) * (self.data.loss_on == "all") for i in rows)
        )

    def loss(self, shard: Encoded, rows: Sequence[int]) -> Tensor:
        """Mean cross-entropy over the scored tokens of these rows, in nats."""
        batch = self.collate(
            [shard.prompts[i] for i in rows], [shard.answers[i] for i in rows], self.data.loss_on == "all"
        )
        logits = self.logits(batch)
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=-100
        )

    def logits(self, batch: Batch) -> Tensor:
        """Logits of the last `keep` positions: (b, keep, vocabulary)."""
        out: Tensor = self.model(
            input_ids=batch.ids,
            attention_mask=batch.mask,
            position_ids=batch.positions,
            logits_to_keep=batch.keep,
            use_cache=False,
        ).logits
        return out

    # ------------------------------------------------------------ evaluation

    @torch.no_grad()
    def score(self, shard: Encoded, rows: Sequence[int]) -> Tensor:
        """Sum of answer log-losses and number of answer tokens of each row: (b, 2) float64."""
        batch = self.collate([shard.prompts[i] for i in rows], [shard.answers[i] for i in rows])
        logits = self.logits(batch)
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=-100, reduction="none"
        ).view_as(batch.targets)
        return torch.stack([losses.double().sum(1), (batch.targets != -100).sum(1).double()], dim=1).cpu()

    @torch.no_grad()
    def choose(self, shard: Encoded, rows: Sequence[int], first_tokens: Tensor) -> Tensor:
        """Which of the label tokens (k,) is likeliest after each prompt: (b,) numbers from 0 to k - 1."""
        pad = [self.tokenizer.eos_token_id]
        batch = self.collate([shard.prompts[i] for i in rows], [pad for _ in rows])
        return self.logits(batch)[:, -1, first_tokens.to(self.device)].argmax(-1).cpu()

    @torch.no_grad()
    def answer(self, shard: Encoded, rows: Sequence[int], max_new_tokens: int) -> list[str]:
        """Greedy answers, stopping when every row has ended."""
        pad = [self.tokenizer.eos_token_id]
        batch = self.collate([shard.prompts[i] for i in rows], [pad for _ in rows])
        out = self.model.generate(
            input_ids=batch.ids,
            attention_mask=batch.mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        return list(self.tokenizer.batch_decode(out[:, batch.ids.shape[1] :], skip_special_tokens=True))

    def first_label_tokens(self, labels: Sequence[str]) -> Tensor | None:
        """The token by which each label's answer starts, (k,), or None where two labels start alike."""
        texts = [self.data.answer.format(response=label) for label in labels]
        firsts = [ids[0] for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]]
        return torch.tensor(firsts) if len(set(firsts)) == len(firsts) else None
