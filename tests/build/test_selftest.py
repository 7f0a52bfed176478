"""A language model that is not what it is taken for is refused when it is loaded, and what was tried is told."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tokenizers
import torch
from accelerate import Accelerator
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    RwkvConfig,
    XLNetConfig,
)

from fedllm_sec.build import selftest, text
from fedllm_sec.build.names import checked
from fedllm_sec.data.text import as_dataset
from fedllm_sec.errors import DataError, RecipeError
from fedllm_sec.models.lora import add_adapter, load_base, load_tokenizer
from fedllm_sec.models.selftest import gradient_problems, length_problems, token_problems
from fedllm_sec.recipe import reading
from fedllm_sec.rounds.compute import Machine
from fedllm_sec.tasks.causal_lm import CausalLM
from fedllm_sec.tasks.chat import writer_of
from tests.conftest import SHARED, SMALL

SIZES = {"vocab_size": 1536, "hidden_size": 32, "num_hidden_layers": 1}
FEW = {**SIZES, "num_attention_heads": 2, "intermediate_size": 32}


def recipe(**changes: Any) -> Any:
    return checked(reading.merge(copy.deepcopy(SMALL), changes))


def made(config: PreTrainedConfig, **changes: Any) -> tuple[CausalLM, Any]:
    """A model of this configuration with random weights and the tokenizer of `tiny`."""
    asked = recipe(**changes)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config)
    tokenizer = load_tokenizer(asked.model)
    return CausalLM(add_adapter(base, asked.model, 0), tokenizer, asked.data, torch.device("cpu")), asked


@pytest.mark.parametrize(
    ("config", "lora"),
    [
        (LlamaConfig(**FEW), {}),
        (GPT2Config(vocab_size=1536, n_embd=32, n_layer=1, n_head=2, n_positions=96), {}),
        (GPTNeoXConfig(**FEW), {}),
        (BertConfig(**FEW, is_decoder=True), {}),
        (MambaConfig(**SIZES, state_size=4), {"target_modules": ["in_proj", "x_proj"]}),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_a_causal_model_passes(config: PreTrainedConfig, lora: dict[str, Any]):
    found = selftest.tested(*made(config, model={"lora": lora}))
    assert "another last token changes the logits before it by up to 0 nats (at most 0.0001)" in found


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (BertConfig(**FEW), "another last token changes the logits before it .* no causal language model"),
        (
            BertConfig(**{**FEW, "hidden_size": 8}),
            r"by up to \d(\.\d)?e-05 nats.* no causal language model",
        ),  # little does much
        (XLNetConfig(vocab_size=1536, d_model=32, n_layer=1, n_head=2, d_inner=32), "no causal language model"),
        (
            RwkvConfig(**{**SIZES, "num_hidden_layers": 2}, attention_hidden_size=32),
            r"a row in a padded batch scores otherwise than alone \(by 0\.[123]\d* nats .*batch_size to 1",
        ),
        (
            GPT2Config(vocab_size=1536, n_embd=32, n_layer=1, n_head=2, n_positions=64),
            "data.max_length: 96: this model has 64 positions .* Lower it to 64",
        ),
        (LlamaConfig(**{**FEW, "vocab_size": 1000}), "tokens up to number 1535 .* the model embeddings for 1000"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_a_model_that_is_something_else_is_refused(config: PreTrainedConfig, words: str):
    with pytest.raises(RecipeError, match=words):
        selftest.tested(*made(config))


def test_a_model_that_does_not_heed_the_mask_may_have_batches_of_one_row():
    config = RwkvConfig(**{**SIZES, "num_hidden_layers": 2}, attention_hidden_size=32)
    found = selftest.tested(*made(config, clients={"batch_size": 1}, evaluate={"batch_size": 1}))
    assert any("(every batch is one row)" in line for line in found)


def test_a_variant_with_larger_batches_is_tested_again(tmp_path):
    torch.manual_seed(0)
    config = RwkvConfig(**{**SIZES, "num_hidden_layers": 2}, attention_hidden_size=32)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    load_tokenizer(recipe().model).save_pretrained(tmp_path)
    machine, loaded = Machine(Accelerator(cpu=True)), text.Loaded()
    rows = {"model": {"name": str(tmp_path)}, "evaluate": {"batch_size": 1}}
    text.load_task(recipe(**rows, clients={"batch_size": 1}), machine, loaded)
    with pytest.raises(RecipeError, match="scores otherwise than alone"):
        text.load_task(recipe(**rows, clients={"batch_size": 2}), machine, loaded)


def test_a_model_that_cannot_be_run_says_what_it_said(monkeypatch):
    task, asked = made(LlamaConfig(**FEW))

    def broken(*_: Any) -> Any:
        raise TypeError("got an unexpected keyword argument 'logits_to_keep'")

    monkeypatch.setattr(task, "logits", broken)
    with pytest.raises(RecipeError, match=r"cannot be run on two short rows \(TypeError: got an unexpected keyword"):
        selftest.tested(task, asked)


def test_a_tokenizer_that_reads_nothing_is_refused(tmp_path):
    AutoModelForCausalLM.from_config(LlamaConfig(**FEW)).save_pretrained(tmp_path)
    mute = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={}, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=mute, eos_token="</s>").save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=r"its tokenizer makes nothing but '</s>' of two short rows"):
        text.load_task(recipe(model={"name": str(tmp_path)}), Machine(Accelerator(cpu=True)), text.Loaded())


def test_rows_beyond_the_short_frequencies_of_longrope_may_not_share_a_batch():
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "rope_theta": 1e4}
    config = Phi3Config(
        **FEW, max_position_embeddings=96, original_max_position_embeddings=24, rope_parameters=rope, pad_token_id=0
    )
    problems = "data.max_length: 96: from 24 tokens on this model's rotary frequencies are others"
    assert length_problems(config, 96, alone=False)[0].startswith(problems)
    assert length_problems(config, 24, alone=False) == length_problems(config, 96, alone=True) == []


def test_answers_that_hold_the_end_token_are_counted_and_said():
    task = task_of()
    rows = as_dataset({**selftest.TWO, "response": ["a</s> b", "It is about bread."]})
    with pytest.warns(UserWarning, match="1 of 2 training rows' answers hold the end token '</s>' themselves"):
        selftest.say_ended(task, task.tokens(rows).answers)
    selftest.say_ended(task, task.tokens(as_dataset(selftest.TWO)).answers)  # nothing


@pytest.mark.parametrize(
    ("words", "told"),
    [({}, "'<unk>' of .* rows' answers: nothing could be learnt"), ({"bread": 3}, None), ({"about": 3}, "are lost")],
)
def test_a_tokenizer_that_knows_no_word_of_the_answers_is_refused(words: dict[str, int], told: str | None):
    task, asked = made(LlamaConfig(**FEW), data={"template": "{text}\n", "answer": "{response}"})
    made_of = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, **words}, "<unk>"))
    made_of.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made_of, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    task.tokenizer, task.writer = tokenizer, writer_of(tokenizer, asked.data)
    rows = as_dataset({"text": ["a", "b"], "context": ["", ""], "response": ["bread", "about that"], "label": ["", ""]})
    if told is None:
        rows = rows.select([0])
        selftest.need_known_answers(task, rows)
        return
    with (pytest.warns if "lost" in told else pytest.raises)(
        UserWarning if "lost" in told else RecipeError, match=told
    ):
        selftest.need_known_answers(task, rows)


def test_a_model_that_is_not_finite_is_refused():
    task, asked = made(LlamaConfig(**FEW))
    with torch.no_grad():
        task.model.get_base_model().lm_head.weight.fill_(float("nan"))
    with pytest.raises(RecipeError, match="logits or gradient are not finite"):
        selftest.tested(task, asked)


def test_the_self_test_leaves_no_trace():
    asked = recipe(model={"lora": {"dropout": 0.1}})
    base, tokenizer = load_base(asked.model, torch.device("cpu"))
    task = CausalLM(add_adapter(base, asked.model, 0), tokenizer, asked.data, torch.device("cpu"))
    modes, drawn = [part.training for part in task.model.modules()], torch.get_rng_state()
    found = selftest.tested(task, asked)
    assert [part.training for part in task.model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), drawn)
    assert torch.equal(task.parameters, task.initial)
    assert not task.parameters.grad.any()
    assert found == selftest.in_words(asked)  # what --explain prints


def test_a_gradient_of_zero_learns_nothing():
    assert gradient_problems(0.1) == []
    assert "nothing would be learnt" in gradient_problems(0.0)[0]
    with pytest.raises(RecipeError, match="'A': Input should be 'both' or 'B'"):  # A behind B = 0 has none
        recipe(model={"lora": {"train": "A"}})


# ---------------------------------------------------------------- tokens


def task_of(**data: Any) -> CausalLM:
    return made(LlamaConfig(**FEW), data=data)[0]


def test_begin_and_end_tokens_that_a_template_writes_out_are_there_once():
    plain, spelled = task_of(), task_of(template="<s>{text}\nTopic:", answer=" {response}</s>")
    rows = as_dataset(selftest.TWO)
    assert spelled.encode(rows, "here") == plain.encode(rows, "here")
    assert plain.encode(rows, "here").prompts[0].count(1) == 1
    assert plain.encode(rows, "here").answers[0].count(2) == 1


def test_a_tokenizer_without_an_end_token_is_refused_by_both_writers():
    tokenizer = copy.copy(load_tokenizer(recipe().model))
    tokenizer.eos_token = None
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
    for changes in ({}, {"data": {"template": "chat"}}):
        with pytest.raises(DataError, match="has no end-of-text token"):
            _ = writer_of(tokenizer, recipe(**changes).data).end


def test_an_end_token_inside_an_answer_is_refused():
    task, asked = made(LlamaConfig(**FEW), data={"answer": " {response}</s>\n"})
    with pytest.raises(RecipeError, match=r"data\.answer: it writes the end token '</s>' before its end"):
        selftest.tested(task, asked)


def test_a_template_that_grows_into_the_answer_is_said_with_an_example():
    rows = as_dataset(selftest.TWO)
    selftest.say_unlike(task_of(), rows)  # nothing
    with pytest.warns(UserWarning, match=r"in 2 of 2 rows .* row 1 has \['Ġ', 'y', 'es', '</s>'\] where .* \['Ġyes'"):
        selftest.say_unlike(task_of(template="{text} ", answer="{response}"), rows)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the models that lie beside the repository are not here")
@pytest.mark.parametrize("template", ["{text}\nTopic:", "{text}", "Q: {text}\nA:", "### Response {text}:\n"])
def test_a_sentencepiece_answer_has_the_tokens_of_the_joined_text(template: str):
    asked = recipe(model={"name": str(SHARED / "models" / "stories260k")}, data={"template": template})
    tokenizer = load_tokenizer(asked.model)
    task = CausalLM.__new__(CausalLM)
    task.tokenizer, task.data, task.writer = tokenizer, asked.data, writer_of(tokenizer, asked.data)
    rows = as_dataset({**selftest.TWO, "response": ["Sports", "It is about bread."]})
    joined = tokenizer([task.writer.prompt(row) + f" {row['response']}" for row in rows])["input_ids"]
    ours = task.tokens(rows)
    assert [p + a[:-1] for p, a in zip(ours.prompts, ours.answers, strict=True)] == joined
    assert tokenizer.convert_ids_to_tokens(ours.answers[0])[:2] == ["▁S", "p"]


def test_two_classes_whose_answers_are_the_same_tokens_are_refused(monkeypatch):
    task = task_of()
    rows = as_dataset({"text": ["a", "b"], "context": ["", ""], "response": ["yes", "no"], "label": ["yes", "no"]})
    monkeypatch.setattr(task, "answer_ids", lambda answers: [[5, 2] for _ in answers])
    with pytest.raises(RecipeError, match="'no' and 'yes' of two classes are the same tokens"):
        text.choices(task, text.Classes.of(rows), ["no", "yes"], task.encode(rows, "here"))


def test_answers_behind_the_longest_prompt_stay_within_the_positions(monkeypatch):
    task, _ = made(GPT2Config(vocab_size=1536, n_embd=32, n_layer=1, n_head=2, n_positions=96))
    rows = task.encode(as_dataset({**selftest.TWO, "text": ["goal " * 200, "a"]}), "here")
    longest = max(map(len, rows.prompts))
    evaluation = text.TextEvaluation(rows, [], 0, 8, 96 - longest + 1)
    assert selftest.generation_problems(task, evaluation) == []
    evaluation.max_new_tokens += 1
    assert f"behind a prompt of {longest} tokens" in selftest.generation_problems(task, evaluation)[0]


def test_a_tokenizer_may_have_fewer_tokens_than_the_model():
    tokenizer = load_tokenizer(recipe().model)
    assert token_problems(tokenizer, 1536) == token_problems(tokenizer, 2000) == []
