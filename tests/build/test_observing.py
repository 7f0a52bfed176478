"""Runs that somebody observes: the same bytes as without, scores beside the truth, reasons where there are none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml

import fedllm_sec
from fedllm_sec.__main__ import main
from fedllm_sec.build.names import checked
from fedllm_sec.build.observing import audited
from fedllm_sec.build.plan import planned
from fedllm_sec.errors import FedError, RecipeError
from fedllm_sec.records import observed
from fedllm_sec.records.verify import look
from fedllm_sec.train import main as train
from tests.conftest import SMALL

BASE: dict[str, Any] = {
    "task": "classify",
    "rounds": 2,
    "model": {"name": "sigmoid_cnn"},
    "data": {"name": "digits", "train_rows": 60, "test_rows": 30},
    "clients": {
        "total": 3, "per_round": 2, "local_steps": 1, "batch_size": 1,
        "optimizer": "sgd", "lr": 0.1, "max_grad_norm": None,
    },
}  # fmt: skip
ATTACK: dict[str, Any] = {
    "privacy": [
        {"name": "reveal_labels"},
        {"name": "idlg", "iterations": 100, "restarts": 1},
        {"name": "linear_layer"},
    ],
    "observe": {"rounds": [1, 2], "clients": [0, 1]},
}


def run(folder: Path, **more: Any) -> Path:
    raw = {**BASE, **more, "output": {"folder": str(folder)}}
    recipe = folder.with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump(raw))
    assert train([str(recipe)]) == 0
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("plain") / "run")


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("watched") / "run", enable_attack=True, attack=ATTACK)


def test_observing_changes_no_byte_of_history_and_model(plain: Path, watched: Path):
    for name in ("history.jsonl", "model/model.safetensors"):
        assert (plain / name).read_bytes() == (watched / name).read_bytes()


def test_the_scores_stand_in_the_summary_and_what_could_not_act_has_its_reason(watched: Path):
    labels, images, linear = json.loads((watched / "summary.json").read_text())["leakage"]
    assert labels["scores"]["labels"]["value"] == 1.0
    assert images["scores"]["psnr"]["value"] > 40
    assert images["scores"]["over_20_db"] == 1.0
    assert linear["scores"] == {"psnr": None, "ssim": None, "over_20_db": None, "labels": None}
    assert linear["not_applicable"] == 4
    found = observed.read_found(watched)
    assert found is not None
    cohorts = [json.loads(line)["cohort"] for line in (watched / "history.jsonl").read_text().splitlines()]
    for one in found["attacks"][1]["observations"]:
        away = one["client"] not in cohorts[one["round"] - 1]
        assert (one["reason"] is not None) == away
        assert not away or "took no part" in one["reason"]


def test_the_audit_reads_the_scores_and_writes_a_page_with_the_best_the_median_and_the_worst(watched: Path, capsys):
    assert main(["audit", str(watched)]) == 0
    printed = capsys.readouterr().out
    assert "audit.html" in printed
    assert "linear_layer: n/a" in printed
    page = (watched / "audit.html").read_text()
    assert [f"idlg: {which}" in page for which in ("best", "median", "worst")] == [True] * 3
    assert page.count("data:image/png;base64,iVBOR") == 6
    assert main(["report", str(watched)]) == 0
    report = (watched / "report.html").read_text()
    assert "What an observer learnt" in report
    assert "None: all clients are honest." in report


def test_an_audit_is_made_again_from_what_was_kept_and_a_damaged_file_is_a_reason(watched: Path):
    before = fedllm_sec.audit(watched)
    (watched / "privacy.json").unlink()
    spoilt = sorted((watched / "observed").iterdir())[0]
    whole = spoilt.read_bytes()
    spoilt.write_bytes(whole[:-40])
    try:
        after = fedllm_sec.audit(watched)
    finally:
        spoilt.write_bytes(whole)
        observed.write_found(watched, before)
    old, new = (found["attacks"][0]["observations"] for found in (before, after))
    changed = [b["reason"] for a, b in zip(old, new, strict=True) if a["reason"] != b["reason"]]
    assert len(changed) == 1
    assert "cannot be read" in changed[0]


def test_verify_looks_at_what_was_kept_and_learnt_and_an_audit_made_again_is_no_damage(watched: Path, tmp_path: Path):
    folder = tmp_path / "run"
    shutil.copytree(watched, folder)
    raw = yaml.safe_load((folder / "recipe.yaml").read_text())
    (tmp_path / "again.yaml").write_text(yaml.safe_dump({**raw, "output": {**raw["output"], "folder": str(folder)}}))
    fedllm_sec.audit(folder, again=True)  # tests before this one have changed what lies there
    assert look(folder).wrong == {}
    learnt, kept = folder / "privacy.json", sorted((folder / "observed").iterdir())[0]
    learnt.write_text(learnt.read_text().replace("reveal_labels", "reveal_nothing"))
    found = look(folder)
    assert found.wrong.keys() == {"privacy.json"}
    assert "privacy.json".startswith(found.again)
    assert train([str(tmp_path / "again.yaml")]) == 0
    assert look(folder).wrong == {}
    assert "reveal_nothing" not in learnt.read_text()
    fedllm_sec.audit(folder, again=True)
    assert look(folder).wrong == {}
    kept.unlink()
    assert look(folder).wrong == {f"observed/{kept.name}": "is gone"}
    fedllm_sec.audit(folder, again=True)  # which cannot bring it back: its scores are n/a, and summary.json says so
    assert look(folder).wrong == {f"observed/{kept.name}": "is gone"}
    leaked = json.loads((folder / "summary.json").read_text())["leakage"]
    assert leaked == [{k: a[k] for k in leaked[0]} for a in json.loads(learnt.read_text())["attacks"]]


def test_a_page_of_a_strangers_scores_shows_no_markup_and_no_picture_that_is_none(watched: Path):
    before = observed.read_found(watched)
    assert before is not None
    hostile = {"name": "<script>x</script>", "scores": {"psnr": {"value": "x"}}, "observations": 3,
               "pictures": {"best": {"true": '"><script>', "made": "x"}}}  # fmt: skip
    try:
        observed.write_found(watched, {**before, "what": ["<b>"], "attacks": [hostile, 7]})
        fedllm_sec.audit(watched)
        page = (watched / "audit.html").read_text()
    finally:
        observed.write_found(watched, before)
    assert "<script>x" not in page
    assert "&lt;script&gt;x" in page
    assert "data:image/png" not in page


def test_gradients_are_those_of_the_first_step_and_a_forged_or_quarantined_row_is_none(tmp_path: Path):
    """With malicious clients, the observer sees rows as they are sent; a forged one has no batch behind it."""
    attack = {
        "privacy": [{"name": "reveal_labels"}], "observe": {"rounds": [1], "clients": [0, 1, 2]},
        "malicious": {"ids": [0]}, "update": [{"name": "inf_nan"}],
    }  # fmt: skip
    clients = {**BASE["clients"], "per_round": None}
    folder = run(tmp_path / "forged", enable_attack=True, attack=attack, clients=clients, rounds=1)
    found = observed.read_found(folder)
    assert found is not None
    reasons = [one["reason"] for one in found["attacks"][0]["observations"]]
    assert "quarantined" in reasons[0]
    assert reasons[1:] == [None, None]

    sight = {"privacy": [{"name": "reveal_labels"}], "observe": {"clients": [1], "what": "gradient"}}
    steps = {**clients, "local_steps": 3, "batch_size": 4, "optimizer": "adamw"}
    folder = run(tmp_path / "gradient", enable_attack=True, attack=sight, clients=steps, rounds=1)
    kept = observed.kept(folder, "c01", 1)
    assert kept is not None
    assert kept["what"] == "gradient"
    assert float(torch.as_tensor(kept["sent"]).norm()) > 0
    found = observed.read_found(folder)
    assert found is not None
    assert found["attacks"][0]["scores"]["labels"]["value"] == 1.0


@pytest.mark.parametrize(
    ("attack", "more", "words"),
    [
        ({"privacy": [{"name": "dlg"}]}, {}, "Add attack.observe"),
        ({"observe": {"rounds": [1]}}, {}, "nobody learns from what is seen"),
        ({**ATTACK, "observe": {"rounds": [3]}}, {}, "after the last round 2"),
        ({**ATTACK, "observe": {"clients": [3]}}, {}, "not one of the clients 0 to 2"),
        ({**ATTACK, "observe": {"rounds": [1, 1]}}, {}, "each once"),
        ({**ATTACK, "malicious": {"count": 1}}, {}, "an observer is no client"),
        (ATTACK, {"data": {**BASE["data"], "flip": True}}, "would not be those of the shard"),
        ({**ATTACK, "privacy": [{"name": "dgl"}]}, {}, 'Did you mean "dlg"'),
        ({**ATTACK, "privacy": [{"name": "dlg", "restart": 2}]}, {}, 'Did you mean "restarts"'),
        (ATTACK, {"algorithm": {"name": "fedgkt"}, "model": {"name": "lenet"}}, "fedgkt sends none"),
        (ATTACK, {"task": "gan", "model": {"name": "mlp_gan"}}, "cannot stand here"),
    ],
)
def test_what_an_observer_cannot_do_is_told_before_anything_trains(attack: Any, more: Any, words: str):
    with pytest.raises(RecipeError, match=words):
        planned(checked({**BASE, "enable_attack": True, "attack": attack, **more}))


TEXT: dict[str, Any] = {
    "rounds": 1,
    "model": {"name": "tiny", "lora": {"r": 4, "alpha": 8}},
    "data": {
        **SMALL["data"],
        "train_rows": 24,
        "test_rows": 40,
        "canaries": {"client": 0, "repetitions": [1, 3], "digits": 2},
    },
    "clients": {"total": 3, "per_round": 2, "local_steps": 3, "batch_size": 4, "lr": 0.02},
    "evaluate": {"rows": 4, "max_new_tokens": 2, "answer_rows": 0},
}
TOLD_APART: dict[str, Any] = {
    "privacy": [{"name": "membership", "score": "loss"}, {"name": "membership", "model": "global"},
                {"name": "membership", "score": "reference", "shadows": 1}, {"name": "canary"}, {"name": "token_set"},
                {"name": "dager"}],
    "observe": {"rounds": [1], "clients": [0, 1], "others": 20, "own_rows": 12},
}  # fmt: skip


def test_a_run_on_text_that_is_observed_has_the_same_bytes_and_tells_members_apart(tmp_path: Path, capsys):
    with patch.dict(BASE, {**TEXT, "task": "causal_lm"}):
        plain = run(tmp_path / "plain")
        watched = run(tmp_path / "watched", enable_attack=True, attack=TOLD_APART)
    for name in ("history.jsonl", "adapter/adapter_model.safetensors"):
        assert (plain / name).read_bytes() == (watched / name).read_bytes()
    before = observed.read_found(watched)
    assert before is not None
    *apart, canary, tokens, dager = before["attacks"]
    assert tokens["not_applicable"] == 2  # steps of AdamW fill r = 4
    assert set(tokens["scores"].values()) == set(dager["scores"].values()) == {None}
    assert [one["repetitions"] for one in canary["repetitions"]] == [1, 3]
    assert [one["reason"] for one in canary["observations"] if one["client"] == "c00"] == [None]
    assert canary["not_applicable"] == 1
    for attack in apart:
        assert attack["kind"] == "membership"
        assert 0 <= attack["scores"]["tpr"]["low"] <= attack["scores"]["auc"]["high"] <= 1
        acted = [one for one in attack["observations"] if one["reason"] is None]
        # three steps of 4 are the whole shard of 8 rows, in which c00 holds one of its secrets three times
        assert [one["members"] for one in acted] == [{"c00": 6}.get(one["client"], 8) for one in acted]
        assert {len(one["roc"]) > 3 for one in acted} == {True}
    assert before["attacks"][0]["scores"] != before["attacks"][1]["scores"]

    after = fedllm_sec.audit(watched, again=True)  # from what was kept, the global model from the checkpoint
    assert [a["scores"] for a in after["attacks"]] == [a["scores"] for a in before["attacks"]]
    assert main(["audit", str(watched)]) == 0
    assert "membership (model global)" in capsys.readouterr().out
    page = (watched / "audit.html").read_text()
    assert "Members found at each share of others" in page
    assert "TPR at 1 % FPR" in page
    assert "planted in rows" in page
    assert canary["observations"][0]["secrets"][1]["secret"] in page
    assert "over 20 dB" not in page

    others = {"name": "canary", "kind": "canary", "repetitions": [{"extracted": "<i>"}],
              "observations": [{"secrets": [{"secret": 3, "said": "<i> x"}, 4]}]}  # fmt: skip
    hostile = {"name": "<script>x", "kind": "membership", "rounds": [{"round": "<i>", "auc": {"value": "x"}}, 3],
               "scores": 7, "observations": [{"auc": {"value": 0.5}, "roc": [[0, "x"], [2, 2]]}]}  # fmt: skip
    observed.write_found(watched, {**before, "attacks": [hostile, others, before["attacks"][0]]})
    fedllm_sec.audit(watched)
    page = (watched / "audit.html").read_text()
    assert "<script>x" not in page
    assert "<i>" not in page
    assert "&lt;i&gt;" in page


@pytest.mark.parametrize(
    ("attack", "words"),
    [
        ({**TOLD_APART, "observe": {"others": 30, "own_rows": 11}}, "others: 30 of 40 held-out rows"),
        ({**TOLD_APART, "privacy": [{"name": "membership", "k": 0.5}]}, "score: drop does not use it"),
        ({**TOLD_APART, "privacy": [{"name": "dlg"}]}, "Fitting: canary, dager, membership, token_set"),
    ],
)
def test_what_an_observer_of_text_cannot_do_is_told_before_anything_trains(tmp_path: Path, attack: Any, words: str):
    from fedllm_sec.build.observing import make_observer

    raw = {**BASE, **TEXT, "task": "causal_lm", "enable_attack": True, "attack": attack}
    held = SimpleNamespace(fitted=SimpleNamespace(encoded=range(40)))
    with pytest.raises(RecipeError, match=words):
        make_observer(checked(raw), ["c00", "c01", "c02"], held, SimpleNamespace(world=1))  # type: ignore[arg-type]


def test_an_audit_of_what_was_never_observed_says_what_to_add(plain: Path, tmp_path: Path):
    with pytest.raises(RecipeError, match="nobody observed this run"):
        fedllm_sec.audit(plain)
    with pytest.raises(FedError, match="holds no run"):
        fedllm_sec.audit(tmp_path)
    assert audited(checked(BASE), None, plain, print) is None
