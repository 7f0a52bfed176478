"""Numbers of a recipe are finite numbers, in sections and in the settings of every method on a menu."""

from __future__ import annotations

import math
import typing
from typing import Annotated, Any

import pytest
from pydantic import Field

from fedllm_sec.build.kept import save_problems
from fedllm_sec.build.names import checked
from fedllm_sec.build.plan import planned
from fedllm_sec.errors import RecipeError
from fedllm_sec.menu import MENUS
from fedllm_sec.recipe.numbers import _kinds
from fedllm_sec.recipe.reading import put
from fedllm_sec.recipe.resolve import check_settings, settings_of
from tests.recipe.test_reading import GOOD, problems


@pytest.mark.parametrize(
    "key", ["rounds", "seed", "clients.lr", "clients.total", "model.lora.alpha", "evaluate.rows", "compute.chunk_mb"]
)
def test_a_truth_value_is_no_number(key: str):
    assert f"{key}: true: true is no number" in problems(put(GOOD, key, True))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize(
    "key", ["clients.lr", "clients.weight_decay", "clients.max_grad_norm", "model.lora.alpha", "attack.probability"]
)
def test_a_number_is_finite(key: str, value: float):
    assert key in problems(put(GOOD, key, value))


def test_a_list_of_numbers_holds_no_truth_value():
    assert "no number" in problems(put(GOOD, "clients.betas", [0.9, True]))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("clients.lr", 1e-320, "0 in single precision"),
        ("clients.weight_decay", 1e300, "infinite in single precision"),
        ("clients.lr", 1e30, "less than or equal to 1000000"),
        ("compute.chunk_mb", 1e-9, "greater than or equal to 0.001"),
        ("attack.every", 1e21, "64 bits"),
        ("defense.root_rows", 10**12, "less than or equal to 1000000000"),
        ("algorithm", {"name": "fedopt", "server_lr": 1e-320}, "0 in single precision"),
    ],
)
def test_a_number_is_one_that_something_can_be_computed_with(key: str, value: Any, words: str):
    assert words in problems(put(GOOD, key, value))


@pytest.mark.parametrize("key", ["attack.every", "output.adapter_every"])
def test_what_happens_in_every_kth_round_happens_within_the_rounds(key: str):
    attack = {"malicious": {"count": 1}, "update": [{"name": "byzantine_zero"}]}
    recipe = checked(put(GOOD | {"enable_attack": True, "attack": attack, "rounds": 4}, key, 5))
    with pytest.raises(RecipeError, match=f"{key}: 5 is more than rounds=4"):
        planned(recipe)
    assert not save_problems(checked(put(put(GOOD, "rounds", 4), "output.adapter_every", 4)))


def test_numbers_are_still_taken_as_they_are_written():
    recipe = checked(put(put(GOOD, "clients.lr", 1), "clients.betas", [0.5, 0.75]))
    assert (recipe.clients.lr, recipe.clients.betas) == (1.0, (0.5, 0.75))


SETTINGS = [
    pytest.param(entry.make, name, id=f"{menu}-{method}-{name}")
    for menu, entries in MENUS.items()
    for method, entry in entries.items()
    for name in settings_of(entry.make)
]


def hint_of(make: Any, name: str) -> Any:
    return typing.get_type_hints(make.__init__ if isinstance(make, type) else make)[name]


@pytest.mark.parametrize(("make", "name"), SETTINGS)
def test_no_setting_of_any_method_takes_nonsense_for_a_number(make: Any, name: str):
    kinds = _kinds(hint_of(make, name))
    wrong = [True] if kinds & {int, float} and bool not in kinds else []
    wrong += [float("nan"), float("inf")] if float in kinds else []
    for value in wrong:
        with pytest.raises(RecipeError, match=f"here.{name}"):
            check_settings(make, {name: value}, "here")


def test_a_key_that_is_no_text_beside_a_methods_settings_is_named():
    for key in (True, 1, None):
        assert "there is no such setting" in problems({**GOOD, "defense": {"rule": {"name": "median", key: "x"}}})


@pytest.mark.parametrize("name", [":b", "..:x", "os:", ""])
def test_a_name_that_is_no_module_is_an_error_in_a_line(name: str):
    assert "defense.rule" in problems({**GOOD, "defense": {"rule": {"name": name}}})


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{text} }", "Single '}' encountered"),
        ("x} {text}", "Single '}' encountered"),
        ("{text} {", "Single '{' encountered"),
        ("{text} {text.__class__}", "it may use"),
        ("{text!r:>9}", "is to be formatted"),
        ("{text:>9}", "is to be formatted"),
        ("{} {text}", "it may use"),
        ("{0} {text}", "it may use"),
        ("no place", "must contain {text}"),
    ],
)
def test_a_template_holds_text_and_context_and_nothing_else(template: str, words: str):
    said = problems({**GOOD, "data": {**GOOD.get("data", {}), "template": template}})
    assert "data.template" in said
    assert words in said


def test_a_brace_that_is_text_is_written_twice():
    checked({**GOOD, "data": {**GOOD.get("data", {}), "template": "{{json}} {text}"}})


def test_a_context_that_no_template_shows_is_an_error():
    columns = {"text": "question", "context": "passage", "response": "answer"}
    data = {**GOOD.get("data", {}), "template": "{text}", "columns": columns}
    assert 'data.columns.context: "passage": no template shows {context}' in problems({**GOOD, "data": data})
    checked({**GOOD, "data": {**data, "template_with_context": "{context} {text}"}})


def test_a_chat_recipe_that_was_written_out_reads_back_and_one_that_gives_other_templates_is_an_error(tmp_path):
    from fedllm_sec.recipe.reading import dump, read

    data = {**GOOD.get("data", {}), "template": "chat"}
    (tmp_path / "recipe.yaml").write_text(dump(checked({**GOOD, "data": data})))  # as a run or a deployment writes it
    assert "template_with_context" in (tmp_path / "recipe.yaml").read_text()
    checked(read(tmp_path / "recipe.yaml"))
    said = problems({**GOOD, "data": {**data, "answer": "{response}!"}})
    assert "data.answer: the chat template writes the whole row" in said


@pytest.mark.parametrize("name", ["../x", "/abs", "..", ".hidden", "a/b", 1, 0.1, True, "", "x ", "x\n", "con:"])
def test_a_variant_is_the_name_of_one_folder(name: Any, tmp_path):
    from fedllm_sec.recipe.reading import variants

    with pytest.raises(RecipeError, match="names one folder"):
        variants({name: {}})


def test_two_variants_that_a_file_system_takes_for_one_are_refused():
    from fedllm_sec.recipe.reading import variants

    with pytest.raises(RecipeError, match="some file systems take it for 'a'"):
        variants({"a": {}, "A": {}})
    assert list(variants({"attack-free": {}, "multi_krum f3": {}})) == ["attack-free", "multi_krum f3"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"report.html": {}}, "what a run leaves behind has this name"),
        ({"Model": {}}, "what a run leaves behind has this name"),
        ({"a": {"variants": {"b": {}}}}, "a variant has none of its own"),
        ({"a": {"output": {"folder": "x"}}}, "a variant lies in the run's folder"),
    ],
)
def test_a_variant_is_not_taken_for_a_file_of_the_run_and_has_no_folder_of_its_own(given: Any, told: str):
    from fedllm_sec.recipe.reading import variants

    with pytest.raises(RecipeError, match=told):
        variants(given)


@pytest.mark.parametrize("key", ["local_steps", "batch_size"])
def test_a_count_beyond_any_machine_is_refused(key: str):
    assert f"clients.{key}" in problems({**GOOD, "clients": {**GOOD["clients"], key: 10**20}})


@pytest.mark.parametrize("folder", ["a\x1b[31mb", "a\nb", "a\ud800b"])
def test_an_output_folder_does_not_command_the_terminal(folder: str):
    assert "must not hold control characters" in problems({**GOOD, "output": {"folder": folder}})


@pytest.mark.parametrize("place", ["data.name", "model.name", "model.start", "output.folder"])
def test_an_empty_place_is_none(place: str):
    section, key = place.split(".")
    given = {**GOOD, section: {**GOOD.get(section, {}), key: " "}}
    assert f"{place}: ' ': is empty. Give a path or a name, or leave the key out" in problems(given)


@pytest.mark.parametrize("folder", ["", None, [], 3])
def test_an_output_folder_is_a_text(folder: Any):
    assert "output.folder" in problems({**GOOD, "output": {"folder": folder}})


def held_to(
    *, radius: Annotated[float, Field(allow_inf_nan=True)] = 1.0, share: Annotated[float, Field(ge=0, le=1)] = 0.5
) -> None:
    """A method of one's own whose annotations say more than a type."""


def test_what_an_annotation_says_of_a_setting_holds():
    assert check_settings(held_to, {"radius": math.inf}, "defense.rule") == {"radius": math.inf, "share": 0.5}
    with pytest.raises(RecipeError, match=r"defense\.rule\.share: 2\.0: Input should be less than or equal to 1"):
        check_settings(held_to, {"share": 2.0}, "defense.rule")
    with pytest.raises(RecipeError, match="true is no number"):
        check_settings(held_to, {"radius": True}, "defense.rule")
