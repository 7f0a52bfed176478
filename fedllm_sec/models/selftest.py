"""Whether a language model is what it is taken for: tried on two short rows when it is loaded, before anything trains.

Each test is a pure function that gives a number, or what is wrong in words. A model that fails one would train and be
measured without a word, on numbers that mean something else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# token ids and attention mask (b, t), the mask's zeros on the left -> logits (b, t, vocabulary)
Logits = Callable[[Tensor, Tensor], Tensor]

# log-probabilities may differ by so much, in nats: rounding in a batch of another shape makes a tenth of it or less
ALIKE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}


def padding_gap(logits: Logits, long: Sequence[int], short: Sequence[int], pad: int) -> float:
    """Mean difference between the log-probabilities of the short row in a batch with the long one, and alone."""
    row, blank = torch.tensor(short), len(long) - len(short)
    batch = torch.tensor([list(long), [pad] * blank + list(short)])
    mask = torch.ones_like(batch)
    mask[1, :blank] = 0
    together = logits(batch, mask)[1, blank:]
    return float(_apart(together, logits(row[None], torch.ones_like(row[None]))[0]).mean())


def foresight(logits: Logits, row: Sequence[int], other: int) -> float:
    """Largest difference that another last token makes to the log-probabilities before it: 0 for a causal model."""
    two = torch.tensor([list(row), [*row[:-1], other]])
    found = logits(two, torch.ones_like(two))
    return float(_apart(found[0, :-1], found[1, :-1]).max())


def memory(logits: Logits, row: Sequence[int], other: int) -> float:
    """Largest difference that another first token makes to the log-probabilities after it: how much a token can do."""
    two = torch.tensor([list(row), [other, *row[1:]]])
    found = logits(two, torch.ones_like(two))
    return float(_apart(found[0, 1:], found[1, 1:]).max())


def _apart(a: Tensor, b: Tensor) -> Tensor:
    return (a.float().log_softmax(-1) - b.float().log_softmax(-1)).abs()


def positions(config: Any) -> int | None:
    """How many tokens long a text may be; None where the configuration sets no bound."""
    found = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def rope_types(config: Any) -> set[str | None]:
    """The kinds of rotary frequencies that the model's layers have."""
    rope = getattr(config, "rope_parameters", None) or {}
    return {rope.get("rope_type"), *(one.get("rope_type") for one in rope.values() if isinstance(one, dict))}


def _short_of(config: Any) -> int:
    """Up to how many tokens a row is short, by a configuration with longrope; 0 where it does not say."""
    rope = getattr(config, "rope_parameters", None) or {}
    found = rope.get("original_max_position_embeddings", getattr(config, "original_max_position_embeddings", 0))
    return found if isinstance(found, int) else 0


def length_problems(config: Any, max_length: int, alone: bool) -> list[str]:
    """Why rows of `max_length` tokens are more than the model can read, `alone` or in batches."""
    most, text = positions(config), config.get_text_config(decoder=True)
    if not alone and "longrope" in rope_types(text) and (short := _short_of(text)) and max_length > short:
        return [
            f"data.max_length: {max_length}: from {short} tokens on this model's rotary frequencies are others "
            "(longrope, original_max_position_embeddings), for all rows of a batch: a row would score otherwise beside "
            f"a longer one. Lower it to {short}, or set clients.batch_size and evaluate.batch_size to 1."
        ]
    if most is None or max_length <= most:
        return []
    return [
        f"data.max_length: {max_length}: this model has {most} positions (max_position_embeddings). Lower it to "
        f"{most}, or choose another model."
    ]


def token_problems(tokenizer: Any, vocabulary: int) -> list[str]:
    """Tokens that the tokenizer can make and the model does not know: it has embeddings for `vocabulary` of them."""
    most = max(tokenizer.get_vocab().values(), default=-1)
    if most < vocabulary:
        return []
    name = tokenizer.convert_ids_to_tokens(most)
    return [
        f"model.name: its tokenizer has tokens up to number {most} ({name!r}), the model embeddings for {vocabulary}: "
        "they do not belong together. Mend the folder, or choose another model."
    ]


def end_problems(tokenizer: Any, answer: Sequence[int]) -> list[str]:
    """An end token inside an answer: generation stops there, so what is taught after it is never said."""
    if tokenizer.eos_token_id not in answer[:-1]:
        return []
    return [
        f"data.answer: it writes the end token {tokenizer.eos_token!r} before its end, where generation stops. Let it "
        "end there: the token is set by itself."
    ]


def foresight_problems(gap: float, bound: float, memory: float) -> list[str]:
    """Why a model whose earlier logits differ so much by a later token cannot be trained on answers.

    In a model of small random weights no token does much: there it is little beside what an earlier token does.
    """
    if gap <= bound and (gap <= bound / 10 or gap <= memory / 10):
        return []
    return [
        f"model.name: another last token changes the logits before it (by up to {gap:.2g} nats): the model sees the "
        "answer that it is to learn. It is no causal language model, or its configuration does not make it one "
        "(is_decoder). Choose another."
    ]


def padding_problems(gap: float, bound: float) -> list[str]:
    """Why a model whose rows differ so much by padding cannot be given batches of several."""
    if gap <= bound:
        return []
    return [
        f"model.name: a row in a padded batch scores otherwise than alone (by {gap:.2g} nats on average): the model "
        "does not heed the attention mask or the position numbers. Set clients.batch_size and evaluate.batch_size to "
        "1, or choose another model."
    ]


def gradient(loss: Tensor, trained: Mapping[str, Tensor]) -> tuple[float, list[str]]:
    """Euclidean length of the gradient of the loss, and the names of the parameters that have no part in the loss."""
    if loss.grad_fn is None:
        return 0.0, list(trained)
    found = dict(zip(trained, torch.autograd.grad(loss, list(trained.values()), allow_unused=True), strict=True))
    lengths = [g.float().norm() for g in found.values() if g is not None]
    return float(torch.stack(lengths or [torch.zeros(())]).norm()), [name for name, g in found.items() if g is None]


def unused_words(unused: Sequence[str], trained: int) -> str:
    """What is to be said of parameters that have no part in the loss; empty where all have."""
    if not unused:
        return ""
    return (
        f"model.lora: {len(unused)} of {trained} trained parameters have no part in the loss of two short rows, such "
        f"as {unused[0]}: the model uses these weights without calling their layer, or not for text. Leave them out of "
        "target_modules, unless other rows reach them (experts that a mixture did not choose)."
    )


def gradient_problems(length: float) -> list[str]:
    """Why what has a gradient of this length learns nothing."""
    if length > 0:
        return []
    return [
        "model.lora: the gradient on two short rows is 0, so nothing would be learnt. Choose other target_modules or "
        "another model."
    ]
