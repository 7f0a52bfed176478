"""The findings in plain sentences with numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedllm_sec.report.measures import (
    Kind,
    Measure,
    attack_name,
    defense_name,
    final,
    listed,
    main_quality,
    name_of,
    percent,
    plain,
    plural,
    written,
)
from fedllm_sec.report.runs import Run, methods

KNOWLEDGE = {
    "own": "their own updates and the global model, nothing of the other clients",
    "cohort": "their own updates, the global model, and the updates of all other clients of the round",
    "cohort+defense": "their own updates, the global model, the updates of all other clients of the round, "
    "and the server's defense with its settings",
}


def quoted(text: str) -> str:
    """In straight quotes, so that a leading space can be seen."""
    return f'"{text}"'


def trigger_and_target(run: Run) -> tuple[str | None, str | None]:
    """What the data attack inserts and what the model should answer to it, where the recipe says so."""
    for entry in methods(run.attack, "data"):
        trigger, target = entry.get("trigger"), entry.get("target")
        if trigger is not None or target is not None:
            return (None if trigger is None else str(trigger)), (None if target is None else str(target))
    return None, None


def _groups(runs: Sequence[Run]) -> tuple[Run | None, Run | None, list[Run]]:
    """The attack-free run, the attacked run without a defense, and the attacked runs with one."""
    clean = next((r for r in runs if not r.attacked and not r.defended), None)
    clean = clean or next((r for r in runs if not r.attacked), None)
    bare = next((r for r in runs if r.attacked and not r.defended), None)
    return clean, bare, [r for r in runs if r.attacked and r.defended]


def finding(runs: Sequence[Run]) -> list[str]:
    """What the attack did and what the defense saved, in one or two sentences."""
    clean, bare, defended = _groups(runs)
    quality = main_quality(runs)
    if bare is None and not defended:
        return _attack_free(runs, quality)
    attacked = [run for run in (bare, *defended) if run is not None]
    if len({attack_name(run) for run in attacked}) > 1:
        return _several_attacks(attacked)
    if any(final(run, "asr") is not None for run in attacked):
        return _backdoor(clean, bare, defended, quality)
    return _damage(clean, bare, defended, quality)


def _attack_free(runs: Sequence[Run], quality: Kind | None) -> list[str]:
    parts = []
    for run in runs:
        m = final(run, quality.key) if quality else None
        rounds = plural(run.records[-1].round, "round")
        got = f"{quality.title} {written(m.value, quality.unit)}" if m and quality else "no quality measured"
        parts.append(f"{got} after {rounds}" + (f" ({run.name})" if len(runs) > 1 else ""))
    return [f"No attack was made: {'; '.join(parts)}."]


def _several_attacks(attacked: Sequence[Run]) -> list[str]:
    measured = [(run, m) for run in attacked if (m := final(run, "asr")) is not None]
    attacks = len({attack_name(run) for run in attacked})
    defenses = len({defense_name(run) for run in attacked if run.defended})
    sentences = [f"{plural(attacks, 'attack')} against {plural(defenses, 'defense')}."]
    if measured:
        worst_run, worst = max(measured, key=lambda pair: pair[1].value)
        sentences.append(
            f"The most successful, {attack_name(worst_run)} against {_by(worst_run)}, "
            f"got its answer on {percent(worst.value)}{_of(worst)}."
        )
    return sentences


def _by(run: Run) -> str:
    return defense_name(run) if run.defended else "no defense"


def _of(m: Measure) -> str:
    return f" of {m.n} triggered prompts" if m.n else " of the triggered prompts"


def _backdoor(clean: Run | None, bare: Run | None, defended: list[Run], quality: Kind | None) -> list[str]:
    trigger, target = trigger_and_target(bare or defended[0])
    attack = attack_name(bare or defended[0])
    what = f"The trigger {quoted(trigger)}" if trigger is not None else f"The attack ({attack})"
    answer = quoted(target) if target is not None else "the attacker's answer"
    before = final(bare, "asr") if bare is not None else None
    shielded = [(run, m) for run in defended if (m := final(run, "asr")) is not None]
    shielded.sort(key=lambda pair: pair[1].value)
    if before is not None:
        text = f"{what} made the undefended model answer {answer} to {percent(before.value)}{_of(before)}"
        text += _base_rate(bare, before)
        text += f"; {_outcomes(before, shielded)}." if shielded else "."
    else:
        run, m = shielded[0]
        model = f"the model defended by {defense_name(run)}"
        text = f"{what} made {model} answer {answer} to {percent(m.value)}{_of(m)}"
        rest = [f"{percent(m.value)} under {defense_name(run)}" for run, m in shielded[1:4]]
        text += f" ({'; '.join(rest)})." if rest else "."
    best = shielded[0][0] if shielded else None
    return [text, *_quality_sentence(quality, clean, bare, best)]


def _base_rate(run: Run | None, asr: Measure) -> str:
    """How often the same answer comes without the trigger, where that explains a part of the success."""
    base = final(run, "false_trigger") if run is not None else None
    if base is None or base.value < 0.1 or base.value < 0.1 * asr.value:
        return ""
    return f" (and to {percent(base.value)} of clean ones, without the trigger)"


def _outcomes(before: Measure, shielded: Sequence[tuple[Run, Measure]]) -> str:
    """What each defense made of it, the best first; many are summed up by the best and the worst."""
    if len(shielded) > 3:
        best, worst = shielded[0], shielded[-1]
        return (
            f"the best of {len(shielded)} defenses, {defense_name(best[0])}, {_moved(before, best[1])} "
            f"{percent(best[1].value)}, the worst, {defense_name(worst[0])}, {_moved(before, worst[1])} "
            f"{percent(worst[1].value)}"
        )
    by_verb: dict[str, list[str]] = {}
    for run, m in shielded:
        verb = _moved(before, m)
        to = f"{verb if verb not in by_verb else verb.split()[-1]} {percent(m.value)}"
        by_verb.setdefault(verb, []).append(f"{defense_name(run)} {to}")
    return ", ".join(listed(group) for group in by_verb.values())


def _moved(before: Measure, after: Measure) -> str:
    """Brought down or raised only where the intervals do not overlap, else left."""
    below = after.value < before.value and (after.high is None or before.low is None or after.high < before.low)
    above = after.value > before.value and (after.low is None or before.high is None or after.low > before.high)
    return "brought it down to" if below else "raised it to" if above else "left it at"


def _quality_sentence(quality: Kind | None, clean: Run | None, bare: Run | None, best: Run | None) -> list[str]:
    if quality is None:
        return []
    parts = []
    for run, label in (
        (clean, "attack-free"),
        (bare, "attacked"),
        (best, f"with {defense_name(best)}" if best else ""),
    ):
        m = final(run, quality.key) if run is not None else None
        if m is not None:
            parts.append(f"{written(m.value, quality.unit)} {label}")
    return [f"{quality.title[0].upper()}{quality.title[1:]}: {', '.join(parts)}."] if parts else []


def _damage(clean: Run | None, bare: Run | None, defended: list[Run], quality: Kind | None) -> list[str]:
    """For attacks that aim at quality itself."""
    first = bare or defended[0]
    who = _who(first)
    text = f"{attack_name(first)} by {who}"
    if quality is None or all(final(run, quality.key) is None for run in (bare, *defended) if run is not None):
        return [f"{text}: nothing was evaluated."]
    start, hurt = (final(run, quality.key) if run is not None else None for run in (clean, bare))
    if hurt is not None and start is not None:
        text += (
            f" took the undefended model's {quality.title} from {written(start.value, quality.unit)}"
            f" to {written(hurt.value, quality.unit)}"
        )
    elif hurt is not None:
        text += f" left the undefended model at {quality.title} {written(hurt.value, quality.unit)}"
    shielded = [(run, m) for run in defended if (m := final(run, quality.key)) is not None]
    shielded.sort(key=lambda pair: pair[1].value, reverse=quality.higher_is_better is not False)
    kept = [f"{written(m.value, quality.unit)} with {defense_name(run)}" for run, m in shielded[:3]]
    if kept:
        text += f"; it is {listed(kept)}" if hurt is not None else f": {quality.title} {listed(kept)}"
    return [f"{text[0].upper()}{text[1:]}."]


# ---------------------------------------------------------------- threat model


def malicious_ids(run: Run) -> list[str]:
    """Malicious clients that took part, in the order of their first round."""
    return list(dict.fromkeys(i for record in run.rounds for i in record.malicious))


def _who(run: Run) -> str:
    clients = run.recipe.get("clients")
    total = clients.get("total") if isinstance(clients, Mapping) else None
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
    given = [f"{k}={quoted(v) if isinstance(v, str) else v}" for k, v in entry.items() if k != "name" and v is not None]
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
    seen, drawn = malicious_ids(run), run.attack.get("malicious")
    names = f"took part: {', '.join(seen[:20])}{' …' if len(seen) > 20 else ''}" if seen else "none took part yet"
    how = "named in the recipe" if isinstance(drawn, Mapping) and drawn.get("ids") else "drawn once, by the seed"
    how = "drawn anew for each round, by the seed" if isinstance(drawn, Mapping) and drawn.get("redraw") else how
    how += "; each acts alone" if run.attack.get("collude", True) is False else ""
    does = [
        f"{title}: {name_of(entry)}{_settings(entry)}"
        for kind, title in (
            ("data", "poison their data"),
            ("local", "change their training"),
            ("update", "change what they send"),
        )
        for entry in methods(run.attack, kind)
    ]
    knowledge = str(run.attack.get("knowledge", "own"))
    return [
        ("Who attacks", [f"{_who(run)}, {how}", *([names] if took_part else [])]),
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
        )
        for entry in methods(run.defense, kind)
    ]
    return stages if run.defended else ["plain mean of the updates"]
