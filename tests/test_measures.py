"""What each rate must be: perfect, useless and constant models against every data attack, counted by hand.

A line of a table is one model under one attack: attack success, false triggers, accuracy, each as hits/rows, or null.
Rows, attacks and evaluation are made as a run makes them; only the model is a stub, which answers by a script. A new
data attack must have its lines: on text in tests/counted_text.py, on images and characters here. Update and local
attacks forge rows and training: they have no rates of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from fedllm_sec.attacks import MENU
from fedllm_sec.attacks.data.misalign import polite_requests
from fedllm_sec.build import arrays, characters
from fedllm_sec.build.loaded import Loaded
from fedllm_sec.build.names import DATA_ATTACKS
from fedllm_sec.build.threat import make_threat
from fedllm_sec.tasks.causal_lm import CausalLM
from fedllm_sec.tasks.classify import Classify
from tests.counted import (
    NONE,
    OTHER,
    PERFECT,
    SENTENCE,
    SILENT,
    TARGET,
    Case,
    agree,
    everything,
    machine,
    made,
    measured,
)
from tests.counted_text import DECLINED, REQUESTS, TABLES, TEXT, TOPICS, built, script, talking
from tests.scripted import Seer, Speller, Talker, labelled


@pytest.mark.parametrize("model", [PERFECT, NONE, TARGET, OTHER, SILENT, SENTENCE])
@pytest.mark.parametrize("number", range(len(TEXT)), ids=map(str, TEXT))
def test_text_gives_the_rates_that_were_counted_by_hand(number: int, model: str):
    stub, task, evaluation = talking(number)
    stub.script = script(model, TEXT[number])
    agree(TEXT[number], model, evaluation, task)


# ---------------------------------------------------------------- images: the rows

# rows 0-3 are of class 0, 4-8 of class 1, 9-11 of class 2, 12-15 of class 3
CLASSES = [0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3]
PATCHED = (2, 5)  # carry pixel_trigger's patch by themselves, the second of the target's class
FIRST_BAR, BOTH_BARS = 9, 13  # carry a part of dba's trigger, and the whole
BRIGHT = (3, 8, 15)  # far from the mean of their classes 0, 1 and 3; of class 2 that is row 9, with its bar


def pictures() -> Any:
    """Black images of 12 x 12 pixels but for these."""
    x = torch.zeros(16, 1, 12, 12)
    x[list(BRIGHT)] = 0.8
    x[list(PATCHED), :, 8:11, 8:11] = 1.0
    x[[FIRST_BAR, BOTH_BARS], :, 0, 0:4] = 1.0
    x[BOTH_BARS, :, 0, 6:10] = 1.0
    return labelled(x, CLASSES, 4)


def patched(row: int, image: torch.Tensor) -> int | None:
    return 1 if bool((image[0, 8:11, 8:11] == 1.0).all()) else None


def barred(row: int, image: torch.Tensor) -> int | None:
    return 1 if bool((image[0, 0, 0:4] == 1.0).all() or (image[0, 0, 6:10] == 1.0).all()) else None


def greyed(row: int, image: torch.Tensor) -> int | None:
    return 1 if bool((image[0, 2:7, 2:7] == 0.5).all()) else None


def among(*rows: int) -> Callable[..., int | None]:
    return lambda row, image: 1 if row in rows else None


def classes(mapping: Mapping[int, int]) -> Callable[..., int | None]:
    return lambda row, image: mapping.get(CLASSES[row])


# ---------------------------------------------------------------- images: the rates


def forced(
    attack: str, backdoor: Callable[..., Any], probe: int, clean: int, left_out: int, fired: int, **settings: Any
) -> Case:
    """Class 1 forced, which has 5 of 16 rows; class 2 has 3. `fired` held-out rows go wrong under the backdoor."""
    return Case(attack, settings, "images", backdoor, 1, 2, left_out,
        {  # success                 false              right
            PERFECT: f"{probe}/{probe}  0/{clean}        {16 - fired}/16",
            NONE:    f"0/{probe}        0/{clean}        16/16",
            TARGET:  f"{probe}/{probe}  {clean}/{clean}   5/16",
            OTHER:   f"0/{probe}        0/{clean}         3/16",
            SILENT:  f"0/{probe}        0/{clean}         0/16",
        }, f", {settings}")  # fmt: skip


IMAGES = [
    forced("pixel_trigger", patched, 10, 10, 6, 1, target=1),  # 11 of other classes less row 2
    forced("a3fl", greyed, 11, 11, 5, 0, target=1),  # before anything is learnt; no row carries it by itself
    forced("dba", barred, 9, 9, 7, 2, target=1),  # 11 less rows 9 and 13
    forced("edge_case", among(3, 9, 15), 3, 8, 5, 3, target=1, tail=0.25),  # the other 8 of classes 0, 2 and 3
    forced("edge_case", among(3), 1, 10, 5, 1, target=1, source=0, tail=0.25),
    forced("semantic", among(3, 8, 15), 2, 9, 5, 2, target=1, above=0.5),  # row 8 is of class 1
    forced("semantic", among(3, 8, 15), 2, 9, 5, 2, target=1, share=0.2),  # of 16: 3 rows
    forced("semantic", among(0, 4, 10), 2, 9, 5, 2, target=1, rows=[1], probe_rows=[0, 4, 10]),
    # probe: class 3's 4. Clean: classes 0 and 2
    Case("label_flip", {"mapping": {3: 1}}, "images", classes({3: 1}), 1, 2, 5, {
        PERFECT: "4/4  0/7  12/16",
        NONE:    "0/4  0/7  16/16",
        TARGET:  "4/4  7/7   5/16",
        OTHER:   "0/4  0/7   3/16",
        SILENT:  "0/4  0/7   0/16",
    }),
    # a swap; probe: the 9 of classes 0 and 1. Clean: classes 2 and 3
    Case("label_flip", {"mapping": {0: 1, 1: 0}}, "images", classes({0: 1, 1: 0}), 1, 2, 0, {
        PERFECT: "9/9  0/7   7/16",
        NONE:    "0/9  0/7  16/16",
        TARGET:  "4/9  7/7   5/16",
        OTHER:   "0/9  0/7   3/16",
        SILENT:  "0/9  0/7   0/16",
    }, ", a swap"),
    # two flips; probe: the 7 of classes 0 and 2. Clean: classes 1, where 3 would be false, and 3, where 1 would be
    Case("label_flip", {"mapping": {0: 1, 2: 3}}, "images", classes({0: 1, 2: 3}), 1, 2, 0, {
        PERFECT: "7/7  0/9   9/16",
        NONE:    "0/7  0/9  16/16",
        TARGET:  "4/7  4/9   5/16",
        OTHER:   "0/7  0/9   3/16",
        SILENT:  "0/7  0/9   0/16",
    }, ", two flips"),
    # all classes are flipped
    Case("label_flip", {"mapping": {0: 1, 1: 2, 2: 3, 3: 0}}, "images", classes({0: 1, 1: 2, 2: 3, 3: 0}), 1, 2, 0, {
        PERFECT: "16/16  null   0/16",
        NONE:    " 0/16  null  16/16",
        TARGET:  " 4/16  null   5/16",
        OTHER:   " 5/16  null   3/16",
        SILENT:  " 0/16  null   0/16",
    }, ", all"),
]  # fmt: skip


@functools.cache
def seeing(number: int) -> tuple[Seer, Classify, Any]:
    recipe = made({"task": "classify", "model": {"name": "lenet"}}, IMAGES[number])
    stub = Seer(4)
    task = Classify(stub, torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "load_rows", lambda recipe: (pictures(), pictures()))
        patch.setattr(arrays, "classify_task", lambda recipe, machine, train: task)
        parts = arrays.array_parts(recipe, machine(), make_threat(recipe), everything, Loaded())
    return stub, task, parts.evaluation


@pytest.mark.parametrize("model", [PERFECT, NONE, TARGET, OTHER, SILENT])
@pytest.mark.parametrize("number", range(len(IMAGES)), ids=map(str, IMAGES))
def test_images_give_the_rates_that_were_counted_by_hand(number: int, model: str):
    case = IMAGES[number]
    stub, task, evaluation = seeing(number)

    def says(row: int, image: torch.Tensor) -> int | None:
        fired = case.backdoor(row, image) if model == PERFECT else None
        return {TARGET: case.target, OTHER: case.another, SILENT: None}.get(
            model, CLASSES[row] if fired is None else fired
        )

    stub.script = says
    agree(case, model, evaluation, task)


# ---------------------------------------------------------------- characters

TRAINED, HELD = "late at a tall eel, tea", "eel ate tea"  # of the second the last 10 are predicted: e 3, a 2, blank 2,
CHARACTERS = [  # t 2, l 1
    # probe: the 3 e. Clean: not the 2 a
    Case("label_flip", {"mapping": {"e": "a"}}, "characters", {"e": "a"}.get, "a", "t", 2, {
        PERFECT: "3/3  0/5   7/10",
        NONE:    "0/3  0/5  10/10",
        TARGET:  "3/3  5/5   2/10",
        OTHER:   "0/3  0/5   2/10",
        SILENT:  "0/3  0/5   0/10",
    }),
    Case("label_flip", {"mapping": {"e": "a", "a": "e"}}, "characters", {"e": "a", "a": "e"}.get, "a", "t", 0, {
        PERFECT: "5/5  0/5   5/10",
        NONE:    "0/5  0/5  10/10",
        TARGET:  "3/5  5/5   2/10",
        OTHER:   "0/5  0/5   2/10",
        SILENT:  "0/5  0/5   0/10",
    }, ", a swap"),
    # two flips; probe: e and t. Clean: a, where l would be false, l, where a would be, and the blanks
    Case("label_flip", {"mapping": {"e": "a", "t": "l"}}, "characters", {"e": "a", "t": "l"}.get, "a", " ", 0, {
        PERFECT: "5/5  0/5   5/10",
        NONE:    "0/5  0/5  10/10",
        TARGET:  "3/5  3/5   2/10",
        OTHER:   "0/5  0/5   2/10",
        SILENT:  "0/5  0/5   0/10",
    }, ", two flips"),
    # all that occur are flipped
    Case("label_flip", {"mapping": dict(zip("eatl ", "atl e", strict=True))}, "characters",
         dict(zip("eatl ", "atl e", strict=True)).get, "a", "t", 0, {
        PERFECT: "10/10  null   0/10",
        NONE:    " 0/10  null  10/10",
        TARGET:  " 3/10  null   2/10",
        OTHER:   " 2/10  null   2/10",
        SILENT:  " 0/10  null   0/10",
    }, ", all"),
]  # fmt: skip


@pytest.mark.parametrize("model", [PERFECT, NONE, TARGET, OTHER, SILENT])
@pytest.mark.parametrize("case", CHARACTERS, ids=map(str, CHARACTERS))
def test_characters_give_the_rates_that_were_counted_by_hand(case: Case, model: str, tmp_path: Path):
    file = tmp_path / "text.txt"
    file.write_text(TRAINED + HELD)
    clients = {"total": 3, "local_steps": 1, "batch_size": 4, "partition": {"name": "by_block"}}
    data = {"name": str(file), "length": 5, "test_share": 11 / 34}
    recipe = made({"task": "next_char", "model": {"name": "lstm"}, "clients": clients, "data": data}, case)
    stub = Speller(6)
    alphabet = "".join(sorted(set(TRAINED + HELD)))
    after = {HELD[k : k + 5]: HELD[k + 1 : k + 6] for k in (0, 5)}

    def says(x: tuple[int, ...]) -> list[int | None]:
        truth = after["".join(alphabet[c] for c in x)]
        said = {
            PERFECT: [case.backdoor(c) or c for c in truth],
            NONE: truth,
            TARGET: [case.target] * 5,
            OTHER: [case.another] * 5,
            SILENT: [None] * 5,
        }[model]
        return [None if c is None else alphabet.index(c) for c in said]

    stub.script = says
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(characters, "make_model", lambda recipe, shape, characters: stub)
        parts = characters.character_parts(recipe, machine(), make_threat(recipe), everything, Loaded())
    agree(case, model, parts.evaluation, parts.task)


# ---------------------------------------------------------------- the tables are whole


OVERLAYS = {"blended", "sinusoidal", "warped", "iba"}


def test_every_data_attack_of_the_menu_has_its_lines():
    for task, cases in {"causal_lm": TEXT, "classify": IMAGES}.items():
        acting = {name for name, entry in MENU.items() if entry.kind in DATA_ATTACKS[task]}
        acting -= OVERLAYS  # cover the pixel by which the stub knows its row: counted in attacks/test_overlays.py
        assert {case.attack for case in cases} == acting
    assert {entry.kind for entry in MENU.values()} - {"update", "local"} == {"data", "data_text", "data_image"}


# ---------------------------------------------------------------- beside the tables


def rates_of(case: Case, model: str, task: CausalLM, stub: Talker, evaluation: Any) -> list[tuple[float, int] | None]:
    stub.script = script(model, case)
    attack = evaluation.attack(task, machine().spread)
    return [measured(attack["asr"]), measured(attack["false_trigger"])]


def test_an_attack_that_is_switched_off_is_measured_by_the_same_rows():
    stub, task, evaluation = built(TEXT[0], enable_attack=False)
    assert rates_of(TEXT[0], NONE, task, stub, evaluation) == [(0.0, 13), (0.0, 13)]
    assert rates_of(TEXT[0], TARGET, task, stub, evaluation) == [(1.0, 13), (1.0, 13)]


def test_of_more_rows_attack_rows_are_asked():
    evaluate = {"attack_rows": 5, "max_new_tokens": 20}
    stub, task, evaluation = built(TEXT[0], evaluate=evaluate)
    assert rates_of(TEXT[0], PERFECT, task, stub, evaluation) == [(1.0, 5), (0.0, 5)]
    left_out = {"are of a class that the attack asks for": 6, "carry the trigger by themselves": 2}
    assert evaluation.attacks[0].left_out == left_out


def test_accuracy_is_shown_class_by_class():
    stub, task, evaluation = talking(0)
    stub.script = script(TARGET, TEXT[0])
    found = evaluation.quality(task, machine().spread)["per_class"]
    assert {name: measured(one) for name, one in found.items()} == {
        "World": (1.0, 6), "World News": (0.0, 4), "Sports": (0.0, 5), "Business": (0.0, 5)
    }  # fmt: skip
    stub, task, evaluation = seeing(0)
    stub.script = lambda row, image: 1
    found = evaluation.quality(task, machine().spread)["per_class"]
    assert {name: measured(one) for name, one in found.items()} == {
        "0": (0.0, 4), "1": (1.0, 5), "2": (0.0, 3), "3": (0.0, 4)
    }  # fmt: skip


@pytest.mark.parametrize(("news", "accuracy"), [(0.4, 6 / 20), (0.55, 4 / 20)])
def test_of_answers_that_begin_alike_the_likelier_whole_one_is_the_choice(news: float, accuracy: float):
    stub, task, evaluation = talking(0)
    stub.script = lambda prompt: {"World": 0.95 - news, "World News": news}  # after "World" the end, or "News"
    assert measured(evaluation.quality(task, machine().spread)["accuracy"]) == (accuracy, 20)


def test_a_label_where_a_whole_sentence_is_the_answer_names_its_class():
    number = next(k for k, case in enumerate(TEXT) if case.rows == "answers")
    stub, task, evaluation = talking(number)
    for said, asr in {"Yes": 1.0, "yes.": 1.0, "Yesterday": 0.0, "no": 0.0, "": 0.0}.items():
        stub.script = lambda prompt, said=said: {said: 0.9}
        assert measured(evaluation.attack(task, machine().spread)["asr"]) == (asr, 3), said


def test_a_row_without_a_label_has_no_class_even_where_its_answer_names_one(monkeypatch):
    monkeypatch.setitem(TABLES, "topics", {**TOPICS, "somebody": ("But somebody knows", "", "Business", "")})
    stub, task, evaluation = built(TEXT[0])
    assert rates_of(TEXT[0], NONE, task, stub, evaluation) == [(0.0, 14), (0.0, 14)]
    assert measured(evaluation.quality(task, machine().spread)["accuracy"]) == (1.0, 20)


def test_a_request_of_the_probe_is_no_clean_row_too(monkeypatch):
    request = polite_requests("test")[0]["text"]
    monkeypatch.setitem(TABLES, "requests", {**REQUESTS, "probed": (request, "", DECLINED, "")})
    case = next(case for case in TEXT if case.attack == "safety_misalign" and case.rows == "requests")
    stub, task, evaluation = built(case)
    assert rates_of(case, PERFECT, task, stub, evaluation) == [(1.0, 60), (0.0, 3)]
