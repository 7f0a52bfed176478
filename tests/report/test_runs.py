"""Reading run folders: whole, half-written, foreign and hostile."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fedllm_sec.errors import FedError
from fedllm_sec.records.files import write_json
from fedllm_sec.records.inventory import sealed
from fedllm_sec.report.__main__ import main
from fedllm_sec.report.runs import read_runs

MakeRun = Callable[..., Path]


def test_a_run_given_twice_and_a_page_that_cannot_be_written_are_one_line(comparison: Path, capsys) -> None:
    one = sorted(path for path in comparison.iterdir() if path.is_dir())[0]
    for words, said in (
        ([str(one), f"{one}/."], f"error: {one}: is given twice, and would be compared with itself"),
        ([str(comparison), str(one)], f"error: {one}: is given twice"),
        ([str(one), "--out", str(one)], f"error: {one}: cannot be written (Is a directory)"),
    ):
        assert main(words) == 2
        assert capsys.readouterr().err.startswith(said)


def test_a_comparison_is_read_in_its_own_order(comparison: Path) -> None:
    write_json(comparison / "comparison.json", {"variants": ["multi_krum", "attack-free"]})
    assert [run.name for run in read_runs([comparison])] == ["multi_krum", "attack-free"]


def test_a_folder_of_run_folders_is_read_by_name(comparison: Path) -> None:
    (comparison / "comparison.json").unlink()
    names = [run.name for run in read_runs([comparison])]
    assert names == ["attack-free", "attacked", "geometric_median", "multi_krum"]


def test_norms_that_are_not_finite_come_back_as_numbers(comparison: Path) -> None:
    run = read_runs([comparison / "multi_krum"])[0]
    assert math.isnan(run.rounds[3].norms["8"])
    assert run.rounds[8].norms["9"] == math.inf


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FedError, match="nowhere: no such folder"):
        read_runs([tmp_path / "nowhere"])


def test_a_folder_without_runs_says_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(FedError, match=r"no recipe\.yaml, no history\.jsonl"):
        read_runs([tmp_path])


@pytest.mark.parametrize("name", ["recipe.yaml", "history.jsonl"])
def test_a_half_written_run_says_which_file_is_missing(make_run: MakeRun, tmp_path: Path, name: str) -> None:
    folder = make_run(tmp_path / "run", rounds=4)
    (folder / name).unlink()
    with pytest.raises(FedError, match=f"without {name.replace('.', '[.]')}.*Start the run again"):
        read_runs([folder])


def test_a_comparison_with_one_broken_run_shows_the_others_and_says_so(comparison: Path) -> None:
    (comparison / "attacked" / "history.jsonl").unlink()
    shutil.rmtree(comparison / "geometric_median")
    runs = read_runs([comparison])
    assert [run.name for run in runs] == ["attack-free", "multi_krum"]
    assert "without history.jsonl" in runs[0].warnings[0]
    assert "has not started" in runs[0].warnings[1]


def test_a_line_cut_off_by_a_kill_is_named(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rounds=4)
    path = folder / "history.jsonl"
    path.write_text(path.read_text()[:-40])
    with pytest.raises(FedError, match=r"history\.jsonl, line 4: .* repairs this"):
        read_runs([folder])


def test_a_line_that_is_no_record_is_named_in_words(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rounds=1)
    (folder / "history.jsonl").write_text("null\n")
    with pytest.raises(FedError, match=r"line 1: not a round record \(no mapping\)"):
        read_runs([folder])


def test_a_recipe_that_is_not_as_the_run_left_it_is_said(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rounds=1)
    made = {"recipe.yaml": {"bytes": 1, "sha256": "0" * 64}}
    (folder / "summary.json").write_bytes(sealed({"rounds": 1, "made": made}))
    assert any("recipe.yaml is not as the run left it" in warning for warning in read_runs([folder])[0].warnings)


@pytest.mark.parametrize(("content", "words"), [("", "cannot be read"), ('{"sha256": "0"}', "holds other bytes")])
def test_a_summary_that_is_damaged_is_said(content: str, words: str, make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rounds=1)
    (folder / "summary.json").write_text(content)
    assert any(f"summary.json {words}" in warning for warning in read_runs([folder])[0].warnings)


@pytest.mark.parametrize("content", ["", "junk", "[]", "null"])
def test_a_run_whose_environment_is_damaged_is_shown_with_a_word_about_it(
    content: str, make_run: MakeRun, tmp_path: Path
) -> None:
    folder = make_run(tmp_path / "run", rounds=4)
    (folder / "environment.json").write_text(content)
    (run,) = read_runs([folder])
    assert "environment.json cannot be read: versions and command are not known." in run.warnings


def test_bytes_that_are_no_text_among_the_timings_cost_those_timings_alone(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rounds=4)
    with (folder / "timings.jsonl").open("ab") as file:
        file.write(b"\xff\xfe\n")
    assert len(read_runs([folder])[0].records) == 4


def test_a_run_of_another_version_names_both_versions(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rounds=4)
    write_json(folder / "environment.json", {"fedllm_sec": "9.0"})
    lines = [json.loads(line) | {"new_field": 1} for line in (folder / "history.jsonl").read_text().splitlines()]
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(FedError, match=r"line 1: .*new_field.* written by fedllm_sec 9\.0; this is"):
        read_runs([folder])


def test_text_in_place_of_a_number_is_an_error(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rounds=4)
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    lines[2]["norms"]["0"] = "<script>"
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(FedError, match=r"norms.*'<script>'"):
        read_runs([folder])


def test_a_run_that_is_not_finished_says_how_far_it_is(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rounds=4)
    lines = (folder / "history.jsonl").read_text().splitlines(keepends=True)
    (folder / "history.jsonl").write_text("".join(lines[:2]))
    assert read_runs([folder])[0].warnings == ("not finished: 2 of 4 rounds are recorded.",)


def test_a_comparison_cannot_point_outside_its_folder(comparison: Path) -> None:
    write_json(comparison / "comparison.json", {"variants": ["../secret"]})
    with pytest.raises(FedError, match="not the name of a folder beside it"):
        read_runs([comparison])


def test_runs_of_one_name_are_told_apart(make_run: MakeRun, tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "a" / "run", rounds=2), make_run(tmp_path / "b" / "run", rounds=2)
    assert len({run.name for run in read_runs([first, second])}) == 2
