"""--explain says who does what and what it will cost, and its counts are those of the run it stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fedllm_sec.build.audit_cost import observer_in_words
from fedllm_sec.build.cost import cost, language_model, size
from fedllm_sec.build.explain import bill, defense, differences, explain
from fedllm_sec.build.federation import build, run
from fedllm_sec.build.names import checked
from fedllm_sec.build.plan import Plan, planned
from fedllm_sec.build.seen import first_row
from fedllm_sec.data.text import as_dataset
from fedllm_sec.models.lora import add_adapter, load_base
from fedllm_sec.recipe.language_model import Lora, Model
from fedllm_sec.rounds.compute import Machine
from fedllm_sec.train import load, main

DIGITS: dict[str, Any] = {
    "rounds": 3,
    "task": "classify",
    "model": {"name": "logistic"},
    "data": {"name": "digits"},
    "clients": {
        "total": 4,
        "local_epochs": 1,
        "batch_size": 20,
        "lr": 0.05,
        "optimizer": "sgd",
        "max_grad_norm": None,
        "partition": {"name": "dirichlet"},
    },
}


def plan_of(raw: dict[str, Any]) -> Plan:
    return planned(checked(raw))


def machine() -> Machine:
    from accelerate import Accelerator

    return Machine(Accelerator(cpu=True))


def test_the_adapter_is_counted_without_loading_a_weight_as_it_is_when_loaded():
    model = Model(lora=Lora(r=3, target_modules=["q_proj", "up_proj"], train="B"))
    counted = language_model(model)
    base, _ = load_base(model, torch.device("cpu"))
    frozen = sum(p.numel() for p in base.parameters())
    adapted = add_adapter(base, model, 0)
    assert counted.trained == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert counted.frozen == frozen
    assert counted.frozen_bytes == 4 * frozen


def test_a_client_of_lower_rank_is_counted_at_what_it_trains_and_sends():
    lora = {"r": 4, "average": "svd", "target_modules": ["q_proj"], "rank_pattern": {"layers.0.self_attn.q_proj": 1}}
    ranked = {"model": {"lora": lora}, "clients": {"total": 4, "local_steps": 3, "ranks": {2: 3, 4: 1}}}
    plan = plan_of(ranked)
    counted, q = cost(plan), 2 * 128  # q_proj is (128, 128): each component has a row of A and a column of B
    layers = load_base(Model(), torch.device("cpu"))[0].config.num_hidden_layers
    whole, half = q * (1 + 4 * (layers - 1)), q * (1 + 2 * (layers - 1))
    assert counted.weights.trained == whole
    assert counted.weights.by_rank == {2: half, 4: whole}
    assert counted.sent == counted.received == 4 * (3 * half + whole) / 4
    text = " ".join("\n".join(bill(plan.recipe, counted)).split())
    assert f"of rank 2 3 clients: each trains {half:,} parameters, sends {size(4 * half)}" in text


def test_four_bits_shrink_the_linear_layers_alone():
    whole, packed = (language_model(Model(dtype="bfloat16", load_in_4bit=four)) for four in (False, True))
    base, _ = load_base(Model(), torch.device("cpu"))
    head = base.get_output_embeddings()
    linear = sum(m.weight.numel() for m in base.modules() if isinstance(m, torch.nn.Linear) and m is not head)
    assert whole.frozen_bytes - packed.frozen_bytes == pytest.approx(linear * (2 - 0.5159), rel=1e-3)


def test_the_expected_steps_and_bytes_are_those_of_the_run():
    plan = plan_of(DIGITS)
    counted = cost(plan)
    federation = build(plan.recipe, machine())
    taken = sum(federation.training.steps_of(federation.task.size(c.shard)) for c in federation.clients)
    assert counted.steps == taken
    assert counted.exact
    assert counted.sizes == tuple(federation.task.size(c.shard) for c in federation.clients)
    assert counted.weights is not None
    assert counted.weights.trained == federation.task.layout.size == 650
    assert counted.sent == counted.received == 2600


def test_a_changing_cohort_of_unequal_shards_gives_a_mean_and_says_about():
    plan = plan_of({**DIGITS, "clients": {**DIGITS["clients"], "per_round": 2}})
    counted = cost(plan)
    assert not counted.exact
    assert any("2 clients x about" in line for line in bill(plan.recipe, counted))


def test_scaffold_sends_its_control_to_every_client_too():
    raw = {
        **DIGITS,
        "algorithm": {"name": "scaffold"},
        "clients": {**DIGITS["clients"], "local_epochs": None, "local_steps": 2},
    }
    counted = cost(plan_of(raw))
    assert (counted.received, counted.sent) == (5200, 2600)


def test_fedgkt_sends_features_and_has_no_update_matrix():
    plan = plan_of({**DIGITS, "model": {"name": "cnn", "hidden": 16}, "algorithm": {"name": "fedgkt"}})
    counted = cost(plan)
    mean = sum(counted.sizes or ()) / 4
    assert counted.sent == mean * (4 * (16 * 8 * 8 + 10) + 8)
    assert counted.received == mean * 4 * 10
    assert any("none: features and logits travel" in line for line in bill(plan.recipe, counted))
    assert counted.weights is not None
    assert counted.weights.trained == build(plan.recipe, machine()).task.layout.size


def test_what_cannot_be_counted_says_why_and_the_rest_is_given():
    plan = plan_of({"model": {"name": "nobody/nothing-of-this-name"}, "clients": {"local_steps": 3, "total": 5}})
    text = "\n".join(bill(plan.recipe, cost(plan)))
    assert "trained parameters d  not counted" in text
    assert 'model.name: "nobody/nothing-of-this-name": no such folder in' in " ".join(text.split())
    assert "10 rounds x 5 clients x 3 steps = 150" in text


def test_data_that_are_not_here_leave_the_small_model_uncounted(tmp_path: Path):
    plan = plan_of({**DIGITS, "data": {"name": str(tmp_path / "none.npz")}})
    text = " ".join("\n".join(bill(plan.recipe, cost(plan))).split())
    assert "no such file" in text
    assert "local steps not counted" in text


def test_the_words_say_who_when_with_what_and_against_what(small: dict[str, Any], tmp_path: Path):
    small["attack"] |= {"start": 2, "knowledge": "cohort"}
    small["variants"] = {"clean": {"enable_attack": False, "enable_defense": False}, "defended": {"seed": 2}}
    small["output"] = {"folder": "runs/x"}
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(small, sort_keys=False))
    text, problems = explain(load(path))
    assert problems == []
    clean, _, defended = text.partition("defended: runs/x/defended")
    assert "rounds: 2" in clean  # the resolved recipe
    assert "lr_schedule: constant" in clean  # with its defaults
    assert "nobody attacks" in clean
    assert "plain mean of the updates" in clean
    assert "seed: 2" in defended
    assert "1 of 4 clients, drawn once, by the seed" in defended
    assert "active in 1 of 2 rounds" in defended
    assert "the updates of all other clients of the round" in defended
    assert 'poison their data: text_trigger (trigger: " cf", target: "Sports", rate: 0.5)' in defended
    assert "Left at: position='end'" in defended
    assert "aggregates: trimmed_mean (f: 1)" in defended
    assert "attackers' sight" in defended


def test_the_named_clients_are_the_ones_that_attack(small: dict[str, Any]):
    small["data"] |= {"train_rows": 40, "test_rows": 30}
    small["rounds"] = 1
    plan = plan_of(small)
    text, _ = explain({"": plan})
    (record,) = run(build(plan.recipe, machine()), 1)
    assert f"clients {', '.join(record.malicious)}" in text


def test_attackers_who_are_redrawn_are_those_of_some_round():
    attack = {"malicious": {"count": 1, "redraw": True}, "update": [{"name": "byzantine_flip"}]}
    plan = plan_of({**DIGITS, "enable_attack": True, "attack": attack})
    records = list(run(build(plan.recipe, machine()), 3))
    ever = sorted({id for record in records for id in record.malicious})
    assert len(ever) < 4
    assert f"in some round of this run: clients {', '.join(ever)}" in explain({"": plan})[0]


def test_noise_that_is_longer_than_any_step_is_said_before_the_run():
    noise = {"name": "weak_dp_client", "sigma": 0.2, "absolute": True}
    plan = plan_of(DIGITS | {"enable_defense": True, "defense": {"before": [noise], "rule": {"name": "mean"}}})
    words = " ".join(" ".join(defense(plan, cost(plan))).split())  # 64 pixels and 10 digits: d = 650
    assert "in the mean of 4 rows has 2.55 of the length that rows are clipped to (0.2 on each of 650 values)" in words
    assert "LONGER THAN ANY STEP" in words


def test_explaining_trains_nothing_and_writes_nothing(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(yaml.safe_dump(DIGITS))
    assert main(["--explain", "r.yaml", "rounds=7"]) == 0
    assert "7 rounds x 4 clients" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["r.yaml"]
    assert main(["--explain", "r.yaml", "data.name=none.npz"]) == 2  # what it says all the same goes to the output
    told = capsys.readouterr()
    assert "Expected cost" in told.out
    assert told.err.startswith("error: the run would not begin: data.name: none.npz: no such file in ")


def test_the_first_row_is_shown_as_it_is_trained_on(small: dict[str, Any], tmp_path: Path):
    rows = [{"text": "word " * 40, "response": "yes " * 40}, {"text": "word " * 40, "response": "yes"}]
    data = {"template": "{text} ->", "max_length": 16}
    train = as_dataset({role: [row.get(role, "") for row in rows] for role in ("text", "context", "response", "label")})

    def shown(**more: Any) -> list[str]:
        return first_row(checked({**small, "data": {**data, **more}, "enable_attack": False}), train)

    head, row = shown()  # the answer of the first is too long by itself
    assert head.startswith("row 2, the first that is not dropped, 1")
    assert "(data.too_long: cut_prompt); the " in head
    assert len(row) < 100
    assert row.endswith("->« yes</s>»")
    assert shown(too_long="drop") == [
        "the first row cannot be written: data: none of 2 rows fits into data.max_length=16 tokens; the shortest has "
        f"{head.partition(' of ')[2].split(' ')[0]}. Raise data.max_length."
    ]
    assert shown(max_length=256)[0].startswith("the first row, ")


def test_differences_name_the_key_and_the_new_value():
    old, new = checked(DIGITS), checked({**DIGITS, "seed": 4, "algorithm": {"name": "fedprox", "mu": 0.1}})
    assert differences(old, new) == ["seed: 4", 'algorithm.name: "fedprox"', "algorithm.mu: 0.1"]


def test_sizes_are_written_with_three_digits():
    assert [size(n) for n in (0, 980, 999.6, 72_500, 1_234_567, 3e9, 5e12)] == [
        "0 B", "980 B", "1 kB", "72.5 kB", "1.23 MB", "3 GB", "5 TB",
    ]  # fmt: skip


def test_what_an_observer_keeps_what_audits_take_and_what_dp_sgd_spends_is_told_beforehand():
    pytest.importorskip("opacus")
    seen = {"rounds": [1, 2], "clients": [0, 1, 3], "what": "gradient"}
    plan = planned(
        checked({
            **DIGITS, "enable_attack": True, "enable_defense": True,
            "attack": {"privacy": [{"name": "linear_layer"}, {"name": "idlg", "iterations": 100},
                                   {"name": "exclusive_neurons"}], "observe": seen},
            "defense": {"client": [{"name": "dp_sgd", "epsilon": 8.0}]},
        })
    )  # fmt: skip
    counted = cost(plan)
    kept, linear, searched, exclusive = observer_in_words(plan.recipe, counted)
    assert kept == (  # 6 rows and 6 starts of 650 float32
        "keeps the gradient of 3 clients in 2 rounds: 6 rows of 650 float32, each with what it started from: 31.2 kB "
        "on disk; in memory 3 at a time (7.8 kB), and nothing of the frozen weights"
    )
    assert linear == "linear_layer: no search; seconds"
    assert "at most 1,800 gradients of gradients" in searched  # 100 iterations, 3 starts, 6 observations
    assert "at most 1,800 gradients of the layers before" in exclusive  # 300 iterations of 6 observations
    assert counted.sizes is not None
    (spent,) = [line for line in defense(plan, counted) if "dp_sgd: noise" in line]
    assert "a client that takes part in all 3 rounds" in spent
    whole = " ".join(line.strip() for line in defense(plan, counted))
    least = float(whole.split("spends epsilon ")[1].split(" ")[0])
    assert 7.9 <= least <= 8.0  # the shortest shard spends most
    assert plan.methods.guards[0].used == {}  # type: ignore[attr-defined]


def test_the_text_audits_rows_are_counted_through_the_model():
    seen = {"rounds": [1], "clients": [0, 1, 2], "others": 100, "own_rows": 50}
    plan = planned(
        checked({
            "rounds": 1, "model": {"name": "tiny"}, "clients": {"total": 4, "local_steps": 5, "batch_size": 8},
            "enable_attack": True,
            "attack": {"privacy": [{"name": "membership"}, {"name": "membership", "score": "reference"},
                                   {"name": "dager"}], "observe": seen},
        })
    )  # fmt: skip
    kept, drop, reference, spans = observer_in_words(plan.recipe, cost(plan))
    assert kept.startswith("keeps the delta of 3 clients in 1 round: 3 rows of ")
    assert "in memory 1 at a time" in kept
    assert "at most 840 rows of 256 tokens" in drop  # 3 x 2 models x (40 + 100)
    assert "at most 3,540 rows of 256 tokens" in reference  # 3 x (5 models x 140 + 4 shadows x 3 x 40)
    assert spans.startswith("dager: no search in the model's losses")
