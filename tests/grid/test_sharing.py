"""What one cell of a grid has trained or measured and another takes: the same bytes as without, where it may be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fedllm_sec.benchmark import main
from fedllm_sec.build.loaded import measuring_key, training_key
from fedllm_sec.build.names import checked
from fedllm_sec.grid import grid
from fedllm_sec.grid.cells import walk
from fedllm_sec.recipe.sections import Recipe
from fedllm_sec.report.grid.folder import Shared, read_grid, read_shared
from tests.grid.test_benchmark import written
from tests.grid.test_grid import BASE

CHECKED = checked(BASE)
TIMED = ("timings.jsonl", "environment.json", "report.html")
LATE: dict[str, Any] = {
    "base": {**BASE, "rounds": 4},
    "axes": {
        "attack": {
            "flip": {"update": [{"name": "byzantine_flip"}], "start": 3},
            "taught": {"data": [{"name": "label_flip", "mapping": {0: 1}}], "update": [], "start": 2},
            "stealthy": {"data": [{"name": "label_flip", "mapping": {0: 1}}], "update": [],
                         "local": [{"name": "neurotoxin"}], "start": 3},
        },
        "defense": {"none": None, "median": {"rule": {"name": "median"}}},
    },
}  # fmt: skip


STAMP: dict[str, Any] = {"name": "pixel_trigger", "target": 0, "rate": 0.5}
LEARNT: dict[str, Any] = {"name": "a3fl", "target": 0, "size": 3, "margin": 2, "passes": 2, "renew": 2}
TRIGGERS: dict[str, Any] = {
    "base": {**BASE, "rounds": 2, "evaluate": {"start": True, "rows": 60, "attack_rows": 40},
             "attack": {"malicious": {"count": 2}, "data": [STAMP], "update": [], "start": 2}},
    "axes": {"attack": {"stamp": {}, "boosted": {"update": [{"name": "byzantine_flip"}]}, "learnt": {"data": [LEARNT]}},
             "defense": {"none": None}},
}  # fmt: skip


def same_files(one: Path, other: Path) -> list[str]:
    """The files of which two folders do not have the same bytes."""
    names = {p.relative_to(root) for root in (one, other) for p in root.rglob("*") if p.is_file()}
    kept = sorted(n for n in names if n.name not in TIMED and n.name != "shared.jsonl" and ".locks" not in n.parts)
    assert len(kept) >= 10
    return [str(n) for n in kept if not _equal(one / n, other / n)]


def _equal(one: Path, other: Path) -> bool:
    if not (one.exists() and other.exists()):
        return False
    if one.name not in ("summary.json", "grid.json") and not one.name.startswith("results"):
        return one.read_bytes() == other.read_bytes()
    return _untimed(one.read_text()) == _untimed(other.read_text()) if one.suffix == ".json" else True


def _untimed(text: str) -> Any:
    found = json.loads(text)
    return {k: v for k, v in found.items() if k not in ("seconds", "command", "made", "sha256")}


def both(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a grid that shared, after comparing its files with those of one that did not."""
    for name, words in (("apart", ["--no-share"]), ("shared", [])):
        (path.parent / name).mkdir()
        monkeypatch.chdir(path.parent / name)
        assert main([str(path), "output.folder=out", *words]) == 0
    apart, shared = path.parent / "apart" / "out", path.parent / "shared" / "out"
    assert same_files(shared, apart) == []
    assert read_shared(apart) is None
    return shared


def walked(path: Path, monkeypatch: pytest.MonkeyPatch) -> Shared:
    """What the cells of a grid shared, after comparing their files with those of cells that did not; no report."""
    for name, share in (("apart", False), ("shared", True)):
        (path.parent / name).mkdir()
        monkeypatch.chdir(path.parent / name)
        found = grid.load(path, ["output.folder=out"])
        walk(found.folder, list(found.run_order()), command="x", started=1.0, tell=lambda *_: None, share=share)
        shutil.rmtree(found.folder / ".rows", ignore_errors=True)
    assert same_files(path.parent / "shared", path.parent / "apart") == []
    assert read_shared(path.parent / "apart" / "out") is None
    return read_shared(path.parent / "shared" / "out")


def test_a_grid_that_shares_rows_leaves_the_bytes_of_one_that_does_not_and_trains_far_fewer(tmp_path, monkeypatch):
    shared = both(written(tmp_path, **LATE), monkeypatch)
    told = read_shared(shared)
    assert told.trained + told.taken == 7 * 4 * 6 - 2 * 2 * 2  # 7 cells, 4 rounds, 6 clients; neurotoxin's 2, 2 rounds
    assert told.trained <= 0.6 * (told.trained + told.taken)
    assert not (shared / ".rows").exists()
    assert read_grid(shared).shared == told


def test_what_was_measured_of_a_model_is_taken_for_the_same_rows_also_with_triggers_and_learnt_ones(
    tmp_path, monkeypatch
):
    told = walked(written(tmp_path, **TRIGGERS), monkeypatch)
    # three passes (held-out, triggered, clean rows) in rounds 0, 1 and 2 of four cells, whose models part in round 2
    held_out, stamped, learnt = 2 + 4, 2 * (2 + 3), 1 + 2 * 1 + 1 + 1
    assert told.measured + told.found == 4 * 3 * 3
    assert told.measured == held_out + stamped + learnt - 1  # clean rows of rounds 0 and 1 are those beside the stamp


SMALL = {**BASE["clients"], "total": 3, "local_steps": 1}
ELSE: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    # rounds 1 and 2 of two cells; in the last one also each client's model; the models part in round 2
    "local": ({"model": {"name": "resnet", "depth": 8, "norm": "batch", "buffers": "local"}}, (1 + 2 * (1 + 3), 1)),
    "gan": ({"task": "gan", "model": {"name": "mlp_gan"}}, (1 + 2, 1)),
    # of other models from round 1 on; the smoothed test begins with what was measured just before
    "smoothed": ({"defense": {"after": [{"name": "crfl", "rho": 10.0, "copies": 3}]}}, (2 + 2 + 3, 1)),
}


@pytest.mark.parametrize(("changes", "passes"), ELSE.values(), ids=ELSE)
def test_clients_with_buffers_of_their_own_generators_and_smoothed_models_share_too(
    tmp_path, changes, passes, monkeypatch
):
    base = {**BASE, "data": {"name": "digits", "train_rows": 60, "test_rows": 20}, "clients": SMALL, **changes}
    attacks = {"zero": {"malicious": {"count": 1}, "update": [{"name": "byzantine_zero"}], "start": 2}}
    defenses = {"some": {}} if "defense" in changes else {"none": None}
    told = walked(written(tmp_path, base=base, axes={"attack": attacks, "defense": defenses}), monkeypatch)
    assert (told.measured, told.found) == passes


TEXT: dict[str, Any] = {
    "base": {
        "rounds": 2, "task": "causal_lm", "model": {"name": "tiny", "lora": {"r": 2, "target_modules": "all-linear"}},
        "data": {"name": "builtin:topic", "columns": {"text": "text", "response": "response", "label": "label"},
                 "template": "{text}\nTopic:", "max_length": 96, "train_rows": 120, "test_rows": 60},
        "clients": {"total": 3, "local_steps": 1, "batch_size": 4, "lr": 1e-3},
        "attack": {"malicious": {"count": 1}, "start": 2, "update": [],
                   "data": [{"name": "text_trigger", "trigger": " cf", "target": "Sports", "rate": 0.5}]},
        "evaluate": {"rows": 20, "attack_rows": 10, "max_new_tokens": 3, "draws": 2, "temperature": 0.7,
                     "second_judge": {"name": "contains"}, "generalise": True, "transcripts": 3},
        "compute": {"threads": 1},
    },
    "axes": {"attack": {"word": {}, "boosted": {"update": [{"name": "byzantine_flip"}]}}, "defense": {"none": None}},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("average", ["factors", "share_a", "exact"])
def test_a_language_models_losses_and_answers_are_shared_and_its_transcripts_stay_the_same(
    tmp_path, average, monkeypatch
):
    lora = {**TEXT["base"]["model"]["lora"], "average": average}
    base = {**TEXT["base"], "model": {"name": "tiny", "lora": lora}}
    told = walked(written(tmp_path, **{**TEXT, "base": base}), monkeypatch)
    assert told.found >= 4  # of round 1 of the other cells: losses and answers
    lines = (tmp_path / "shared" / "out" / "cells" / "word__none" / "answers.jsonl").read_text().splitlines()
    assert len(lines) > 20


def test_a_line_of_what_was_shared_may_be_damaged_or_older(tmp_path: Path):
    lines = [
        '{"trained": 3, "taken": 4}',
        "[]",
        '{"trained": 1e999, "taken": 1}',
        '{"trained"',
        "3",
        '{"trained": "x"}',
    ]
    lines.append('{"trained": 1, "taken": 2, "measured": 5, "found": 1000}')
    (tmp_path / "shared.jsonl").write_text("\n".join(lines))
    assert read_shared(tmp_path) == Shared(4, 6, 5, 1000)
    assert read_shared(tmp_path).in_words("others") == {
        "clients' rows": "4 trained, 6 taken from others",
        "passes over held-out rows": "5 made, 1,000 not made again",
    }
    assert Shared(3, 0, 3, 0).in_words("others") == {}


@pytest.mark.parametrize(
    ("changes", "shares"),
    [({}, True), ({"algorithm": {"name": "fedprox"}}, True), ({"algorithm": {"name": "fedgkt"}}, False),
     ({"model": {"name": "tests.stub_model:make"}}, False)],
)  # fmt: skip
def test_neither_code_from_outside_nor_fedgkt_is_shared(changes, shares):
    recipe = Recipe.model_construct(**{**CHECKED.__dict__, **changes})
    assert (training_key(recipe) is not None) == (measuring_key(recipe) is not None) == shares


@pytest.mark.parametrize("name", ["scaffold", "fedprox", "feddyn", "fednova", "fedopt"])
def test_methods_with_a_memory_share_too_and_end_in_the_same_bytes(tmp_path: Path, name: str, monkeypatch):
    base = {**BASE, "rounds": 3, "algorithm": {"name": name}, "clients": {**BASE["clients"], "per_round": 3}}
    base["clients"] |= {"optimizer": "sgd", "max_grad_norm": None} if name in ("scaffold", "fednova", "feddyn") else {}
    path = written(tmp_path, base=base, axes={"attack": {"zero": {"start": 3}}, "defense": {"none": None}})
    told = read_shared(both(path, monkeypatch))
    assert (told.trained, told.taken) == (9, 9)  # two cells of three rounds of three clients, the same rows
