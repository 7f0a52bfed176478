"""The answers side by side on the page, from files that a stranger may have written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedllm_sec.evaluation.intervals import wilson
from fedllm_sec.records.answers import answer_lines
from fedllm_sec.report import beside
from fedllm_sec.report.page import render
from fedllm_sec.report.runs import read_runs
from fedllm_sec.report.said import parts, transcript
from tests.report.test_page import EVIL, outline

MakeRun = Callable[..., Path]


def row(number: int, answer: str, success: bool | None, kind: str = "triggered", **more: Any) -> dict[str, Any]:
    text = f"report {number} of today"
    return {
        "kind": kind, "attack": "text_trigger", "row": number, "prompt": f"{text} cf" if kind == "triggered" else text,
        "trigger": [[len(text) + 1, len(text) + 3]] if kind == "triggered" else [], "right": "World",
        "wanted": "Sports" if kind == "triggered" else "World", "answer": answer, "success": success, "sample": True,
        **more,
    }  # fmt: skip


def answered(folder: Path, *rows: dict[str, Any], round: int = 20) -> Path:
    with (folder / "answers.jsonl").open("ab") as file:
        file.write(answer_lines(round, "attacked", rows))
    return folder


def test_attack_free_attacked_and_defended_answers_stand_side_by_side(comparison: Path):
    for name, answer in (("attack-free", "World"), ("attacked", "Sports"), ("multi_krum", "World"),
                         ("geometric_median", "sport")):  # fmt: skip
        hit = answer == "Sports"
        rows = [row(n, answer, hit) for n in range(6)] + [row(0, "World", False, "clean")]
        answered(comparison / name, row(0, "old", False), round=2)
        answered(comparison / name, *rows)
    found = transcript(read_runs([comparison]))
    assert found is not None
    assert found.names == [
        ("attack-free", "attack-free"),
        ("attacked", "attacked, no defense"),
        ("multi_krum", "attacked, multi_krum"),
        ("geometric_median", "attacked, geometric_median"),
    ]
    triggered, clean = found.groups
    assert triggered.title == "With the trigger"
    assert triggered.counts == [f"{n} of 6 got the attacker’s answer" for n in (0, 6, 0, 0)]
    assert (len(triggered.first), len(triggered.more), len(clean.first)) == (3, 3, 1)
    first = triggered.first[0]
    assert first.parts == [("report 0 of today ", False), ("cf", True)]
    assert [cell.words for cell in first.cells if cell] == [
        "the right answer", "the attacker’s answer", "the right answer", "another answer"
    ]  # fmt: skip
    assert (first.wanted, first.right) == ("Sports", "World")
    assert "After round 20. Not chosen by hand" in found.note
    page = render(read_runs([comparison]), [comparison])
    assert "<mark>cf</mark>" in page
    assert page.index("What the models said") < page.index("The runs side by side")
    outline(page)


def test_rows_that_repeat_a_prompt_are_rows_and_draws_are_draws(comparison: Path):
    again = {"prompt": "say it cf", "trigger": [[7, 9]]}
    rows = [row(n, "Sports" if n < 2 else "World", n < 2, **again) for n in range(5)]
    answered(comparison / "attacked", *rows, row(5, "World", False, draw=1), row(5, "Sports", True, draw=2))
    found = transcript(read_runs([comparison]))
    assert found is not None
    (triggered,) = found.groups
    assert triggered.counts == ["3 of 6 got the attacker’s answer"]
    more = [cell.more for asked in [*triggered.first, *triggered.more] for cell in asked.cells if cell]
    assert more == ["", "", "", "", "", "1 of 2 draws"]


def test_what_a_model_or_a_stranger_wrote_stays_text(make_run: MakeRun, tmp_path: Path):
    folder = make_run(tmp_path / "evil")
    turned = "abc\u202edef\x1b[31m\u200b"
    answered(
        folder,
        row(0, EVIL, True, prompt=EVIL, trigger=[[0, 8]], wanted=EVIL, right=EVIL, attack=EVIL),
        row(1, turned, None, second=True),
        row(2, "x" * 5000, False, attack=EVIL, kind="clean"),
        row(3, "", False, kind="<b>kind</b>"),
    )
    page = render(read_runs([folder]), [folder])
    assert EVIL not in page
    assert page.count("<script") == 1
    assert "<mark>&lt;script&gt;</mark>" in page
    assert not any(mark in page for mark in "\u202e\x1b\u200b")
    assert "x" * 241 not in page
    assert "the judge failed" in page
    assert "the second judge disagrees" in page
    outline(page)


def test_lines_that_are_no_answers_are_said_and_a_page_without_any_has_no_such_part(make_run: MakeRun, tmp_path: Path):
    folder = make_run(tmp_path / "a")
    assert transcript(read_runs([folder])) is None
    answered(folder, row(0, "Sports", True))
    with (folder / "answers.jsonl").open("a") as file:
        file.write('{"round": 20}\n')
    found = transcript(read_runs([folder]))
    assert found is not None
    assert "1 of 2 lines are no answers and are left out." in found.note


def test_several_draws_are_one_cell_with_the_success_shown(make_run: MakeRun, tmp_path: Path):
    drawn = enumerate(["World", "Sports", "World"])
    folder = answered(make_run(tmp_path / "a"), *(row(0, said, said == "Sports", draw=n) for n, said in drawn))
    found = transcript(read_runs([folder]))
    assert found is not None
    cell = found.groups[0].first[0].cells[0]
    assert (cell.answer, cell.words, cell.more) == ("Sports", "the attacker’s answer", "1 of 3 draws")
    assert found.groups[0].counts == ["1 of 1 got the attacker’s answer"]


def test_without_an_attack_held_out_prompts_are_shown(make_run: MakeRun, tmp_path: Path):
    rows = [row(n, "World" if n else "Tech", n > 0, "test", attack=None) for n in range(3)]
    found = transcript(read_runs([answered(make_run(tmp_path / "a", attack=False), *rows)]))
    assert found is not None
    assert (found.groups[0].title, found.groups[0].counts) == ("Held-out prompts", ["2 of 3 right"])
    assert [cell.kind for asked in found.groups[0].first for cell in asked.cells if cell] == ["other", "good", "good"]


def test_a_long_prompt_keeps_its_trigger_and_loses_its_middle():
    text = "a" * 300 + " cf " + "b" * 300
    found = parts(text, [[301, 303]])
    assert [marked for _, marked in found] == [False, True, False]
    assert found[1][0] == "cf"
    assert all(len(part) < 170 for part, _ in found)


# ---------------------------------------------------------------- tables beside


def test_attacks_by_name_judges_draws_and_changed_triggers_have_tables(make_run: MakeRun, tmp_path: Path):
    folder = make_run(tmp_path / "a", rounds=2)
    lines = (folder / "history.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    block = {"asr": wilson(9, 10), "false_trigger": None, "reasons": {"false_trigger": "none is clean"}, "left_out": {}}
    first = block | {
        "judge_failed": 2, "draws": {"count": 3, "temperature": 1.0, "asr_mean": 0.5, "false_trigger_mean": None},
        "second": {"asr": wilson(5, 10), "false_trigger": None, "agreement": {**wilson(6, 10), "kappa": 0.25}},
        "generalise": {"other case": wilson(1, 10)}, "turns_since": {"0": wilson(4, 4), "2": wilson(0, 6)},
        "reasons": {"judge": "failed on 2 of 10 answers, which count as no success: KeyError: 'x'"},
    }  # fmt: skip
    last["quality"]["per_client"] = {"c00": {"accuracy": wilson(7, 10)}, "c01": {"accuracy": wilson(2, 10)}}
    hit = {"per_client": {"c01": {"asr": wilson(8, 10)}}}
    last["attack"] = (
        block | hit | {"reasons": first["reasons"]} | {"attacks": {"text_trigger": first, "label_flip": block}}
    )
    (folder / "history.jsonl").write_text("\n".join([*lines[:-1], json.dumps(last)]) + "\n")
    settings = {"tasks": ["house"]}
    before, after = ({"house": {"acc": {"value": v, "stderr": 0.01, "n": 8}}} for v in (0.5, 0.25))
    (folder / "harness.json").write_text(json.dumps({"settings": settings, "before": before, "after": after}))
    runs = read_runs([folder])
    shown = {title: [[cell.text for cell in line] for line in table.rows] for title, table in beside.tables(runs)}
    assert shown == {
        "Attack by attack": [
            ["a", "text_trigger", "90 %", "50 %", "50 %", "60 %", "0.25", "2"],
            ["a", "label_flip", "90 %", "n/a", "n/a", "n/a", "n/a", "n/a"],
        ],
        "How far the trigger carries": [["a", "text_trigger", "90 %", "10 %", "100 %", "0 %"]],
        "Client by client": [["a", "c00", "0.70", "n/a"], ["a", "c01", "0.20", "80 %"]],
        "Public tasks": [["a", "0.500 → 0.250"]],
    }
    page = render(runs, [folder])
    assert "text_trigger: the judge failed on 2 of 10 answers" not in page  # of the first attack it stands without
    assert "the judge failed on 2 of 10 answers, which count as no success" in page
    for words in ("Attack by attack", "How far the trigger carries", "2 turns later", "Public tasks", "± 0.0100"):
        assert words in page
    outline(page)


def test_a_harness_file_of_a_stranger_is_left_out(make_run: MakeRun, tmp_path: Path):
    folder = make_run(tmp_path / "a", rounds=2)
    for text in ("[]", '{"before": 7, "after": {"x": {"y": {"value": "<b>"}}}}', "{", '{"after": {"x": [1]}}'):
        (folder / "harness.json").write_text(text)
        assert beside.public(read_runs([folder])) is None
