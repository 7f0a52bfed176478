"""answers.jsonl of a run folder: cut back with the history and sealed with it; all of a round while it is the last."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedllm_sec.records import RunFolder, inventory
from fedllm_sec.records.answers import answer_lines
from fedllm_sec.records.verify import look
from tests.records.test_history import RECORD

RECIPE = "rounds: 2\n"


def answered(round: int, last: bool) -> Any:
    rows = [
        {"kind": "clean", "attack": "a", "row": n, "prompt": f"p{n}", "trigger": [], "wanted": "w",
         "answer": f"said in round {round}", "success": False, "sample": n == 0}
        for n in range(3 if last else 1)
    ]  # fmt: skip
    return replace(RECORD, round=round, answers=rows)


def play(path: Path, rounds: int, stop: int | None = None) -> RunFolder:
    """A run of so many rounds from where its folder stands, killed after round `stop`."""
    text = f"rounds: {rounds}\n"
    folder = RunFolder(path, "attacked")
    path.mkdir(exist_ok=True)
    state = folder.resume(text)
    told = folder.begin(text, {"device": "cpu"}, state)
    assert told == []
    for round in range((state["round"] if state is not None else 0) + 1, (stop or rounds) + 1):
        folder.append(answered(round, round == rounds), {"round": round, "vector": torch.zeros(2)})
    if stop is None:
        folder.close({"rounds": rounds}, rounds)
    return folder


def test_answers_of_a_start_that_was_not_whole_are_given_once(tmp_path: Path):
    """Killed between the answers of round 0 and the checkpoint that makes them count."""
    folder = RunFolder(tmp_path, "attacked")
    folder.begin(RECIPE, {"device": "cpu"}, None)
    (tmp_path / "timings.jsonl").write_text('{"round": 0}\n')
    whole = replace(answered(0, False), cohort=[])
    folder.answers.write_bytes(answer_lines(0, "attacked", whole.answers))
    again = RunFolder(tmp_path, "attacked")
    again.begin(RECIPE, {"device": "cpu"}, again.resume(RECIPE))
    again.append(whole, {"round": 0, "vector": torch.zeros(2)})
    resumed = RunFolder(tmp_path, "attacked")
    state = resumed.resume(RECIPE)
    assert state is not None
    assert resumed.begin(RECIPE, {"device": "gpu"}, state) == ["device: 'cpu' -> 'gpu'"]  # the start was made elsewhere
    assert said(resumed) == ["0"]
    assert (tmp_path / "timings.jsonl").read_text().count("\n") == 1


def said(folder: RunFolder) -> list[str]:
    return [line.split('"round": ')[1][0] for line in folder.answers.read_text().splitlines()]


def test_a_killed_run_and_one_with_more_rounds_end_with_the_same_bytes_as_the_straight_run(tmp_path: Path):
    straight = play(tmp_path / "straight", 4)
    assert said(straight) == ["1", "2", "3", "4", "4", "4"]
    killed = play(tmp_path / "killed", 4, stop=2)
    with killed.answers.open("ab") as file:
        file.write(b'{"round": 3, "kind": "clean"')  # of a round that has no checkpoint
    assert look(tmp_path / "killed").wrong == {}
    play(tmp_path / "killed", 4)
    longer = play(tmp_path / "longer", 2)
    assert said(longer) == ["1", "2", "2", "2"]
    play(tmp_path / "longer", 4)
    for other in ("killed", "longer"):
        for name in ("answers.jsonl", "checkpoint.safetensors"):
            assert (tmp_path / other / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_answers_that_were_changed_or_lost_are_seen(tmp_path: Path):
    folder = play(tmp_path / "a", 3, stop=2)
    whole = folder.answers.read_bytes()
    folder.answers.write_bytes(whole.replace(b"round 1", b"round x"))
    changed = {"answers.jsonl": "is not as the run left it: answers are lost or changed"}
    assert look(tmp_path / "a").wrong == changed
    folder.answers.unlink()
    assert look(tmp_path / "a").wrong == {"answers.jsonl": "is gone"}
    again = RunFolder(tmp_path / "a")
    assert again.begin("rounds: 3\n", {"device": "cpu"}, again.resume("rounds: 3\n")) == ["answers.jsonl is gone"]
    done = play(tmp_path / "b", 2)
    done.answers.write_bytes(b"")
    found = look(tmp_path / "b")
    assert list(found.wrong) == ["answers.jsonl"]
    assert "instead of" in found.wrong["answers.jsonl"]
    assert "answers.jsonl" in inventory.FILES
