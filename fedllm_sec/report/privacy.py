"""What an observer learnt: the section of a run's page, and the page of `fedllm-sec audit`. Nothing read is trusted."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedllm_sec.records.files import in_a_line, write_atomic
from fedllm_sec.records.observed import read_found
from fedllm_sec.report import overheard
from fedllm_sec.report.markup import facts_of, fill
from fedllm_sec.report.measures import duration, percent
from fedllm_sec.report.overheard import interval, named, number
from fedllm_sec.report.runs import Run, read_run

MOST_PICTURE = 200_000  # characters of a PNG file in base 64; more is left out
SEES = {
    "delta": "the rows that clients send, before any screening: the server itself, or whoever listens on the wire",
    "gradient": "the gradient of each client's first local step, as clients that share gradients send it",
}
KNOWS = "the model that was sent out, how clients train, and the size of their batches; not their data"


def sections(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What to show of each run that was observed."""
    return [section for run in runs if (section := section_of(run.name, read_found(run.folder))) is not None]


def section_of(name: str, found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The card, the tables and the pictures of one privacy.json; None where there is none that can be read."""
    if found is None:
        return None
    attacks = [attack for attack in found["attacks"] if isinstance(attack, Mapping)]
    images = [attack for attack in attacks if "kind" not in attack]
    tables = [{"titles": TITLES, "rows": [_row(attack) for attack in images], "note": NOTE}] if images else []
    return {
        "name": name,
        "card": [
            ("Who observes", [SEES.get(str(found.get("what")), in_a_line(found.get("what")))]),
            ("What it knows", [KNOWS]),
            ("What it took", [f"{named(a)}: {_seconds(a.get('seconds'))}" for a in attacks]),
        ],
        "tables": [*tables, *overheard.tables(attacks)],
        "curves": overheard.pictures(name, attacks),
        "texts": overheard.texts(attacks),
        "finding": _of_images(tables[0]["rows"]) if images else overheard.findings(attacks),
        "pictures": [shown for attack in attacks for shown in _pictures(attack)],
        "reasons": [text for attack in attacks for text in _reasons(attack)],
    }


def _row(attack: Mapping[str, Any]) -> list[str]:
    scores = attack.get("scores")
    scores = scores if isinstance(scores, Mapping) else {}
    return [
        in_a_line(attack.get("name")),
        interval(scores.get("psnr"), "{:.1f} dB"),
        interval(scores.get("ssim"), "{:.2f}"),
        "n/a" if (share := number(scores.get("over_20_db"))) is None else percent(share),
        interval(scores.get("labels"), "{:.2f}"),
        in_a_line(attack.get("not_applicable", "")),
    ]


TITLES = ("attack", "PSNR", "SSIM", "over 20 dB", "labels right", "n/a")
NOTE = (
    "Means over images after the best matching of each batch, with 95 % bootstrap intervals; labels: the share that "
    "was named rightly. The column n/a counts what could not be attacked."
)


def _seconds(given: Any) -> str:
    value = number(given)
    return "n/a" if value is None else duration(value)


def _pictures(attack: Mapping[str, Any]) -> list[dict[str, str]]:
    """The best, the median and the worst image by PSNR, in this order: no other choice is made."""
    kept, shown = attack.get("pictures"), []
    for which in ("best", "median", "worst"):
        pair = kept.get(which) if isinstance(kept, Mapping) else None
        if not isinstance(pair, Mapping) or not (is_png(pair.get("true")) and is_png(pair.get("made"))):
            continue
        psnr, ssim = number(pair.get("psnr")), number(pair.get("ssim"))
        words = "n/a" if psnr is None else f"{psnr:.1f} dB"
        words += "" if ssim is None else f", SSIM {ssim:.2f}"
        where = f"round {in_a_line(pair.get('round'))}, client {in_a_line(pair.get('client'))}"
        title = f"{in_a_line(attack.get('name'))}: {which}"
        shown.append({"title": title, "true": pair["true"], "made": pair["made"], "words": words, "where": where})
    return shown


def is_png(given: Any) -> bool:
    """Whether it can be a PNG file in base 64."""
    return isinstance(given, str) and len(given) <= MOST_PICTURE and bool(re.fullmatch(r"iVBOR[A-Za-z0-9+/]+=*", given))


def _reasons(attack: Mapping[str, Any]) -> list[str]:
    """Why the attack could not act, each reason once."""
    listed = attack.get("observations")
    listed = listed if isinstance(listed, list) else []
    reasons = [o["reason"] for o in listed if isinstance(o, Mapping) and isinstance(o.get("reason"), str)]
    return [f"{named(attack)}: n/a: {' '.join(reason.split())[:400]}" for reason in dict.fromkeys(reasons)]


def _of_images(given: Sequence[Sequence[str]]) -> list[str]:
    """In two sentences, the attack with the best mean PSNR first."""
    rows = [row for row in given if row[1] != "n/a"]
    if not rows:
        labels = [row for row in given if row[4] != "n/a"]
        first = f"{labels[0][0]} read off {labels[0][4]} of the labels." if labels else "Nothing was learnt."
        return [first, "No image was reconstructed."]
    best = max(rows, key=lambda row: float(row[1].split(" ")[0]))
    return [
        f"{best[0]} reconstructs images at {best[1]}.",
        f"{best[3]} of them are over 20 dB, where a person sees what is shown.",
    ]


def as_text(found: Mapping[str, Any]) -> str:
    """The tables for a terminal."""
    section = section_of("", found)
    assert section is not None
    lines = []
    for table in section["tables"]:
        rows = [list(table["titles"]), *table["rows"]]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += ["  ".join(text.ljust(n) for text, n in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, *section["reasons"]])


def write_audit(folder: Path) -> Path:
    """Write audit.html into a run folder that has a privacy.json."""
    run = read_run(folder)
    section = section_of(run.name, read_found(folder))
    path = folder / "audit.html"
    made = [] if section is None else [section]
    page = fill(
        "audit.html",
        styles=["page.css"],
        scripts=["page.js"],
        title=f"{run.name}: what was given away",
        folders=str(folder),
        finding=(made[0]["finding"] or ["Nothing was learnt."]) if made else ["Nobody observed this run."],
        facts=facts_of([run]),
        warnings=list(run.warnings),
        privacy=made,
    )
    write_atomic(path, page.encode())
    return path
