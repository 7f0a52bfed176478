"""A run folder that rotted, or that a stranger made: it ends as the undisturbed run, or in one clear line.

By default every 7th case; `pytest -m slow tests/records/test_mutations.py` takes all of them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fedllm_sec.benchmark import main as benchmark
from fedllm_sec.records import checkpoint, verify
from fedllm_sec.report.__main__ import main as report
from tests.records.smallest import RECIPE, contents, edit, plain_page, start, write

FILES = (
    "recipe.yaml", "environment.json", "history.jsonl", "timings.jsonl", "checkpoint.safetensors", "summary.json",
    "model/model.safetensors", "model-round-1/model.safetensors",
)  # fmt: skip
DEEP = b"[" * 100_000 + b"]" * 100_000
BOMB = b"a: &a [x, x]\n" + b"".join(
    b"%c: &%c [*%c, *%c, *%c, *%c]\n" % (c + 1, c + 1, c, c, c, c) for c in range(97, 115)
)
MUTATIONS: dict[str, Callable[[bytes], bytes]] = {
    "gone": lambda data: b"",  # and removed below
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "last byte": lambda data: data[:-1],
    "flipped": lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:],
    "flipped near the end": lambda data: data[:-40] + bytes([data[-40] ^ 1]) + data[-39:],
    "a digit": lambda data: data.replace(b"0.", b"1.", 1),
    "longer": lambda data: data + b"\n\x00rest",
    "no UTF-8": lambda data: b"\xff\xfe\x00" * 9,
    "a list": lambda data: b"[1, 2]\n",
    "a number": lambda data: b"7\n",
    "a large number": lambda data: b"9" * 5_000,
    "deep": lambda data: DEEP,
    "bomb": lambda data: BOMB,
    "NaN": lambda data: data.replace(b"1", b"NaN"),
    "control characters": lambda data: data.replace(b'"', b'"\\u001b[2J<b>\\u202e', 2),
    "words for numbers": lambda data: data.replace(b": 1", b': "<b>1</b>"'),
    "a header that lies": lambda data: b"\xff\xff\xff\xff\xff\xff\xff\x7f" + data[8:],
}
SELDOM = (
    "a large number", "control characters", "deep", "bomb", "words for numbers", "a header that lies", "longer",
    "no UTF-8", "a number",
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    write(folder)
    assert start(folder) == 0
    return folder


def mutated(whole: Path, folder: Path, name: str, mutation: str) -> Path:
    shutil.copytree(whole, folder)
    edit(folder / "out" / name, MUTATIONS[mutation])
    if mutation == "gone":
        (folder / "out" / name).unlink()
    return folder


def cases(finished: bool) -> Iterator[tuple[str, str]]:
    """Every file with every mutation, but for those that only a parser can stumble over where there is none."""
    for name in FILES:
        for mutation in MUTATIONS:
            if not (name.startswith("model") and mutation in SELDOM) and (finished or name in FILES[:5]):
                yield name, mutation


def one_line(said: str) -> bool:
    return said.startswith("error: ") and said.count("\n") == 1 and len(said) < 700 and "Traceback" not in said


SOME = pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])


@SOME
def test_a_finished_run_that_rotted_is_made_whole_or_says_what_is_lost(whole: Path, tmp_path: Path, capsys, every: int):
    left = contents(whole / "out")
    for number, (name, mutation) in enumerate(list(cases(True))[::every]):
        folder, case = mutated(whole, tmp_path / str(number), name, mutation), (name, mutation)
        changed = (
            not (folder / "out" / name).exists()
            or (folder / "out" / name).read_bytes() != (whole / "out" / name).read_bytes()
        )
        asked = verify.main([str(folder / "out")])
        assert asked == int(changed), (case, capsys.readouterr().out)
        found = capsys.readouterr().out
        code = start(folder)
        said = capsys.readouterr()
        if code == 2:
            assert one_line(said.err), (case, said.err)
            assert "round 1" not in said.out, case  # told before anything is trained
            continue
        assert code == 0, case
        if "cannot be made again" in said.out:
            assert name in ("timings.jsonl", "environment.json", "model-round-1/model.safetensors"), case
            assert "cannot be made again" in found, (case, found)
            continue
        assert contents(folder / "out") == left, case
        assert verify.main([str(folder / "out")]) == 0, case
        capsys.readouterr()


@SOME
def test_a_run_that_was_stopped_and_rotted_goes_on_or_says_what_is_lost(
    whole: Path, tmp_path: Path, capsys, every: int
):
    left = contents(whole / "out")
    half = tmp_path / "half"
    write(half, rounds=1)
    assert start(half) == 0
    write(half)
    for lost in ("summary.json", "model"):
        (shutil.rmtree if lost == "model" else Path.unlink)(half / "out" / lost)
    for number, (name, mutation) in enumerate(list(cases(False))[::every]):
        folder, case = mutated(half, tmp_path / str(number), name, mutation), (name, mutation)
        capsys.readouterr()
        code = start(folder)
        said = capsys.readouterr()
        if code == 2:
            assert one_line(said.err), (case, said.err)
            assert "round 2" not in said.out, case
            continue
        assert code == 0, case
        if (name, mutation) != ("checkpoint.safetensors", "gone"):  # as of a run that was killed in its first round
            assert "round 1/2" not in said.out, case
        ends, same = contents(folder / "out"), dict(left)
        if name in ("environment.json", "timings.jsonl"):  # what they held is lost
            for found in (ends, same):
                found[name] = None
                found["summary.json"] = {**found["summary.json"], "made": None}
        assert ends == same, case


@SOME
def test_what_a_stranger_put_into_a_folder_is_reported_or_refused_in_a_line(
    whole: Path, tmp_path: Path, capsys, every: int
):
    read = [case for case in cases(True) if not case[0].startswith(("model", "checkpoint"))]
    for number, (name, mutation) in enumerate(read[:: min(every, 3)]):
        folder, case = mutated(whole, tmp_path / str(number), name, mutation), (name, mutation)
        code = report([str(folder / "out"), "--markdown"])
        said = capsys.readouterr()
        assert code in (0, 2), case
        assert code == 0 or one_line(said.err), (case, said.err)
        assert not any(mark in said.out + said.err for mark in "\x00\x1b\u202e"), case


# ---------------------------------------------------------------- checkpoints that were put together


def resealed(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """A checkpoint with another content that has the hash of this content: made with a program, not by accident."""
    path = folder / "out" / "checkpoint.safetensors"
    state = checkpoint.unpack(path.read_bytes())
    change(state)
    path.write_bytes(b"".join(checkpoint.pack(state)))
    (folder / "out" / "summary.json").unlink()
    recipe = folder / "r.yaml"
    recipe.write_text(recipe.read_text().replace("rounds: 2", "rounds: 3"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state["vector"].fill_(float("nan")), "its model is not made of finite numbers"),
        (lambda state: state.update(round=1), "the checkpoint is of round 1, history.jsonl holds rounds [0, 1, 2]"),
        (lambda state: state.update(vector=torch.zeros(3)), "a vector of shape (3,), the model's has (650,)"),
        (lambda state: state.update(vector="x"), "holds no state that this model and these methods can go on from"),
        (lambda state: state.update(memory=7), "holds no state that this model and these methods can go on from"),
        (lambda state: state.pop("vector"), "holds no state that this model and these methods can go on from"),
        (lambda state: state.update(history_sha256="0"), "is not the one that checkpoint.safetensors belongs to"),
        (
            lambda state: state.update(history_bytes=-5),
            "is damaged, or not the one that checkpoint.safetensors belongs to",
        ),
        (lambda state: state.update(history_bytes="x"), "cannot be read (invalid literal for int()"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(whole: Path, tmp_path: Path, change, words, capsys):
    folder = tmp_path / "a"
    shutil.copytree(whole, folder)
    resealed(folder, change)
    assert start(folder) == 2
    said = capsys.readouterr()
    assert words in said.err
    assert one_line(said.err.replace("\n", "\n", 1)), said.err
    assert "round 3" not in said.out


def test_a_scaled_model_and_a_swapped_checkpoint_are_refused(whole: Path, tmp_path: Path, capsys):
    for name in ("scaled", "swapped"):
        shutil.copytree(whole, tmp_path / name)
    path = tmp_path / "scaled" / "out" / "checkpoint.safetensors"
    state = checkpoint.unpack(path.read_bytes())
    state["vector"] *= 2
    path.write_bytes(b"".join(checkpoint.pack(state)))
    assert start(tmp_path / "scaled") == 2
    assert "holds other bytes than the run wrote, so nothing can be made from it" in capsys.readouterr().err
    write(tmp_path / "other", seed=5)
    assert start(tmp_path / "other") == 0
    theirs = tmp_path / "other" / "out" / "checkpoint.safetensors"
    shutil.copy(theirs, tmp_path / "swapped" / "out" / "checkpoint.safetensors")
    assert start(tmp_path / "swapped") == 2
    assert "not the one that checkpoint.safetensors belongs to" in capsys.readouterr().err


def test_nothing_is_written_through_a_link(whole: Path, tmp_path: Path, capsys):
    for number, name in enumerate(("history.jsonl", "model", "model/model.safetensors")):
        folder = tmp_path / str(number)
        shutil.copytree(whole, folder)
        elsewhere = tmp_path / f"elsewhere-{number}"
        shutil.move(folder / "out" / name, elsewhere)
        (folder / "out" / name).symlink_to(elsewhere)
        (folder / "out" / "summary.json").unlink()
        before = elsewhere.read_bytes() if elsewhere.is_file() else sorted(elsewhere.iterdir())
        assert start(folder) == 2
        assert f"{name}: is a link to elsewhere" in capsys.readouterr().err
        assert before == (elsewhere.read_bytes() if elsewhere.is_file() else sorted(elsewhere.iterdir()))


# ---------------------------------------------------------------- grids


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grid")
    axes = {"attack": {name: {"update": [{"name": f"byzantine_{name}"}]} for name in ("flip", "zero")}}
    base = {**RECIPE, "attack": {"malicious": {"count": 1}}}
    (folder / "g.yaml").write_text(yaml.safe_dump({"base": base, "axes": axes}, sort_keys=False))
    with plain_page():
        assert benchmark([str(folder / "g.yaml"), f"output.folder={folder / 'out'}"]) == 0
    return folder


def rows(out: Path) -> dict[str, tuple[str, str]]:
    import csv

    with (out / "results.csv").open() as file:
        return {row["cell"]: (row["status"], row["accuracy"]) for row in csv.DictReader(file)}


def test_one_bad_cell_of_a_grid_does_not_take_the_table_from_the_others(grid: Path, tmp_path: Path, capsys):
    good = rows(grid / "out")
    assert len(good) == 3
    bad = "flip__none"
    for number, (name, mutation) in enumerate(
        [("history.jsonl", "words for numbers"), ("summary.json", "deep"), ("model/model.safetensors", "gone")]
    ):
        folder = tmp_path / str(number)
        shutil.copytree(grid, folder)
        for recipe in folder.glob("out/cells/*/recipe.yaml"):
            recipe.write_text(recipe.read_text().replace(str(grid), str(folder)))
        edit(folder / "out" / "cells" / bad / name, MUTATIONS[mutation])
        with plain_page():
            code = benchmark([str(folder / "g.yaml"), f"output.folder={folder / 'out'}"])
        said, found = capsys.readouterr(), rows(folder / "out")
        assert code in (0, 1), said.err
        assert "Traceback" not in said.err + said.out
        assert {cell: row for cell, row in found.items() if cell != bad} == {c: r for c, r in good.items() if c != bad}
        if name in ("summary.json", "model/model.safetensors"):
            assert (code, found[bad]) == (0, good[bad])
        else:
            assert (code, found[bad]) == (1, ("failed", ""))


def test_a_cell_that_is_a_link_is_not_written_through(grid: Path, tmp_path: Path, capsys):
    cells, elsewhere = tmp_path / "out" / "cells", tmp_path / "elsewhere"
    cells.mkdir(parents=True)
    elsewhere.mkdir()
    (cells / "flip__none").symlink_to(elsewhere)
    assert benchmark([str(grid / "g.yaml"), f"output.folder={tmp_path / 'out'}"]) == 2
    assert "cells/flip__none is a link to elsewhere" in capsys.readouterr().err
    assert list(elsewhere.iterdir()) == []


def test_a_table_of_a_grid_that_nobody_repaired_has_a_row_for_the_damaged_cell(grid: Path, tmp_path: Path):
    from fedllm_sec.grid import results
    from fedllm_sec.grid.grid import load

    shutil.copytree(grid, tmp_path / "g")
    found = load(grid / "g.yaml", [f"output.folder={tmp_path / 'g' / 'out'}"])
    cell = tmp_path / "g" / "out" / "cells" / "flip__none"
    edit(cell / "history.jsonl", MUTATIONS["words for numbers"])
    by_cell = {row["cell"]: row for row in results.table(found)}
    assert by_cell["flip__none"]["status"] == "damaged"
    assert "line 1: not a round record" in by_cell["flip__none"]["error"]
    assert [row["status"] for row in by_cell.values()].count("done") == 2


def test_verify_tells_of_many_runs_and_of_a_grid(grid: Path, whole: Path, tmp_path: Path, capsys):
    assert verify.main([str(whole / "out"), str(grid / "out")]) == 0
    assert capsys.readouterr().out.count(": whole, 2 rounds\n") == 4
    folder = mutated(whole, tmp_path / "a", "model/model.safetensors", "flipped near the end")
    (folder / "out" / "model-round-1" / "model.safetensors").unlink()
    assert verify.main([str(folder / "out")]) == 1
    assert capsys.readouterr().out == (
        f"{folder / 'out'}: damaged\n"
        "  model/model.safetensors holds other bytes than the run wrote: the run's command makes it again\n"
        "  model-round-1/model.safetensors is gone: cannot be made again\n"
    )
    assert verify.main([str(tmp_path), str(tmp_path / "nothing")]) == 2
    assert "nothing: no such folder" in capsys.readouterr().err


def test_verify_believes_what_the_run_left_not_what_its_recipe_says_now(whole: Path, tmp_path: Path, capsys):
    shutil.copytree(whole / "out", tmp_path / "out")
    recipe = tmp_path / "out" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("rounds: 2", "rounds: 9"))
    shutil.rmtree(tmp_path / "out" / "model")
    assert verify.main([str(tmp_path / "out")]) == 1
    assert "model/model.safetensors is gone" in capsys.readouterr().out


def test_verify_names_a_file_once_and_leaves_the_advice_to_the_run(whole: Path, tmp_path: Path, capsys):
    for number, (name, data, words) in enumerate(
        [
            ("history.jsonl", b"x\n", "is shorter than its checkpoint says ({size} bytes)"),
            ("checkpoint.safetensors", b"", "cannot be read (Expecting value: line 1 column 1 (char 0))"),
        ]
    ):
        folder = tmp_path / str(number)
        shutil.copytree(whole / "out", folder)
        size = (folder / name).stat().st_size
        (folder / name).write_bytes(data)
        assert verify.main([str(folder)]) == 1
        told = f"  {name} {words.format(size=size)}: cannot be made again\n"
        assert capsys.readouterr().out == f"{folder}: damaged\n{told}"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("history.jsonl", lambda data: data + data.splitlines(keepends=True)[-1]),
        ("history.jsonl", lambda data: data + b"\xff"),
        ("recipe.yaml", lambda data: data.replace(b"lr: ", b"lr: 1")),
        ("recipe.yaml", lambda data: b"a: @x"),
    ],
)
def test_what_verify_says_the_command_makes_again_it_makes_again(whole: Path, tmp_path: Path, capsys, name, change):
    write(tmp_path)
    assert start(tmp_path) == 0
    path = tmp_path / "out" / name
    before = path.read_bytes()
    path.write_bytes(change(before))
    assert path.read_bytes() != before
    capsys.readouterr()
    assert verify.main([str(tmp_path / "out")]) == 1
    assert f"  {name} has " in (told := capsys.readouterr().out)
    assert told.count(": the run's command makes it again") == 1
    assert start(tmp_path) == 0
    assert path.read_bytes() == before
    assert verify.main([str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("name", ["summary.json", "model/model.safetensors", "answers.jsonl"])
def test_a_folder_in_the_place_of_a_file_is_named_before_training_and_by_verify(whole, tmp_path: Path, capsys, name):
    folder = mutated(whole, tmp_path / "a", "summary.json", "last byte")
    (folder / "out" / name).unlink(missing_ok=True)
    (folder / "out" / name).mkdir()
    assert start(folder) == 2
    words = "is a folder, where the run has a file. Move it away"
    assert capsys.readouterr().err == f"error: out/{name}: {words}.\n"
    assert verify.main([str(folder / "out")]) == 1
    assert capsys.readouterr().out == f"{folder / 'out'}: damaged\n  {name} {words}\n"


@pytest.mark.parametrize("name", ["recipe.yaml", "history.jsonl", "checkpoint.safetensors", "timings.jsonl"])
@pytest.mark.parametrize("stands", ["folder", "loop of links"])
def test_verify_names_the_file_where_a_folder_or_a_loop_stands(
    whole: Path, tmp_path: Path, name: str, stands: str, capsys
):
    shutil.copytree(whole / "out", tmp_path / "out")
    file = tmp_path / "out" / name
    file.unlink(missing_ok=True)
    if stands == "folder":
        file.mkdir()
    else:
        file.symlink_to(name)
    assert verify.main([str(tmp_path / "out")]) == 1
    found = capsys.readouterr()
    assert found.err == ""
    assert [line.split()[0] for line in found.out.splitlines()[1:]] == [name]


def test_verify_misses_a_cell_that_the_grid_has(grid: Path, tmp_path: Path, capsys):
    shutil.copytree(grid / "out", tmp_path / "out")
    lost = tmp_path / "out" / "cells" / "flip__none"
    shutil.rmtree(lost)
    assert verify.main([str(tmp_path / "out")]) == 1
    assert f"{lost}: damaged\n  is gone, or was never run" in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, "", "[1]", '{"cells": 3}'])
def test_verify_names_a_list_of_cells_that_is_damaged(grid: Path, tmp_path: Path, capsys, content: str | None):
    shutil.copytree(grid / "out", tmp_path / "out")
    if content is None:
        (tmp_path / "out" / "grid.json").unlink()
    else:
        (tmp_path / "out" / "grid.json").write_text(content)
    assert verify.main([str(tmp_path / "out")]) == 1
    told = capsys.readouterr().out
    assert "out: damaged\n  grid.json does not list its cells: the grid's command, once it is removed, makes it" in told
    assert told.count(": whole, 2 rounds\n") == 3
