"""Rows that one cell of a grid has trained and another takes: the same bytes as without, and only where they may be."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedllm_sec.benchmark import main
from fedllm_sec.build.loaded import training_key
from fedllm_sec.build.names import checked
from fedllm_sec.protocols import Labelled, LocalResult
from fedllm_sec.recipe.sections import Recipe
from fedllm_sec.report.grid.folder import read_grid, shared_rows
from fedllm_sec.rounds.sharing import RowStore, Unlike, digest
from tests.grid.test_benchmark import written
from tests.grid.test_grid import BASE

CHECKED = checked(BASE)
CPU = torch.device("cpu")
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


def result(seed: int, loss: float = 0.25, d: int = 10) -> LocalResult:
    delta = torch.randn(d, generator=torch.Generator().manual_seed(seed))
    return LocalResult("c03", delta, 31.0, 4, loss, torch.arange(3).double())


def same_files(one: Path, other: Path) -> list[str]:
    """The files of which two folders do not have the same bytes."""
    names = {p.relative_to(root) for root in (one, other) for p in root.rglob("*") if p.is_file()}
    kept = sorted(n for n in names if n.name not in TIMED and n.name != "shared.jsonl" and ".locks" not in n.parts)
    assert len(kept) > 10
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
    assert shared_rows(apart) is None
    return shared


def test_a_grid_that_shares_rows_leaves_the_bytes_of_one_that_does_not_and_trains_far_fewer(tmp_path, monkeypatch):
    shared = both(written(tmp_path, **LATE), monkeypatch)
    trained, taken = shared_rows(shared)
    assert trained + taken == 7 * 4 * 6 - 2 * 2 * 2  # 7 cells, 4 rounds, 6 clients; neurotoxin's 2 attackers, 2 rounds
    assert trained <= 0.6 * (trained + taken)
    assert not (shared / ".rows").exists()
    assert read_grid(shared).shared == (trained, taken)


def test_a_row_comes_back_whole_and_a_damaged_or_unknown_one_not_at_all(tmp_path: Path):
    store, sent = RowStore.at(tmp_path / "rows"), result(1, loss=float("nan"))
    assert store.get("a" * 64, "c03", CPU) is None
    store.put("a" * 64, sent)
    back = store.get("a" * 64, "c03", CPU)
    assert torch.equal(back.delta, sent.delta)
    assert torch.equal(back.buffers, sent.buffers)
    assert (back.id, back.count, back.steps) == ("c03", 31.0, 4)
    assert back.loss != back.loss
    assert (store.trained, store.taken) == (1, 1)
    path = tmp_path / "rows" / ("a" * 64)
    whole = path.read_bytes()
    for rotten in (whole[:-1], whole[:70] + b"x" + whole[71:], b"", b"0" * len(whole)):
        path.write_bytes(rotten)
        assert store.get("a" * 64, "c03", CPU) is None


def test_a_full_store_loses_what_was_used_longest_ago_and_never_grows_beyond_its_bound(tmp_path: Path):
    size = 64 + 400
    store = RowStore(tmp_path, limit=3 * (size + 4 * 500))
    for number in range(5):
        store.put(f"row{number}", result(number, d=500))
        store.get("row0", "c03", CPU)
    left = sorted(p.name for p in tmp_path.iterdir())
    assert "row0" in left
    assert "row4" in left
    assert "row1" not in left
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) <= store.limit
    RowStore(tmp_path / "none", limit=10**9).put("lost", result(1))  # the folder went away: the run goes on


def test_equal_values_have_equal_digests_and_others_do_not():
    images = Labelled(torch.zeros(2, 1, 2, 2), torch.tensor([0, 1]), 2, torch.zeros(2, dtype=torch.bool))
    same = replace(images, x=torch.zeros(4, 1, 2, 2)[::2])
    assert digest(images) == digest(same)
    others = [replace(images, y=torch.tensor([1, 1])), replace(images, classes=3), replace(images, x=images.x.double())]
    values = [images, *others, [1, 2], [12], ["1", 2], (1, (2,)), {"a": 1}, {"a": None}, 1, True, 1.0, "1", None]
    assert len({digest(value) for value in values}) == len(values)
    with pytest.raises(Unlike):
        digest(object())


@pytest.mark.parametrize(
    ("changes", "shares"),
    [({}, True), ({"algorithm": {"name": "fedprox"}}, True), ({"algorithm": {"name": "fedgkt"}}, False),
     ({"model": {"name": "tests.stub_model:make"}}, False)],
)  # fmt: skip
def test_neither_code_from_outside_nor_fedgkt_is_shared(changes, shares):
    recipe = Recipe.model_construct(**{**CHECKED.__dict__, **changes})
    assert (training_key(recipe) is not None) == shares


@pytest.mark.parametrize("name", ["scaffold", "fedprox", "feddyn", "fednova", "fedopt"])
def test_methods_with_a_memory_share_too_and_end_in_the_same_bytes(tmp_path: Path, name: str, monkeypatch):
    base = {**BASE, "rounds": 3, "algorithm": {"name": name}, "clients": {**BASE["clients"], "per_round": 3}}
    base["clients"] |= {"optimizer": "sgd", "max_grad_norm": None} if name in ("scaffold", "fednova", "feddyn") else {}
    path = written(tmp_path, base=base, axes={"attack": {"zero": {"start": 3}}, "defense": {"none": None}})
    assert shared_rows(both(path, monkeypatch)) == (9, 9)  # two cells of three rounds of three clients, the same rows
