"""Bad input, as a user gives it: a recipe is refused before anything is trained, with place, value, reason, way out."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedllm_sec.build import text as build_text
from fedllm_sec.build.federation import build, run
from fedllm_sec.build.names import checked
from fedllm_sec.build.threat import attack_problems
from fedllm_sec.errors import AttackError, FedError, IdleAttack, RecipeError
from fedllm_sec.recipe import reading as recipes
from fedllm_sec.rounds.compute import Machine
from fedllm_sec.tasks.fitting import Fitted
from fedllm_sec.train import load, main

DIGITS: dict[str, Any] = {
    "rounds": 2,
    "task": "classify",
    "model": {"name": "logistic"},
    "data": {"name": "digits"},
    "clients": {"total": 4, "local_steps": 2, "batch_size": 20, "optimizer": "sgd", "lr": 0.05, "max_grad_norm": None},
}
LETTERS: dict[str, Any] = {
    "rounds": 2,
    "task": "next_char",
    "model": {"name": "lstm", "hidden": 8},
    "data": {"name": "text.txt", "length": 20},
    "clients": {"total": 3, "local_steps": 2, "batch_size": 4},
}


def machine() -> Machine:
    from accelerate import Accelerator

    return Machine(Accelerator(cpu=True))


def refusal(raw: dict[str, Any]) -> FedError:
    """The error that checking and building end with; nothing is trained by either."""
    with pytest.raises(FedError) as caught:
        build(checked(raw), machine())
    return caught.value


def under_attack(*data: dict[str, Any], update: Any = (), **more: Any) -> dict[str, Any]:
    block = {"malicious": {"count": 1}, "data": list(data), "update": list(update), **more}
    return {"enable_attack": True, "attack": block}


def defended(rule: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"enable_defense": True, "defense": {"rule": rule, **more}}


# ---------------------------------------------------------------- text


def rows_file(folder: Path, count: int = 40) -> str:
    rows = [{"text": f"word {i}", "response": "AB"[i % 2], "label": "AB"[i % 2]} for i in range(count)]
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture
def own_rows(small: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The small recipe on a file with the answers A and B: 20 training and 20 held-out rows."""
    small["data"] |= {"name": rows_file(tmp_path), "test_share": 0.5, "template": "{text} ->"}
    del small["data"]["train_rows"], small["data"]["test_rows"]
    small["attack"]["data"][0]["target"] = "A"
    return small


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": {"name": "nowhere/rows.jsonl"}}, "nowhere/rows.jsonl: no such folder or file in"),
        ({"data": {"name": "./nowhere"}}, "no such folder or file"),
        ({"data": {"columns": {"text": "txt", "response": "answer"}}}, 'columns.text: .*no column "txt". Did you mean'),
        ({"data": {"columns": {"text": "txt", "response": "answer"}}}, 'columns.response: .*no column "answer"'),
        ({"data": {"test_share": None, "train_where": {"label": "C"}, "test_where": {"label": "A"}}},
         'train_where: no row has label = "C"'),
        ({"clients": {"total": 30}}, "20 training rows for 30 clients. Lower clients.total or add rows"),
        ({"clients": {"partition": {"name": "dirichlet", "alpha": 0.001, "min_rows": 5}}},
         "left a client with 0 rows in 100 draws .* Raise alpha or lower clients.total"),
        ({"clients": {"total": 15, "partition": {"name": "shards", "per_client": 3}}}, "got no rows. Use another"),
        ({"clients": {"partition": {"name": "shards", "per_client": 0}}}, "per_client: 0: Input should be greater th"),
        ({"clients": {"partition": {"name": "quantity", "min_rows": -3}}}, "min_rows: -3: Input should be greater"),
        ({"model": {"lora": {"target_modules": ["q_prj", "o_prj"]}}}, 'no module "q_prj". Did you mean "q_proj"'),
        ({"model": {"lora": {"target_modules": ["q_prj", "o_prj"]}}}, 'no module "o_prj". Did you mean "o_proj"'),
        ({"model": {"lora": {"target_modules": []}}}, "target_modules: is empty"),
        ({"model": {"lora": {"target_modules": ["norm"]}}}, "peft cannot adapt these .*Name linear layers"),
        ({"model": {"lora": {"target_modules": "q_proj"}}}, "'q_proj': Input should be 'all-linear', or: .*list"),
        ({"model": {"name": "./no-model"}}, "no such folder"),
        ({"attack": {"malicious": {"count": 4}}}, "4 of 4 clients; needs at least 1 attacker and 1 honest client"),
        ({"attack": {"malicious": {"count": 0}}}, "attack.malicious.count: 0"),
        ({"attack": {"malicious": {"count": None, "share": 0.05}}}, "0 of 4 clients"),
        ({"attack": {"malicious": {"count": None, "ids": []}}}, "0 of 4 clients"),
        ({"defense": {"rule": {"name": "krum", "f": 1}}}, "needs n >= 2f \\+ 3 clients, got n=4, f=1. Lower f"),
        ({"defense": {"rule": {"name": "trimmed_mean", "f": 2}}}, "needs n > 2f clients, got n=4, f=2. Lower f"),
        ({"defense": {"before": [{"name": "nnm", "f": 4}]}}, "nnm: needs n > f clients, got n=4, f=4"),
        ({"attack": {"data": [{"name": "text_trigger", "trigger": " ", "target": "A"}]}}, "no visible characters"),
        ({"attack": {"data": [{"name": "text_trigger", "target": "a b"}]}}, "'a b' is not a label of the data"),
        ({"attack": {"data": [{"name": "label_flip", "mapping": {"C": "A"}}]}}, "'C' is not a label of the data"),
        ({"data": {"max_length": 8}}, r"poisoned rows are longer than data.max_length=8 .*rows \[.*Raise data"),
        ({"attack": {"update": [{"name": "alie"}]}}, "attack.knowledge: 'own': .*needs 'cohort'. Grant it"),
        ({"attack": {"data": [{"name": "pixel_trigger", "target": 1}]}}, "kind 'data_image' and cannot stand here"),
        ({"attack": {"update": [{"name": "byzantine_flip", "scale": -1.0}]}}, "scale: -1.0: must be a positive number"),
        ({"attack": {"local": [{"name": "pgd"}]}}, r"attack\.local\.0: pgd: an attacker takes part in round 1"),
    ],
)  # fmt: skip
def test_a_bad_recipe_on_text_is_refused_before_training(own_rows: dict[str, Any], change: dict[str, Any], words: str):
    error = refusal(recipes.merge(own_rows, change))
    assert pytest.raises(FedError, match=f"(?s){words}").matches(error), str(error)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("bad.jsonl", b"{oops\n", "cannot be read as json"),
        ("bad.parquet", b"PAR1xxxx", "cannot be read as parquet"),
        ("bad.csv", bytes(range(256)) * 4, "byte 0x80 is not utf-8 text"),
        ("empty.jsonl", b"", "is empty: zero rows"),
        ("head.csv", b"text,response,label\n", "has zero rows"),
        ("list.json", b"[]", "has zero rows"),
        ("rows.xlsx", b"x", 'has the ending ".xlsx"|no such folder|neither'),
    ],
)
def test_a_file_that_cannot_be_read_is_named(own_rows: dict[str, Any], tmp_path: Path, name, content, words):
    (tmp_path / name).write_bytes(content)
    own_rows["data"]["name"] = str(tmp_path / name)
    assert pytest.raises(FedError, match=words).matches(error := refusal(own_rows)), str(error)


@pytest.mark.parametrize(
    "change",
    [
        {"data": {"max_length": 8}},
        {"attack": {"data": [{"name": "text_trigger", "target": "C"}]}},
        {"attack": {"malicious": {"count": 0}}},
        {"attack": {"update": [{"name": "alie"}]}},
        {"attack": {"data": [{"name": "pixel_trigger", "target": 1}]}},
    ],
)
def test_what_an_attack_cannot_do_is_a_mistake_of_the_recipe(own_rows: dict[str, Any], change: dict[str, Any]):
    assert isinstance(refusal(recipes.merge(own_rows, change)), RecipeError)


def test_pgd_without_a_radius_may_start_where_a_step_was_seen(own_rows: dict[str, Any]):
    relative = recipes.merge(own_rows, {"attack": {"local": [{"name": "pgd"}]}, "rounds": 4})
    for change in ({"start": 2}, {"local": [{"name": "pgd", "radius": 0.1}]}):
        assert attack_problems(checked(recipes.merge(relative, {"attack": change}))) == []
    one = recipes.merge(relative, {"attack": {"malicious": {"count": 1}}, "clients": {"total": 10, "per_round": 1}})
    found = ["round 1" in str(attack_problems(checked(one | {"rounds": 90, "seed": seed}))) for seed in range(40)]
    assert 1 <= sum(found) <= 10  # the attacker is drawn for round 1 by one seed of ten


def test_a_trigger_that_the_tokenizer_drops_is_an_error(own_rows: dict[str, Any], monkeypatch):
    whole = build_text.CausalLM.fit

    def without_cf(self, rows, *given, **named) -> Fitted:
        read = whole(self, rows.map(lambda row: {"text": row["text"].replace(" cf", "")}), *given, **named)
        return replace(read, rows=rows)

    monkeypatch.setattr(build_text.CausalLM, "fit", without_cf)
    error = refusal(own_rows)
    assert isinstance(error, AttackError)
    assert "changes the text but not its tokens in 8 of 8 test prompts" in str(error)


def test_a_trigger_that_is_kept_passes_the_same_check(own_rows: dict[str, Any]):
    build(checked(own_rows), machine())


# ---------------------------------------------------------------- images and characters


def arrays(folder: Path, **changed: Any) -> str:
    made = {
        "x_train": np.zeros((20, 8, 8), np.uint8),
        "y_train": np.arange(20) % 2,
        "x_test": np.zeros((6, 8, 8), np.uint8),
        "y_test": np.arange(6) % 2,
        **changed,
    }
    np.savez(folder / "images.npz", **made)
    return str(folder / "images.npz")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"x_train": np.zeros((20, 8, 8), int)}, "is int64, must be uint8 from 0 to 255, or floats .*Convert it"),
        ({"x_train": np.zeros((20, 64), np.uint8)}, r"shape \(20, 64\), must be \(rows, height, width\)"),
        ({"x_train": np.zeros((20, 2, 8, 8), np.uint8)}, "1, 3 or 4 channels. Move the axes"),
        ({"x_test": np.zeros((6, 9, 9), np.uint8)}, "They must agree"),
        ({"y_test": np.array([0, 1, 2, 0, 1, 5])}, "y_test has label 2 in row 2 .*classes go from 0 to 1"),
        ({"y_train": np.arange(20) % 2 - 1}, "y_train has label -1 in row 0"),
        ({"y_train": np.ones(20)}, "must be one integer a row"),
        ({"x_train": np.zeros((0, 8, 8), np.uint8), "y_train": np.zeros(0, int)}, "has zero rows"),
        ({"x_train": np.array([{}, 2], dtype=object)}, "it holds Python objects; reading those is running code"),
    ],
)
def test_bad_images_are_refused_before_training(tmp_path: Path, changed: dict[str, Any], words: str):
    error = refusal({**DIGITS, "data": {"name": arrays(tmp_path, **changed)}})
    assert pytest.raises(FedError, match=words).matches(error), str(error)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (under_attack({"name": "text_trigger", "target": "a"}), "kind 'data_text' and cannot stand here"),
        (under_attack({"name": "label_flip", "mapping": {0: 12}}), r"mapping: \[12\]: classes go from 0 to 9"),
        (under_attack({"name": "pixel_trigger", "target": 12}), "target: 12: classes go from 0 to 9"),
        ({"model": {"name": "resnet", "depth": 8, "norm": "batch", "buffers": "averaged"}},
         "model.buffers: 'averaged': must be one of average, local, batch. Did you mean"),
        ({"model": {"name": "lenet", "buffers": "average"}}, "lenet keeps no running statistics. Remove it"),
        ({"algorithm": {"name": "scaffold"}, "clients": {"local_steps": None, "local_epochs": 1,
                                                         "partition": {"name": "dirichlet"}}},
         "shards of different sizes give .* local steps.*Set clients.local_steps instead"),
        ({"algorithm": {"name": "fedopt", "optimizer": "adamm"}}, "'adamm': Input should be 'sgd', 'adam', 'yogi'"),
        ({"algorithm": {"name": "fedoptt"}}, 'no "fedoptt". Did you mean "fedopt"'),
        (defended({"name": "deepsight", "layer": "nope"}), 'one parameter that ends in "nope"'),
        (defended({"name": "fltrust"}), "Set defense.root_rows"),
        (defended({"name": "mean"}, root_rows=10**6), "root_rows: 1000000 of"),
        (defended({"name": "mean"}, after=[{"name": "crfl", "rho": -1.0}]), "crfl: needs rho"),
        (defended({"name": "centered_clipping", "tau": -1.0}), "centered_clipping: needs tau > 0"),
    ],
)  # fmt: skip
def test_a_bad_recipe_on_images_is_refused_before_training(change: dict[str, Any], words: str):
    error = refusal(recipes.merge(DIGITS, change))
    assert pytest.raises(FedError, match=words).matches(error), str(error)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"hello", "5 characters are too few .*Give more text or lower data.length"),
        (b"", "0 characters are too few"),
        (b"caf\xe9 " * 100, "byte 0xe9 is not utf-8 text. Set data.encoding to .* latin-1"),
        (None, "no such file"),
    ],
)
def test_bad_text_files_are_refused_before_training(tmp_path: Path, content: bytes | None, words: str):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    error = refusal({**LETTERS, "data": {"name": str(path), "length": 20}})
    assert pytest.raises(FedError, match=words).matches(error), str(error)


# ---------------------------------------------------------------- all at once, and as the command line tells it


def test_mistakes_of_every_part_are_told_together(tmp_path: Path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "rounds: 2\ntask: classify\nmodel: {name: logistic}\ndata: {name: digits}\n"
        "clients: {total: 4, local_epochs: 1}\nalgorithm: {name: scaffold}\n"
        "enable_attack: true\n"
        "attack: {malicious: {count: 1}, update: [{name: alie}], data: [{name: label_flip, mapping: {1: 1}}]}\n"
        "enable_defense: true\ndefense: {rule: {name: krum, f: 1}}\n"
    )
    with pytest.raises(RecipeError) as caught:
        load(path)
    told = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 5
    for words in ("clients.optimizer", "max_grad_norm", "needs 'cohort'", "mapped to itself", "n >= 2f + 3"):
        assert words in told


def test_the_mistakes_of_all_variants_are_told_together(tmp_path: Path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "task: classify\nclients: {total: 4, local_steps: 1}\nvariants:\n"
        "  one: {enable_defense: true, defense: {rule: {name: krum, f: 1}}}\n"
        "  two: {enable_defense: true, defense: {rule: {name: bulyan, f: 1}}}\n"
    )
    with pytest.raises(RecipeError, match=r"(?s)2 mistakes.*krum: needs.*bulyan: needs"):
        load(path)


@pytest.mark.parametrize("change", [{"clients": {"total": 2000}}, {"data": {"name": "nowhere.npz"}}])
def test_the_command_line_tells_an_error_in_a_line_and_writes_no_run(
    tmp_path: Path, monkeypatch, capsys, change: dict[str, Any]
):
    monkeypatch.chdir(tmp_path)
    raw = recipes.merge(DIGITS, change)
    Path("r.yaml").write_text(json.dumps(raw))
    assert main(["r.yaml"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: data")
    assert "Traceback" not in told
    assert not list(tmp_path.rglob("history.jsonl"))


# ---------------------------------------------------------------- during training: recorded, never fatal


def test_a_client_that_sends_nan_is_quarantined_in_every_round_and_the_model_learns():
    attack = under_attack(update=[{"name": "inf_nan"}])
    records = list(run(build(checked({**DIGITS, **attack, "rounds": 6}), machine()), 6))
    for record in records:
        assert list(record.quarantined) == record.malicious
        assert "are not finite" in next(iter(record.quarantined.values()))
    assert records[-1].quality["loss"] < records[0].quality["loss"]


@pytest.mark.parametrize("knowledge", ["own", "cohort"])
def test_a_cohort_of_attackers_alone_does_not_end_the_run(knowledge: str):
    attack = under_attack(update=[{"name": "byzantine_random"}], knowledge=knowledge, malicious={"count": 3})
    raw = recipes.merge({**DIGITS, **attack, "rounds": 6}, {"clients": {"per_round": 1}})
    records = list(run(build(checked(raw), machine()), 6))
    assert any(record.malicious == record.cohort for record in records)


@pytest.mark.parametrize("per_round", [1, 2])
@pytest.mark.parametrize("name", ["alie", "ipm", "min_max", "min_sum", "tailored", "fang", "mimic"])
def test_where_a_cohort_gives_an_attack_nothing_to_work_with_it_says_so_and_the_run_goes_on(name: str, per_round: int):
    attack = under_attack(update=[{"name": name}], knowledge="cohort+defense", malicious={"count": 3})
    raw = recipes.merge({**DIGITS, **attack, "rounds": 6}, {"clients": {"per_round": per_round}})
    federation = build(checked(raw), machine())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        records = list(run(federation, 6))
    idle = [str(w.message) for w in said if issubclass(w.category, IdleAttack)]
    assert len(records) == 6
    alone = sum(record.malicious == record.cohort for record in records)
    assert sum("no honest client is in this round" in text for text in idle) == alone


def test_where_every_cohort_is_the_same_that_is_a_mistake_of_the_recipe():
    attack = under_attack(update=[{"name": "alie"}], knowledge="cohort", malicious={"count": 3})
    assert "the attackers are a majority by themselves and z has no bound. Set alie.z" in str(
        refusal({**DIGITS, **attack})
    )


@pytest.mark.parametrize("name", [":", "a b:c", "own:", ":rule", "own:rule:more"])
def test_what_is_no_name_of_code_is_told_without_importing_any(small: dict[str, Any], name: str):
    raw = recipes.merge(small, {"enable_defense": True, "defense": {"rule": {"name": name}}})
    with pytest.raises(RecipeError, match=r"defense\.rule\.name: .* is no package\.module:name"):
        checked(raw, allow_code=False)


def test_a_block_that_is_no_block_is_told_once(small: dict[str, Any]):
    with pytest.raises(RecipeError) as caught:
        checked(recipes.merge(small, {"algorithm": "fedavg", "clients": {"partition": "dirichlet"}}))
    assert [problem.partition(": ")[0] for problem in caught.value.problems] == ["clients.partition", "algorithm"]
