"""What the `key.sub=value` words of a command may be to each other."""

from __future__ import annotations

from collections.abc import Sequence

from fedllm_sec.errors import RecipeError


def refuse_undone(assignments: Sequence[str]) -> None:
    """An error where an override would be undone by one after it: the same key, or the block that holds it."""
    for place, later in enumerate(assignments):
        key = later.partition("=")[0]
        for earlier in assignments[:place]:
            if earlier == later or f"{earlier.partition('=')[0]}.".startswith(f"{key}."):
                raise RecipeError(f'override "{later}": would undo "{earlier}", given before it. Give one of them.')
