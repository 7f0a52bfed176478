"""YAML as people expect it, and files made to do harm."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm_sec.errors import RecipeError
from fedllm_sec.recipe import reading
from fedllm_sec.recipe.plainyaml import dump, parse


def test_words_that_old_yaml_takes_for_numbers_dates_and_truth_values_stay_words():
    text = "a: 010\nb: 1:30\nc: no\nd: 2020-01-02\ne: 0x1f\nf: 1_000\ng: -7\nh: 1e-4\ni: .inf\nj: 0.5\nk: on"
    assert parse(text, "here") == {
        "a": 10, "b": "1:30", "c": "no", "d": "2020-01-02", "e": "0x1f", "f": 1000, "g": -7, "h": 1e-4,
        "i": float("inf"), "j": 0.5, "k": "on",
    }  # fmt: skip


def test_merge_keys_lay_a_block_under_another():
    text = "base: &b {lr: 1, steps: 2}\nmine: {<<: *b, lr: 3}"
    assert parse(text, "here")["mine"] == {"lr": 3, "steps": 2}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3", 'here, line 3: the key "a" is given twice'),
        ("? [a]\n: 1", "here, line 1: a list or a block cannot be a key"),
        ("? {a: 1}\n: 1", "here, line 1: a list or a block cannot be a key"),
        ("a: [1, 2", "here, line 1: not YAML"),
        ("a: !!python/object/apply:os.system [x]", "not YAML"),
        ("[" * 5000, "nested too deeply"),
        ("[" * 60 + "]" * 60, "nested too deeply"),
        ("a: " + "x" * 300_000, "a recipe has at most 100,000"),
        ("[" + "1," * 21_000 + "]", "stands for more than 20,000 values"),
    ],
)
def test_what_cannot_be_a_recipe_is_refused_in_a_line(text: str, words: str):
    with pytest.raises(RecipeError) as refused:
        parse(text, "here")
    assert words in str(refused.value)
    assert len(str(refused.value)) < 400


def test_fifty_blocks_inside_each_other_are_read_and_no_deeper_text_is_looked_at():
    deep = parse("[" * 50 + "1" + "]" * 50, "here")
    for _ in range(50):
        (deep,) = deep
    assert deep == 1
    with pytest.raises(RecipeError, match="nested too deeply"):  # and not that "@" is no YAML
        parse("- " * 60 + "@", "here")


def test_an_alias_bomb_is_refused_before_it_goes_off():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    with pytest.raises(RecipeError, match="stands for more than"):
        parse("\n".join(lines), "here")


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
    | st.sampled_from(["010", "1e5", "1:30", "no", "2020-01-02", "<<", "=", "~", "null", "0x1f", ".5", "1_0"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(plain)
def test_what_is_written_is_read_back_as_it_was(value):
    assert parse(dump(value), "here") == value


def test_a_file_of_any_size_and_a_number_of_any_length_are_refused_at_once(tmp_path):
    path = tmp_path / "long.yaml"
    path.write_bytes(b"# " + b"x" * 10_000_000)
    with pytest.raises(RecipeError, match="longer than 400,000 bytes"):
        reading.read(path)
    with pytest.raises(RecipeError, match=r"cannot be read \(Is a directory\)"):
        reading.read(tmp_path)
    with pytest.raises(RecipeError, match="line 1: a number of 5,000 digits"):
        parse("rounds: " + "9" * 5000, "here")
    many = "variants:\n" + "".join(f"  v{i}: {{}}\n" for i in range(7000))
    with pytest.raises(RecipeError, match="7,000 of them; a recipe has at most 200"):
        reading.variants(parse(many, "here")["variants"])
    with pytest.raises(RecipeError, match="a recipe has at most 100,000"):
        parse("variants:\n" + "".join(f"  v{i}: {{}}\n" for i in range(100_000)), "here")
