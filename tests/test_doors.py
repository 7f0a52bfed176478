"""The commands a person types."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import yaml

import fedllm_sec
from fedllm_sec import errors
from fedllm_sec.__main__ import COMMANDS, main
from fedllm_sec.errors import quietly
from fedllm_sec.recipe import shipped
from fedllm_sec.recipe.__main__ import title
from fedllm_sec.train import main as train
from tests.conftest import ROOT

DIGITS = {
    "task": "classify",
    "rounds": 2,
    "model": {"name": "logistic"},
    "data": {"name": "digits", "train_rows": 200, "test_rows": 50},
    "clients": {"total": 4, "local_steps": 1, "batch_size": 20, "lr": 0.05, "optimizer": "sgd"},
    "variants": {"a": {"seed": 1}, "b": {"seed": 2}, "c": {"seed": 3}},
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_subcommand_is_there_and_explains_itself(name: str, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    assert "usage:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["deploy", "clients"], 'there is no command "deploy clients". Did you mean "client"?'),
        (["recipe", "from-fedml", "/nope"], "/nope: there is no such file. Give the YAML that FedML is started with"),
        (["report", "/nope"], "/nope: no such folder. Give a run folder"),
        (["scan", "adapter", "--set", "a=1", "--seeds", "9"], "--set, --seeds: acts beside --calibrate RECIPE alone."),
        (["scan", "--calibrate", "a", "--out", "b", "--base", "c"], "--base: acts beside an ADAPTER"),
    ],
)
def test_a_command_that_cannot_act_names_the_word_and_ends_with_2(words: list[str], told: str, capsys):
    try:
        code = main(words)
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    assert told in capsys.readouterr().err


def test_the_version_is_the_packages(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fedllm-sec {fedllm_sec.__version__}\n"


def test_an_unknown_command_is_named_with_a_way_out(capsys):
    assert main(["trian"]) == 2
    assert 'there is no command "trian". Did you mean "train"?' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "kind", "example"),
    [("train", "recipe", "train quickstart"), ("benchmark", "grid", "benchmark grids/quick")],
)
def test_a_command_without_its_recipe_is_one_line_with_an_example(command: str, kind: str, example: str, capsys):
    for words, said in (([], f"no {kind} is given"), (["rounds=3"], f'{kind}: "rounds=3" is an override')):
        assert main([command, *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {said}")
        assert f"e.g. python -m fedllm_sec.{example}" in line


def test_every_shipped_recipe_is_listed_with_a_title_and_shown(capsys):
    files = [p.relative_to(ROOT / "recipes").with_suffix("").as_posix() for p in (ROOT / "recipes").rglob("*.yaml")]
    assert sorted(files) == sorted(shipped.names())
    assert all(title(name) for name in shipped.names())
    assert main(["recipe", "show", "quickstart"]) == 0
    assert capsys.readouterr().out == (ROOT / "recipes" / "quickstart.yaml").read_text()
    assert main(["recipe", "show", "quickstat"]) == 2
    assert 'Did you mean "quickstart"?' in capsys.readouterr().err


def test_a_shipped_recipe_is_found_by_name_from_anywhere(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "quickstart", "--check"]) == 0
    assert "quickstart: fine (3 runs)." in capsys.readouterr().out
    assert main(["train", "quickstrat", "--check"]) == 2
    assert 'no file and no shipped recipe "quickstrat". Did you mean "quickstart"?' in capsys.readouterr().err
    assert main(["benchmark", "grids/quick", "--list"]) == 0


def test_a_wheel_runs_the_quickstart_outside_the_checkout(tmp_path: Path):
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path], cwd=ROOT, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    done = subprocess.run(
        [sys.executable, "-m", "fedllm_sec", "train", "quickstart", "--check"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path / "site")}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "quickstart: fine (3 runs).\n", done.stderr


def test_several_variants_are_run_in_the_recipes_order_and_reported_with_earlier_ones(tmp_path: Path, capsys):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({**DIGITS, "output": {"folder": str(tmp_path / "out")}}))
    assert train([str(path), "--only", "c", "--only", "a"]) == 0
    compared = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert compared["variants"] == ["a", "c"]
    assert compared["command"].endswith("--only c --only a")
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_dir()) == ["a", "c"]
    assert train([str(path), "--only", "b", "--only", "a"]) == 0
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["variants"] == ["a", "b", "c"]
    assert "already done" in capsys.readouterr().out
    assert train([str(path), "--only", "d"]) == 2
    assert 'there is no variant "d"' in capsys.readouterr().err


@pytest.mark.parametrize("module", ["fedllm_sec.train", "fedllm_sec.benchmark"])
def test_ctrl_c_stops_a_command_that_was_started_with_sigint_ignored(module: str, tmp_path: Path):
    recipe = {**DIGITS, "rounds": 100_000, "output": {"folder": str(tmp_path / "out")}}
    del recipe["variants"]
    if module.endswith("benchmark"):
        recipe = {"base": recipe, "axes": {"seed": [1]}}
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(recipe))
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", module, str(path)], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )  # fmt: skip
    try:
        assert process.stdout is not None
        process.stdout.readline()
        # The first round is over. Before, modules are imported, and of a Ctrl-C inside of exec("...") CPython remembers
        # that it was not handled there: it then ends by the signal, which a shell shows as 130 too.
        while not any(path.stat().st_size for path in tmp_path.rglob("history.jsonl")):
            assert process.poll() is None, process.communicate()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert "stopped; the same command goes on" in said


def test_a_warning_of_ours_is_a_line_and_others_stay_as_python_writes_them():
    @quietly
    def command() -> int:
        ours = str(Path(errors.__file__).parent / "data" / "text.py")
        told.append(warnings.formatwarning("data: a.csv: look.", UserWarning, ours, 3))
        told.append(warnings.formatwarning("elsewhere", UserWarning, "/lib/torch.py", 3, "x = 1"))
        return 0

    told: list[str] = []
    before = warnings.formatwarning
    assert command() == 0
    assert told == ["warning: data: a.csv: look.\n", "/lib/torch.py:3: UserWarning: elsewhere\n  x = 1\n"]
    assert warnings.formatwarning is before


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["report", "--nope"], "there is no option --nope"),
        (["verify", ""], "one of the arguments is empty"),
        (["verify"], "the following arguments are required: RUN"),
    ],
)
def test_what_is_wrong_with_a_command_line_is_told_first(words: list[str], told: str, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err


def test_ctrl_c_before_a_command_has_begun_is_a_word(capsys):
    @quietly
    def command() -> int:
        raise KeyboardInterrupt

    assert command() == 130
    assert capsys.readouterr().err == "stopped.\n"
