"""Families of text classifiers: a new output drawn by the seed, scores as alone and in float64, folders that load."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedllm_sec.build.card import card
from fedllm_sec.build.names import checked
from fedllm_sec.build.text_classifier import made
from fedllm_sec.data.text import as_dataset
from fedllm_sec.errors import AttackError, DataError, RecipeError
from fedllm_sec.models.lora import base_of
from fedllm_sec.models.saving import save_adapter, save_whole
from fedllm_sec.tasks.classify_text import ClassifyText
from tests import classifiers

CPU = torch.device("cpu")
NAMES = ["Food", "Science", "Sports"]
ROWS = {
    "text": ["the keeper saved the penalty", "the baker baked a loaf of bread in the oven", "the moon"],
    "context": ["", "a bakery", ""],
    "response": ["Sports", "food ", "Science"],
    "label": ["Sports", "food ", "Science"],
}


def recipe(folder: Path | str, lora: Any, **model: Any) -> Any:
    return checked(
        {
            "task": "classify_text",
            "model": {"name": str(folder), "lora": lora, **model},
            "data": {"max_length": 64},
            "clients": {"local_steps": 1},
        }
    )


def reference(task: ClassifyText, row: int) -> torch.Tensor:
    """The log-probabilities of the classes, of the row alone and in float64."""
    model = copy.deepcopy(task.model).double()
    text, context = ROWS["text"][row], ROWS["context"][row]
    told = {"return_tensors": "pt", "return_token_type_ids": True}
    inputs = task.tokenizer(text, context, **told) if context else task.tokenizer(text, **told)
    if not task.writer.typed:
        inputs.pop("token_type_ids", None)
    with torch.no_grad():
        return torch.log_softmax(model(**inputs).logits[0], -1)


@pytest.mark.parametrize("family", classifiers.FAMILIES)
def test_a_family_is_adapted_scored_saved_and_loaded_alike(family: str, tmp_path: Path):
    folder = classifiers.folder(family, tmp_path / "base")
    asked = recipe(folder, {"r": 2, "alpha": 4})
    task = made(asked, CPU, NAMES)
    task.model.eval()

    # the output is new, trained whole and no layer of it has an adapter; everything else has one, or is frozen
    trained = set(task.layout.names)
    base = base_of(task.model)
    behind = [name for name, _ in base.named_children() if name != base.base_model_prefix and name != "dropout"]
    for part in behind:
        assert any(f".{part}.modules_to_save.default." in name for name in trained)
    assert all("lora_" in name or ".modules_to_save." in name for name in trained)
    assert not any("lora_" in name and f".{part}." in name for name in trained for part in behind)
    again = made(asked, CPU, NAMES)
    assert torch.equal(task.initial, again.initial)
    assert not torch.equal(task.initial, made(asked.model_copy(update={"seed": 1}), CPU, NAMES).initial)

    with torch.no_grad():
        task.parameters.add_(0.3 * torch.randn(task.layout.size, generator=torch.Generator().manual_seed(1)))
    rows, everything = task.tokens(as_dataset(ROWS)), [0, 1, 2]
    assert rows.answers == [[2], [0], [1]]
    expected = torch.stack([reference(task, i) for i in everything])
    found = task.score(rows, everything, torch.tensor([0, 1, 2]))
    torch.testing.assert_close(found[:, 2:], expected, rtol=1e-4, atol=1e-4)
    losses = -expected[everything, [2, 0, 1]]
    torch.testing.assert_close(found[:, 0], losses, rtol=1e-4, atol=1e-4)
    assert found[:, 1].tolist() == [1, 1, 1]
    torch.testing.assert_close(task.loss(rows, everything).double(), losses.mean(), rtol=1e-4, atol=1e-4)
    likeliest = expected.argmax(1).tolist()
    assert task.generate(rows, everything) == [[k] for k in likeliest]
    assert [task.decode(ids) for ids in [[2], []]] == ["Sports", ""]

    # what the card says loads the folder, and rows of a batch score alike there
    save_adapter(task.model, task.tokenizer, asked.model, tmp_path / "out", initial=task.layout.split(task.initial))
    written = card(asked, (str(folder), None), [], None, NAMES).partition("```python\n")[2].partition("```")[0]
    there: dict[str, Any] = {}
    exec(written.replace("THIS FOLDER", str(tmp_path / "out")), there)
    batch = task.collate(rows, everything)
    told = {} if batch.types is None else {"token_type_ids": batch.types}
    with torch.no_grad():
        logits = there["model"].eval()(input_ids=batch.ids, attention_mask=batch.mask, **told).logits
    torch.testing.assert_close(logits.log_softmax(-1).double(), expected, rtol=1e-3, atol=1e-3)
    assert there["base"].config.id2label == dict(enumerate(NAMES))


def test_only_a_model_with_two_token_types_is_told_of_them(tmp_path: Path):
    typed = {}
    for family in ("bert", "roberta", "gpt2"):
        task = made(recipe(classifiers.folder(family, tmp_path / family), None), CPU, NAMES)
        typed[family] = task.tokens(as_dataset(ROWS)).types
    assert typed["roberta"] == typed["gpt2"] == []
    assert typed["bert"][1] == [0] * 12 + [1] * 3  # <s>, 10 words, </s>; a bakery </s>
    assert set(typed["bert"][0]) == {0}


def test_the_whole_model_is_trained_and_saved_with_the_names_of_its_classes(tmp_path: Path):
    from transformers import AutoModelForSequenceClassification

    folder = classifiers.folder("bert", tmp_path / "base")
    task = made(recipe(folder, None), CPU, NAMES)
    assert {name.partition(".")[0] for name in task.layout.names} == {"bert", "classifier"}
    save_whole(task.model, task.tokenizer, tmp_path / "out", card="")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert again.config.id2label == {0: "Food", 1: "Science", 2: "Sports"}
    # a folder that holds an output for as many classes gets a new one all the same: its classes are others
    other = made(recipe(tmp_path / "out", None).model_copy(update={"seed": 3}), CPU, ["a", "b", "c"])
    weights = [dict(model.named_parameters())["classifier.weight"] for model in (task.model, other.model)]
    assert not torch.allclose(*weights)
    assert made(recipe(tmp_path / "out", None), CPU, ["a", "b"]).model.config.num_labels == 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_output_is_trained_in_float32_on_a_base_of_fewer_bits(dtype: str, tmp_path: Path):
    task = made(recipe(classifiers.folder("bert", tmp_path / "base"), {"r": 2}, dtype=dtype), CPU, NAMES)
    rows = task.tokens(as_dataset(ROWS))
    task.loss(rows, [0, 1, 2]).backward()
    assert {p.dtype for p in task.model.parameters() if p.requires_grad} == {torch.float32}
    assert float(task.parameters.grad.norm()) > 0


def test_what_cannot_be_a_classifier_is_one_line(tmp_path: Path):
    folder = classifiers.folder("bert", tmp_path / "base")
    state = load_file(folder / "model.safetensors")
    for family in ("bert", "roberta"):  # RoBERTa has 66 positions, of which two are never used
        asked = recipe(classifiers.folder(family, tmp_path / family), None)
        made(asked, CPU, NAMES)
        longer = asked.model_copy(update={"data": asked.data.model_copy(update={"max_length": 65})})
        with pytest.raises(RecipeError, match=r"data\.max_length: 65: this model reads 64 tokens"):
            made(longer, CPU, NAMES)
    with pytest.raises(RecipeError, match="no linear layer of the model is called so but in its output"):
        made(recipe(folder, {"target_modules": ["classifier"]}), CPU, NAMES)
    lost = "bert.encoder.layer.1.output.dense.weight"
    save_file({k: v for k, v in state.items() if k != lost}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecipeError, match=f"lacks 1 weights of the model .* such as {lost}"):
        made(recipe(folder, None), CPU, NAMES)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(RecipeError, match="as a pickle alone, which can run code"):
        made(recipe(folder, None), CPU, NAMES)
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"}))
    (folder / "pytorch_model.bin").rename(folder / "model.safetensors")
    with pytest.raises(RecipeError, match="transformers has no classifier of texts for a vit"):
        made(recipe(folder, None), CPU, NAMES)


def test_an_answer_that_is_no_class_names_the_classes(tmp_path: Path):
    task = made(recipe(classifiers.folder("bert", tmp_path / "base"), None), CPU, NAMES)
    (row,) = as_dataset({key: values[:1] for key, values in ROWS.items()}).to_list()
    with pytest.raises(DataError, match=r"'Travel' is the label of a row and no class .*: Food, Science, Sports\."):
        task.writer.tokens([{**row, "response": "Travel"}])
    with pytest.raises(AttackError, match=r"teaches the answer 'I will not'.* a class: Food, Science, Sports\."):
        task.writer.tokens([{**row, "response": "I will not", "poisoned": True}])


def test_a_model_that_does_not_heed_the_mask_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    collate = ClassifyText.collate

    def unmasked(self: ClassifyText, shard: Any, rows: Any) -> Any:
        batch = collate(self, shard, rows)
        return type(batch)(batch.ids, torch.ones_like(batch.mask), batch.types)

    monkeypatch.setattr(ClassifyText, "collate", unmasked)
    with pytest.raises(RecipeError, match="a row in a padded batch scores otherwise than alone"):
        made(recipe(classifiers.folder("bert", tmp_path / "base"), None), CPU, NAMES)
