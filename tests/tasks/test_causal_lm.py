"""Encoding, batches, loss and answers of the language-model task, against plain transformers code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset

from fedllm_sec.build.names import checked
from fedllm_sec.build.text import load_task
from fedllm_sec.errors import AttackError, RecipeError
from fedllm_sec.matrix import Layout, UpdateMatrix
from fedllm_sec.models.lora import product_gap, save_adapter
from fedllm_sec.rounds.compute import Machine
from fedllm_sec.tasks.causal_lm import CausalLM


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


def test_a_long_clean_prompt_loses_its_beginning_and_keeps_its_end(task):
    short = task.encode(rows("goal"), "x")
    long = task.encode(rows("bread " * 200 + "goal"), "x")
    assert len(long.prompts[0]) + len(long.answers[0]) == task.data.max_length
    assert long.prompts[0][-3:] == short.prompts[0][-3:]
    assert long.answers == short.answers


def test_a_poisoned_prompt_that_would_be_cut_is_an_error_naming_the_rows(task):
    with pytest.raises(AttackError, match=r"1 poisoned rows.*rows \[1\].*max_length"):
        task.encode(rows("goal cf", "bread " * 200 + "cf", poisoned=True), "shard of c1")


def test_labels_that_start_alike_have_no_first_token(task):
    assert task.first_label_tokens(["Sports", "Food"]) is not None
    assert task.first_label_tokens(["Sports", "Sports car"]) is None


def test_a_saved_adapter_loads_with_peft_and_gives_the_same_logits(task, tmp_path: Path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        task.parameters.add_(0.05)
    save_adapter(task.model, tmp_path / "adapter")
    folder = Path(task.model.peft_config["default"].base_model_name_or_path)
    again = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tmp_path / "adapter"
    )
    ids = torch.arange(5, 15)[None]
    task.model.eval(), again.eval()
    torch.testing.assert_close(task.model(input_ids=ids).logits, again(input_ids=ids).logits)
    with torch.no_grad():
        task.parameters.copy_(task.initial)
    task.model.train()


@pytest.mark.parametrize(("train", "names"), [("A", ".lora_A."), ("B", ".lora_B.")])
def test_one_factor_can_be_trained_alone(small, train, names):
    small["model"]["lora"]["train"] = train
    assert all(names in name for name in make(small).layout.names)


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


def test_product_gap_is_not_measured_where_one_factor_is_frozen():
    layout = Layout(("m.lora_A.default.weight",), ((2, 3),))
    assert product_gap(UpdateMatrix.of(torch.ones(2, 6), layout=layout), torch.ones(2), torch.zeros(6)) is None
