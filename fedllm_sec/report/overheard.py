"""What an observer of text learnt, as tables and curves. Nothing that was read is trusted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from statistics import median_low
from typing import Any

import matplotlib

from fedllm_sec.records.files import in_a_line
from fedllm_sec.report.measures import percent
from fedllm_sec.report.plots import (
    BLUE,
    GREEN,
    MUTED,
    ORANGE,
    PURPLE,
    SKY,
    STYLE,
    VERMILLION,
    Picture,
    figure,
    label,
    to_svg,
)

MOST_CURVES, MOST_SECRETS, MOST_PIECES = 6, 12, 200  # that are shown
COLOURS = (VERMILLION, BLUE, GREEN, PURPLE, ORANGE, SKY)
DASHES: tuple[Any, ...] = ("-", (0, (6, 1.5)), (0, (4, 1, 1, 1)), (0, (2, 1)), (0, (1, 1)), (0, (8, 1, 1, 1)))
LEAST_FPR = 0.003  # where the curves' axis begins: one of 300
Curve = list[tuple[float, float]]


def number(given: Any) -> float | None:
    fine = isinstance(given, (int, float)) and not isinstance(given, bool) and math.isfinite(given)
    return float(given) if fine else None


def interval(given: Any, form: str) -> str:
    """A mean with its limits, or n/a."""
    values = [number(given.get(key)) for key in ("value", "low", "high")] if isinstance(given, Mapping) else [None]
    if None in values:
        return "n/a"
    value, low, high = (form.format(value).split(" ") for value in values)
    return f"{' '.join(value)} [{low[0]}, {high[0]}]"


def named(attack: Mapping[str, Any]) -> str:
    """A method and its settings: one name may stand several times in a recipe."""
    settings = attack.get("settings")
    said = [f"{key} {value}" for key, value in settings.items()] if isinstance(settings, Mapping) else []
    return label(in_a_line(attack.get("name")) + (f" ({', '.join(map(in_a_line, said))})" if said else ""), 60)


def listed(given: Any) -> list[Mapping[str, Any]]:
    return [one for one in given if isinstance(one, Mapping)] if isinstance(given, list) else []


def of_kind(attacks: Sequence[Mapping[str, Any]], kind: str) -> list[Mapping[str, Any]]:
    return [attack for attack in attacks if attack.get("kind") == kind]


# ---------------------------------------------------------------- tables


def by_round(found: Sequence[Mapping[str, Any]], first: str, second: str, *more: str) -> list[list[str]]:
    """A row for each attack and round: its name, the round, two measures, why it does not apply, further measures."""
    return [
        [named(attack), in_a_line(one.get("round")), interval(one.get(first), "{:.2f}"),
         interval(one.get(second), "{:.2f}"), in_a_line(attack.get("not_applicable", "")),
         *(interval(one.get(name), "{:.2f}") for name in more)]
        for attack in found for one in listed(attack.get("rounds")) or [{"round": "n/a"}]
    ]  # fmt: skip


def tables(attacks: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """{titles, rows, note} of each kind that is there."""
    if found := of_kind(attacks, "membership"):
        yield {
            "titles": ("membership", "round", "AUC", "TPR at 1 % FPR", "n/a"),
            "rows": by_round(found, "auc", "tpr"),
            "note": "How well rows that a client trained on are told from held-out ones of the same kind: AUC 0.5 is "
            "chance; the share of them that is found while 1 in 100 others is taken for one. Means over clients, with "
            "95 % bootstrap intervals over rows.",
        }
    if found := of_kind(attacks, "canary"):
        rows = [
            [named(attack), in_a_line(one.get("repetitions")), interval(one.get("exposure"), "{:.1f}"),
             "n/a" if (share := number(one.get("extracted"))) is None else percent(share),
             in_a_line(attack.get("not_applicable", ""))]
            for attack in found for one in listed(attack.get("repetitions")) or [{"repetitions": "n/a"}]
        ]  # fmt: skip
        yield {
            "titles": ("secrets", "planted in rows", "exposure (bits)", "said when asked", "n/a"),
            "rows": rows,
            "note": "How many bits of a planted secret are given away: 0 to log2 of the guesses (10 of a thousand), "
            "1.4 where it was never seen. Means over secrets and observations, with 95 % bootstrap intervals.",
        }
    if found := of_kind(attacks, "tokens"):
        yield {
            "titles": ("text", "round", "tokens read", "read rightly", "n/a", "rows exact", "ROUGE-1", "ROUGE-2"),
            "rows": by_round(found, "recall", "precision", "exact", "rouge_1", "rouge_2"),
            "note": "The share of the distinct tokens of a client's rows that is read off what it sent, and the share "
            "of what is read that is right; of what reads order, the share of whole rows that is exact, and the share "
            "of tokens (ROUGE-1) and pairs of tokens (ROUGE-2) that a row and what was read of it have in common. "
            "Means over clients, with 95 % bootstrap intervals.",
        }


def findings(attacks: Sequence[Mapping[str, Any]]) -> list[str]:
    """What each kind has found at most, in a sentence or two."""
    said = []
    for made in tables(attacks):
        rows = [row for row in made["rows"] if row[2] != "n/a"]
        if not rows:
            continue
        name, where, most, more, *_ = max(rows, key=lambda row: float(row[2].split(" ")[0]))
        if made["titles"][0] == "membership":
            said.append(f"{name} tells rows that were trained on from others with AUC {most} in round {where}.")
            said.append(f"It names a share of {more} of them while 1 in 100 others is taken for one.")
        elif made["titles"][0] == "text":
            said.append(f"{name} reads a share of {most} of a client's tokens in round {where}; {more} are right.")
        else:
            said.append(f"{name} gets {most} bits of a secret that stood in {where} rows; {more} of those are said.")
    return said


# ---------------------------------------------------------------- text


def texts(attacks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What was said beside what was to be found, word by word, whether it is right: of the last observation."""
    found = []
    for attack in of_kind(attacks, "canary"):
        acted = [one for one in listed(attack.get("observations")) if listed(one.get("secrets"))]
        for secret in listed(acted[-1]["secrets"])[:MOST_SECRETS] if acted else ():
            true, said = (in_a_line(secret.get(key, "")).split() for key in ("secret", "said"))
            found.append(
                {
                    "title": named(attack),
                    "where": f"{in_a_line(secret.get('question'))} In {in_a_line(secret.get('repetitions'))} rows, "
                    f"round {in_a_line(acted[-1].get('round'))}, client {in_a_line(acted[-1].get('client'))}.",
                    "true": " ".join(true),
                    "said": [(word, word == right) for word, right in zip_longest(said, true) if word is not None],
                }
            )
    for attack in of_kind(attacks, "tokens"):
        acted = [one for one in listed(attack.get("observations")) if listed(one.get("texts"))]
        for text in listed(acted[-1]["texts"])[:MOST_SECRETS] if acted else ():
            said = text.get("said")
            pieces = [p for p in said if isinstance(p, list) and len(p) == 2] if isinstance(said, list) else []
            shares = [number(text.get(key)) for key in ("rouge_1", "rouge_2")]
            rouge = ", ".join("n/a" if value is None else f"{value:.2f}" for value in shares)
            found.append(
                {
                    "title": f"{named(attack)}: {in_a_line(text.get('which'))}",
                    "where": f"ROUGE-1 and ROUGE-2 {rouge}, round {in_a_line(acted[-1].get('round'))}, "
                    f"client {in_a_line(acted[-1].get('client'))}.",
                    "true": in_a_line(text.get("true", "")),
                    "said": [(in_a_line(piece), right is True) for piece, right in pieces[:MOST_PIECES]],
                }
            )
    return found


# ---------------------------------------------------------------- curves


def _curves(attack: Mapping[str, Any]) -> list[tuple[float, Any, Any, Curve]]:
    """AUC, round, client and curve of each observation that has them."""
    found = []
    for one in listed(attack.get("observations")):
        auc = one.get("auc")
        value = number(auc.get("value")) if isinstance(auc, Mapping) else None
        given = one.get("roc")
        points = [p for p in given if isinstance(p, list) and len(p) == 2] if isinstance(given, list) else []
        curve = [(x, y) for x, y in ((number(a), number(b)) for a, b in points) if x is not None and y is not None]
        if value is not None and curve and all(0 <= x <= 1 and 0 <= y <= 1 for x, y in curve):
            found.append((value, one.get("round"), one.get("client"), curve))
    return found


def pictures(name: str, attacks: Sequence[Mapping[str, Any]]) -> list[Picture]:
    """The ROC of each membership attack's median observation by AUC; of many attacks, those of the highest."""
    chosen = []
    for attack in of_kind(attacks, "membership"):
        if curves := _curves(attack):
            middle = median_low([auc for auc, *_ in curves])
            chosen.append((named(attack), *next(curve for curve in curves if curve[0] == middle)))
    if not chosen:
        return []
    chosen = sorted(chosen, key=lambda one: -one[1])
    with matplotlib.rc_context(STYLE):
        svg = _drawn(chosen, f"roc-{name}")
    shown, auc, r, client, _ = chosen[0]
    left = f" Of {len(chosen)} attacks those with the highest AUC." if len(chosen) > MOST_CURVES else ""
    said = f"Members found at each share of others taken for members: the best is {shown}, AUC {auc:.2f}."
    how = f"Of each attack the median observation by AUC: the first, round {in_a_line(r)}, client {in_a_line(client)}."
    return [Picture(f"roc-{name}", svg, said, how + left)]


def _drawn(chosen: Sequence[tuple[str, float, Any, Any, Curve]], salt: str) -> str:
    fig, axes = figure(width=6.4, height=4.2)
    for (shown, auc, _, _, curve), colour, dashes in zip(chosen, COLOURS, DASHES, strict=False):
        x, y = zip(*((max(a, LEAST_FPR), b) for a, b in curve), strict=True)
        axes.step(x, y, where="post", color=colour, linestyle=dashes, label=f"{shown}: AUC {auc:.2f}")
    chance = [LEAST_FPR * (1 / LEAST_FPR) ** (i / 50) for i in range(51)]
    axes.plot(chance, chance, color=MUTED, linewidth=1.0, linestyle=(0, (1, 2)), label="chance")
    axes.axvline(0.01, color=MUTED, linewidth=1.0)
    axes.set_xscale("log")
    axes.set_xlim(LEAST_FPR, 1)
    axes.set_ylim(0, 1.02)
    axes.set_xticks([0.01, 0.1, 1], ["1 %", "10 %", "100 %"])
    axes.set_xlabel("others taken for members")
    axes.set_ylabel("members found")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.18))
    return to_svg(fig, salt)
