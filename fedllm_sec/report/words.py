"""The findings in plain sentences with numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedllm_sec.report import pairs
from fedllm_sec.report.measures import (
    Kind,
    Measure,
    asked,
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


FEDERATIONS_TOLD = 4
Measured = tuple[Run, Measure]


def finding(runs: Sequence[Run]) -> list[str]:
    """What the attack did and what the defense saved, in one or two sentences for each federation."""
    groups = pairs.federations(runs)
    if len(groups) == 1:
        return _finding(runs)
    told = [f"{pairs.label_of(group, runs)}: {text}" for group in groups[:FEDERATIONS_TOLD] for text in _finding(group)]
    more = len(groups) - FEDERATIONS_TOLD
    return [*told, *([f"{plural(more, 'more federation')}: see the table."] if more > 0 else [])]


def _finding(runs: Sequence[Run]) -> list[str]:
    """The same for runs that differ in attack and defense only."""
    clean = next((r for r in runs if not r.attacked and not r.defended), None)
    bare = next((r for r in runs if r.attacked and not r.defended), None)
    defended = [r for r in runs if r.attacked and r.defended]
    quality = main_quality(runs)
    if bare is None and not defended:
        return _attack_free(runs, quality)
    attacked = [run for run in runs if run.attacked]
    if len({pairs.attack_of(run) for run in attacked}) > 1:
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
    attacks = len({pairs.attack_of(run) for run in attacked})
    defenses = len({str(run.defense) for run in attacked if run.defended})
    return [f"{plural(attacks, 'attack')} against {plural(defenses, 'defense')}.", *_most_successful(attacked)]


def _most_successful(attacked: Sequence[Run]) -> list[str]:
    measured = [(run, m) for run in attacked if (m := final(run, "asr")) is not None]
    if not measured:
        return []
    run, top = max(measured, key=lambda pair: pair[1].value)
    same, near = (
        listed([f"{attack_name(run)} against {_by(run, attacked)}" for run in runs])
        for runs in pairs.level_with(top, measured, "percent")
    )
    text = f"The most successful, {same}, got the attacker's answer on {percent(top.value)}{_of(run, top)}"
    return [f"{text}; {near} cannot be told apart from that." if near else f"{text}."]


def _by(run: Run, among: Sequence[Run]) -> str:
    """The defense by name, and the run where several have that name."""
    name = defense_name(run) if run.defended else "no defense"
    same = [other for other in among if other.defended and defense_name(other) == name]
    return f"{name} ({run.name})" if len(same) > 1 else name


def _some(runs: Sequence[Run], among: Sequence[Run]) -> str:
    return listed([_by(run, among) for run in runs]) if len(runs) < 4 else f"{len(runs)} of them"


def _of(run: Run, m: Measure) -> str:
    rows = f"triggered {asked(run)}s"
    return f" of {m.n} {rows}" if m.n else f" of the {rows}"


def _backdoor(clean: Run | None, bare: Run | None, defended: list[Run], quality: Kind | None) -> list[str]:
    trigger, target = trigger_and_target(bare or defended[0])
    attack = attack_name(bare or defended[0])
    what = f"The trigger {quoted(trigger)}" if trigger is not None else f"The attack ({attack})"
    answer = quoted(target) if target is not None else "the attacker's answer"
    before = final(bare, "asr") if bare is not None else None
    shielded = [(run, m) for run in defended if (m := final(run, "asr")) is not None]
    shielded.sort(key=lambda pair: math.inf if math.isnan(pair[1].value) else pair[1].value)
    if bare is not None and before is not None:
        text = _taught(f"{what} made the undefended model answer {answer}", bare, before, clean)
        text += f"; {_outcomes(before, shielded)}." if shielded else "."
    else:
        run, m = shielded[0]
        model = f"the model defended by {_by(run, defended)}"
        text = _taught(f"{what} made {model} answer {answer}", run, m, clean)
        rest = [f"{percent(m.value)} under {_by(run, defended)}" for run, m in shielded[1:4]]
        text += f" ({'; '.join(rest)})." if rest else "."
    best = shielded[0][0] if shielded else None
    return [text, *_quality_sentence(quality, clean, bare, best)]


def _taught(made: str, run: Run, m: Measure, clean: Run | None) -> str:
    """How often the answer came, and how often it comes anyway: from the attack-free model, or without the trigger."""
    free = final(clean, "asr") if clean is not None and pairs.asked_alike(run, clean) else None
    text = f"{made} to {percent(m.value)}{_of(run, m)}"
    if free is not None and not pairs.apart(m, free, "percent"):
        return f"{text}, which cannot be told from the attack-free model's {percent(free.value)}"
    if free is not None:
        return f"{text} (the attack-free model: {percent(free.value)})"
    return text + _base_rate(run, m)


def _base_rate(run: Run, asr: Measure) -> str:
    """How often the same answer comes without the trigger, where that explains a part of the success."""
    base = final(run, "false_trigger")
    if base is None or base.value < 0.1 or base.value < 0.1 * asr.value:
        return ""
    return f" (and to {percent(base.value)} of clean ones, without the trigger)"


def _outcomes(before: Measure, shielded: Sequence[Measured]) -> str:
    """What each defense made of it, the least success first; many are summed up by the two ends."""
    among = [run for run, _ in shielded]
    if len(shielded) > 3:
        ends = []
        for word, m in (("least", shielded[0][1]), ("most", shielded[-1][1])):
            same, near = (_some(runs, among) for runs in pairs.level_with(m, shielded, "percent"))
            ends.append(f"{word} is left by {same}, which {_moved(before, m)} {percent(m.value)}")
            ends[-1] += f" ({near} cannot be told apart from that)" if near else ""
        return f"of {len(shielded)} defenses the {', the '.join(ends)}"
    by_verb: dict[str, list[str]] = {}
    for run, m in shielded:
        verb = _moved(before, m)
        to = f"{verb if verb not in by_verb else verb.split()[-1]} {percent(m.value)}"
        by_verb.setdefault(verb, []).append(f"{_by(run, among)} {to}")
    return ", ".join(listed(group) for group in by_verb.values())


def _moved(before: Measure, after: Measure) -> str:
    """Brought down or raised only where the two can be told apart, else left."""
    if not pairs.apart(before, after, "percent"):
        return "left it at"
    return "brought it down to" if after.value < before.value else "raised it to"


def _quality_sentence(quality: Kind | None, clean: Run | None, bare: Run | None, best: Run | None) -> list[str]:
    if quality is None:
        return []
    parts = []
    shielded = f"with {defense_name(best)}" if best else ""
    for run, label in ((clean, "attack-free"), (bare, "attacked"), (best, shielded)):
        m = final(run, quality.key) if run is not None else None
        if m is not None:
            parts.append(f"{written(m.value, quality.unit)} {label}")
    return [f"{quality.title[0].upper()}{quality.title[1:]}: {', '.join(parts)}."] if parts else []


def _harm(value: float, quality: Kind) -> float:
    """Larger is worse; what is not a number is worst."""
    return math.inf if math.isnan(value) else value if quality.higher_is_better is False else -value


def _damage(clean: Run | None, bare: Run | None, defended: list[Run], quality: Kind | None) -> list[str]:
    """For attacks that aim at quality itself."""
    first = bare or defended[0]
    text = f"{attack_name(first)} by {_who(first)}"
    if quality is None or all(final(run, quality.key) is None for run in (bare, *defended) if run is not None):
        return [f"{text}: nothing was evaluated."]
    start, hurt = (final(run, quality.key) if run is not None else None for run in (clean, bare))
    if hurt is not None:
        text += _hurt(quality, start, hurt)
    shielded = [(run, m) for run in defended if (m := final(run, quality.key)) is not None]
    shielded.sort(key=lambda pair: _harm(pair[1].value, quality))
    among = [run for run, _ in shielded]
    kept = [f"{written(m.value, quality.unit)} with {_by(run, among)}" for run, m in shielded[:3]]
    if kept:
        text += f"; it is {listed(kept)}" if hurt is not None else f": {quality.title} {listed(kept)}"
        text += f", and in the table with {len(shielded) - 3} more" if len(shielded) > 3 else ""
    return [f"{text[0].upper()}{text[1:]}."]


def _hurt(quality: Kind, start: Measure | None, hurt: Measure) -> str:
    """What became of the undefended model: taken down only where that can be told from the attack-free one."""
    now = written(hurt.value, quality.unit)
    if start is None:
        return f" left the undefended model at {quality.title} {now}"
    then = written(start.value, quality.unit)
    worse = _harm(hurt.value, quality) > _harm(start.value, quality) and pairs.apart(start, hurt, quality.unit)
    if worse:
        return f" took the undefended model's {quality.title} from {then} to {now}"
    return f" left the undefended model's {quality.title} at {now} (attack-free {then})"


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
