"""Our rules in another engine's round: made from the menu, and what they decided in a folder that our report reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fedllm_sec.api.states import Merged
from fedllm_sec.defenses import MENU
from fedllm_sec.errors import DefenseError
from fedllm_sec.recipe.resolve import resolve
from fedllm_sec.records.files import append, write_atomic
from fedllm_sec.records.history import RoundRecord, record_line


def made(item: Any, settings: Mapping[str, Any], kind: str, place: str) -> Any:
    """A rule or stage by its menu name, or a callable as it is."""
    if isinstance(item, tuple) and len(item) == 2:
        item, settings = item[0], dict(item[1])
    elif isinstance(item, Mapping):
        settings = {key: value for key, value in item.items() if key != "name"}
        item = item.get("name")
    if isinstance(item, str):
        return resolve(item, settings, {k: entry for k, entry in MENU.items() if entry.kind == kind}, place)
    if not callable(item) or settings:
        raise DefenseError(f"{place}: {item!r}: must be a menu name with its settings, or a callable without any.")
    return item


@dataclass(frozen=True)
class Decisions:
    """A line a round in FOLDER/history.jsonl, for `fedllm-sec report FOLDER`; nothing where there is no folder."""

    folder: Path | None

    @classmethod
    def begun(cls, folder: str | Path | None, rule: str | Callable[..., Any], settings: Mapping[str, Any]) -> Decisions:
        """An empty record of a rule's decisions."""
        if folder is None:
            return cls(None)
        at = Path(folder)
        at.mkdir(parents=True, exist_ok=True)
        name = rule if isinstance(rule, str) else getattr(rule, "__name__", type(rule).__name__)
        told = {"enable_defense": True, "defense": {"rule": {"name": name, **settings}}}
        write_atomic(at / "recipe.yaml", json.dumps(told, default=str).encode())
        write_atomic(at / "history.jsonl", b"")
        return cls(at)

    def add(
        self, number: int, ids: Sequence[str], merged: Merged | None, refused: Mapping[str, str], examples: float,
        length: float, skipped: str | None,
    ) -> None:  # fmt: skip
        """Round `number`: whose states were usable, what the rule made of them, who was refused and why."""
        if self.folder is None:
            return
        decision, beside = (merged.decision, merged.buffers_refused) if merged is not None else (None, {})

        def by_id(values: Tensor | None) -> dict[str, float] | None:
            return None if values is None else dict(zip(ids, map(float, values.tolist()), strict=True))

        kept = None if decision is None or decision.kept is None else by_id(decision.kept)
        record = RoundRecord(
            round=number,
            cohort=[*ids, *(id for id in refused if id not in ids)],
            malicious=[],
            attacking=False,
            losses={},
            norms={},
            quarantined={id: why for id, why in refused.items() if id not in beside},
            buffers_refused=beside,
            weights=by_id(decision.weights) if decision is not None else None,
            kept=[id for id, value in kept.items() if value] if kept is not None else None,
            scores=by_id(decision.scores) if decision is not None else None,
            notes={**(dict(decision.notes) if decision is not None else {}), "examples": examples},
            update_norm=length,
            skipped=skipped,
            lora_gap=None,
            detection=None,
            quality=None,
            attack=None,
        )
        append(self.folder / "history.jsonl", record_line(record).encode())
