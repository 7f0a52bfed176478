"""Update matrices in memory, on disk and over ranks; lazy rows; and every way to hand over something unusable."""

import json
import os
import socket

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file

from fedllm_sec import kernels
from fedllm_sec.errors import DefenseError
from fedllm_sec.matrix import Layout, UpdateMatrix


def rows_of(seed, n, d):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def whole(updates):
    return torch.cat([block for _, block in updates.blocks()], 1)


# ---------------------------------------------------------------- layout


def test_a_layout_splits_a_vector_and_joins_it_again():
    layout = Layout.of([("a", torch.zeros(2, 3)), ("b", torch.zeros(4)), ("c", torch.zeros(()))])
    vector = torch.arange(11.0)
    parts = layout.split(vector)
    assert layout.size == 11
    assert parts["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert parts["c"].shape == ()
    assert torch.equal(layout.join(parts), vector)


# ---------------------------------------------------------------- in memory


@pytest.mark.parametrize("chunk_mb", [None, 1e-6, 0.01, 0.5])
def test_blocks_cover_all_columns_once_in_order(chunk_mb):
    rows = rows_of(0, 5, 40_001)
    updates = (
        UpdateMatrix.of(rows, chunk_mb=chunk_mb)
        if chunk_mb != 1e-6
        else UpdateMatrix.of(rows[:, :50], chunk_mb=chunk_mb)
    )
    places = [place for place, _ in updates.blocks()]
    assert [place.start for place in places] == [0, *(place.stop for place in places[:-1])]
    assert torch.equal(whole(updates), updates.rows)


def test_a_block_fits_the_memory_it_was_given():
    updates = UpdateMatrix.of(rows_of(1, 8, 30_000), chunk_mb=0.1)
    assert max(block.numel() * 4 for _, block in updates.blocks()) <= 0.1 * 2**20


def test_rows_that_are_views_of_something_larger_are_read_right():
    base = rows_of(2, 9, 800)
    rows = base[1:8:2, 100:500]
    turned = rows_of(3, 300, 4).T
    for view in (rows, turned):
        plain = view.contiguous()
        assert torch.equal(kernels.gram(UpdateMatrix.of(view)), kernels.gram(UpdateMatrix.of(plain)))
        assert torch.equal(kernels.median(UpdateMatrix.of(view)), kernels.median(UpdateMatrix.of(plain)))


def test_selecting_keeps_ids_and_counts_and_copies_nothing():
    rows = rows_of(4, 4, 10)
    updates = UpdateMatrix.of(rows, ids=["a", "b", "c", "d"], counts=[1, 2, 3, 4])
    chosen = updates.select([3, 1]).select([1, 0])
    assert chosen.ids == ("b", "d")
    assert chosen.counts == (2.0, 4.0)
    assert chosen.picked == (1, 3)
    assert chosen.rows.data_ptr() == rows.data_ptr()
    assert torch.equal(whole(chosen), rows[[1, 3]])


def test_mixing_forms_each_block_when_it_is_read():
    rows = rows_of(5, 3, 1000)
    weights = torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, -2.0]])
    mixed = UpdateMatrix.of(rows, chunk_mb=0.001).mix(weights)
    assert (mixed.n, mixed.ids, mixed.picked) == (2, ("mix0", "mix1"), None)
    torch.testing.assert_close(whole(mixed), weights @ rows)


def test_very_small_and_very_large_weights_do_not_vanish():
    rows = torch.full((2, 5), 1e38)
    mixed = UpdateMatrix.of(rows).mix(torch.tensor([[1e-42, 0.0]], dtype=torch.float64))
    torch.testing.assert_close(whole(mixed), torch.full((1, 5), 1e-4))


# ---------------------------------------------------------------- on disk


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_saved_matrix_comes_back_with_ids_counts_and_layout(tmp_path, dtype):
    rows = rows_of(6, 7, 70_003).to(dtype)
    layout = Layout(("a", "b"), ((70_000,), (3, 1)))
    saved = UpdateMatrix.of(rows, ids=list("abcdefg"), counts=range(7), layout=layout)
    saved.save(tmp_path / "u.safetensors")
    opened = UpdateMatrix.open(tmp_path / "u.safetensors", chunk_mb=0.5)
    assert (opened.ids, opened.counts, opened.layout) == (saved.ids, saved.counts, layout)
    assert torch.equal(opened.rows, rows)
    assert torch.equal(whole(opened), rows.float())
    assert torch.equal(load_file(tmp_path / "u.safetensors")["rows"], rows)
    assert os.listdir(tmp_path) == ["u.safetensors"]


def test_kernels_give_the_same_bits_from_disk_as_from_memory(tmp_path):
    rows = rows_of(7, 12, 200_000)
    UpdateMatrix.of(rows).save(tmp_path / "u.safetensors")
    inside, outside = UpdateMatrix.of(rows), UpdateMatrix.open(tmp_path / "u.safetensors")
    weights = torch.rand(12, generator=torch.Generator().manual_seed(0))
    for result in (
        kernels.gram,
        kernels.sq_distances,
        kernels.row_norms,
        kernels.median,
        kernels.sign_sums,
        lambda u: kernels.trimmed_mean(u, 2),
        lambda u: kernels.combine(u, weights),
        lambda u: kernels.gram(u.select([4, 2])),
        lambda u: kernels.median(u.mix(torch.full((2, 12), 0.5))),
    ):
        assert torch.equal(result(outside), result(inside))


def test_a_mixed_matrix_is_saved_as_it_stands(tmp_path):
    rows = rows_of(8, 4, 300)
    UpdateMatrix.of(rows).select([2, 0]).save(tmp_path / "u.safetensors")
    assert torch.equal(UpdateMatrix.open(tmp_path / "u.safetensors").rows, rows[[2, 0]])


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_a_truncated_file_is_an_error(tmp_path, keep):
    path = tmp_path / "u.safetensors"
    UpdateMatrix.of(rows_of(9, 4, 300)).save(path)
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    with pytest.raises(DefenseError, match=r"u\.safetensors: .*truncated.* Write it again"):
        UpdateMatrix.open(path)


def test_files_of_another_kind_are_errors(tmp_path):
    path = tmp_path / "u.safetensors"
    with pytest.raises(DefenseError, match="cannot be opened"):
        UpdateMatrix.open(path)
    header = json.dumps({"rows": {"dtype": "I64", "shape": [1, 1], "data_offsets": [0, 8]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(DefenseError, match="rows are I64"):
        UpdateMatrix.open(path)
    header = json.dumps({"rows": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 8]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(DefenseError, match=r"do not hold \(2, 2\)"):
        UpdateMatrix.open(path)
    path.write_bytes((2).to_bytes(8, "little") + b"[]")
    with pytest.raises(DefenseError, match="not a safetensors file"):
        UpdateMatrix.open(path)


# ---------------------------------------------------------------- over ranks


def spread(rank, port, rows, folder):
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    owners = [0, 1, 0, 1, 0]  # which rank trained a client
    own = rows[[i for i, owner in enumerate(owners) if owner == rank]]
    updates = UpdateMatrix.across_ranks(own, owners=owners, ids=list("abcde"), chunk_mb=0.01)
    results = {
        "gram": kernels.gram(updates),
        "median": kernels.median(updates),
        "combined": kernels.combine(updates, torch.tensor([1.0, 0, 2, 0, 3])),
        "some": kernels.median(updates.select([4, 1, 0])),
    }
    torch.save(results, os.path.join(folder, f"{rank}.pt"))
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_rows_spread_over_two_ranks_are_gathered_block_by_block(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    rows = rows_of(10, 5, 3001)
    mp.spawn(spread, args=(port, rows, str(tmp_path)), nprocs=2)
    updates = UpdateMatrix.of(rows)
    wanted = {
        "gram": kernels.gram(updates),
        "median": kernels.median(updates),
        "combined": kernels.combine(updates, torch.tensor([1.0, 0, 2, 0, 3])),
        "some": kernels.median(updates.select([4, 1, 0])),
    }
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: UpdateMatrix.of([]), "an empty list"),
        (lambda: UpdateMatrix.of(torch.zeros(0, 3)), "n >= 1"),
        (lambda: UpdateMatrix.of(torch.zeros(3)), "n >= 1"),
        (lambda: UpdateMatrix.of([torch.zeros(3), torch.zeros(4)]), "row 1 has shape"),
        (lambda: UpdateMatrix.of([torch.zeros(3), torch.zeros(3).half()]), "different types"),
        (lambda: UpdateMatrix.of(torch.zeros(2, 3, dtype=torch.int64)), "int64"),
        (lambda: UpdateMatrix.of(torch.zeros(2, 3).double()), "float64"),
        (lambda: UpdateMatrix.of(torch.zeros(2, 3), ids=["a"]), "1 ids for 2 rows"),
        (lambda: UpdateMatrix.of(torch.zeros(2, 3), counts=[1, 2, 3]), "3 counts for 2 rows"),
        (lambda: UpdateMatrix.of(torch.zeros(2, 3), layout=Layout.single(4)), "layout has 4"),
        (lambda: UpdateMatrix.of(torch.zeros(2, 3), chunk_mb=0), "chunk_mb=0"),
        (lambda: UpdateMatrix.of(torch.zeros(2, 3)).select([2]), "cannot select"),
        (lambda: UpdateMatrix.of(torch.zeros(2, 3)).select([]), "cannot select"),
        (lambda: UpdateMatrix.of(torch.zeros(2, 3)).mix(torch.ones(2, 3)), "cannot mix"),
        (lambda: UpdateMatrix.of(torch.zeros(2, 3)).mix(torch.full((1, 2), float("nan"))), "NaN"),
        (lambda: UpdateMatrix.of(torch.zeros(2, 3)).mix(torch.ones(3, 2), ids=["a"]), "1 ids for 3"),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_reason(make, words):
    with pytest.raises(DefenseError, match=words):
        make()
