"""What a store gives back is what it was given, or nothing; equal values have equal digests, others do not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from fedllm_sec.protocols import Labelled, LocalResult
from fedllm_sec.rounds.sharing import packed, unpacked
from fedllm_sec.rounds.store import HASH, Digests, Store, Unlike, digest

CPU = torch.device("cpu")
SHAPES = {"delta": (10,), "numbers": (3,), "buffers": (3,)}
IMAGES = Labelled(torch.zeros(2, 1, 2, 2), torch.tensor([0, 1]), 2, torch.zeros(2, dtype=torch.bool))


def result(seed: int, loss: float = 0.25, d: int = 10) -> LocalResult:
    delta = torch.randn(d, generator=torch.Generator().manual_seed(seed))
    return LocalResult("c03", delta, 31.0, 4, loss, torch.arange(3).double())


def test_a_row_comes_back_whole_and_a_damaged_or_unknown_one_not_at_all(tmp_path: Path):
    store, sent = Store.at(tmp_path / "rows"), result(1, loss=float("nan"))
    assert store.get("a" * 64, SHAPES) is None
    store.put("a" * 64, packed(sent))
    back = unpacked("c03", store.get("a" * 64, SHAPES), CPU)
    assert torch.equal(back.delta, sent.delta)
    assert torch.equal(back.buffers, sent.buffers)
    assert (back.id, back.count, back.steps) == ("c03", 31.0, 4)
    assert back.loss != back.loss
    assert store.get("a" * 64, SHAPES | {"delta": (11,)}) is None
    assert store.get("a" * 64, SHAPES | {"buffers": None}) is None
    path = tmp_path / "rows" / ("a" * 64)
    whole = path.read_bytes()
    for rotten in (whole[:-1], whole[:70] + b"x" + whole[71:], b"", b"0" * len(whole)):
        path.write_bytes(rotten)
        assert store.get("a" * 64, SHAPES) is None


@pytest.mark.parametrize("held", [b"no tensors", save({"numbers": torch.zeros(3)})[:20], b"\x80\x04N."])
def test_whole_bytes_that_hold_no_tensors_are_none_and_nothing_is_unpickled(tmp_path: Path, held: bytes):
    import hashlib

    (tmp_path / "key").write_bytes(hashlib.sha256(held).hexdigest().encode() + held)
    assert len(hashlib.sha256(held).hexdigest()) == HASH
    assert Store.at(tmp_path).get("key", {"numbers": (3,)}) is None


def test_a_full_store_loses_what_was_used_longest_ago_and_never_grows_beyond_its_bound(tmp_path: Path):
    size = 64 + 400
    store = Store(tmp_path, limit=3 * (size + 4 * 500))
    for number in range(5):
        store.put(f"row{number}", packed(result(number, d=500)))
        store.get("row0", SHAPES)
    left = sorted(p.name for p in tmp_path.iterdir())
    assert "row0" in left
    assert "row4" in left
    assert "row1" not in left
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) <= store.limit
    store.put("all", {"numbers": torch.zeros(10_000)})
    assert sorted(p.name for p in tmp_path.iterdir()) == left  # what has no room drives nothing out
    Store(tmp_path / "none", limit=10**9).put("lost", packed(result(1)))  # the folder went away: the run goes on


def test_eight_processes_stay_within_the_bound_though_each_looks_at_the_folder_now_and_then(tmp_path: Path):
    stores = [Store(tmp_path, limit=400_000) for _ in range(8)]
    for number in range(400):
        stores[number % 8].put(f"row{number}", {"numbers": torch.zeros(250)})
        assert number % 20 or sum(p.stat().st_size for p in tmp_path.iterdir()) <= 400_000
    assert (tmp_path / "row399").exists()


def test_equal_values_have_equal_digests_and_others_do_not():
    same = replace(IMAGES, x=torch.zeros(4, 1, 2, 2)[::2])
    assert digest(IMAGES) == digest(same)
    others = [replace(IMAGES, y=torch.tensor([1, 1])), replace(IMAGES, classes=3), replace(IMAGES, x=IMAGES.x.double())]
    values = [IMAGES, *others, [1, 2], [12], ["1", 2], (1, (2,)), {"a": 1}, {"a": None}, 1, True, 1.0, "1", None]
    assert len({digest(value) for value in values}) == len(values)
    with pytest.raises(Unlike):
        digest(object())


@dataclass(frozen=True)
class Counted:
    """A record that is looked at through its one field."""

    rows: list[int]


def test_the_digest_of_a_record_is_taken_once_and_that_of_one_in_its_place_anew(monkeypatch):
    taken = []
    monkeypatch.setattr("fedllm_sec.rounds.store.digest", lambda value: taken.append(1) or digest(value))
    digests, one = Digests(), Counted([1, 2])
    assert digests.of(one) == digests.of(one) == digest(one)
    assert len(taken) == 1
    for number in range(50):  # each may get the place in memory of the one before it
        assert digests.of(Counted([number])) == digest(Counted([number]))
    assert len(digests.known) <= 2
