"""Who attacks, when, seeing what and doing what, and what the server does about it: in words, from the recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedllm_sec.report.measures import name_of, percent, plain, plural
from fedllm_sec.report.runs import Run, methods
from fedllm_sec.report.terms import as_yaml

KNOWLEDGE = {
    "own": "their own updates and the global model, nothing of the other clients",
    "cohort": "their own updates, the global model, and the updates of all other clients of the round",
    "cohort+defense": "their own updates, the global model, the updates of all other clients of the round, "
    "and the server's defense with its settings",
}


def quoted(text: str) -> str:
    """In straight quotes, so that a leading space can be seen."""
    return f'"{text}"'


def malicious_ids(run: Run) -> list[str]:
    """Malicious clients that took part, in the order of their first round."""
    return list(dict.fromkeys(i for record in run.rounds for i in record.malicious))


def spread(run: Run) -> float | None:
    """The share of honest clients who hold poisoned rows, where nobody is malicious; else None."""
    block = run.attack.get("spread")
    share = block.get("clients", 1.0) if isinstance(block, Mapping) else None
    return float(share) if isinstance(share, (int, float)) else None


def who(run: Run) -> str:
    clients = run.recipe.get("clients")
    total = clients.get("total") if isinstance(clients, Mapping) else None
    if (share := spread(run)) is not None:
        return f"rows of {f'all {total}' if share == 1 else f'{percent(share)} of {total}'} clients"
    chosen = run.attack.get("malicious")
    chosen = chosen if isinstance(chosen, Mapping) else {}
    of = f" of {total}" if total is not None else ""
    if chosen.get("ids") is not None:
        ids = list(chosen["ids"]) if isinstance(chosen["ids"], list) else [chosen["ids"]]
        return f"{len(ids)}{of} clients"
    if chosen.get("count") is not None:
        return f"{chosen['count']}{of} clients"
    if isinstance(chosen.get("share"), (int, float)):
        return f"{percent(chosen['share'])}{of} clients"
    return f"{len(malicious_ids(run))}{of} clients"


def _settings(entry: Mapping[str, Any]) -> str:
    given = [
        f"{key}: {quoted(value) if isinstance(value, str) else as_yaml(value)}"
        for key, value in entry.items()
        if key != "name" and value is not None
    ]
    return f" ({', '.join(given)})" if given else ""


def _when(run: Run, took_part: bool) -> str:
    start, stop, every = run.attack.get("start", 1), run.attack.get("stop"), run.attack.get("every", 1)
    text = f"from round {start} " + (f"to round {stop}" if stop is not None else "to the end")
    text += f", every {every} rounds" if every not in (None, 1) else ""
    chance = run.attack.get("probability", 1.0)
    text += f", each time with probability {plain(float(chance))}" if chance not in (None, 1) else ""
    active = sum(record.attacking for record in run.rounds)
    return f"{text}; active in {active} of {plural(len(run.rounds), 'recorded round')}" if took_part else text


def attack_card(run: Run, *, took_part: bool = True) -> list[tuple[str, list[str]]]:
    """Who attacks, when, seeing what and doing what, as (question, answers); empty without an attack.

    Without `took_part` it says only what the recipe says, which is alike for all seeds.
    """
    if not run.attack:
        return []
    does = [
        f"{title}: {name_of(entry)}{_settings(entry)}"
        for kind, title in (
            ("data", "poison their data"),
            ("local", "change their training"),
            ("update", "change what they send"),
        )
        for entry in methods(run.attack, kind)
    ]
    if spread(run) is not None:
        held = f"no client: {who(run)} were poisoned before they got them; all of them are honest"
        return [("Who attacks", [held]), ("When", ["in every round: the rows are in the data"]), ("What they do", does)]
    seen, drawn = malicious_ids(run), run.attack.get("malicious")
    names = f"took part: {', '.join(seen[:20])}{' …' if len(seen) > 20 else ''}" if seen else "none took part yet"
    how = "named in the recipe" if isinstance(drawn, Mapping) and drawn.get("ids") else "drawn once, by the seed"
    how = "drawn anew for each round, by the seed" if isinstance(drawn, Mapping) and drawn.get("redraw") else how
    how += "; each acts alone" if run.attack.get("collude", True) is False else ""
    knowledge = str(run.attack.get("knowledge", "own"))
    return [
        ("Who attacks", [f"{who(run)}, {how}", *([names] if took_part else [])]),
        ("When", [_when(run, took_part)]),
        ("What they see", [KNOWLEDGE.get(knowledge, knowledge)]),
        ("What they do", does or ["nothing"]),
    ]


def defense_steps(run: Run) -> list[str]:
    """What clients do for their defense and the server with the updates, in order."""
    stages = [
        f"{title}: {name_of(entry)}{_settings(entry)}"
        for kind, title in (
            ("client", "each client that does not attack"),
            ("before", "changes the rows"),
            ("rule", "aggregates"),
            ("after", "changes the model"),
            ("repair", "after the last round the server repairs the model"),
        )
        for entry in methods(run.defense, kind)
    ]
    return stages if run.defended else ["plain mean of the updates"]
