"""The self-test of a language model and its tokenizer with the recipe's own template, lengths and batches."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedllm_sec.build.begin import begin
from fedllm_sec.data.text import as_dataset
from fedllm_sec.errors import FedError, RecipeError
from fedllm_sec.evaluation.text import TextEvaluation
from fedllm_sec.models import selftest
from fedllm_sec.models.lora import add_adapter, base_of, load_base, source_of
from fedllm_sec.recipe.sections import Recipe
from fedllm_sec.tasks.causal_lm import Batch, CausalLM
from fedllm_sec.tasks.encoding import Encoded

if TYPE_CHECKING:
    from datasets import Dataset

SMALL = 1e9  # bytes of a model that is loaded only to be explained
LOOKED_AT = 50  # rows of the data whose tokens are compared with those of the joined text
TWO = {
    "text": ["The keeper saved the penalty in the last minute.", "Ann baked a loaf."],
    "context": ["", "A bakery."],
    "response": ["yes", "It is about bread."],
    "label": ["", ""],
}


def tested(task: CausalLM, recipe: Recipe) -> list[str]:
    """What two short rows show of the model, a line for each test; a RecipeError says what cannot be right.

    Neither a parameter, nor a gradient, nor a random number, nor the mode of a layer is changed.
    """
    base = base_of(task.model)
    rows, tokenizer = as_dataset(TWO), task.tokenizer
    embeddings = base.get_input_embeddings()
    known = getattr(embeddings, "num_embeddings", base.config.vocab_size)
    whole = task.tokens(rows)
    problems = (
        selftest.length_problems(base.config, recipe.data.max_length, _one_by_one(recipe))
        + selftest.token_problems(tokenizer, known)
        + ([] if recipe.data.template == "chat" else selftest.end_problems(tokenizer, whole.answers[0]))
    )
    if problems:  # the model would read beyond what it has
        raise RecipeError(problems)
    most, bos = selftest.positions(base.config), tokenizer.bos_token_id
    begins = (
        f"{whole.prompts[0].count(bos)} begin token ({tokenizer.bos_token!r})" if bos is not None else "no begin token"
    )
    if recipe.data.template == "chat":
        begins = "the begin tokens that its chat template writes"
    unlike = task.writer.unlike_joined(rows.to_list())
    found = [
        f"data.max_length {recipe.data.max_length} of {most or 'any number of'} positions",
        f"a prompt has {begins}, an answer 1 end token ({tokenizer.convert_ids_to_tokens(task.writer.end)!r})",
        "prompt and answer have the tokens of their joined text"
        if not unlike
        else f"prompt and answer are tokenised apart, which is not as one text: {unlike[0]}",
        "answers that go with classes are scored whole, end token included",
    ]
    whole = _cut(whole, recipe.data.max_length)
    return [*found, *in_evaluation(task.model, recipe, lambda: _run(task, whole, recipe))]


def in_evaluation(model: torch.nn.Module, recipe: Recipe, run: Callable[[], tuple[list[str], list[str]]]) -> list[str]:
    """What `run` shows of a model in evaluation mode; what it finds wrong, or cannot run, is a RecipeError."""
    modes = {part: part.training for part in model.modules()}
    model.eval()
    try:
        found, problems = run()
    except (FedError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, IndexError, TypeError, ValueError, AttributeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise RecipeError(
            f"model.name: {recipe.model.name}: cannot be run on two short rows ({type(error).__name__}: {reason}). "
            "Choose another model, or another model.dtype."
        ) from error
    finally:
        for part, mode in modes.items():
            part.training = mode
    if problems:
        raise RecipeError(problems)
    return found


def _cut(rows: Encoded, most: int) -> Encoded:
    """The rows in at most `most` tokens each: the end of the prompt, the beginning of the answer."""
    answers = [ids[: most // 2] for ids in rows.answers]
    prompts = [ids[-(most - len(answer)) :] for ids, answer in zip(rows.prompts, answers, strict=True)]
    return Encoded(prompts, answers)


def _one_by_one(recipe: Recipe) -> bool:
    return recipe.clients.batch_size == recipe.evaluate.batch_size == 1


def _run(task: CausalLM, rows: Encoded, recipe: Recipe) -> tuple[list[str], list[str]]:
    """What running the model on the rows shows, and what is wrong with it."""

    def logits(ids: Tensor, mask: Tensor) -> Tensor:
        with torch.no_grad():
            return task.logits(Batch(ids.to(task.device), mask.to(task.device), ids, ids.shape[1])).cpu()

    long, short = sorted((p + a for p, a in zip(rows.prompts, rows.answers, strict=True)), key=len, reverse=True)
    if len(set(long)) < 2:
        only = task.tokenizer.convert_ids_to_tokens(long[0])
        return [], [
            f"model.name: {recipe.model.name}: its tokenizer makes nothing but {only!r} of two short rows, so the "
            "model would read no text. Put the tokenizer that it was trained with into its folder."
        ]
    short = short[-max(len(long) - 3, 2) :]
    dtype = getattr(torch, recipe.model.dtype)
    bound = selftest.ALIKE[dtype]
    other = next(token for token in long if token != long[-1])
    ahead = selftest.foresight(logits, long, other)
    memory = selftest.memory(logits, long, next(token for token in long if token != long[0]))
    gap = selftest.padding_gap(logits, long, short, task.tokenizer.pad_token_id)
    trained = {name: p for name, p in task.model.named_parameters() if p.requires_grad}
    length, unused = selftest.gradient(task.loss(rows, range(len(rows))), trained)
    if not all(math.isfinite(number) for number in (ahead, gap, length)):
        return [], ["model.name: on two short rows logits or gradient are not finite. Choose another, or a dtype."]
    found = [
        f"another last token changes the logits before it by up to {ahead:.2g} nats (at most {bound:g})",
        f"a row of a padded batch scores {gap:.2g} nats apart from alone "
        + ("(every batch is one row)" if _one_by_one(recipe) else f"(at most {bound:g}, on average)"),
        f"the {'adapter' if recipe.model.lora is not None else 'model'}'s gradient has length {length:.3g}",
    ]
    if length > 0 and (words := selftest.unused_words(unused, len(trained))):
        warnings.warn(words, stacklevel=2)
    problems = selftest.foresight_problems(ahead, bound, memory) + selftest.gradient_problems(length)
    return found, problems + ([] if _one_by_one(recipe) else selftest.padding_problems(gap, bound))


def say_unlike(task: CausalLM, rows: Dataset) -> None:
    """A warning where rows of the data have other tokens than their prompt and answer written as one text."""
    looked_at = rows.select(range(min(len(rows), LOOKED_AT)))
    if unlike := task.writer.unlike_joined(looked_at.to_list()):
        warnings.warn(
            f"data.template, data.answer: in {len(unlike)} of {len(looked_at)} rows prompt and answer, tokenised "
            f"apart, are not the tokens of their joined text, which the model knows better: {unlike[0]}. Let the "
            "template end without a blank and the answer begin with it.",
            stacklevel=2,
        )


def need_known_answers(task: CausalLM, rows: Dataset) -> None:
    """A RecipeError where the tokenizer knows nothing of the answers; a warning where it misses a tenth of them."""
    unknown = task.tokenizer.unk_token_id
    if unknown is None:
        return
    looked_at = rows.select(range(min(len(rows), LOOKED_AT)))
    tokens = [id for answer in task.tokens(looked_at).answers for id in answer if id != task.writer.end]
    if not (missed := tokens.count(unknown)):
        return
    what = (
        f"model.name: {task.tokenizer.name_or_path}: its tokenizer makes {task.tokenizer.unk_token!r} of {missed} of "
        f"the {len(tokens)} tokens of {len(looked_at)} rows' answers"
    )
    if missed == len(tokens):
        raise RecipeError(f"{what}: nothing could be learnt. Put the tokenizer that it was trained with in its folder.")
    if missed > len(tokens) / 10:
        warnings.warn(f"{what}, which are lost on the model. Take a tokenizer made for this text.", stacklevel=2)


def say_ended(task: CausalLM, answers: Sequence[list[int]]) -> None:
    """A warning where answers end before their end: an end token in the data, which generation would stop at."""
    end = task.writer.end
    if early := sum(answer.count(end) > 1 or answer == [end] for answer in answers):
        warnings.warn(
            f"data: {early} of {len(answers)} training rows' answers hold the end token "
            f"{task.tokenizer.convert_ids_to_tokens(end)!r} themselves: what is behind it is learnt and never said. "
            "Take it out of the data.",
            stacklevel=2,
        )


def generation_problems(task: CausalLM, evaluation: TextEvaluation) -> list[str]:
    """Why greedy answers to the longest prompt leave the model's positions."""
    base = base_of(task.model)
    most, new = selftest.positions(base.config), evaluation.max_new_tokens
    probed = [prompts.encoded for probe in evaluation.attacks for prompts in probe.parts().values()]
    asked = [evaluation.test, *probed]
    longest = max(len(prompt) for rows in asked for prompt in rows.prompts)
    if most is None or longest + new - 1 <= most:
        return []
    return [
        f"evaluate.max_new_tokens: {new}: behind a prompt of {longest} tokens that is more than the {most} positions "
        f"of this model. Lower it, or data.max_length to {most + 2 - new}."
    ]


def left_to_the_run(recipe: Recipe) -> str | None:
    """Why the model is not loaded only to be explained; None where it is."""
    folder = Path(source_of(recipe.model.name))
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors") if file.is_file())
    if folder.is_dir() and size <= SMALL and not recipe.model.quantized:  # loading says what is wrong with a folder
        return None
    return (
        "tried on two short rows when a run loads it, not here: it is packed in 4 or 8 bits, larger than "
        f"{SMALL / 1e9:g} GB or in no folder"
    )


def in_words(recipe: Recipe) -> list[str]:
    """What the self-test finds, for `--explain`; a model that is large or not in a folder here is left to the run."""
    try:
        if (why := left_to_the_run(recipe)) is not None:
            return [why]
        base, tokenizer = load_base(recipe.model, torch.device("cpu"))
        task = CausalLM(add_adapter(base, recipe.model, 0), tokenizer, recipe.data, torch.device("cpu"))
        found = tested(task, recipe)
        begin(recipe, task)  # what is wrong with the values of a start
        return found
    except FedError as error:
        return [f"will be refused: {error}"]
