"""What an observer keeps and what its attacks will take, in words and before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedllm_sec.attacks import PRIVACY_MENU
from fedllm_sec.attacks.privacy.membership import Membership
from fedllm_sec.build.cost import FLOAT, Cost, size
from fedllm_sec.build.members import OTHERS
from fedllm_sec.build.names import make
from fedllm_sec.recipe.sections import Recipe

SPEEDS = 1.0e10, 5.0e10  # operations of a core a second, least and most


def observer_in_words(recipe: Recipe, counted: Cost) -> list[str]:
    """Who looks at what, and what the attacks will take; nothing without an observer."""
    block = recipe.attack if recipe.enable_attack else None
    if block is None or block.observe is None:
        return []
    seen, count = block.observe, len(block.observe.rounds) * len(block.observe.clients)
    rounds = f"{len(seen.rounds)} round" + ("s" if len(seen.rounds) != 1 else "")
    kept = f"keeps the {seen.what} of {len(seen.clients)} clients in {rounds}: {count} rows"
    if counted.weights is None:
        return [kept]
    row = FLOAT * counted.weights.trained
    held = 1 if seen.what == "delta" else len(seen.clients)
    words = [
        f"{kept} of {counted.weights.trained:,} float32, each with what it started from: {size(2 * count * row)} on "
        f"disk; in memory {held} at a time ({size(held * row)}), and nothing of the frozen weights"
    ]
    for number, method in enumerate(block.privacy):
        words.append(f"{method['name']}: {_taken(recipe, counted, method, f'attack.privacy.{number}', count)}")
    return words


def _taken(recipe: Recipe, counted: Cost, method: Mapping[str, Any], place: str, count: int) -> str:
    """What one attack takes for all observations."""
    made = make(method, PRIVACY_MENU, place)
    bound = getattr(made, "keywords", {})
    most = bound.get("iterations", 0) * bound.get("restarts", 1) * count
    if most and method["name"] == "exclusive_neurons":
        low, high = (f"{most * seconds:,.0f} s" for seconds in (0.001, 0.03))
        return f"at most {most:,} gradients of the layers before the first linear one: {low} to {high}"
    if most:
        each = "each 4 ms (sigmoid_cnn, one image) to 50 ms (cnn, 8 images) on a core"
        low, high = (f"{most * seconds:,.0f} s" for seconds in (0.004, 0.05))
        return f"at most {most:,} gradients of gradients, {each}: {low} to {high}"
    if recipe.task != "causal_lm" or counted.weights is None:
        return "no search; seconds"
    if method["name"] not in ("membership", "canary"):
        return "no search in the model's losses: its first layers alone; seconds where spans are small"
    rows = count * (_of_membership(recipe, made) if isinstance(made, Membership) else _of_canary(recipe))
    tokens = rows * recipe.data.max_length
    work = 2.0 * tokens * (counted.weights.trained + counted.weights.frozen)
    least, longest = (f"{work / speed:,.0f} s" for speed in reversed(SPEEDS))
    return (
        f"at most {rows:,} rows of {recipe.data.max_length} tokens through the model (a row trained on counts as "
        f"three), at 10 to 50 billion operations a second: {least} to {longest} on a core"
    )


def _of_membership(recipe: Recipe, made: Membership) -> int:
    """Rows through the model for one observation."""
    assert recipe.attack is not None
    assert recipe.attack.observe is not None
    clients = recipe.clients
    trained = (clients.local_steps or 1) * (clients.batch_size or 1)
    asked = trained + (recipe.attack.observe.others or OTHERS)
    if made.score == "reference":
        return (made.shadows + 1) * asked + 3 * made.shadows * trained
    return 2 * asked if made.score == "drop" else asked


def _of_canary(recipe: Recipe) -> int:
    """Beginnings of all guesses and the greedy answer, of each secret."""
    planted = recipe.data.canaries
    if planted is None:
        return 0
    return len(planted.repetitions) * (sum(10**k for k in range(planted.digits)) + planted.digits)
