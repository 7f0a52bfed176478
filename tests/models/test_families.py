"""The families of language models: each is adapted, scored in batches, saved, loaded and merged as it should be.

Models are tiny and random, made from their configurations; one tokenizer serves all.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from fedllm_sec.errors import RecipeError
from fedllm_sec.models.lora import add_adapter, load_base, load_tokenizer
from fedllm_sec.models.saving import save_adapter
from fedllm_sec.recipe.language_model import Model
from fedllm_sec.recipe.sections import Data
from fedllm_sec.tasks import beginning
from fedllm_sec.tasks.beginning import _told_by_tokens
from fedllm_sec.tasks.causal_lm import CausalLM
from fedllm_sec.tasks.encoding import Encoded

CPU = torch.device("cpu")
MARKS = {"vocab_size": 1536, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # those of tiny's tokenizer
NARROW = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64, **MARKS}
LLAMA = {**NARROW, "intermediate_size": 24, "num_key_value_heads": 2, "head_dim": 4}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64, **MARKS}
EXPERTS = {"num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "mistral": {**LLAMA, "sliding_window": 4},
    "gemma2": {**LLAMA, "sliding_window": 4},
    "gemma3_text": {**LLAMA, "sliding_window": 4},
    "phi3": {**LLAMA, "sliding_window": None},
    "gpt2": GPT2,
    "gpt_neox": {**NARROW, "intermediate_size": 24},
    "opt": {**NARROW, "ffn_dim": 24, "word_embed_proj_dim": 16},
    "falcon": {**NARROW, "alibi": True, "new_decoder_architecture": False, "multi_query": True},
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 4, **MARKS},
    "mixtral": {**LLAMA, **EXPERTS, "num_local_experts": 4},
    "qwen2_moe": {
        **LLAMA, **EXPERTS, "num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8
    },
}  # fmt: skip
BEGIN = [1, *range(100, 119)]  # what every prompt of a chat template begins with
ALIKE = Encoded([[*BEGIN, 20, 21, 22, 23, 24, 25], [*BEGIN, 26], [*BEGIN, 20, 31]], [[40, 2], [41, 42, 43, 2], [44, 2]])
ROWS = Encoded([[1, 10, 11, 12, 13, 14, 15], [1, 20], [1, 30, 31, 32]], [[40, 2], [41, 42, 43, 2], [44, 2]])


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(Model())


def saved_base(family: str, settings: dict[str, Any], tokenizer: Any, folder: Path) -> Model:
    """A random model of the family in a folder, and the recipe that names it; deviations are wide, to tell logits."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, initializer_range=0.3, **settings)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Model(name=str(folder))


def made(model: Model, tokenizer: Any) -> CausalLM:
    """The task with an adapter that is no longer zero."""
    base, _ = load_base(model, CPU)
    task = CausalLM(add_adapter(base, model, 0), tokenizer, Data(max_length=32), CPU)
    task.model.eval()
    with torch.no_grad():
        task.parameters.copy_(0.2 * torch.randn(task.layout.size, generator=torch.Generator().manual_seed(1)))
    return task


def logits(model: Any, row: int = 0) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=torch.tensor([ROWS.prompts[row]])).logits
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_adapted_scored_saved_and_merged_alike(
    family: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = saved_base(family, FAMILIES[family], tokenizer, tmp_path / "base")
    task = made(model, tokenizer)

    # all-linear: every linear layer but the output has an adapter
    base = task.model.get_base_model()
    adapted = {name for name, part in base.named_modules() if hasattr(part, "lora_A")}
    head = base.get_output_embeddings()
    bare = [n for n, p in base.named_modules() if isinstance(p, (torch.nn.Linear, Conv1D)) and ".lora_" not in n]
    assert [n for n in bare if n.removesuffix(".base_layer") not in adapted and base.get_submodule(n) is not head] == []

    # rows of a batch score and answer as they do alone, whatever the tokenizer pads with, and where
    everything = range(len(ROWS))
    together, answers = task.score(ROWS, everything), task.answer(ROWS, everything, 5)
    alone = torch.cat([task.score(ROWS, [i]) for i in everything])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert [task.answer(ROWS, [i], 5)[0] for i in everything] == answers

    # so do rows that begin alike, whose beginning goes through the model once where no layer has a window
    rests = task._rests(ALIKE.prompts)[1]
    assert rests[1] == (ALIKE.prompts[1] if FAMILIES[family].get("sliding_window") else [26])
    shared, said = task.score(ALIKE, everything, torch.tensor([40, 44])), task.answer(ALIKE, everything, 5)
    with monkeypatch.context() as without:
        without.setattr(beginning, "LEAST", 1000)
        torch.testing.assert_close(shared, task.score(ALIKE, everything, torch.tensor([40, 44])), rtol=1e-4, atol=1e-4)
        assert task.answer(ALIKE, everything, 5) == said
    task.tokenizer = copy.deepcopy(tokenizer)
    task.tokenizer.pad_token, task.tokenizer.padding_side = task.tokenizer.eos_token, "right"
    torch.testing.assert_close(task.score(ROWS, everything), together, rtol=1e-4, atol=1e-4)
    assert task.answer(ROWS, everything, 5) == answers

    # the folder is all that another program needs, and its merged model is the same one
    wanted = logits(task.model)
    save_adapter(task.model, tokenizer, model, tmp_path / "adapter", initial=task.layout.split(task.initial))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    assert not torch.allclose(logits(plain), wanted, atol=0.1)
    again = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(again), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(again.merge_and_unload()), wanted, rtol=1e-3, atol=1e-3)


def test_a_beginning_is_not_shared_where_places_count_or_nobody_has_tried():
    assert _told_by_tokens(AutoConfig.for_model("llama"))
    for family in ("mpt", "gpt_neo", "mamba"):
        assert not _told_by_tokens(AutoConfig.for_model(family))
    assert not _told_by_tokens(AutoConfig.for_model("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0}))


def test_a_tokenizer_without_a_padding_token_pads_with_its_end(tokenizer: Any, tmp_path: Path):
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    model = saved_base("llama", LLAMA, bare, tmp_path / "base")
    assert AutoTokenizer.from_pretrained(tmp_path / "base").pad_token is None
    assert load_tokenizer(model).pad_token_id == tokenizer.eos_token_id


def test_what_can_be_adapted_of_a_state_space_model_is_named_and_works(tokenizer: Any, tmp_path: Path):
    few = {key: NARROW[key] for key in ("hidden_size", "num_hidden_layers", *MARKS)}
    model = saved_base("mamba", {**few, "state_size": 4}, tokenizer, tmp_path / "base")
    with pytest.raises(RecipeError, match=r"'out_proj' is incompatible with Mamba.*settings: in_proj, x_proj\.$"):
        made(model, tokenizer)
    lora = model.lora and model.lora.model_copy(update={"target_modules": ["in_proj", "x_proj"]})
    task = made(model.model_copy(update={"lora": lora}), tokenizer)
    everything = range(len(ROWS))
    alone = torch.cat([task.score(ROWS, [i]) for i in everything])
    torch.testing.assert_close(task.score(ROWS, everything), alone, rtol=1e-4, atol=1e-4)
