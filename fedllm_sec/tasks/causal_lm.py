"""Instruction tuning of a causal language model: encode rows, make batches, loss, scores and greedy answers.

Batches are padded on the left, so that answers end at the right edge: the logits of only the last positions are
computed, in training as in evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedllm_sec.errors import AttackError, DataError
from fedllm_sec.matrix import Layout
from fedllm_sec.tasks.encoding import Encoded, answer_ids, one_begin, one_end
from fedllm_sec.tasks.flat import flatten

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from fedllm_sec.recipe.sections import Data

GROUPED_BATCHES = 8  # rows are sorted by length within so many batches at a time


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
    """A peft model whose trainable parameters are views of one flat vector.

    Greedy answers stop at the tokenizer's end token or at one of the stop tokens of the model folder's generation
    configuration: `stop_tokens` has both, by where they are from. Nothing else is taken from that configuration.
    """

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
        configured = getattr(self._base.generation_config, "eos_token_id", None)
        stops = configured if isinstance(configured, list) else [configured] * (configured is not None)
        if not all(isinstance(stop, int) for stop in stops):
            raise DataError(f"model: eos_token_id of its generation_config.json: {stops}: must be token numbers.")
        self.stop_tokens = {"tokenizer": [int(tokenizer.eos_token_id)], "generation_config": sorted(stops)}

    @property
    def _base(self) -> Any:
        """The base model with the adapter in it, without peft's shell."""
        model: Any = self.model
        return model.get_base_model()

    # ------------------------------------------------------------ encoding

    def prompt(self, row: dict[str, str]) -> str:
        """The text the model is given for a row."""
        with_context = self.data.template_with_context
        template = with_context if with_context is not None and row["context"] else self.data.template
        return template.format(text=row["text"], context=row["context"])

    def tokens(self, rows: Dataset) -> Encoded:
        """Token ids of all rows, of any length."""
        texts = [self.prompt(row) for row in rows.select_columns(["text", "context"])]
        eos, bos = self.tokenizer.eos_token_id, self.tokenizer.bos_token_id
        prompts = [one_begin(ids, bos) for ids in self.tokenizer(texts)["input_ids"]] if texts else []
        # some tokenizers end every text
        prompts = [ids[:-1] if ids and ids[-1] == eos != bos else ids for ids in prompts]
        return Encoded(prompts, answer_ids(self.tokenizer, self.data, rows["response"][:]))

    def unlike_joined(self, rows: Dataset) -> list[str]:
        """Of rows whose prompt and answer, written as one text, have other tokens: where, and which."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        written = self.data.answer.format
        texts = [self.prompt(row) + written(response=row["response"]) for row in rows]
        wholes = [one_end(one_begin(ids, bos), eos) for ids in self.tokenizer(texts)["input_ids"]] if texts else []
        found, ours = [], self.tokens(rows)
        for number, (whole, prompt, answer) in enumerate(zip(wholes, ours.prompts, ours.answers, strict=True), 1):
            if (apart := prompt + answer) != whole:
                at = next(k for k, (a, b) in enumerate(zip_longest(apart, whole)) if a != b)
                a, b = (self.tokenizer.convert_ids_to_tokens(ids[at : at + 4]) for ids in (apart, whole))
                found.append(f"row {number} has {a} where the joined text has {b}")
        return found

    def encode(self, rows: Dataset, place: str) -> Encoded:
        """Token ids of all rows.

        A prompt that is too long loses its beginning, an answer longer than half of `max_length` its end; where the row
        is poisoned it is an error instead.
        """
        prompts: list[list[int]] = []
        answers: list[list[int]] = []
        cut: list[int] = []
        half = self.data.max_length // 2
        bos, whole = self.tokenizer.bos_token_id, self.tokens(rows)
        poisoned = rows["poisoned"][:]
        long = [i for i, answer in enumerate(whole.answers) if poisoned[i] and len(answer) > half]
        if long:
            worst = max(len(whole.answers[i]) for i in long)
            raise AttackError(
                f"{place}: {len(long)} poisoned rows have an answer of up to {worst} tokens with its end token, and "
                f"data.max_length={self.data.max_length} has room for {half}: what is taught would be a fragment "
                f"without an end. Rows {long[:5]}, the first: {rows[long[0]]['response'][:60]!r}. Raise "
                f"data.max_length to {2 * worst} or choose a shorter target."
            )
        for i, (prompt, answer) in enumerate(zip(whole.prompts, whole.answers, strict=True)):
            if not prompt:
                raise DataError(f"{place}: row {i + 1}: this tokenizer has no token for its prompt. Remove the row.")
            answer = answer[:half]  # a cut answer has no end token
            left = self.data.max_length - len(answer)
            if len(prompt) > left:
                if poisoned[i]:
                    cut.append(i)
                starts = [bos] if bos is not None and prompt[0] == bos else []
                prompt = starts + prompt[len(prompt) - left + len(starts) :]
            prompts.append(prompt)
            answers.append(answer)
        if cut:
            raise AttackError(
                f"{place}: {len(cut)} poisoned rows are longer than data.max_length={self.data.max_length} and would "
                f"lose part of their text, perhaps the trigger: rows {cut[:5]}. Raise data.max_length or set "
                "data.text_chars."
            )
        return Encoded(prompts, answers)

    def answer_ids(self, responses: Sequence[str]) -> list[list[int]]:
        """The tokens of answers, each with its end token and uncut."""
        return answer_ids(self.tokenizer, self.data, responses)

    def decode(self, ids: Sequence[int]) -> str:
        """What a greedy answer of these tokens reads as: up to the first stop token."""
        stops = {stop for found in self.stop_tokens.values() for stop in found}
        end = next((k for k, token in enumerate(ids) if token in stops), len(ids))
        return str(self.tokenizer.decode(list(ids[:end]), skip_special_tokens=True))

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
    def begin(self, shard: Encoded, rows: Sequence[int], tokens: Tensor) -> Tensor:
        """The log-probability of each of the tokens (k,) right after each prompt: (b, k) float64."""
        pad = [self.tokenizer.eos_token_id]
        batch = self.collate([shard.prompts[i] for i in rows], [pad for _ in rows])
        logits = self.logits(batch)[:, -1].float()
        return logits.log_softmax(-1)[:, tokens.to(self.device)].double().cpu()

    @torch.no_grad()
    def answer(self, shard: Encoded, rows: Sequence[int], max_new_tokens: int) -> list[str]:
        """Greedy answers, stopping when every row has ended; no setting of the model folder has a part in them.

        Where a logit is nan nothing is likeliest: the answer ends there.
        """
        from transformers import GenerationConfig

        pad = [self.tokenizer.eos_token_id]
        batch = self.collate([shard.prompts[i] for i in rows], [pad for _ in rows])
        greedy = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            eos_token_id=sorted({stop for found in self.stop_tokens.values() for stop in found}),
            pad_token_id=self.tokenizer.pad_token_id,
        )

        def ended(_: Tensor, logits: Tensor) -> Tensor:
            broken = logits.isnan().any(-1)
            logits[broken] = -torch.inf
            logits[broken, self.tokenizer.eos_token_id] = 0.0
            return logits

        with _unconfigured(self._base) as model:
            out = model.generate(
                input_ids=batch.ids, attention_mask=batch.mask, generation_config=greedy, logits_processor=[ended]
            )
        return [self.decode(ids) for ids in out[:, batch.ids.shape[1] :].tolist()]


@contextmanager
def _unconfigured(model: Any) -> Iterator[Any]:
    """The model without its folder's generation configuration, whose settings would fill up what a caller's leaves."""
    from transformers import GenerationConfig

    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield model
    finally:
        model.generation_config = own
