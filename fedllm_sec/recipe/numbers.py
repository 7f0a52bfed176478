"""What counts as a number in a recipe: finite, no truth value, and one that single precision can hold.

Where infinity means something, the annotation says so: `Annotated[float, pydantic.Field(allow_inf_nan=True)]`.
"""

from __future__ import annotations

import math
import typing
from typing import Any

import pydantic

SMALLEST, LARGEST = 2.0**-126, 2.0**128 * (1 - 2.0**-24)  # normal numbers of single precision
FINITE = pydantic.ConfigDict(allow_inf_nan=False, protected_namespaces=())


def need_number(value: Any, annotation: Any) -> Any:
    """The value; an error where the annotation asks for numbers and it is, or holds, one that nothing computes with.

    That is true or false, a whole number beyond 64 bits, and a fraction that is 0 or infinite in single precision.
    """
    kinds = _kinds(annotation)
    if kinds & {int, float}:
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        for part in parts if isinstance(parts, (list, tuple)) else [parts]:
            if isinstance(part, bool) and bool not in kinds:
                asked = str(part).lower()
                raise ValueError(f'{asked} is no number; as a text it is "{asked}", with the quotes')
            if isinstance(part, int) or (isinstance(part, float) and math.isfinite(part)):
                _need_size(part, float in kinds)
    return value


def _need_size(value: float, fraction: bool) -> None:
    if fraction and value and not SMALLEST <= abs(value) <= LARGEST:
        became = "0" if abs(value) < SMALLEST else "infinite"
        raise ValueError(f"is {became} in single precision, in which a run computes; give 0 or 1e-37 to 1e38")
    if not fraction and abs(value) >= 2**63:
        raise ValueError("is beyond what 64 bits hold; give a smaller number")


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
