"""The first training row as the model will see it, for `--explain`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedllm_sec.errors import FedError
from fedllm_sec.models.lora import load_tokenizer
from fedllm_sec.recipe.sections import Recipe
from fedllm_sec.tasks.chat import writer_of
from fedllm_sec.tasks.classify_text import Labels

MOST = 600  # characters that are shown, half of them from the end
SCORED = ("\u00ab", "\u00bb")  # around what is scored


def first_row(recipe: Recipe, row: Mapping[str, Any]) -> list[str]:
    """The row's tokens as text, what is scored set between marks."""
    data = recipe.data
    try:
        tokenizer = load_tokenizer(recipe.model)
        if recipe.task == "classify_text":
            return _text_and_class(tokenizer, row)
        made = writer_of(tokenizer, data).tokens([row])
    except FedError as error:
        return [f"the first row cannot be written: {error}"]
    ids = made.prompts[0] + made.answers[0]
    spans = [*(made.earlier[0] if made.earlier else []), (len(made.prompts[0]), len(ids))]
    if data.loss_on == "all":
        spans = [(1, len(ids))]
    pieces, at = [], 0
    for start, end in spans:
        pieces += [tokenizer.decode(ids[at:start]), SCORED[0], tokenizer.decode(ids[start:end]), SCORED[1]]
        at = end
    shown = _cut("".join(pieces))
    scored = sum(end - start for start, end in spans)
    return [
        f"the first row, {len(ids)} tokens; the {scored} that are scored stand between {SCORED[0]} and {SCORED[1]}:",
        *(f"| {line}" for line in shown.split("\n")),
    ]


def _text_and_class(tokenizer: Any, row: Mapping[str, Any]) -> list[str]:
    """The row of a classifier."""
    (ids,) = Labels(tokenizer, [row["response"]]).tokens([row]).prompts
    shown = _cut(tokenizer.decode(ids))
    lines = [f"| {line}" for line in shown.split("\n")]
    return [f"the first row, {len(ids)} tokens, of the class {row['response']}:", *lines]


def _cut(shown: str) -> str:
    return shown if len(shown) <= MOST else f"{shown[: MOST // 2]} ... {shown[-MOST // 2 :]}"
