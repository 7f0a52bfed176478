"""`~` is the home folder in every path of a recipe, and a name that leads nowhere is answered within seconds."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pydantic
import pytest
from datasets import Dataset, DatasetDict
from huggingface_hub import constants

from fedllm_sec import train
from fedllm_sec.data import arrays, corpus
from fedllm_sec.data.sources import load_table
from fedllm_sec.errors import DataError, RecipeError
from fedllm_sec.models.lora import source_of
from fedllm_sec.recipe import places
from fedllm_sec.recipe.resolve import did_you_mean
from fedllm_sec.recipe.sections import ArrayData, CharData, Data, Model, Output

TINY = str(Path(places.__file__).parents[1] / "models" / "tiny")  # a model's folder that is whole


def test_the_home_folder_is_meant_in_every_path(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/ada")
    for section in (Data, ArrayData, CharData, Model):
        assert section(name="~/x").name == "/home/ada/x"
    assert Output(folder="~/runs/{name}").folder == "/home/ada/runs/{name}"
    assert Data(train="~/a.csv", test="b~.csv").train == "/home/ada/a.csv"
    assert Data(test="b~.csv").test == "b~.csv"


def test_a_home_that_nobody_has_is_an_error():
    with pytest.raises(pydantic.ValidationError, match="no home folder is known for this"):
        Output(folder="~nobody_of_this_name/x")


def test_a_run_of_a_home_folder_lies_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("clients: {local_steps: 1}\noutput: {folder: '~/out/{name}'}\n")
    plans = train.load(Path("~/mine.yaml"), ["variants={a: {}}"])
    assert plans["a"].recipe.output.folder == f"{tmp_path}/out/mine/a"


@pytest.fixture
def silent_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A network in which nobody answers, not even the name server."""

    class Session:
        def head(self, *_: Any, **__: Any) -> None:
            time.sleep(30)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    monkeypatch.setattr(places, "PATIENCE", 0.2)
    places.hub_problem.cache_clear()
    yield
    places.hub_problem.cache_clear()


@pytest.mark.usefixtures("silent_hub")
def test_a_name_that_leads_nowhere_is_answered_at_once_and_names_no_host():
    asked = [
        lambda: source_of("some/model"),
        lambda: load_table("some/set", None, "train", 0),
        lambda: arrays.load("some/set"),
    ]
    import datasets  # noqa: F401  (its import is not what is timed)

    begin = time.monotonic()
    for ask in asked:
        with pytest.raises((DataError, RecipeError), match="the hub cannot be reached") as caught:
            ask()
        assert "http" not in str(caught.value)
        assert ".co" not in str(caught.value)
    assert time.monotonic() - begin < 5


def test_a_path_is_never_looked_for_on_the_hub():
    for name in ("./x", "/x", "a/b/c", "../a", "a//b", "a\0"):
        with pytest.raises(RecipeError, match=r"no such folder or GGUF file( in |\. Give)"):
            source_of(name)
        with pytest.raises(DataError, match=r"no such folder or file( in |\. Give)"):
            load_table(name, None, "train", 0)


def test_a_library_s_words_are_told_without_addresses():
    told = places.why(OSError("404 for url (https://hub.example/api/x?y). Not found\nmore"))
    assert told == "404 for url Not found"


def test_the_built_in_families_are_those_of_the_corpus():
    assert ("all", *corpus.FAMILIES) == places.FAMILIES
    assert places.lost_family("builtin:topics") == (
        'data.name: builtin:topics: there is no built-in family "topics". Did you mean "topic"?'
    )


@pytest.mark.usefixtures("silent_hub")
def test_lost_names_are_those_that_are_certainly_nowhere(tmp_path: Path):
    (tmp_path / "rows.csv").write_text("text,response\n")
    fine = [
        {},
        {"model": {"name": "tiny"}, "data": {"name": "builtin:edit"}},
        {"model": {"name": TINY}, "data": {"name": str(tmp_path / "rows.csv")}},
        {"task": "classify", "model": {"name": "lenet"}, "data": {"name": "digits"}},
        {"model": 3, "data": {"name": ["x"]}},  # what is no name is told by the check of types
    ]
    assert [places.lost(raw) for raw in fine] == [[]] * len(fine)
    (model, data) = places.lost({"model": {"name": "some/model"}, "data": {"name": "rows.csv"}})
    assert 'model.name: "some/model": no such folder' in model
    assert "data.name: rows.csv: no such file or folder" in data
    (data,) = places.lost({"task": "classify", "data": {"name": "fashionmnist"}})
    assert "the hub cannot be reached" in data
    assert "fashion_mnist" in data


def test_a_mistyped_name_is_told_before_anything_heavy_is_imported(tmp_path: Path):
    code = (
        "import sys\n"
        "from fedllm_sec.train import main\n"
        "code = main(['quickstart', 'model.name=./nope', 'output.folder=x'])\n"
        "print(code, sorted({'torch', 'transformers', 'numba', 'datasets', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.split("\n")[-2] == "2 []"
    assert "model.name: ./nope: no such folder" in done.stderr
    assert not (tmp_path / "x").exists()


def test_a_folder_that_cannot_be_made_is_said_by_check(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for folder, words in (
        (tmp_path / "file", "file is a file, where a folder must be"),
        (tmp_path / "file" / "runs", "file is a file, where a folder must be"),
        ("/proc/x", "/proc holds what the system tells"),
        ("a" * 300, "no folder's name is longer than 255 bytes"),
        (tmp_path / "link", "link is a link that leads nowhere"),
    ):
        assert words in (places.folder_problem(str(folder)) or "")
    assert places.folder_problem(str(tmp_path / "new" / "run")) is None


def test_check_finds_the_names_that_lead_nowhere_and_asks_no_hub(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(places, "hub_problem", lambda: pytest.fail("the hub is asked"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    Path("r.yaml").write_text("clients: {total: 2, local_steps: 1}\n")
    assert train.main(["r.yaml", "--check", "data.name=rows.csv", "model.name=empty", "rounds=0"]) == 2
    said = capsys.readouterr().err
    assert "3 mistakes" in said
    assert "data.name: rows.csv: no such file or folder" in said
    assert "model.name: empty: has no config.json" in said
    assert train.main(["r.yaml", "--check", "model.name=tiiny"]) == 0
    assert 'note: model.name: "tiiny": nothing of this name in' in capsys.readouterr().out


def test_a_pipe_is_no_table_and_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "rows.csv")
    with pytest.raises(DataError, match="is a pipe or a device"):
        load_table(str(tmp_path / "rows.csv"), None, "train", 0)


def test_two_files_that_could_be_one_split_are_not_chosen_from(tmp_path: Path):
    (tmp_path / "train.csv").write_text("text,response\na,b\n")
    (tmp_path / "train.jsonl").write_text('{"text": "a", "response": "b"}\n')
    with pytest.raises(DataError, match=r'train.jsonl, train.csv for split "train". Name the file'):
        load_table(str(tmp_path), None, "train", 0)
    assert load_table(str(tmp_path), None, "train.csv", 0).text("response") == ["b"]


def test_the_splits_of_a_saved_set_are_named(tmp_path: Path):
    DatasetDict({"fit": Dataset.from_dict({"text": ["a"]})}).save_to_disk(str(tmp_path))
    with pytest.raises(DataError, match=r'no file for split "train". Known: fit\.'):
        load_table(str(tmp_path), None, "train", 0)


def test_a_model_s_folder_without_weights_is_refused_by_its_name(tmp_path: Path):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((Path(TINY) / name).read_bytes())
    assert "holds no weights" in (places.lost_model(str(tmp_path)) or "")
    (tmp_path / "model.safetensors").symlink_to("nowhere.safetensors")
    assert "model.safetensors is no file, or a link that leads nowhere" in (places.lost_model(str(tmp_path)) or "")


def test_a_name_in_another_form_of_the_same_letters_is_told_as_that():
    assert did_you_mean("revi\u00e9w", ["revie\u0301w", "text"]).endswith("the same letters in another Unicode form?")
    assert did_you_mean("reviw", ["review", "text"]) == ' Did you mean "review"?'
