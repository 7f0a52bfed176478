"""Classification of texts by a transformers model: texts as tokens, batches, loss, scores and the classes chosen.

To whatever measures a language model this is one, whose vocabulary of answers is its classes: an answer is one number,
that of a class, and reads as the class's name. Batches are padded on the right. A later token may change what an
earlier one says: nothing is read but the logits of the whole text.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedllm_sec.errors import AttackError, DataError
from fedllm_sec.matrix import Layout
from fedllm_sec.models.lora import base_of, scales
from fedllm_sec.records.compared import normal
from fedllm_sec.tasks.classify import chosen
from fedllm_sec.tasks.encoding import Encoded, by_length
from fedllm_sec.tasks.fitting import Fits
from fedllm_sec.tasks.flat import flatten

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

SHOWN = 20  # classes that a message lists


@dataclass(frozen=True)
class Texts(Encoded):
    """Token ids of texts, and as their answers the numbers of their classes, which are no tokens of the text.

    `types` has, of each row, which tokens are of its context (1) and which of its text (0).
    """

    types: list[list[int]] = field(default_factory=list)  # empty: the model is not told

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [len(prompt) for prompt in self.prompts]


@dataclass(frozen=True)
class Batch:
    """Right-padded rows: each (b, t)."""

    ids: Tensor
    mask: Tensor
    types: Tensor | None = None


class Labels:
    """How rows become tokens and class numbers: the context, where a row has one, is the second text of a pair."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, names: Sequence[str], typed: bool = False) -> None:
        self.tokenizer, self.names, self.typed = tokenizer, list(names), typed
        self.numbers = {normal(name): k for k, name in enumerate(names)}

    def tokens(self, rows: Sequence[Mapping[str, Any]]) -> Texts:
        """Token ids of all rows, of any length, and the class that each one's answer names."""
        found: dict[int, tuple[list[int], list[int]]] = {}
        for paired in (False, True):  # in a batch either all texts have a second one or none has
            at = [i for i, row in enumerate(rows) if bool(row["context"]) == paired]
            if not at:
                continue
            pair = [[rows[i][part] for i in at] for part in (("text", "context") if paired else ("text",))]
            made = self.tokenizer(*pair, return_token_type_ids=True)
            found |= dict(zip(at, zip(made["input_ids"], made["token_type_ids"], strict=True), strict=True))
        ids, types = ([found[i][part] for i in range(len(rows))] for part in (0, 1))
        return Texts(ids, [[self.number(row)] for row in rows], types=types if self.typed else [])

    def number(self, row: Mapping[str, Any]) -> int:
        """The class that the row's answer names; an error where it names none."""
        answer = str(row["response"])
        if (known := self.numbers.get(normal(answer))) is not None:
            return known
        names = ", ".join([*self.names[:SHOWN], *["..."][: len(self.names) - SHOWN]])
        if row.get("poisoned"):
            raise AttackError(
                f"attack.data: teaches the answer {answer[:60]!r}, and a classifier answers with a class: {names}. "
                "Choose one of them as the target, or another attack."
            )
        raise DataError(
            f"data.columns.label: {answer[:60]!r} is the label of a row and no class of the training rows: {names}. "
            "Write it as one of them (data.rename), choose other rows (data.test_where), or raise data.train_rows."
        )

    def answer_ids(self, responses: Sequence[str]) -> list[list[int]]:
        """Each answer as its class's number."""
        return [[self.number({"response": response})] for response in responses]

    def unlike_joined(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """None: no answer is joined to a text."""
        return []


class ClassifyText(Fits):
    """A classifier of transformers, or a peft adapter on one, whose trainable parameters are views of one flat vector.

    `names` are the classes in the order of the model's outputs.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        names: Sequence[str],
        device: torch.device,
        *,
        max_length: int,
        too_long: str = "cut_prompt",
    ) -> None:
        self.model, self.tokenizer, self.names, self.device = model, tokenizer, list(names), device
        self.max_length, self.too_long = max_length, too_long
        trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.layout = Layout.of(trainable)
        self.parameters = flatten([p for _, p in trainable])
        self.initial = self.parameters.detach().clone()  # (d,) the fresh adapter and output layer, or the whole model
        self.scales = scales(model)  # how often the product of each A factor counts
        self.writer = Labels(tokenizer, names, tells_types(base_of(model)))

    # ------------------------------------------------------------ encoding

    def tokens(self, rows: Dataset) -> Texts:
        """Token ids of all rows, of any length, and their classes."""
        return self.writer.tokens(rows.to_list())

    def answer_ids(self, responses: Sequence[str]) -> list[list[int]]:
        """Each answer as its class's number."""
        return self.writer.answer_ids(responses)

    def decode(self, ids: Sequence[int]) -> str:
        """The name of the class of an answer; "" for no class."""
        return self.names[ids[0]] if ids else ""

    # ------------------------------------------------------------ batches

    def collate(self, shard: Texts, rows: Sequence[int]) -> Batch:
        """Right-pad rows."""
        prompts = [shard.prompts[i] for i in rows]
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), int(self.tokenizer.pad_token_id))
        mask, types = torch.zeros_like(ids), torch.zeros_like(ids) if shard.types else None
        for place, (i, prompt) in enumerate(zip(rows, prompts, strict=True)):
            ids[place, : len(prompt)] = torch.tensor(prompt)
            mask[place, : len(prompt)] = 1
            if types is not None:
                types[place, : len(prompt)] = torch.tensor(shard.types[i])
        return Batch(ids.to(self.device), mask.to(self.device), None if types is None else types.to(self.device))

    def size(self, shard: Texts) -> int:
        return len(shard)

    def batches(self, shard: Texts, size: int, rng: torch.Generator) -> Iterator[list[int]]:
        """One epoch of row numbers: shuffled, grouped by length within a few batches, in shuffled order."""
        yield from by_length(shard.lengths, size, rng)

    def weight(self, shard: Texts, rows: Sequence[int]) -> float:
        return float(len(rows))

    def logits(self, batch: Batch) -> Tensor:
        """One for each class: (b, classes) float32."""
        told = {} if batch.types is None else {"token_type_ids": batch.types}
        out: Tensor = self.model(input_ids=batch.ids, attention_mask=batch.mask, **told).logits
        return out.float()

    def _classes(self, shard: Texts, rows: Sequence[int]) -> Tensor:
        return torch.tensor([shard.answers[i][0] for i in rows], device=self.device)

    def loss(self, shard: Texts, rows: Sequence[int]) -> Tensor:
        """Mean cross-entropy of the rows' classes, in nats."""
        return torch.nn.functional.cross_entropy(self.logits(self.collate(shard, rows)), self._classes(shard, rows))

    # ------------------------------------------------------------ evaluation

    @torch.no_grad()
    def score(self, shard: Texts, rows: Sequence[int], first: Tensor | None = None) -> Tensor:
        """Log-loss of each row's class, and 1, the number of its answers: (b, 2) float64.

        With `first` (k,) also the log-probability of each of these classes, from the same pass: (b, 2 + k).
        """
        said = self.logits(self.collate(shard, rows)).log_softmax(-1)
        losses = -said.gather(1, self._classes(shard, rows)[:, None])
        found = torch.cat([losses, torch.ones_like(losses)], dim=1)
        if first is not None:
            found = torch.cat([found, said[:, first.to(self.device)]], dim=1)
        return found.double().cpu()

    @torch.no_grad()
    def generate(self, shard: Texts, rows: Sequence[int], max_new_tokens: int = 1) -> list[list[int]]:
        """The likeliest class of each row as an answer; an empty one where a logit is not finite."""
        found: list[int] = chosen(self.logits(self.collate(shard, rows))).tolist()
        return [[k] if k >= 0 else [] for k in found]


def tells_types(base: Any) -> bool:
    """Whether the model is told by token types which of two texts a token is of.

    Models that have the argument and one type, as RoBERTa, or take it for something else, as GPT-2, are not told.
    """
    known = "token_type_ids" in inspect.signature(base.forward).parameters
    return known and (getattr(base.config, "type_vocab_size", None) or 1) > 1
