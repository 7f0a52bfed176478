"""The first training row as the model will see it, for `--explain`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedllm_sec.errors import FedError
from fedllm_sec.models.lora import load_tokenizer
from fedllm_sec.recipe.sections import Recipe
from fedllm_sec.tasks.chat import writer_of
from fedllm_sec.tasks.classify_text import Labels
from fedllm_sec.tasks.encoding import Encoded
from fedllm_sec.tasks.fitting import fitted

if TYPE_CHECKING:
    from datasets import Dataset

TRIED = 50  # rows, of which the first that is not dropped is shown
MOST = 600  # characters that are shown, half of them from the end
SCORED = ("\u00ab", "\u00bb")  # around what is scored


def first_row(recipe: Recipe, train: Dataset) -> list[str]:
    """The tokens of the first row that `data.max_length` and `data.too_long` leave, as text, what is scored marked."""
    data = recipe.data
    try:
        tokenizer = load_tokenizer(recipe.model)
        classes = recipe.task == "classify_text"
        writer = Labels(tokenizer, [train[0]["response"]]) if classes else writer_of(tokenizer, data)
        front = train.select(range(1 if classes else min(len(train), TRIED)))
        whole = writer.tokens(front.to_list()).lengths
        left = fitted(writer, front, data.max_length, data.too_long, "data")
    except FedError as error:
        return [f"the first row cannot be written: {error}"]
    number, made = left.kept[0], left.encoded
    which = "the first row" if number == 0 else f"row {number + 1}, the first that is not dropped"
    cut = f" of {whole[number]} (data.too_long: {data.too_long})" if whole[number] > data.max_length else ""
    if classes:
        shown = tokenizer.decode(made.prompts[0])
        head = f"{which}, {len(made.prompts[0])} tokens{cut}, of the class {train[0]['response']}:"
    else:
        shown, scored = _marked(tokenizer, made, data.loss_on == "all")
        head = (
            f"{which}, {made.lengths[0]} tokens{cut}; the {scored} that are scored stand between {SCORED[0]} and "
            f"{SCORED[1]}:"
        )
    return [head, *(f"| {line}" for line in _cut(shown).split("\n"))]


def _marked(tokenizer: Any, made: Encoded, everything: bool) -> tuple[str, int]:
    """The first row as text with marks around what is scored, and how many tokens that is."""
    ids = made.prompts[0] + made.answers[0]
    spans = [*(made.earlier[0] if made.earlier else []), (len(made.prompts[0]), len(ids))]
    if everything:
        spans = [(1, len(ids))]
    pieces, at = [], 0
    for start, end in spans:
        pieces += [tokenizer.decode(ids[at:start]), SCORED[0], tokenizer.decode(ids[start:end]), SCORED[1]]
        at = end
    return "".join(pieces), sum(end - start for start, end in spans)


def _cut(shown: str) -> str:
    return shown if len(shown) <= MOST else f"{shown[: MOST // 2]} ... {shown[-MOST // 2 :]}"
