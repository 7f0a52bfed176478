"""What a client's reply must be: every name, type, size and number is known beforehand, and nothing else is taken.

A reply is three records: `delta` (arrays), `claims` (numbers), `of` (which question it answers). They are read as
mappings, so that they can be tried without Flower.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedllm_sec.deploy.wire import Packed, Refused, decode, names, unpack
from fedllm_sec.protocols import LocalResult

MOST_EXAMPLES = 1e9  # that a client may claim, and local steps as well


@dataclass(frozen=True)
class Expected:
    """What the server asked for."""

    client: str
    round: int
    nonce: str  # made anew for each question: a replay answers none
    size: int  # d
    buffers: int  # b
    wire: str


def read_reply(content: Any, expected: Expected) -> LocalResult:
    """The result in a reply's content; Refused, in words for the record, where it is not what was asked for."""
    delta = _only(content.array_records, "array records", ("delta",))["delta"]
    claims = _only(content.metric_records, "metric records", ("claims",))["claims"]
    of = _only(content.config_records, "config records", ("of",))["of"]
    _only(of, "of", ("client", "round", "nonce"))
    for key, wanted in (("client", expected.client), ("round", expected.round), ("nonce", expected.nonce)):
        if type(of[key]) is not type(wanted) or of[key] != wanted:
            why = "it answers another question" if key == "nonce" else f"must be {wanted!r}"
            raise Refused(f"{key}: {str(of[key])[:40]!r}: {why}")
    _only(claims, "claims", ("num-examples", "steps", "loss"))
    count = number(claims["num-examples"], "num-examples", 0.0, MOST_EXAMPLES)
    steps = number(claims["steps"], "steps", 1.0, MOST_EXAMPLES)
    loss = number(claims["loss"], "loss", -math.inf, math.inf)
    if count <= 0 or steps != int(steps):
        raise Refused(f"claims {count:g} examples and {steps:g} steps")
    beside = ("buffers",) if expected.buffers else ()
    _only(delta, "arrays", (*names(expected.wire), *beside))
    arrays = {key: packed(delta[key]) for key in (*names(expected.wire), *beside)}
    buffers: Tensor | None = None
    if expected.buffers:
        buffers = unpack(arrays.pop("buffers"), "buffers", "float64", expected.buffers)
    return LocalResult(expected.client, decode(arrays, expected.wire, expected.size), count, int(steps), loss, buffers)


def packed(array: Any) -> Packed:
    """An array as it came, nothing of it read; Refused where it is no array."""
    parts = [getattr(array, name, None) for name in ("dtype", "shape", "data", "stype")]
    if not all(type(part) is kind for part, kind in zip(parts, (str, tuple, bytes, str), strict=True)):
        raise Refused(f"an array is a {type(array).__name__} of {', '.join(type(part).__name__ for part in parts)}")
    if not all(type(length) is int for length in parts[1]):
        raise Refused(f"an array has shape {str(parts[1])[:60]}")
    return Packed(*parts)


def number(value: Any, name: str, low: float, high: float) -> float:
    """A finite number in [low, high]; Refused where it is a truth value, a list, NaN or beyond."""
    if type(value) not in (int, float):
        raise Refused(f"{name}: is a {type(value).__name__}, must be a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise Refused(f"{name}: {value}: is not finite")
    if not low <= value <= high:
        raise Refused(f"{name}: {value:.12g} is not between {low:.12g} and {high:.12g}")
    return float(value)


def _only(found: Any, what: str, keys: tuple[str, ...]) -> Mapping[str, Any]:
    """A mapping that has these keys and no others."""
    if not isinstance(found, Mapping):
        raise Refused(f"{what}: is a {type(found).__name__}")
    if len(found) != len(keys) or set(found) != set(keys):
        raise Refused(f"{what}: {sorted(map(str, found))[:5]} ({len(found)} of them), must be {sorted(keys)}")
    return found
