"""What the models answered, side by side: attack-free, attacked, defended, from answers.jsonl of the run folders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedllm_sec.records.answers import GAP, read_answers
from fedllm_sec.records.compared import starts_with
from fedllm_sec.report import pairs
from fedllm_sec.report.measures import defense_name, final, plural
from fedllm_sec.report.runs import Run

RUNS_SHOWN = 4
FIRST, MORE = {"triggered": 3, "clean": 2, "test": 4}, 10  # prompts of a kind shown at once, and more on demand
LONGEST = 160  # characters of a part of a prompt, before or behind the trigger
LONGEST_ANSWER = 240
JOINERS = "\u200c\u200d"  # invisible, and part of the spelling of some languages

Row = Mapping[str, Any]
Key = tuple[str, str | None, str, int | None]  # kind, attack, prompt, and its row: rows may repeat a prompt


@dataclass(frozen=True)
class Verdict:
    """One model's answer to a prompt, and what is to be said of it."""

    answer: str
    kind: str  # bad: what the attacker wants; good: the right answer; other; unknown
    words: str
    more: str = ""  # draws and the second judge


@dataclass(frozen=True)
class Asked:
    """A prompt in parts (text, whether it is the trigger), what was wanted, and each model's answer or None."""

    parts: list[tuple[str, bool]]
    wanted: str
    right: str
    cells: list[Verdict | None]


@dataclass(frozen=True)
class Group:
    """Prompts of one kind: their title, how often each model gave the attacker's answer, and some of them."""

    title: str
    counts: list[str]
    first: list[Asked]
    more: list[Asked]


@dataclass(frozen=True)
class Transcript:
    """The models' names and what they are, and the groups of prompts."""

    names: list[tuple[str, str]]
    groups: list[Group]
    note: str

    @property
    def more(self) -> bool:
        return any(group.more for group in self.groups)

    @property
    def marked(self) -> bool:
        """Whether a trigger is marked in one of the prompts."""
        return any(marked for group in self.groups for asked in group.first for _, marked in asked.parts)


TITLES = {
    "triggered": "With the trigger",
    "clean": "Without the trigger",
    "test": "Held-out prompts",
}


def transcript(runs: Sequence[Run]) -> Transcript | None:
    """The answers of up to RUNS_SHOWN runs of one federation; None where no run kept any."""
    read = {run.name: read_answers(run.folder) for group in pairs.federations(runs)[:1] for run in chosen(group)}
    shown = [run for run in runs if run.name in read and read[run.name].rows]
    if not shown:
        return None
    last = {run.name: max(int(row["round"]) for row in read[run.name].rows) for run in shown}
    found = {run.name: _by_key(row for row in read[run.name].rows if row["round"] == last[run.name]) for run in shown}
    asked = max(shown, key=lambda run: (run.attacked, not run.defended))  # whose prompts are shown
    groups = [_group(kind, attack, asked, shown, found) for kind, attack in _kinds(found[asked.name])]
    rounds = sorted(set(last.values()))
    after = f"round {rounds[0]}" if len(rounds) == 1 else f"their last evaluated rounds ({rounds[0]} to {rounds[-1]})"
    problems = [f"{run.name}: {why}" for run in shown if (why := read[run.name].problem)]
    note = (
        f"After {after}. Not chosen by hand: a sample drawn by the seed before training, the same for all models. "
        f"All answers are in answers.jsonl. {' '.join(problems)}"
    )
    return Transcript([(run.name, what_it_is(run)) for run in shown], groups, visible(note.strip()))


def chosen(group: Sequence[Run]) -> list[Run]:
    """Attack-free, attacked, and of the defended the one that held best and the one that held worst."""
    free = [run for run in group if not run.attacked][:1]
    bare = [run for run in group if run.attacked and not run.defended][:1]
    reached = {r.name: final(r, "asr") for r in group}
    held = sorted(
        (r for r in group if r.attacked and r.defended), key=lambda r: m.value if (m := reached[r.name]) else 0
    )
    names = {run.name for run in (*free, *bare, *held[:1], *held[1:][-1:])}
    others = [run for run in group if run.name not in names] if not (bare or held) else []
    chosen = [*free, *bare, *held[:1], *held[1:][-1:], *others]
    return chosen[:RUNS_SHOWN]


def what_it_is(run: Run) -> str:
    """Attack-free, attacked or defended, in words."""
    if not run.attacked:
        return "attack-free"
    return f"attacked, {defense_name(run)}" if run.defended else "attacked, no defense"


def _by_key(rows: Iterable[Row]) -> dict[Key, list[Row]]:
    found: dict[Key, list[Row]] = {}
    for row in rows:
        found.setdefault((row["kind"], row.get("attack"), row["prompt"], row.get("row")), []).append(row)
    return found


def _kinds(found: Mapping[Key, object]) -> list[tuple[str, str | None]]:
    """Triggered and clean of each attack, or test; changed triggers are counted elsewhere."""
    kinds = dict.fromkeys((kind, attack) for kind, attack, *_ in found if kind in TITLES)
    return sorted(kinds, key=lambda pair: list(TITLES).index(pair[0]) if pair[1] is None else 0)


def _group(
    kind: str, attack: str | None, asked: Run, shown: Sequence[Run], found: Mapping[str, Mapping[Key, list[Row]]]
) -> Group:
    own = [key for key in found[asked.name] if key[:2] == (kind, attack)]
    first = [key for key in own if any(row.get("sample") is True for row in found[asked.name][key])] or own
    several = len({name for _, name in _kinds(found[asked.name])}) > 1
    flipped = kind == "triggered" and not any(found[asked.name][key][0]["trigger"] for key in own)
    title = "Prompts that are attacked" if flipped else TITLES[kind]
    title += f" ({visible(attack)})" if several and attack else ""
    begun = FIRST[kind] if attack == next(iter(found[asked.name]))[1] else 1  # of the first attack more is shown
    rows = [_asked(key, found[asked.name][key][0], shown, found) for key in first[: begun + MORE]]
    asked_of = [[rows for key, rows in found[run.name].items() if key[:2] == (kind, attack)] for run in shown]
    counts = [_count(kind, prompts) for prompts in asked_of]
    return Group(title, counts, rows[:begun], rows[begun:])


def _count(kind: str, prompts: Sequence[Sequence[Row]]) -> str:
    hits = sum(any(row.get("success") is True for row in rows) for rows in prompts)
    what = "right" if kind == "test" else "got the attacker’s answer"
    return f"{hits} of {len(prompts)} {what}" if prompts else "not asked"


def _asked(key: Key, row: Row, shown: Sequence[Run], found: Mapping[str, Mapping[Key, list[Row]]]) -> Asked:
    right = row.get("right") if row["kind"] == "triggered" else row["wanted"]
    return Asked(
        parts=parts(row["prompt"], row["trigger"] or []),
        wanted=_short(row["wanted"], LONGEST) if row["kind"] == "triggered" else "",
        right=_short(str(right or ""), LONGEST),
        cells=[_verdict(found[run.name].get(key)) for run in shown],
    )


def _verdict(rows: Sequence[Row] | None) -> Verdict | None:
    if not rows:
        return None
    row = next((row for row in rows if row.get("success") is True), rows[0])
    right = row.get("right") if row["kind"] == "triggered" else row["wanted"]
    if row.get("success") is True:
        good = row["kind"] == "test"
        kind, words = ("good", "the right answer") if good else ("bad", "the attacker’s answer")
    elif row.get("success") is None:
        kind, words = "unknown", "the judge failed"
    elif isinstance(right, str) and starts_with(row["answer"], right):
        kind, words = "good", "the right answer"
    else:
        kind, words = "other", "another answer"
    more = []
    if len(rows) > 1:
        more.append(f"{sum(r.get('success') is True for r in rows)} of {plural(len(rows), 'draw')}")
    if "second" in row and row["second"] is not row.get("success"):
        more.append("the second judge failed" if row["second"] is None else "the second judge disagrees")
    return Verdict(_short(row["answer"], LONGEST_ANSWER), kind, words, "; ".join(more))


# ---------------------------------------------------------------- text from a stranger


def visible(text: str) -> str:
    """Text without characters that cannot be seen or turn the line around, but for line breaks and joiners."""
    return "".join(c if c.isprintable() or c in "\n" + JOINERS else " " if c == "\t" else "\ufffd" for c in text)


def _short(text: str, most: int) -> str:
    return _middle(visible(text.strip()), most)


def parts(prompt: str, spans: Sequence[Sequence[int]]) -> list[tuple[str, bool]]:
    """The prompt cut at its trigger; of a long part that is none the middle is left out."""
    found, at = [], 0
    for start, end in spans:
        found += [(prompt[at:start], False), (prompt[start:end], True)]
        at = end
    found.append((prompt[at:], False))
    most = LONGEST if spans else 2 * LONGEST
    return [(visible(text) if marked else _middle(visible(text), most), marked) for text, marked in found if text]


def _middle(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most // 2] + GAP + text[-most // 2 :]
