"""The findings in plain sentences with numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedllm_sec.records.summary import diverged_since
from fedllm_sec.report import pairs
from fedllm_sec.report.measures import (
    Kind,
    Measure,
    asked,
    attack_name,
    defense_name,
    final,
    finally_answered,
    listed,
    main_quality,
    measure,
    percent,
    plural,
    written,
)
from fedllm_sec.report.runs import Run, methods
from fedllm_sec.report.threat import quoted, who


def trigger_and_target(run: Run) -> tuple[str | None, str | None]:
    """What the data attack inserts and what the model should answer to it, where the recipe says so."""
    for entry in methods(run.attack, "data"):
        trigger, target = entry.get("trigger"), entry.get("target")
        if trigger is not None or target is not None:
            return (None if trigger is None else str(trigger)), (None if target is None else str(target))
    return None, None


FEDERATIONS_TOLD = 4
STARTS_TOLD = 3
DIVERGED_TOLD = 4
Measured = tuple[Run, Measure]


def finding(runs: Sequence[Run]) -> list[str]:
    """What the attack did and what the defense saved, in one or two sentences for each federation, and from where.

    Models that are lost come first: their other numbers mean little.
    """
    return [*diverged(runs), *_findings(runs), *starts(runs)]


def diverged(runs: Sequence[Run]) -> list[str]:
    """Which runs have a held-out loss that is not finite any more, and since when."""
    lost = [
        (run, since) for run in runs if (since := diverged_since([r for r in run.records if r.quality])) is not None
    ]
    where = [f"{f'in {run.name} ' if len(runs) > 1 else ''}since round {since}" for run, since in lost]
    more = len(where) - DIVERGED_TOLD
    told = listed([*where[:DIVERGED_TOLD], *([f"in {plural(more, 'more run')}"] if more > 0 else [])])
    return [f"Diverged: held-out loss not finite {told}."] if lost else []


def starts(runs: Sequence[Run]) -> list[str]:
    """What the runs started from, where that is not simply the beginning."""
    places = list(dict.fromkeys(run.start for run in runs))
    if places in ([], [None]):
        return []
    if len(places) == 1:
        return [f"{'The run starts' if len(runs) == 1 else 'All runs start'} {places[0]}."]
    if len(places) > STARTS_TOLD:
        return [f"The runs start from {len(places)} different models."]
    of = {place: listed([run.name for run in runs if run.start == place]) for place in places}
    told = [f"{names} {place or 'from the beginning'}" for place, names in of.items()]
    return [f"Starts: {'; '.join(told)}."]


def _findings(runs: Sequence[Run]) -> list[str]:
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
    shared = pairs.same_round(runs)
    if shared is None:
        return []  # pairs.notes says why
    cut = pairs.cut(runs, shared)
    if cut != list(runs):
        return [f"After round {shared}, the last that all were evaluated in: {text}" for text in _finding(cut)]
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
        rounds = plural(m.round if m else run.records[-1].round, "round")
        got = f"{quality.title} {written(m.value, quality.unit)}" if m and quality else "no quality measured"
        parts.append(f"{got} after {rounds}" + (f" ({run.name})" if len(runs) > 1 else ""))
    return [f"No attack was made: {'; '.join(parts)}."]


def _several_attacks(attacked: Sequence[Run]) -> list[str]:
    attacks = len({pairs.attack_of(run) for run in attacked})
    defenses = len({str(run.defense) for run in attacked if run.defended})
    return [f"{plural(attacks, 'attack')} against {plural(defenses, 'defense')}.", *_most_successful(attacked)]


def _most_successful(attacked: Sequence[Run]) -> list[str]:
    """By attack success beyond false triggers where all have both, else by attack success."""
    measured = [(run, m) for run in attacked if (m := final(run, "asr")) is not None]
    both = {run.name: found for run, _ in measured if (found := finally_answered(run)) is not None}
    if not measured:
        return []
    if len(both) == len(measured):
        run = max((run for run, _ in measured), key=lambda run: pairs.beyond(both[run.name]))
        levels = pairs.level_beyond(run, [other for other, _ in measured])
        success, anyway = both[run.name]
        beside = f" and on {percent(anyway.value)} of clean ones, without the trigger"
        none = anyway.value >= success.value or not pairs.apart(success, anyway, "percent")
    else:
        run, success = max(measured, key=lambda pair: pair[1].value)
        levels = pairs.level_with(success, measured, "percent")
        beside, none = "", False
    same, near = (listed([_against(other, attacked) for other in runs]) for runs in levels)
    text = f"most successful, {same}, got the attacker's answer on {percent(success.value)}{_of(run, success)}{beside}"
    text = f"No backdoor seen beyond false triggers: the {text}" if none else f"The {text}"
    return [f"{text}; {near} cannot be told apart from that." if near else f"{text}."]


def _against(run: Run, among: Sequence[Run]) -> str:
    """The attack and the defense by name, and the run where several are called the same."""
    names = [f"{attack_name(r)} against {defense_name(r) if r.defended else 'no defense'}" for r in (run, *among)]
    return f"{names[0]} ({run.name})" if names[1:].count(names[0]) > 1 else names[0]


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
        *others, (run, m) = shielded  # the most that the attack reached
        model = f"the model defended by {_by(run, defended)}"
        text = _taught(f"{what} made {model} answer {answer}", run, m, clean)
        rest = [f"{percent(m.value)}{_anyway(run, m)} under {_by(run, defended)}" for run, m in others[:3]]
        text += f" ({'; '.join(rest)})." if rest else "."
    best = shielded[0][0] if shielded else None
    return [text, *_quality_sentence(quality, clean, bare, best, defended)]


def _taught(made: str, run: Run, m: Measure, clean: Run | None) -> str:
    """How often the answer came, and how often it comes anyway: from the attack-free model, or without the trigger.

    Where either cannot be told from the success by the interval of the difference, or is more, there is no backdoor to
    be seen, and that comes first.
    """
    free = final(clean, "asr") if clean is not None and pairs.asked_alike(run, clean) else None
    base = _without_trigger(run, m)
    text = f"{made} to {percent(m.value)}{_of(run, m)}"
    none = f"No backdoor seen, {{}}: {text[0].lower()}{text[1:]}"
    if free is not None and not pairs.apart(m, free, "percent"):
        none = none.format("the attack-free model does the same")
        return f"{none}, which cannot be told from the attack-free model's {percent(free.value)}"
    if free is not None and free.value > m.value:
        none = none.format("the attack-free model does it more often")
        return f"{none}, no more than the attack-free model's {percent(free.value)}"
    beside = [] if free is None else [f"the attack-free model: {percent(free.value)}"]
    clean_ones = f"to {percent(base.value)} of clean ones, without the trigger" if base is not None else ""
    if base is not None and (base.value > m.value or not pairs.apart(m, base, "percent")):
        how = "more often" if pairs.seen_apart(m, base, "percent") else "as often"
        none = none.format(f"clean {asked(run)}s get the answer {how}")
        return f"{none} and {clean_ones}{f' ({beside[0]})' if beside else ''}"
    if base is not None and _explains(base, m):
        beside.insert(0, f"and {clean_ones}")
    return f"{text} ({'; '.join(beside)})" if beside else text


def _without_trigger(run: Run, success: Measure) -> Measure | None:
    """False triggers in the round in which this attack success was measured."""
    record = next((record for record in run.records if record.round == success.round), None)
    return None if record is None else measure(record, "false_trigger")


def _explains(base: Measure, success: Measure) -> bool:
    """Whether false triggers are a part of the success that people should know."""
    return base.value >= 0.1 and base.value >= 0.1 * success.value


def _anyway(run: Run, success: Measure) -> str:
    base = _without_trigger(run, success)
    return f" (false triggers {percent(base.value)})" if base is not None and _explains(base, success) else ""


def _outcomes(before: Measure, shielded: Sequence[Measured]) -> str:
    """What each defense made of it, the least success first; many are summed up by the two ends."""
    among = [run for run, _ in shielded]
    if len(shielded) > 3:
        ends = []
        for word, (run, m) in (("least", shielded[0]), ("most", shielded[-1])):
            same, near = (_some(runs, among) for runs in pairs.level_with(m, shielded, "percent"))
            ends.append(f"{word} is left by {same}, which {_moved(before, m)} {percent(m.value)}")
            ends[-1] += _anyway(run, m) if len(pairs.level_with(m, shielded, "percent")[0]) == 1 else ""
            ends[-1] += f" ({near} cannot be told apart from that)" if near else ""
        return f"of {len(shielded)} defenses the {', the '.join(ends)}"
    by_verb: dict[str, list[str]] = {}
    for run, m in shielded:
        verb = _moved(before, m)
        to = f"{verb if verb not in by_verb else verb.split()[-1]} {percent(m.value)}{_anyway(run, m)}"
        by_verb.setdefault(verb, []).append(f"{_by(run, among)} {to}")
    return ", ".join(listed(group) for group in by_verb.values())


def _moved(before: Measure, after: Measure) -> str:
    """Brought down or raised only where the two can be told apart, else left."""
    if not pairs.seen_apart(before, after, "percent"):
        return "left it at"
    return "brought it down to" if after.value < before.value else "raised it to"


def _quality_sentence(
    quality: Kind | None, clean: Run | None, bare: Run | None, best: Run | None, among: Sequence[Run]
) -> list[str]:
    if quality is None:
        return []
    parts = []
    shielded = f"with {_by(best, among)}" if best else ""
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
    text = f"{attack_name(first)} by {who(first)}"
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
    worse = _harm(hurt.value, quality) > _harm(start.value, quality) and pairs.seen_apart(start, hurt, quality.unit)
    if worse:
        return f" took the undefended model's {quality.title} from {then} to {now}"
    return f" left the undefended model's {quality.title} at {now} (attack-free {then})"
