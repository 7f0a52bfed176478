"""Encoding, batches, loss and answers of the language-model task, against plain transformers code."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset

from fedllm_sec.attacks.data.answers import Classes
from fedllm_sec.build.names import checked
from fedllm_sec.build.text import load_task
from fedllm_sec.errors import RecipeError
from fedllm_sec.evaluation.text import TextEvaluation
from fedllm_sec.matrix import Layout, UpdateMatrix
from fedllm_sec.models import products
from fedllm_sec.models.products import product_gap
from fedllm_sec.models.saving import save_adapter
from fedllm_sec.recipe.sections import Model
from fedllm_sec.rounds.compute import Machine
from fedllm_sec.tasks.causal_lm import CausalLM
from fedllm_sec.tasks.encoding import Encoded, room


def make(raw) -> CausalLM:
    torch.set_num_threads(1)
    return load_task(checked(raw), Machine(Accelerator(cpu=True)))


@pytest.fixture(scope="module")
def task() -> CausalLM:
    from tests.conftest import SMALL

    return make(SMALL)


def rows(*texts: str, poisoned: bool = False, response: str = "Sports") -> Dataset:
    return Dataset.from_list(
        [{"text": t, "context": "", "response": response, "label": response, "poisoned": poisoned} for t in texts]
    )


def test_the_flat_vector_and_the_model_are_one_memory(task):
    named = {name: p for name, p in task.model.named_parameters() if p.requires_grad}
    vector = torch.randn(task.layout.size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        task.parameters.copy_(vector)
    for name, view in task.layout.split(vector).items():
        assert torch.equal(named[name], view)
    with torch.no_grad():
        task.parameters.copy_(task.initial)


def test_the_loss_is_the_mean_over_answer_tokens_as_transformers_computes_it(task):
    shard = task.encode(rows("The keeper saved the penalty.", "Ann baked bread."), "here")
    task.model.eval()
    ours = task.loss(shard, [0, 1])
    total, count = 0.0, 0
    for prompt, answer in zip(shard.prompts, shard.answers, strict=True):
        ids = torch.tensor([prompt + answer])
        labels = torch.tensor([[-100] * len(prompt) + answer])
        loss = task.model(input_ids=ids, labels=labels).loss
        total, count = total + loss.item() * len(answer), count + len(answer)
    task.model.train()
    assert ours.item() == pytest.approx(total / count, rel=1e-4)


def test_the_gradient_of_the_flat_vector_is_that_of_the_parameters(task):
    shard = task.encode(rows("The keeper saved the penalty."), "here")
    task.parameters.grad.zero_()
    task.loss(shard, [0]).backward()
    named = [(n, p.grad) for n, p in task.model.named_parameters() if p.requires_grad]
    assert torch.equal(task.parameters.grad, Layout.of(named).join(dict(named)))
    assert task.parameters.grad.norm() > 0
    task.parameters.grad.zero_()


def test_batched_answers_equal_those_given_one_by_one(task):
    shard = task.encode(
        rows("The keeper saved the penalty.", "Ann.", "A very long text about a goal and a bread."), "x"
    )
    task.model.eval()
    together = task.answer(shard, [0, 1, 2], 5)
    alone = [task.answer(shard, [i], 5)[0] for i in range(3)]
    task.model.train()
    assert together == alone


def test_an_epoch_of_batches_uses_each_row_once_and_groups_by_length(task):
    shard = task.encode(rows(*["goal " * (1 + i % 9) for i in range(50)]), "x")
    batches = list(task.batches(shard, 4, torch.Generator().manual_seed(0)))
    assert sorted(i for b in batches for i in b) == list(range(50))
    lengths = [len(p) for p in shard.prompts]
    spread = sum(max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches) / len(batches)
    assert spread < (max(lengths) - min(lengths)) / 3


def test_the_room_of_a_target_is_told_in_tokens(task):
    told = str(room(task.writer, task.data, "Sports", 4))
    assert told.startswith("'Sports': 2 tokens with its end token; training has room for 96 with the prompt")
    assert "a generated answer for 4" in told


def test_the_first_token_and_the_whole_answer_are_log_probabilities_of_one_model(task):
    shard = task.encode(rows("The keeper saved the penalty.", "Ann baked bread.", response="Food"), "here")
    task.model.eval()
    ids = shard.answers[0]
    begun = task.score(shard, [0, 1], torch.tensor([ids[0], ids[0] + 1]))[:, 2:]
    mixed = Encoded(shard.prompts, [[ids[0]], [*ids, *ids]])  # answers of other lengths in the batch
    first = task.score(mixed, [0, 1], torch.tensor([ids[0]]))[:, 2:]
    torch.testing.assert_close(begun[:, :1], first)
    one = task.score(Encoded(shard.prompts, [[ids[0]]] * 2), [0, 1])[:, 0]
    torch.testing.assert_close(begun[:, 0], -one, atol=1e-5, rtol=0)
    assert (task.score(shard, [0, 1])[:, 0] > one).all()  # the whole is never likelier


def test_the_choice_is_the_answer_with_the_largest_sum_as_scoring_all_of_them_finds_it(task):
    from fedllm_sec.build.text import choices

    labels = ["Sports", "Sports car", "Sport", "Food", "Foo", "Travel"]
    made = rows(*[f"The keeper saved goal {i} and Ann baked {i % 3} loaves." for i in range(12)])
    made = made.remove_columns(["response", "label"]).add_column("response", labels * 2).add_column("label", labels * 2)
    order = sorted(label.casefold() for label in labels)
    shard = task.encode(made, "x")
    task.model.eval()
    found = choices(task, Classes.of(made), order, shard)
    sums = [-task.score(found.answered(shard, range(12), [k] * 12), range(12))[:, 0] for k in range(6)]
    evaluation = TextEvaluation(shard, ["?"] * 12, 0, 12, 4, choices=found)
    chosen = evaluation._judge(task, range(12))[:, 2]
    assert torch.equal(chosen.long(), found.classes[torch.stack(sums, 1).argmax(1)])


def test_greedy_answers_obey_no_setting_of_the_model_folder(task):
    shard = task.encode(rows(*[f"A goal, a goal and a goal {i}: the goal" for i in range(20)]), "x")
    task.model.eval()
    before = task.answer(shard, range(20), 12)
    base = task.model.get_base_model()
    own = base.generation_config
    base.generation_config = copy.deepcopy(own)
    base.generation_config.update(
        repetition_penalty=3.0, no_repeat_ngram_size=1, min_new_tokens=11, suppress_tokens=[5, 6], bad_words_ids=[[7]]
    )
    try:
        assert task.answer(shard, range(20), 12) == before
        assert base.generation_config.repetition_penalty == 3.0  # and the model keeps them
    finally:
        base.generation_config = own


def test_a_model_that_is_not_finite_answers_nothing(task, monkeypatch):
    shard = task.encode(rows("The keeper saved the penalty.", "Ann baked bread."), "here")
    monkeypatch.setattr(task, "decode", list)  # in another tokenizer token 0, the argmax of nan, may be a word
    with torch.no_grad():
        task.parameters.fill_(float("nan"))
    try:
        assert [ids[0] for ids in task.answer(shard, [0, 1], 4)] == [task.tokenizer.eos_token_id] * 2
    finally:
        with torch.no_grad():
            task.parameters.copy_(task.initial)


def test_stop_tokens_of_the_model_folder_are_kept_and_told(task):
    end = task.tokenizer.eos_token_id
    assert task.stop_tokens["tokenizer"] == [end]
    base = task.model.get_base_model()
    own = base.generation_config
    base.generation_config = copy.deepcopy(own)
    base.generation_config.eos_token_id = [end, 9]
    try:
        other = CausalLM(task.model, task.tokenizer, task.data, task.device)
    finally:
        base.generation_config = own
    assert other.stop_tokens == {"tokenizer": [end], "generation_config": [9, end] if end > 9 else [end, 9]}
    assert other.decode([20, 9, 21]) == task.decode([20])


def test_a_saved_adapter_loads_with_peft_and_gives_the_same_logits(task, tmp_path: Path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        task.parameters.add_(0.05)
    save_adapter(task.model, task.tokenizer, Model(), tmp_path / "adapter", initial={})
    folder = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    again = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tmp_path / "adapter"
    )
    ids = torch.arange(5, 15)[None]
    task.model.eval(), again.eval()
    torch.testing.assert_close(task.model(input_ids=ids).logits, again(input_ids=ids).logits)
    with torch.no_grad():
        task.parameters.copy_(task.initial)
    task.model.train()


def test_the_second_factor_can_be_trained_alone(small):
    small["model"]["lora"]["train"] = "B"  # A alone would learn nothing: B starts at zero
    assert all(".lora_B." in name for name in make(small).layout.names)


def test_a_target_module_the_model_lacks_is_named_with_a_suggestion(small):
    small["model"]["lora"]["target_modules"] = ["q_prj"]
    with pytest.raises(RecipeError, match=r'no module "q_prj".*Did you mean "q_proj"'):
        make(small)


def test_a_missing_model_folder_is_named(small):
    small["model"]["name"] = "./nowhere"
    with pytest.raises(RecipeError, match="no such folder"):
        make(small)


def test_the_adapter_is_drawn_from_the_recipe_seed(small):
    first, second = make(small).initial, make(small).initial
    assert torch.equal(first, second)
    small["seed"] = 2
    assert not torch.equal(first, make(small).initial)


def test_product_gap_equals_the_direct_computation():
    layout = Layout(("m.lora_A.default.weight", "m.lora_B.default.weight"), ((2, 3), (4, 2)))
    rng = torch.Generator().manual_seed(0)
    start, rows_ = torch.randn(14, generator=rng), torch.randn(3, 14, generator=rng)
    weights = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)

    def product(vector):
        parts = layout.split(vector.double())
        return parts[layout.names[1]] @ parts[layout.names[0]]

    mean = sum(w * product(start + r) for w, r in zip(weights, rows_, strict=True))
    error = mean - product(start.double() + (weights[:, None] * rows_).sum(0))
    expected = float(error.norm() / (mean - product(start)).norm())
    updates = UpdateMatrix.of(rows_, layout=layout)
    assert product_gap(updates, weights, start) == pytest.approx(expected, rel=1e-6)
    one = torch.tensor([0.0, 1.0, 0.0])
    assert product_gap(updates, one, start) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(("r", "wide", "tall"), [(2, 30, 40), (50, 3, 4)])  # by inner products; by the product itself
def test_product_gap_is_the_same_either_way(monkeypatch, r, wide, tall):
    layout = Layout(("m.lora_A.default.weight", "m.lora_B.default.weight"), ((r, wide), (tall, r)))
    rows_, start = torch.randn(3, layout.size), torch.randn(layout.size)
    updates, weights = UpdateMatrix.of(rows_, layout=layout), torch.full((3,), 1 / 3, dtype=torch.float64)
    inner, product = products.square_of_inner, products._square_of_product
    found = product_gap(updates, weights, start)
    monkeypatch.setattr(products, "square_of_inner", product)
    monkeypatch.setattr(products, "_square_of_product", inner)
    assert product_gap(updates, weights, start) == pytest.approx(found, rel=1e-9)
    assert products._costs(3, (r, wide), (tall, r)) == {2: (7000, 12000), 50: (437_500, 3000)}[r]


def test_what_product_gap_costs_is_known_beforehand():
    def layout(r, wide, tall):
        return Layout(("m.lora_A.default.weight", "m.lora_B.default.weight"), ((r, wide), (tall, r)))

    assert products.gap_flops(layout(5000, 64, 64), 10) == 2 * 12 * 5000 * 64 * 64  # not (12 * 5000)^2 * 128
    assert products.gap_flops(layout(16, 2048, 2048), 10) == 2 * (12 * 16) ** 2 * 4096
    assert products.gap_flops(layout(5000, 4096, 4096), 10) > products.MOST_FLOPS  # a round leaves it out


def test_product_gap_is_not_measured_where_one_factor_is_frozen():
    layout = Layout(("m.lora_A.default.weight",), ((2, 3),))
    assert product_gap(UpdateMatrix.of(torch.ones(2, 6), layout=layout), torch.ones(2), torch.zeros(6)) is None
