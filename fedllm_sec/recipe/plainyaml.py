"""YAML as people expect it, and nothing that a stranger's file could do harm with."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from fedllm_sec.errors import RecipeError

MOST_CHARACTERS = 100_000  # of a file
MOST_VALUES = 20_000  # of a file, aliases counted each time they are used
DEEPEST = 50  # blocks inside blocks
MOST_DIGITS = 100  # of a whole number
_NAMED = re.compile(r"(alias|anchor|tag|tag handle)\b.*", re.DOTALL)  # PyYAML quotes the name after these words


class _Loader(yaml.SafeLoader):
    """1e-4 is a number, 010 is ten, `no`, 1:30 and 2020-01-02 are words, a key given twice is an error, << merges.

    Blocks that are nested too deeply end the reading where that is seen: PyYAML's time grows with the depth's square.
    """

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        if self.depth > DEEPEST + 2:  # the last two are a key's or an item's own value
            raise RecursionError
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


_NUMBERS_AND_DATES = {f"tag:yaml.org,2002:{name}" for name in ("bool", "int", "float", "timestamp")}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in pairs if tag not in _NUMBERS_AND_DATES]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9][0-9_]*$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    digits = loader.construct_scalar(node).replace("_", "")
    if len(digits) > MOST_DIGITS:
        raise RecipeError(f"line {node.start_mark.line + 1}: a number of {len(digits):,} digits. Text is quoted.")
    return int(digits)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        line = key_node.start_mark.line + 1
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, Hashable):
            raise RecipeError(f"line {line}: a list or a block cannot be a key. Write a word.")
        if key in seen:
            raise RecipeError(f'line {line}: the key "{key}" is given twice. Keep one.')
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)
_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def parse(text: str, place: str) -> Any:
    """YAML text to plain values, with the line in the error."""
    if len(text) > MOST_CHARACTERS:
        raise RecipeError(f"{place}: {len(text):,} characters; a recipe has at most {MOST_CHARACTERS:,}.")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{place}, line {mark.line + 1}" if mark else place
        raise RecipeError(f"{where}: not YAML ({_problem(error)}).") from None
    except RecursionError:
        raise RecipeError(
            f"{place}: blocks are nested too deeply. At most {DEEPEST} may lie inside each other."
        ) from None
    except RecipeError as error:
        raise RecipeError([f"{place}, {problem}" for problem in error.problems]) from None
    _refuse_bombs(value, place)
    return value


def _problem(error: yaml.YAMLError) -> str:
    """What is wrong, without the names of aliases and tags: a key that begins with * or ! may be a secret."""
    text = " ".join(str(getattr(error, "problem", None) or error).split())
    return _NAMED.sub(r"\1", text)


def _refuse_bombs(value: Any, place: str) -> None:
    """A few aliases of aliases can stand for more values than a machine holds."""
    left, open_blocks = MOST_VALUES, [(value, 0)]
    while open_blocks:
        block, depth = open_blocks.pop()
        if not isinstance(block, (dict, list)):
            continue
        if depth > DEEPEST:
            raise RecipeError(f"{place}: blocks are nested too deeply. At most {DEEPEST} may lie inside each other.")
        left -= len(block)
        if left < 0:
            raise RecipeError(f"{place}: stands for more than {MOST_VALUES:,} values. Write fewer, or drop aliases.")
        open_blocks += [(inner, depth + 1) for inner in (block.values() if isinstance(block, dict) else block)]


class _Dumper(yaml.SafeDumper):
    """Quotes every text that this reader or another would take for a number, a date or a truth value."""


_Dumper.yaml_implicit_resolvers = {
    first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, []), *_Loader.yaml_implicit_resolvers.get(first, [])]
    for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_Loader.yaml_implicit_resolvers}
}


def _text(dumper: _Dumper, value: str) -> yaml.ScalarNode:
    """Line ends of other alphabets are read back as blanks unless they are escaped."""
    style = '"' if any(mark in value for mark in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style)


_Dumper.add_representer(str, _text)


def dump(value: Any) -> str:
    """Plain values as YAML that `parse` reads as the same values."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
