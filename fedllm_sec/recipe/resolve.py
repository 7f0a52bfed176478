"""{name, settings} -> a callable: a menu name, or outside code as "package.module:attribute".

The keyword-only parameters of a function or class *are* its settings: their names, types and defaults are read from
the signature and stand nowhere else.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import re
import sys
import traceback
import typing
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pydantic

from fedllm_sec.errors import RecipeError
from fedllm_sec.recipe.numbers import FINITE, key_as_written, need_number


@dataclass(frozen=True)
class Entry:
    """A line of a menu: what to call, where it is published, and (for defenses and attacks) its kind."""

    make: Callable[..., Any]
    paper: str
    kind: str = ""


Menu = Mapping[str, Entry]
BY_PLACE = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """' Did you mean "krum"?', or the list of what there is."""
    options = sorted(known)
    form = unicodedata.normalize("NFC", word)
    if twin := next(
        (option for option in options if option != word and unicodedata.normalize("NFC", option) == form), None
    ):
        return f' Did you mean "{twin}", the same letters in another Unicode form?'
    near = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    return f' Did you mean "{near[0]}"?' if near else f" Known: {', '.join(options) or 'none'}."


def settings_of(make: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of a function, or of a class's `__init__`, by name."""
    parameters = inspect.signature(make).parameters.values()
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}


def find(name: str, menu: Menu, place: str) -> Callable[..., Any]:
    """The function or class behind a menu name or "package.module:attribute"."""
    if name in menu:
        return menu[name].make
    if ":" not in name:
        raise RecipeError(f'{place}.name: there is no "{name}".{did_you_mean(name, menu)}')
    module_name, _, attribute = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # `accelerate launch` and console scripts leave the working folder out
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError, TypeError) as error:  # ":f" and "..:f" are no module names
        raise RecipeError(
            f'{place}.name: cannot import "{module_name}" ({error}). Is it on PYTHONPATH or in this folder?'
        ) from error
    except KeyboardInterrupt:  # Ctrl-C while it is imported
        raise
    except BaseException as error:  # whatever the module does when it is imported
        *_, last = traceback.extract_tb(error.__traceback__)
        raise RecipeError(
            f'{place}.name: "{module_name}" cannot be imported: {type(error).__name__}: {error} ({last.filename}, line '
            f"{last.lineno}). Mend it."
        ) from error
    found = getattr(module, attribute, None)
    if not callable(found):
        raise RecipeError(f'{place}.name: "{module_name}" has no function or class "{attribute}".')
    if not (inspect.isclass(found) or inspect.isroutine(found) or hasattr(found, "__wrapped__")):
        raise RecipeError(
            f'{place}.name: "{name}" is an object of type {type(found).__name__}, and what settings it takes is not to '
            "be seen. Name a function or a class."
        )
    try:
        inspect.signature(found)
    except ValueError as error:  # some of those that are not written in Python
        raise RecipeError(f'{place}.name: "{name}" does not say which settings it takes. Name a function.') from error
    return typing.cast("Callable[..., Any]", found)


# the kinds of a union stand in pydantic's places: clients.betas.list[float], model.lora.target_modules.literal['x']
_KIND = re.compile(r"^(?:str|int|float|bool|none|(?:literal|list|dict|tuple|constrained|function)\b.*)$")


def type_problems(errors: Iterable[Any], place: str = "") -> list[str]:
    """What pydantic says of values of a wrong type, a line for each value: a union is told as one."""
    told: dict[tuple[str, str], list[str]] = {}
    for error in errors:
        parts = [str(part) for part in error["loc"] if not (isinstance(part, str) and _KIND.match(part))]
        told.setdefault((".".join([place] * bool(place) + parts), _shown(error["input"])), []).append(
            error["msg"].removeprefix("Value error, ")
        )
    return [f"{where}: {value}: {', or: '.join(dict.fromkeys(why))}." for (where, value), why in told.items()]


def _shown(value: Any) -> str:
    """A value as it stands in the file, where Python writes it otherwise."""
    return key_as_written(value) if value is None or isinstance(value, bool) else repr(value)


def _model_of(make: Callable[..., Any]) -> type[pydantic.BaseModel]:
    """A model that holds the settings of a function or class to their annotations."""
    target = make.__init__ if inspect.isclass(make) else make
    hints = typing.get_type_hints(target, include_extras=True)
    fields: dict[str, Any] = {
        name: (hints.get(name, Any), ... if p.default is p.empty else p.default)
        for name, p in settings_of(make).items()
    }
    config = pydantic.ConfigDict(**FINITE, arbitrary_types_allowed=True)

    def numbers(value: Any, info: pydantic.ValidationInfo) -> Any:
        return need_number(value, fields[str(info.field_name)][0])

    checks: dict[str, Any] = {"numbers": pydantic.field_validator("*", mode="before")(numbers)} if fields else {}
    return pydantic.create_model("Settings", __config__=config, __validators__=checks, **fields)


_own_model = functools.cache(_model_of)  # of the package's own, which stay as they are: a grid asks for each cell


def check_settings(make: Callable[..., Any], settings: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The settings, converted to the annotated types; every mistake at once as a RecipeError."""
    known = settings_of(make)
    own = str(getattr(make, "__module__", "")).partition(".")[0] == __package__.partition(".")[0]
    try:
        model = (_own_model if own and inspect.isroutine(make) | inspect.isclass(make) else _model_of)(make)
    except Exception as error:  # an annotation that leads nowhere, such as one imported for type checkers alone
        raise RecipeError(f"{place}.name: its annotations cannot be read ({error}). Import what they name.") from error
    by_place = {p.name for p in inspect.signature(make).parameters.values() if p.kind in BY_PLACE}
    problems = [
        f"{place}.{key_as_written(key)}: {_shown(settings[key])} is set, but "
        + (
            f'"{key}" stands among what {make.__name__} is called with. Put a * before its settings.'
            if key in by_place and not own
            else f"there is no such setting.{did_you_mean(key_as_written(key), known)}"
        )
        for key in settings
        if key not in known
    ]
    try:
        checked = model(**{key: value for key, value in settings.items() if key in known})
    except pydantic.ValidationError as error:
        errors = error.errors()
        problems += [f"{place}.{e['loc'][0]}: is needed and has no default." for e in errors if e["type"] == "missing"]
        problems += type_problems([e for e in errors if e["type"] != "missing"], place)
    if problems:
        raise RecipeError(problems)
    return {name: getattr(checked, name) for name in known}


def resolve(name: str, settings: Mapping[str, Any], menu: Menu, place: str) -> Any:
    """A function with its settings bound, or an instance of a class made with them."""
    make = find(name, menu, place)
    checked = check_settings(make, settings, place)
    parameters = inspect.signature(make).parameters.values()
    if inspect.isclass(make) and (asked := [p.name for p in parameters if p.kind in BY_PLACE and p.default is p.empty]):
        raise RecipeError(
            f'{place}.name: "{name}" cannot be made without {", ".join(asked)}, and a recipe gives keyword-only '
            "settings alone. Put a * before its settings: def __init__(self, *, ...)."
        )
    return make(**checked) if inspect.isclass(make) else functools.partial(make, **checked)
