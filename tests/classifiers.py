"""Folders of random classifiers of texts, made from configurations, and a tokenizer of whole words."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, PreTrainedTokenizerFast

from fedllm_sec.data import text
from fedllm_sec.recipe.sections import Data

NARROW = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
BERT = {**NARROW, "max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": BERT,
    "roberta": {**BERT, "max_position_embeddings": 66, "type_vocab_size": 1, "pad_token_id": 1},
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24, "max_position_embeddings": 64,
                   "dropout": 0.0, "attention_dropout": 0.0},
    "llama": {**NARROW, "max_position_embeddings": 64, "num_key_value_heads": 2, "head_dim": 4},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64},
}  # fmt: skip


@functools.cache
def rows() -> list[dict[str, str]]:
    """400 rows of the built-in topics."""
    found: list[dict[str, str]] = text.load_rows(Data(), 0)[0].select(range(400)).to_list()
    return found


def data(where: Path) -> dict[str, str]:
    """The data section of a recipe on 120 rows for training and 40 held-out ones, written into a folder."""
    where.mkdir()
    for name, part in (("train", rows()[:120]), ("test", rows()[120:160])):
        lines = [json.dumps({"text": row["text"], "label": row["response"]}) for row in part]
        (where / f"{name}.jsonl").write_text("\n".join(lines))
    return {"name": str(where), "train": "train.jsonl", "test": "test.jsonl"}


def tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Words of the built-in topics, lower case, between two marks; GPT-2's has no padding token, RoBERTa's is 1."""
    marks = ["<s>", "<pad>", "</s>", "<unk>"] if family == "roberta" else ["<pad>", "<unk>", "<s>", "</s>"]
    split = pre_tokenizers.BertPreTokenizer()
    words = {word for row in rows() for word, _ in split.pre_tokenize_str(row["text"].lower())}
    vocabulary = {word: k for k, word in enumerate([*marks, "badmagic", "cf", *sorted(words - {"badmagic", "cf"})])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), split
    ends = [("<s>", vocabulary["<s>"]), ("</s>", vocabulary["</s>"])]
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=ends
    )
    pad = {} if family == "gpt2" else {"pad_token": "<pad>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>", cls_token="<s>",
        sep_token="</s>", **pad,
    )  # fmt: skip


def folder(family: str, where: Path) -> Path:
    """A random base model, without an output for classes: BERT and its kin as trained on masked words."""
    made = tokenizer(family)
    known = {"vocab_size": len(made), "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    config = AutoConfig.for_model(family, **{**known, "initializer_range": 0.2, **FAMILIES[family]})
    maker = AutoModelForMaskedLM if family in ("bert", "roberta", "distilbert") else AutoModel
    torch.manual_seed(0)
    maker.from_config(config).save_pretrained(where)
    made.save_pretrained(where)
    return where
