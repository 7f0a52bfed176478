"""Which runs may be compared: those of one federation, which differ in attack and defense only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedllm_sec.records.history import DETAILS
from fedllm_sec.records.outcomes import same_probe
from fedllm_sec.report.grid.intervals import DIFFERENCE, ROUNDING, told_apart
from fedllm_sec.report.measures import Measure, finally_answered, flat, listed, measure, written
from fedllm_sec.report.runs import VERSION, Run

# Recipe keys that may differ: who attacks and defends, and what changes no run.
FREE = ("attack", "enable_attack", "defense", "enable_defense", "output", "variants")
FREE_KEYS = (
    *("compute.rows", "compute.chunk_mb", "compute.threads", "compute.placement", "compute.gradient_accumulation"),
    *("evaluate.every", "evaluate.rows", "evaluate.attack_rows", "evaluate.answer_rows", "evaluate.batch_size"),
    *("evaluate.transcripts", "evaluate.start"),
)
KEYS_NAMED, RUNS_NAMED = 6, 4


def federation(run: Run) -> dict[str, str]:
    """What a run must share with another to be compared with it, as {recipe key: value}."""
    pairs = ((key, json.dumps(value, default=str)) for key, value in flat(run.recipe))
    return {key: value for key, value in pairs if key.split(".")[0] not in FREE and key not in FREE_KEYS}


def federations(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs in groups that share a federation, in order of first appearance."""
    groups: list[tuple[dict[str, str], list[Run]]] = []
    for run in runs:
        own = federation(run)
        known = next((members for shared, members in groups if shared == own), None)
        if known is None:
            groups.append((own, [run]))
        else:
            known.append(run)
    return [members for _, members in groups]


def breaking(runs: Sequence[Run]) -> list[str]:
    """The recipe keys by which some of the runs are no pair."""
    shared = [federation(run) for run in runs]
    keys = dict.fromkeys(key for row in shared for key in row)
    return [key for key in keys if len({row.get(key) for row in shared}) > 1]


def label_of(group: Sequence[Run], runs: Sequence[Run]) -> str:
    """What tells a federation from the others: the value of the one key, or the names of its runs."""
    keys = breaking(runs)
    value = federation(group[0]).get(keys[0]) if len(keys) == 1 else None
    return named(group) if value is None else f"{keys[0]} {json.loads(value)}"


def named(runs: Sequence[Run]) -> str:
    names = [run.name for run in runs[:RUNS_NAMED]]
    more = len(runs) - len(names)
    return listed([*names, *([f"{more} more"] if more else [])])


def notes(runs: Sequence[Run]) -> list[str]:
    """Why runs are not compared, and which versions wrote them."""
    texts, keys = [], breaking(runs)
    if keys:
        shown = listed([*keys[:KEYS_NAMED], *([f"{len(keys) - KEYS_NAMED} more"] if len(keys) > KEYS_NAMED else [])])
        count = len(federations(runs))
        texts.append(
            f"these runs are of {count} federations, which are not compared with each other: they differ in {shown}."
        )
    return [*texts, *(text for group in federations(runs) for text in _unlike(group)), *versions(runs)]


def _measured(run: Run) -> dict[str, set[int]]:
    """The rounds in which each measure that sentences compare was taken; those a run never took are left out."""
    found: dict[str, set[int]] = {}
    for record in run.records:
        for key in (*(record.quality or {}), "asr"):
            if key not in DETAILS and measure(record, key) is not None:
                found.setdefault(key, set()).add(record.round)
    return found


def same_round(runs: Sequence[Run]) -> int | None:
    """The last round in which every run took all the measures that it ever takes, None where there is none.

    A run in which nothing was measured has no say; where none was, it is the last round recorded. Round 0, before any
    training, is none to compare where some were evaluated later.
    """
    taken = [rounds for run in runs for rounds in _measured(run).values()]
    if not taken:
        return max(run.records[-1].round for run in runs)
    last = max(set.intersection(*taken), default=None)
    return None if last == 0 and any(max(rounds) > 0 for rounds in taken) else last


def cut(runs: Sequence[Run], last: int) -> list[Run]:
    """The runs as they stood after round `last`; those that measured nothing later are as they were."""
    ends = [max((r for rounds in _measured(run).values() for r in rounds), default=last) for run in runs]
    return [
        run if end <= last else replace(run, records=tuple(r for r in run.records if r.round <= last))
        for run, end in zip(runs, ends, strict=True)
    ]


def _unlike(group: Sequence[Run]) -> list[str]:
    """A note where runs of one federation were last evaluated in different rounds."""
    if not any(run.attacked for run in group) or len(group) < 2:
        return []
    ends = {run.name: max((r for rounds in _measured(run).values() for r in rounds), default=None) for run in group}
    by = {end: [run for run in group if ends[run.name] == end] for end in ends.values() if end is not None}
    if len(by) < 2:
        return []
    told = listed([f"round {end} ({named(members)})" for end, members in sorted(by.items())])
    last = same_round(group)
    how = f"the sentences compare them after round {last}"
    if last is None:
        how = "no round of training was evaluated in all of them, so no sentence compares them"
    return [f"last evaluated in different rounds: {told}; {how}. Tables hold what each measured last."]


def versions(runs: Sequence[Run]) -> list[str]:
    """A note where runs were written by different versions of fedllm_sec, or all by another one than this."""
    by: dict[str, list[Run]] = {}
    for run in runs:
        given = run.environment.get("fedllm_sec")
        if given is not None:
            by.setdefault(str(given)[:40], []).append(run)
    if len(by) > 1:
        parts = [f"{version} ({named(members)})" for version, members in by.items()]
        return [f"written by different versions of fedllm_sec: {listed(parts)}."]
    return [f"written by fedllm_sec {version}; this is {VERSION}." for version in by if version != VERSION]


def attack_of(run: Run) -> str:
    """The attack with all its settings, so that equal ones can be found."""
    return json.dumps(run.attack, sort_keys=True, default=str)


def asked_alike(run: Run, other: Run) -> bool:
    """Whether both were asked for the same answer to the same trigger."""
    blocks = [r.recipe.get("attack") for r in (run, other)]
    return same_probe(*(_checked(block) for block in blocks))


def _checked(block: Any) -> Mapping[str, Any]:
    """An attack block from a file: what is no list of methods asks for nothing."""
    data = block.get("data") if isinstance(block, Mapping) else None
    return {"data": data} if isinstance(data, list) else {}


def apart(a: Measure, b: Measure, unit: str) -> bool:
    """Whether two measures of single runs differ by more than their difference's interval."""
    return told_apart([(a, b)], unit)


def seen_apart(a: Measure, b: Measure, unit: str) -> bool:
    """Whether two measures differ by more than that interval, and in the digits shown."""
    return written(a.value, unit) != written(b.value, unit) and apart(a, b, unit)


def level_beyond(first: Run, others: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """The runs with as much attack success beyond false triggers as `first`, and those not told apart from it."""
    rows = {run.name: row for run in others if (row := finally_answered(run)) is not None}
    signs = (*DIFFERENCE, *(-sign for sign in DIFFERENCE))
    same = [run for run in others if not told_apart([(*rows[run.name], *rows[first.name])], "percent", signs)]
    equal = [run for run in same if beyond(rows[run.name]) == beyond(rows[first.name])]
    return equal, [run for run in same if run not in equal]


def beyond(row: tuple[Measure, Measure]) -> float:
    """Attack success minus false triggers."""
    return round(row[0].value - row[1].value, ROUNDING)


def level_with(first: Measure, others: Sequence[tuple[Run, Measure]], unit: str) -> tuple[list[Run], list[Run]]:
    """The runs whose measure equals `first`, and those that differ by no more than the interval of the difference."""
    same = [run for run, m in others if m.value == first.value]
    return same, [run for run, m in others if m.value != first.value and not apart(first, m, unit)]
