"""The loss of the same conversations is that of TRL's SFTTrainer, where TRL is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from fedllm_sec.data.formats import Turn, spoken
from fedllm_sec.recipe.sections import Data
from fedllm_sec.tasks.causal_lm import CausalLM
from tests.tasks.test_chat import FAMILIES, TEMPLATES, Bare, bytes_tokenizer, model_of

trl = pytest.importorskip("trl", reason="needs trl: pip install trl")

ONE = [{"role": "user", "content": "Name a pet."}, {"role": "assistant", "content": "A cat."}]
TWO = [*ONE, {"role": "user", "content": "And another, please?"}, {"role": "assistant", "content": " A dog, or two. "}]


def ours(name: str, rows: list[list[dict[str, str]]], **data: Any) -> float:
    tokenizer = bytes_tokenizer((TEMPLATES / f"{name}.jinja").read_text())
    task = CausalLM(Bare(model_of(tokenizer)), tokenizer, Data(template="chat", **data), torch.device("cpu"))
    made = [spoken([Turn(**turn) for turn in row])._asdict() | {"context": ""} for row in rows]
    return task.loss(task.writer.tokens(made), range(len(rows))).item()


def theirs(tmp_path: Path, name: str, rows: list[dict[str, Any]], **settings: Any) -> float:
    tokenizer = bytes_tokenizer((TEMPLATES / f"{name}.jinja").read_text())
    given = trl.SFTConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=len(rows), report_to=[], use_cpu=True, bf16=False,
        max_length=None, packing=False, eos_token="</s>", **settings,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model_of(tokenizer), args=given, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    (batch,) = trainer.get_train_dataloader()
    return trainer.compute_loss(trainer.model, dict(batch)).item()


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "chatml"])
def test_every_answer_scored_is_assistant_only_loss(tmp_path: Path, name: str):
    rows = [{"messages": ONE}, {"messages": TWO}]
    assert ours(name, [ONE, TWO]) == pytest.approx(theirs(tmp_path, name, rows, assistant_only_loss=True), abs=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_token_scored_is_language_modelling(tmp_path: Path, name: str):
    rows = [{"messages": ONE}, {"messages": TWO}]
    assert ours(name, [ONE, TWO], loss_on="all") == pytest.approx(theirs(tmp_path, name, rows), abs=1e-4)


@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral", "gemma3"])
def test_the_last_answer_scored_is_completion_only_loss(tmp_path: Path, name: str):
    rows = [{"prompt": row[:-1], "completion": row[-1:]} for row in (ONE, TWO)]
    wanted = theirs(tmp_path, name, rows, completion_only_loss=True)
    assert ours(name, [ONE, TWO], loss_on="last_response") == pytest.approx(wanted, abs=1e-4)
