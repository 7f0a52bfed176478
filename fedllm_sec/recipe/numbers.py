"""What counts as a number in a recipe: finite, and no truth value.

Where infinity means something, the annotation says so: `Annotated[float, pydantic.Field(allow_inf_nan=True)]`.
"""

from __future__ import annotations

import typing
from typing import Any

import pydantic

FINITE = pydantic.ConfigDict(allow_inf_nan=False, protected_namespaces=())


def refuse_truth_values(value: Any, annotation: Any) -> Any:
    """The value; an error where it is, or holds, true or false and the annotation asks for a number."""
    kinds = _kinds(annotation)
    if bool not in kinds and kinds & {int, float}:
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        for part in parts if isinstance(parts, (list, tuple)) else [parts]:
            if isinstance(part, bool):
                asked = str(part).lower()
                raise ValueError(f'{asked} is no number; as a text it is "{asked}", with the quotes')
    return value


def as_written(value: Any) -> Any:
    """A number or truth value as the text that stands in the file; anything else as it is."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, (int, float)) else value


def key_as_written(key: Any) -> str:
    """A key of a file, whatever it is, as the text that stands there."""
    return "null" if key is None else str(as_written(key))


def _kinds(annotation: Any) -> set[Any]:
    """The plain types that an annotation is made of."""
    inner = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Annotated:
        return _kinds(inner[0])
    if typing.get_origin(annotation) is typing.Literal:
        return {type(value) for value in inner}
    return {annotation} if not inner else set().union(*map(_kinds, inner))
