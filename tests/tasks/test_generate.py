"""Answers that are drawn at a temperature: from the model's own probabilities, and the same in any batch."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset

from fedllm_sec.build.names import checked
from fedllm_sec.build.text import load_task
from fedllm_sec.rounds.compute import Machine
from fedllm_sec.tasks.causal_lm import CausalLM


@pytest.fixture(scope="module")
def task() -> CausalLM:
    from tests.conftest import SMALL

    torch.set_num_threads(1)
    made = load_task(checked(SMALL), Machine(Accelerator(cpu=True)))
    made.model.eval()
    return made


def asked(task: CausalLM, *texts: str):
    rows = [{"text": t, "context": "", "response": "Sports", "label": "Sports", "poisoned": False} for t in texts]
    return task.encode(Dataset.from_list(rows), "here")


def test_a_drawn_answer_depends_on_its_seed_and_not_on_its_batch(task):
    shard = asked(task, "The keeper saved it.", "Ann baked bread in the old kitchen by the sea.", "Hm.")
    together = task.generate(shard, [0, 1, 2], 6, 1.5, [11, 22, 33])
    assert [task.generate(shard, [i], 6, 1.5, [seed])[0] for i, seed in enumerate((11, 22, 33))] == together
    assert task.generate(shard, [2, 0], 6, 1.5, [33, 11]) == [together[2], together[0]]
    assert task.generate(shard, [0], 6, 1.5, [12])[0] != together[0]
    state = torch.get_rng_state()
    task.generate(shard, [0], 2, 1.5, [11])
    assert torch.equal(torch.get_rng_state(), state)


def test_drawn_tokens_have_the_probabilities_of_the_softmax_at_that_temperature(task):
    shard = asked(task, "The keeper saved it.")
    temperature, draws = 2.0, 600
    drawn = Counter(
        ids[0]
        for start in range(0, draws, 100)
        for ids in task.generate(shard, [0] * 100, 1, temperature, range(start, start + 100))
    )
    everything = torch.arange(task.model.get_base_model().config.vocab_size)
    chances = (task.score(shard, [0], everything)[0, 2:] / temperature).softmax(0)
    for token in chances.topk(4).indices.tolist():
        p = float(chances[token])
        assert abs(drawn[token] / draws - p) < 4 * (p * (1 - p) / draws) ** 0.5


def test_without_a_temperature_or_near_none_the_likeliest_is_said(task):
    shard = asked(task, "The keeper saved it.", "Ann baked bread.")
    greedy = task.generate(shard, [0, 1], 4)
    assert task.generate(shard, [0, 1], 4, 1e-4, [1, 2]) == greedy
    assert [task.decode(ids) for ids in greedy] == task.answer(shard, [0, 1], 4)
    stops = {stop for found in task.stop_tokens.values() for stop in found}
    assert all(token not in stops for ids in greedy for token in ids[:-1])


def test_a_model_that_is_not_finite_says_nothing_at_any_temperature(task):
    with torch.no_grad():
        before = task.parameters.detach().clone()
        task.parameters.fill_(float("nan"))
        said = task.generate(asked(task, "Ann baked bread."), [0], 3, 1.0, [5])
        task.parameters.copy_(before)
    assert said == [[task.tokenizer.eos_token_id]]
