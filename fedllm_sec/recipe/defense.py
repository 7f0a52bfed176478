"""What a recipe may say of the server's defense and of what clients do for their own."""

from __future__ import annotations

from typing import Any, Literal

from fedllm_sec.recipe.section import Count, Section


class DefenseBlock(Section):
    """What the server does with the rows, in order; acts where `enable_defense` is true."""

    client: list[dict[str, Any]] = []  # what clients that do not attack run in their own training
    before: list[dict[str, Any]] = []  # what changes or mixes rows before the rule
    rule: dict[str, Any] = {"name": "mean"}  # what makes one update of the rows
    after: list[dict[str, Any]] = []  # what changes that update
    space: Literal["factors", "product", "aligned"] = "factors"  # adapters as sent, by B A, or in one gauge
    scope: Literal["model", "layer"] = "model"  # one decision for a row, or one for each adapted layer
    repair: dict[str, Any] | None = None  # what the server does to the model after the last round, once
    root_rows: Count | None = None  # clean rows the server holds, taken out of the training set
