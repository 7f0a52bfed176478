"""docs/recipe_keys.md is what the settings language says today."""

from __future__ import annotations

import importlib.util
from types import ModuleType

from fedllm_sec.build.names import BESIDE
from tests.conftest import ROOT


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_recipe_keys", ROOT / "scripts" / "make_recipe_keys.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


made = script()


def test_the_page_of_recipe_keys_is_up_to_date():
    assert made.PAGE.read_text(encoding="utf-8") == made.page(), "run python scripts/make_recipe_keys.py"


def test_every_key_has_a_line_that_says_what_it_is():
    known = made.comments()
    sections = [made.Recipe, *made.places()]
    bare = [f"{s.__name__}.{name}" for s in sections for name in s.model_fields if not made.description(s, name, known)]
    assert bare == []


def test_values_and_defaults_are_written_as_in_a_recipe():
    page = made.page()
    assert "| `r` | whole number from 1 to 65536 | `8` | rank of the adapters |" in page
    assert "| `dropout` | number from 0 below 1 | `0.0` |" in page
    assert "| `knowledge` | `own` or `cohort` or `cohort+defense` | `own` |" in page
    assert "| `folder` | name or path" in page
    assert "## `data` (task classify, gan, nas)" in page


def test_keys_beside_a_methods_settings_are_on_the_page():
    page = made.page()
    assert "- `buffers`: `average`, `local`, `batch`: how running statistics" in page
    assert all(f"- `{key}`: " in page for keys in BESIDE.values() for key in keys)
