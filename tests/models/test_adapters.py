"""Every setting of an adapter: what it trains, where it starts, and that the saved folder is the same model."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from fedllm_sec.attacks.conformance import example_view
from fedllm_sec.attacks.update.gauge import lora_gauge
from fedllm_sec.build.names import checked
from fedllm_sec.errors import RecipeError
from fedllm_sec.matrix import UpdateMatrix
from fedllm_sec.models.lora import add_adapter, load_base, load_tokenizer
from fedllm_sec.models.products import product_gap
from fedllm_sec.models.saving import refuse_tied, save_adapter, save_merged, save_whole
from fedllm_sec.models.shifted import Shifted
from fedllm_sec.recipe.language_model import Lora, Model
from fedllm_sec.recipe.sections import Data
from fedllm_sec.tasks.causal_lm import CausalLM
from tests.models.test_families import CPU, LLAMA, ROWS, logits, saved_base

ALL = range(len(ROWS))
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "patterns": {"r": 2, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"k_proj": 3.0}},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "layers": {"layers_to_transform": [1]},
    "head": {"modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "pissa": {"r": 2, "init_lora_weights": "pissa"},
    "pissa_niter_16": {"r": 2, "init_lora_weights": "pissa_niter_16"},
    "olora": {"r": 2, "init_lora_weights": "olora", "use_dora": True, "modules_to_save": ["norm"]},
    "pissa, B alone": {"r": 2, "init_lora_weights": "pissa", "train": "B", "use_rslora": True},
    "core": {"r": 2, "average": "core", "rank_pattern": {"q_proj": 3}, "use_rslora": True},
    "pissa, patterns": {
        "r": 2, "init_lora_weights": "pissa", "use_rslora": True, "rank_pattern": {"q_proj": 3},
        "alpha_pattern": {"v_proj": 5.0},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(Model())


@pytest.fixture(scope="module")
def model(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return saved_base("llama", LLAMA, tokenizer, tmp_path_factory.mktemp("llama") / "base")


def with_lora(model: Model, lora: dict[str, Any] | None, **settings: Any) -> Model:
    return model.model_copy(update={**settings, "lora": None if lora is None else Lora(**lora)})


def task_of(model: Model, tokenizer: Any) -> CausalLM:
    base, _ = load_base(model, CPU)
    made = CausalLM(add_adapter(base, model, 0), tokenizer, Data(max_length=32), CPU)
    made.model.eval()
    return made


def gradient(task: CausalLM) -> Tensor:
    task.model.train()
    task.parameters.grad.zero_()
    task.loss(ROWS, ALL).backward()
    task.model.eval()
    return task.parameters.grad.clone()


def moved(task: CausalLM) -> None:
    with torch.no_grad():
        task.parameters.add_(0.2 * torch.randn(task.layout.size, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("name", SETTINGS)
def test_an_adapter_starts_as_the_base_and_is_saved_for_the_base_as_it_is_published(
    name: str, model: Model, tokenizer: Any, tmp_path: Path
):
    settings = with_lora(model, SETTINGS[name])
    plain = AutoModelForCausalLM.from_pretrained(model.name, dtype=torch.float32)
    base, task = logits(plain), task_of(settings, tokenizer)
    torch.testing.assert_close(logits(task.model), base, rtol=1e-4, atol=1e-4)
    assert torch.equal(task.initial, task_of(settings, tokenizer).initial)  # every client starts from the same

    checkpointed = task_of(with_lora(model, SETTINGS[name], gradient_checkpointing=True), tokenizer)
    assert torch.equal(gradient(task), gradient(checkpointed))

    moved(task)
    wanted = logits(task.model)
    assert not torch.allclose(wanted, base, atol=0.5)
    save_adapter(task.model, tokenizer, settings, tmp_path / "adapter", initial=task.layout.split(task.initial))
    again = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(again), wanted, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(logits(again.merge_and_unload()), wanted, rtol=1e-3, atol=1e-3)
    if name != "embedding":
        save_merged(task.model, tokenizer, tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
        torch.testing.assert_close(logits(merged), wanted, rtol=1e-3, atol=1e-3)
        assert torch.equal(logits(task.model), wanted)  # the run goes on with its own


def test_a_merged_model_holds_what_was_added_to_base_weights(model: Model, tokenizer: Any, tmp_path: Path):
    task = task_of(with_lora(model, {"r": 2, "average": "exact"}), tokenizer)
    moved(task)
    names, rng = list(task.scales), torch.Generator().manual_seed(2)
    shifted = Shifted(task.model, names)
    for name, rank in ((names[0], 1), (names[1], 40)):  # kept as factors, and as a whole matrix
        out, wide = shifted.layers[name].get_base_layer().weight.shape
        shifted.add(name, 0.3 * torch.randn(out, rank, generator=rng), torch.randn(rank, wide, generator=rng))
    wanted = logits(task.model)
    save_merged(task.model, tokenizer, tmp_path / "merged", shifted=shifted)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-3, atol=1e-3)
    assert torch.equal(logits(task.model), wanted)


def test_a_merged_model_whose_output_is_its_embedding_is_refused_where_one_of_them_is_adapted(
    model: Model, tokenizer: Any, tmp_path: Path
):
    tied = saved_base("llama", {**LLAMA, "tie_word_embeddings": True}, tokenizer, tmp_path / "tied")
    refuse_tied(task_of(with_lora(tied, {"r": 2}), tokenizer).model)
    refuse_tied(task_of(with_lora(model, {"r": 2, "target_modules": ["lm_head"]}), tokenizer).model)
    with pytest.warns(UserWarning, match="one matrix"):
        task = task_of(with_lora(tied, {"r": 2, "target_modules": ["lm_head"]}), tokenizer)
    with pytest.raises(RecipeError, match=r"output.save: merged: .* act in both places"):
        refuse_tied(task.model)


def test_an_adapter_that_is_taken_off_leaves_the_base_or_the_base_is_read_anew(model: Model, tokenizer: Any):
    published = load_base(model, CPU)[0].state_dict()
    for name in ("plain", "patterns", "dora", "layers", "head", "embedding", "gaussian", "pissa", "olora", "core"):
        settings = SETTINGS[name]
        made = with_lora(model, settings)
        after = task_of(made, tokenizer).model.unload().state_dict()
        assert made.changes_base or all(torch.equal(published[key], after[key]) for key in published), name
    assert with_lora(model, None).changes_base


def test_what_is_trained_has_the_names_and_ranks_of_the_recipe(model: Model, tokenizer: Any):
    shapes = {}
    for name in ("patterns", "dora", "layers", "head"):
        layout = task_of(with_lora(model, SETTINGS[name]), tokenizer).layout
        shapes[name] = dict(zip(layout.names, layout.shapes, strict=True))
    layer = "base_model.model.model.layers.1.self_attn"
    assert shapes["patterns"][f"{layer}.q_proj.lora_A.default.weight"] == (4, 16)
    assert shapes["patterns"][f"{layer}.k_proj.lora_A.default.weight"] == (2, 16)
    assert shapes["dora"][f"{layer}.k_proj.lora_magnitude_vector.default.weight"] == (8,)
    assert not any(".layers.0." in name for name in shapes["layers"])
    assert shapes["head"]["base_model.model.lm_head.modules_to_save.default.weight"] == (1536, 16)


def test_a_whole_model_is_trained_saved_and_loaded(model: Model, tokenizer: Any, tmp_path: Path):
    task = task_of(with_lora(model, None), tokenizer)
    assert task.layout.size == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(model.name).parameters())
    assert "model.embed_tokens.weight" in task.layout.names
    assert task.scales == {}
    checkpointed = task_of(with_lora(model, None, gradient_checkpointing=True), tokenizer)
    assert torch.equal(gradient(task), gradient(checkpointed))
    moved(task)
    save_whole(task.model, tokenizer, tmp_path / "model", card="of it")
    again = load_base(Model(name=str(tmp_path / "model")), CPU)[0].eval()
    assert torch.equal(logits(again), logits(task.model))
    assert (tmp_path / "model" / "README.md").read_text() == "of it"


def test_the_gap_of_products_counts_each_layer_as_often_as_the_model_does(model: Model, tokenizer: Any):
    """||sum w s BA - s B'A'|| / ||sum w s BA - s B_0 A_0|| over dense products, with s = alpha / r of each layer."""
    task = task_of(with_lora(model, {**SETTINGS["patterns"], "use_dora": True}), tokenizer)
    rng = torch.Generator().manual_seed(0)
    start, rows = torch.randn(task.layout.size, generator=rng), torch.randn(3, task.layout.size, generator=rng)
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    error = change = 0.0
    for a, scale in task.scales.items():
        b = a.replace("lora_A", "lora_B")

        def product(vector: Tensor, a: str = a, b: str = b) -> Tensor:
            parts = task.layout.split(vector.double())
            return parts[b] @ parts[a]

        mean = sum(w * product(start + row) for w, row in zip(weights, rows, strict=True))
        error += scale**2 * float((mean - product(start + weights.float() @ rows)).square().sum())
        change += scale**2 * float((mean - product(start)).square().sum())
    assert sorted(set(task.scales.values())) == [1.5, 4.0, 8.0]  # 3 / 2, 16 / 4, 16 / 2
    updates = UpdateMatrix.of(rows, layout=task.layout)
    assert product_gap(updates, weights, start, task.scales) == pytest.approx((error / change) ** 0.5, rel=1e-5)


def test_another_gauge_is_the_same_model_whatever_is_trained_beside_the_factors(model: Model, tokenizer: Any):
    settings = {"use_dora": True, "modules_to_save": ["lm_head"], "target_modules": ["embed_tokens", "q_proj"]}
    task = task_of(with_lora(model, settings), tokenizer)
    moved(task)
    wanted, own = logits(task.model), task.parameters.detach() - task.initial
    view = replace(example_view(), own=own[None], global_vector=task.initial, layout=task.layout)
    forged = lora_gauge(view, factor=4.0)[0]
    assert forged.norm() > 2 * own.norm()
    with torch.no_grad():
        task.parameters.copy_(task.initial + forged)
    torch.testing.assert_close(logits(task.model), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"rank_pattern": {"q_prj": 4}}, r'rank_pattern: "q_prj" fits none .* down_proj, gate_proj'),
        ({"alpha_pattern": {"lm_head": 4}}, r'alpha_pattern: "lm_head" fits none of the adapted layers'),
        ({"layers_to_transform": [7]}, r"layers_to_transform: \[7\]: no block of these numbers"),
        ({"modules_to_save": ["lm_haed"]}, r'modules_to_save: the model has no module "lm_haed"'),
        ({"modules_to_save": ["act_fn"]}, r'modules_to_save: "act_fn" has no weights of its own'),
    ],
)
def test_a_setting_of_an_adapter_that_cannot_act_is_an_error(
    lora: dict[str, Any], words: str, model: Model, tokenizer: Any
):
    with pytest.raises(RecipeError, match=words):
        task_of(with_lora(model, lora), tokenizer)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"lora": {"init_lora_weights": "eva"}},
            "init_lora_weights: 'eva': such a start is computed from training data",
        ),
        ({"lora": {"init_lora_weights": "loftq"}}, "quantises the base by a rule that no saved adapter tells"),
        ({"lora": {"init_lora_weights": False}}, "init_lora_weights: false: such a start makes B random too"),
        ({"lora": {"init_lora_weights": "olora"}, "load_in_8bit": True}, "packed ones would be rounded anew"),
        ({"lora": {"rank_pattern": {"(": 4}}}, "rank_pattern.*is no regular expression"),
        ({"lora": {"vera": True}}, "model.lora.vera: unknown key"),
        ({"lora": None, "load_in_4bit": True}, "model.lora: null: packed weights cannot be trained.*drop load_in_4bit"),
        ({"lora": None, "dtype": "bfloat16"}, "the whole model is trained in float32.*mixed_precision: bf16"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "load_in_8bit: true: load_in_4bit is true as well"),
    ],
)
def test_a_start_that_cannot_be_federated_or_a_contradiction_is_refused_by_the_recipe(
    settings: dict[str, Any], words: str
):
    with pytest.raises(RecipeError, match=words):
        checked({"model": settings, "clients": {"local_steps": 1}})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"revision": "v1"}, "model.revision: v1: tiny is on this disk"),
        (
            {"attn_implementation": "flash_attention_2"},
            "model.attn_implementation: flash_attention_2: .* or null",
        ),
        ({"load_in_8bit": True}, r"model.load_in_8bit: needs bitsandbytes.*pip install 'fedllm_sec\[llm-gpu\]'"),
    ],
)
def test_what_this_machine_or_this_model_has_not_is_named(
    settings: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(RecipeError, match=words):
        load_base(Model(**settings), CPU)


def test_attention_is_computed_as_asked():
    assert load_base(Model(attn_implementation="eager"), CPU)[0].config._attn_implementation == "eager"
