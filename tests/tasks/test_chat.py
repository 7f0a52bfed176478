"""Conversations are written by the model's own template, and the tokens that are scored are the assistant's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedllm_sec.build.names import checked
from fedllm_sec.errors import DataError, RecipeError
from fedllm_sec.recipe.sections import Data
from fedllm_sec.tasks.causal_lm import CausalLM
from fedllm_sec.tasks.chat import Chat, writer_of
from fedllm_sec.tasks.encoding import Encoded

TEMPLATES = Path(__file__).parent / "templates"
MARKS = [
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "[gMASK]", "<|system|>", "<|user|>", "<|assistant|>",
]  # fmt: skip
FAMILIES = ("chatml", "qwen2_5", "llama3", "mistral", "gemma3")
HISTORY = json.dumps([["user", "Name a tool."], ["assistant", "A plane."]])
ONE = {"text": "Name a pet.", "context": "", "response": "A cat."}
TWO = {"text": "And one more?", "context": "", "response": "A rasp.", "history": HISTORY, "system": ""}


def bytes_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """One token a byte and one for each mark."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS])
    found = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    found.chat_template = template
    return found


def chat(name: str, **data: Any) -> Chat:
    written = writer_of(bytes_tokenizer((TEMPLATES / f"{name}.jinja").read_text()), Data(template="chat", **data))
    assert isinstance(written, Chat)
    return written


def spelt(writer: Chat, row: dict[str, str]) -> tuple[str, str, list[str]]:
    """Prompt, answer, and what is scored in the prompt, as text."""
    made, decode = writer.tokens([row]), writer.tokenizer.decode
    (prompt,), (answer,), (earlier,) = made.prompts, made.answers, made.earlier
    return decode(prompt), decode(answer), [decode(prompt[start:end]) for start, end in earlier]


def test_of_an_earlier_answer_no_token_of_what_invites_it_is_scored_where_tokens_part_otherwise_before_it():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = {c: i for i, c in enumerate([*alphabet, "\u010a\u010a"])}  # two line breaks, if nothing follows
    made = Tokenizer(models.BPE(vocab=pairs, merges=[("\u010a", "\u010a")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    assert [len(tokenizer(text)["input_ids"]) for text in ("\n\n", "\n\nA")] == [1, 3]
    tokenizer.chat_template = (TEMPLATES / "llama3.jinja").read_text()
    prompt, answer, earlier = spelt(writer_of(tokenizer, Data(template="chat")), TWO)
    assert (answer, earlier) == ("A rasp.<|eot_id|>", ["A plane.<|eot_id|>"])
    assert prompt.endswith("<|end_header_id|>\n\n")


WRITTEN = {
    "chatml": (
        "<|im_start|>user\nName a tool.<|im_end|>\n<|im_start|>assistant\nA plane.<|im_end|>\n<|im_start|>user\n"
        "And one more?<|im_end|>\n<|im_start|>assistant\n", "A rasp.<|im_end|>\n", "A plane.<|im_end|>\n",
    ),
    "qwen2_5": (
        "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\nName a tool.<|im_end|>\n<|im_start|>assistant\n"
        "A plane.<|im_end|>\n<|im_start|>user\nAnd one more?<|im_end|>\n<|im_start|>assistant\n",
        "A rasp.<|im_end|>", "A plane.<|im_end|>",
    ),
    "llama3": (
        "<s><|start_header_id|>user<|end_header_id|>\n\nName a tool.<|eot_id|><|start_header_id|>assistant"
        "<|end_header_id|>\n\nA plane.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nAnd one more?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n", "A rasp.<|eot_id|>", "A plane.<|eot_id|>",
    ),
    "mistral": (
        "<s>[INST] Name a tool. [/INST] A plane.</s>[INST] And one more? [/INST]", " A rasp.</s>", " A plane.</s>",
    ),
    "gemma3": (
        "<s><start_of_turn>user\nName a tool.<end_of_turn>\n<start_of_turn>model\nA plane.<end_of_turn>\n"
        "<start_of_turn>user\nAnd one more?<end_of_turn>\n<start_of_turn>model\n",
        "A rasp.<end_of_turn>\n", "A plane.<end_of_turn>\n",
    ),
    "glm4": (
        "[gMASK]<|user|>\nName a tool.<|assistant|>\nA plane.<|user|>\nAnd one more?<|assistant|>\n",
        "A rasp.<|user|>", "A plane.<|user|>",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN)
def test_every_answer_is_scored_to_the_mark_that_ends_it(name: str):
    prompt, answer, earlier = WRITTEN[name]
    assert spelt(chat(name), TWO) == (prompt, answer, [earlier])
    assert spelt(chat(name, loss_on="last_response"), TWO) == (prompt, answer, [])
    assert chat(name).tokens([TWO]).prompts[0].count(256) == prompt.count("<s>")  # no begin token beside the template's


@pytest.mark.parametrize(
    ("name", "end"), [("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("gemma3", "<end_of_turn>"),
                      ("mistral", "</s>"), ("glm4", "<|user|>")]
)  # fmt: skip
def test_the_mark_that_ends_an_answer_is_found_also_where_it_is_the_next_turns(name: str, end: str):
    writer = chat(name)
    assert writer.tokenizer.convert_ids_to_tokens(writer.end) == end
    assert writer.answer_ids(["A cat."]) == [writer.tokens([ONE]).answers[0]]


MARKED = (  # what an assistant says as its words and, in a mark of their own, its last ones
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and (not loop.last or BOTH) %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    " -- {% generation %}Yours.<|im_end|>{% endgeneration %}\n"
    "{% elif m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_marks_belong_to_the_turn_in_which_they_stand():
    three = TWO | {"history": json.dumps([*json.loads(HISTORY), ["user", "Mr. A plane."], ["assistant", "A saw."]])}
    writer = writer_of(bytes_tokenizer(MARKED.replace("BOTH", "false")), Data(template="chat"))
    said = ["A plane.", "A saw.", "Yours.<|im_end|>", "Yours.<|im_end|>"]
    _, answer, earlier = spelt(writer, three)
    assert (answer, sorted(earlier)) == ("A rasp.<|im_end|>", said)
    last = writer_of(bytes_tokenizer(MARKED.replace("BOTH", "false")), Data(template="chat", loss_on="last_response"))
    assert spelt(last, three)[1:] == ("A rasp.<|im_end|>", [])


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}<|im_end|>\n{% else %}{{ USER }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_users_words_that_a_template_writes_otherwise_do_not_mix_turns():
    louder = writer_of(bytes_tokenizer(CHATML.replace("USER", "m['content'] | upper")),
                       Data(template="chat", loss_on="last_response"))  # fmt: skip
    assert spelt(louder, TWO)[1:] == ("A rasp.<|im_end|>", [])
    cut = writer_of(bytes_tokenizer(CHATML.replace("USER", "m['content'][:3]")), Data(template="chat"))
    with pytest.raises(DataError, match="writes the user's words otherwise"):
        cut.tokens([TWO])


def test_a_marked_answer_ends_with_its_last_character_and_the_mark_that_ends_it():
    writer = writer_of(bytes_tokenizer(CHATML.replace("USER", "m['content']")), Data(template="chat"))
    fox = {**TWO, "response": "yes 🦊", "history": json.dumps([["user", "a"], ["assistant", "no Å"]])}
    assert spelt(writer, fox)[1:] == ("yes 🦊<|im_end|>", ["no Å<|im_end|>"])
    tight = writer_of(bytes_tokenizer(CHATML.replace("USER", "m['content']").replace("% gen", "%gen")),
                      Data(template="chat"))  # fmt: skip
    assert spelt(tight, fox) == spelt(writer, fox)


def test_marks_before_the_first_question_are_refused():
    template = "{% generation %}{{ messages[0]['content'] }}{% endgeneration %}" + CHATML.replace(
        "USER", "m['content']"
    )
    writer = writer_of(bytes_tokenizer(template), Data(template="chat"))
    with pytest.raises(DataError, match="cover what stands before the first question"):
        writer.tokens([{**ONE, "system": "Be brief."}])


def test_an_answer_of_which_two_pieces_are_marked_is_refused():
    writer = writer_of(bytes_tokenizer(MARKED.replace("BOTH", "true")), Data(template="chat"))
    for row in (ONE, TWO):
        with pytest.raises(DataError, match=r"generation marks cover 2 pieces of one answer \('A "):
            writer.tokens([row])


def test_marks_that_follow_what_the_user_says_are_refused():
    template = MARKED.replace("BOTH", "messages[0]['content'] == 'Name a tool.'")
    template = template.replace("not loop.last or", "")  # two marks a turn for these words, one for any others
    writer = writer_of(bytes_tokenizer(template), Data(template="chat"))
    with pytest.raises(DataError, match="depends on what the user says"):
        writer.tokens([TWO])


@pytest.mark.parametrize("marked", [False, True])
def test_an_earlier_answer_is_scored_to_its_own_mark_where_the_last_has_another(marked: bool):
    said = "{% generation %}{{ m['content'] }}{% endgeneration %}" if marked else "{{ m['content'] }}"
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}<|assistant|>{% else %}" + said
        + "{{ '</s>' if loop.last else '<|im_end|>' }}{% endif %}{% endfor %}"
    )  # fmt: skip
    writer = writer_of(bytes_tokenizer(template), Data(template="chat"))
    assert spelt(writer, TWO)[1:] == ("A rasp.</s>", ["A plane.<|im_end|>"])


def test_a_template_without_any_mark_is_ended_by_the_end_token():
    plain = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}" \
            "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"  # fmt: skip
    writer = writer_of(bytes_tokenizer(plain), Data(template="chat"))
    assert spelt(writer, ONE) == ("user: Name a pet.\nassistant: ", "A cat.\n</s>", [])


def test_system_prompt_and_context_are_part_of_what_is_asked():
    row = {"text": "Sum up.", "context": "It rained.", "response": "Rain.", "system": "Be brief.", "history": ""}
    assert spelt(chat("chatml"), row)[0] == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSum up.\n\nIt rained.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_template_that_rewrites_earlier_turns_is_refused_unless_only_the_last_is_scored():
    with pytest.raises(DataError, match=r"with a later turn the template writes earlier ones otherwise \(turn 2 of 4"):
        chat("rewriting").tokens([TWO])
    said = spelt(chat("rewriting", loss_on="last_response"), TWO)
    assert said[1] == "<think></think>A rasp.<|im_end|>\n"
    forced = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '</s>' }}{% endfor %}" \
             "{% if add_generation_prompt %}{{ 'assistant:<think>' }}{% endif %}"  # fmt: skip
    with pytest.raises(DataError, match=r"it invites an answer with '.*assistant:<think>'"):
        writer_of(bytes_tokenizer(forced), Data(template="chat")).tokens([ONE])


def test_where_a_token_would_reach_over_the_border_the_prompt_stays_as_it_is_asked():
    merged = Tokenizer(models.BPE(
        vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))} | {"ĊA": 256},
        merges=[("Ċ", "A")],
    ))  # fmt: skip
    merged.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    merged.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS])
    for name in ("chatml", "qwen2_5"):
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=merged, eos_token="</s>", chat_template=(TEMPLATES / f"{name}.jinja").read_text()
        )
        made = writer_of(tokenizer, Data(template="chat")).tokens([ONE])
        assert made.prompts[0][-1] == tokenizer.convert_tokens_to_ids("Ċ")
        assert made.answers[0][0] == tokenizer.convert_tokens_to_ids("A")
        assert tokenizer.convert_tokens_to_ids("<|im_end|>") in made.answers[0]
        holding = writer_of(tokenizer, Data(template="chat")).tokens([ONE | {"response": "A <|im_end|>cat."}])
        said = "".join(tokenizer.convert_ids_to_tokens(holding.answers[0]))
        assert said.removesuffix("Ċ") == "AĠ<|im_end|>cat.<|im_end|>"  # not cut where the answer holds the mark


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, r"has no chat template. Give one as a file in data\.chat_template"),
        ("{% for m in messages %}{{ m['content'] }", "does not render the roles user assistant"),
        ("{{ raise_exception('no system prompts here') }}", "no system prompts here"),
        ("{{ 1 / 0 }}", "does not render"),
        ("fixed", "the template writes no token of the answer 'A cat.'"),
        (
            "{% for m in messages %}{{ m['content'] }}{% generation %}{% endgeneration %}{% endfor %}",
            "its generation marks mark nothing",
        ),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_with_its_place(template: str | None, words: str):
    with pytest.raises(DataError, match=rf"data\.template: chat: .*{words}"):
        writer_of(bytes_tokenizer(template), Data(template="chat")).tokens([ONE])


def test_roles_in_an_order_that_the_template_refuses_are_named():
    row = {**TWO, "history": json.dumps([["user", "a"]])}
    with pytest.raises(DataError, match=r"the roles user user assistant \(Roles must be user, assistant"):
        chat("mistral").tokens([row])


def test_a_template_of_ones_own_is_a_file(tmp_path: Path):
    path = tmp_path / "mine.jinja"
    with pytest.raises(DataError, match=r"data\.chat_template: .*mine\.jinja: cannot be read"):
        writer_of(bytes_tokenizer(), Data(template="chat", chat_template=str(path)))
    path.write_text("{{ messages[9]['content'] }}")
    with pytest.raises(DataError, match=r"data\.chat_template: .*mine\.jinja: the template does not render"):
        writer_of(bytes_tokenizer(), Data(template="chat", chat_template=str(path))).tokens([ONE])
    path.write_bytes(b"\xff")
    with pytest.raises(DataError, match="is not UTF-8"):
        writer_of(bytes_tokenizer(), Data(template="chat", chat_template=str(path)))
    path.write_text(" \n")
    with pytest.raises(DataError, match="is empty"):
        writer_of(bytes_tokenizer(), Data(template="chat", chat_template=str(path)))
    path.write_text((TEMPLATES / "llama3.jinja").read_text())
    written = writer_of(bytes_tokenizer("{{ 'not this' }}"), Data(template="chat", chat_template=str(path)))
    assert spelt(written, ONE)[1] == "A cat.<|eot_id|>"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"template": "chat", "answer": " {response}!"}, r"data\.answer: the chat template writes the whole row"),
        ({"template": "chat", "template_with_context": "{text}{context}"}, r"data\.template_with_context: the chat"),
        ({"system": "Be brief."}, r"data\.system: is for the model's own chat template"),
        ({"chat_template": "x.jinja"}, r"data\.chat_template: is for the model's own chat template"),
    ],
)
def test_settings_that_could_not_act_are_refused(small, data, words):
    small["data"].pop("template")
    small["data"] |= data
    with pytest.raises(RecipeError, match=words):
        checked(small)


# ---------------------------------------------------------------- the loss


def model_of(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    ))  # fmt: skip


class Bare(torch.nn.Module):
    """A model with the shell that CausalLM expects of peft."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model

    def get_base_model(self) -> LlamaForCausalLM:
        return self.model

    def forward(self, **given: Any) -> Any:
        return self.model(**given)


def task_of(name: str, **data: Any) -> CausalLM:
    tokenizer = bytes_tokenizer((TEMPLATES / f"{name}.jinja").read_text())
    return CausalLM(Bare(model_of(tokenizer)), tokenizer, Data(template="chat", **data), torch.device("cpu"))


@pytest.mark.parametrize("loss_on", ["response", "last_response", "all"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_is_the_mean_over_the_tokens_that_are_said(name: str, loss_on: str):
    task = task_of(name, loss_on=loss_on)
    shard, losses = task.writer.tokens([ONE, TWO]), []
    prompt, answer, _ = WRITTEN[name]
    whole = prompt + answer + ("\n" if name == "qwen2_5" and loss_on == "all" else "")
    for row in (0, 1):
        ids = torch.tensor([shard.prompts[row] + shard.answers[row]])
        if row == 1:
            assert task.tokenizer.decode(ids[0]) == whole
        logits = task.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        each = -logits[torch.arange(ids.shape[1] - 1), ids[0, 1:]]
        scored = torch.zeros(ids.shape[1] - 1, dtype=torch.bool)
        for start, end in [(1, None)] if loss_on == "all" else [*shard.earlier[row], (len(shard.prompts[row]), None)]:
            scored[slice(start - 1, end - 1 if end else None)] = True
        losses.append(each[scored])
    assert torch.allclose(task.loss(shard, [0, 1]), torch.cat(losses).mean(), atol=1e-6)
    assert task.weight(shard, [0, 1]) == sum(map(len, losses))


def test_greedy_answers_stop_at_the_templates_mark():
    task = task_of("llama3")
    assert task.stop_tokens["template"] == [task.tokenizer.convert_tokens_to_ids("<|eot_id|>")]
    assert task.decode(task.answer_ids(["A cat."])[0]) == "A cat."
    assert isinstance(task.writer.tokens([ONE]), Encoded)
