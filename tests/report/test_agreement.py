"""Every number and sentence that is shown agrees with history.jsonl, for random grids and runs of made-up histories."""

from __future__ import annotations

import csv
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from fedllm_sec.grid import results
from fedllm_sec.report import decided, page, tables, words
from fedllm_sec.report.grid import page as grid_page
from fedllm_sec.report.grid.details import lived_says
from fedllm_sec.report.grid.folder import Grid, read_grid
from fedllm_sec.report.grid.numbers import slices
from fedllm_sec.report.grid.views import views
from fedllm_sec.report.grid.words import finding
from fedllm_sec.report.measures import listed
from fedllm_sec.report.runs import read_runs
from tests.report import made_up
from tests.report.recomputed import (
    Part,
    Rate,
    Run,
    Shown,
    agrees,
    apart,
    gap,
    holds,
    less,
    over_seeds,
    parts_of,
    runs_of,
)
from tests.report.test_grid_page import Heat, data_of

CHANCE = st.sampled_from([0.0, 0.0, 0.2])
FATES = st.builds(
    made_up.Fate,
    seed=st.integers(0, 2**32),
    rows=st.sampled_from([20, 200, 2500]),
    ties=st.booleans(),
    nan=CHANCE,
    quarantine=CHANCE,
    skipped=CHANCE,
    evaluate_every=st.sampled_from([1, 2, 4]),
    failed=CHANCE,
    per_class=st.booleans(),
    labelled=st.sampled_from([True, True, False]),
)
SHAPES = st.sampled_from(sorted(made_up.SHAPES))
EASY = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """No disk is waited for, and no curve is drawn: what their texts say is tested on its own."""
    monkeypatch.setattr("os.fsync", lambda handle: None)
    monkeypatch.setattr("fedllm_sec.report.grid.curves.pictures", lambda *given: ([], 0))


class Folder:
    """A made-up grid in a folder that goes when the test is done with it."""

    def __init__(self, name: str, fate: made_up.Fate) -> None:
        self.name, self.fate = name, fate

    def __enter__(self) -> Folder:
        self.path = Path(tempfile.mkdtemp()) / "grid"
        self.path.mkdir()
        self.grid = made_up.write_grid(self.path, self.name, self.fate)
        self.runs = runs_of(self.path)
        self.by_folder = {f"cells/{run.slug}": run for run in self.runs}
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.path.parent)

    def twin(self, run: Run) -> Run | None:
        other = self.by_folder.get(run.twin or "")
        return other if other is not None and other.done else None


# ---------------------------------------------------------------- results.csv and Parquet

LESS = ("loss",)


def expected_row(folder: Folder, run: Run) -> dict[str, float | None]:
    """What results.csv must say of a finished run."""
    row: dict[str, float | None] = {}
    for key in ("accuracy", "loss", "asr", "false_trigger"):
        final = run.lines[-1]["quality"] if key in ("accuracy", "loss") else run.lines[-1]["attack"]
        given = (final or {}).get(key)
        value = given["value"] if isinstance(given, dict) else given
        row[key] = None if value is None else float(value)
    classes = [rate["value"] for rate in (run.lines[-1]["quality"]["per_class"] or {}).values()]
    row["worst_class_accuracy"] = min(classes) if classes else None
    row |= {f"detection_{key}": run.mean_of("detection", key) for key in ("tpr", "weight_share", "fpr", "auc")}
    row |= {"robustness": run.mean_of("robustness"), "stealth_norm_rank": run.mean_of("stealth", "norm_rank")}
    row["quarantined"] = sum(len(line["quarantined"]) for line in run.lines)
    row["skipped_rounds"] = sum(line["skipped"] is not None for line in run.lines)
    twin = folder.twin(run)
    for key in ("accuracy", "loss"):
        own, other = run.last(key), twin.last(key) if twin else None
        known = own is not None and other is not None
        row[f"{key}_drop"] = (own.value - other.value) * (1 if key in LESS else -1) if known else None  # type: ignore[union-attr]
    own, other = run.last("asr"), twin.last("asr") if twin else None
    alike = twin is not None and run.asked() == twin.asked() and own is not None and other is not None
    row["asr_rise"] = own.value - other.value if alike else None  # type: ignore[union-attr]
    return row


def same(text: str, value: float | None) -> bool:
    if value is None:
        return text == ""
    return (
        text == "nan"
        if math.isnan(value)
        else text not in ("", "nan") and math.isclose(float(text), value, abs_tol=1e-12)
    )


def check_results(folder: Folder) -> None:
    results.write(folder.grid)
    rows = list(csv.DictReader((folder.path / "results.csv").open(encoding="utf-8")))
    table = parquet.read_table(folder.path / "results.parquet").to_pylist()
    assert [row["cell"] for row in rows] == [run.slug for run in folder.runs]
    for run, row, typed in zip(folder.runs, rows, table, strict=True):
        assert row["status"] == ("done" if run.done else row["status"])
        for axis in folder.grid.axes:
            labels = {at[axis] for at in run.places}
            wanted = "" if len(labels) > 1 or labels == {"null"} else labels.pop()
            assert row[axis] == wanted, (run.slug, axis)
        for column, text in row.items():
            value = typed[column]
            assert text == ("" if value is None else str(value)) or float(text) == value, (column, text, value)
        expected = expected_row(folder, run) if run.done else {"accuracy": None, "loss": None}
        for column, number in expected.items():
            assert same(row.get(column, ""), number), (run.slug, column, row.get(column), number)
    means = list(csv.DictReader((folder.path / "results_by_cell.csv").open(encoding="utf-8")))
    groups: dict[tuple[str, ...], list[float]] = {}
    names = [axis for axis in folder.grid.axes if axis != "seed"]
    for row in rows:
        known = groups.setdefault(tuple(row[name] for name in names), [])
        known += [float(row["loss"])] if row.get("loss") else []
    for row in means:
        known = groups.pop(tuple(row[name] for name in names))
        assert int(row["done"]) == len(known)
        assert same(row.get("loss", ""), sum(known) / len(known) if known else None)
    assert not groups


# ---------------------------------------------------------------- maps, ranking, sentences of a grid

Of = Callable[[dict[str, Run]], "Shown | None"]


Row = tuple[Rate, ...]


def rates_of(slot: dict[str, Run], key: str) -> dict[str, Row]:
    return {seed: row for seed, run in slot.items() if run.done and (row := run.parts(key)) is not None}


def shown_of(rows: Iterable[Row], key: str) -> Shown | None:
    return gap([*rows]) if key == "beyond" else over_seeds([rate for (rate,) in rows])


def value_of(row: Row) -> float:
    return less(row[:1], row[1:]) if len(row) == 2 else row[0].value


def measure(key: str) -> Of:
    return lambda slot: shown_of(rates_of(slot, key).values(), key)


def two_rates(slot: dict[str, Run], counted: Callable[[dict[str, Run]], Any]) -> tuple[float, float] | None:
    """Mean attack success and false triggers of the runs that count and have both."""
    both = [run.answered() for seed, run in slot.items() if run.done and counted({seed: run}) is not None]
    known = [pair for pair in both if pair is not None]
    return (mean(a.value for a, _ in known), mean(b.value for _, b in known)) if known else None


def change(folder: Folder, key: str) -> Of:
    """What quality lost, or attack success gained, against the twins."""

    def of(slot: dict[str, Run]) -> Shown | None:
        pairs = []
        for run in slot.values():
            twin, own = folder.twin(run), run.last(key)
            other = twin.last(key) if twin else None
            if own is None or other is None or (key == "asr" and run.asked() != twin.asked()):  # type: ignore[union-attr]
                continue
            pairs.append((other, own) if key == "accuracy" else (own, other))
        return gap(pairs)

    return of


def shown_views(folder: Folder) -> list[tuple[str, str, Of]]:
    """(title, key, what a slot shows) of each map, in order."""
    done = [run for run in folder.runs if run.done]
    main = "accuracy" if all(run.last("accuracy") for run in done) else "loss"
    title = {"accuracy": "accuracy", "loss": "held-out loss"}[main]
    found = [] if not done else [
        (title, main, measure(main)),
        (f"{title} {'lost' if main == 'accuracy' else 'added'}", "", change(folder, main)),
    ]  # fmt: skip
    if any(run.last("asr") for run in done):
        for title, key in (("attack success beyond false triggers", "beyond"),
                           ("attack success, false triggers unknown", "asr")):  # fmt: skip
            if any(run.parts(key) for run in done):
                found.append((title, key, measure(key)))
        gained = change(folder, "asr")
        if any(gained({"": run}) for run in folder.runs if not run.is_twin):
            found.append(("attack success gained", "", gained))
    return found


def harm(key: str, value: float) -> float:
    return math.inf if math.isnan(value) else -value if key == "accuracy" else value


def unescaped(line: str) -> list[str]:
    cells = re.split(r"(?<!\\)(?:\\\\)*\|", line)[1:-1]
    return [re.sub(r"\\(.)", r"\1", cell.strip()) for cell in cells]


def blocks_of(text: str) -> list[tuple[str, list[list[str]]]]:
    """(caption, rows) of every Markdown table."""
    found = []
    for block in re.split(r"\n\n(?=\*\*)", text):
        caption, rest = block.split("\n\n", 1)
        assert caption.startswith("**")
        assert caption.endswith("**")
        assert caption[-3] != " "
        lines = [unescaped(line) for line in rest.splitlines() if line.startswith("|")]
        found.append((re.sub(r"\\(.)", r"\1", caption.strip("*")), lines[2:]))
    return found


def latex_rows(text: str) -> list[list[str]]:
    body = [line for line in text.splitlines() if line.endswith(r" \\")]
    return [
        [cell.strip().strip("{}").replace(r"\%", "%") for cell in re.split(r"(?<!\\)&", line[:-3])] for line in body
    ]


def check_maps(folder: Folder, grid: Grid) -> None:
    """The Markdown's matrices against the files, and LaTeX and the page against Markdown."""
    text = grid_page.paper_text(grid, latex=False)
    attacks, defenses, parts = parts_of(folder.path, folder.runs)
    blocks = iter(blocks_of(text))
    matrices = []
    for part in parts:
        for title, _, of in shown_views(folder):
            caption, rows = next(blocks)
            assert caption.startswith(f"{title}: attack (rows) against defense (columns)")
            for attack, row in zip(attacks, rows, strict=True):
                for defense, cell in zip(defenses, row[1:], strict=True):
                    check_slot(part, attack, defense, cell, of)
                    check_rates(part.slots.get((attack, defense), {}), cell, of, title.startswith("attack success"))
            matrices.append(rows)
    caption, rows = next(blocks)
    assert caption.startswith("ranking of the defenses")
    check_ranking(folder, attacks, defenses, parts, rows)
    numbers = [row for matrix in [*matrices, rows] for row in matrix]
    for plain, latex in zip(numbers, [r for r in latex_rows(grid_page.paper_text(grid, latex=True)) if r[0] not in
                                      ("attack", "defense")], strict=True):  # fmt: skip
        assert plain[1] == latex[1]
        assert len(plain) == len(latex)
    check_page(folder, grid_page.render(grid), matrices)


def check_slot(part: Part, attack: str, defense: str, cell: str, of: Of) -> None:
    slot = part.slots.get((attack, defense), {})
    if not slot:
        assert cell == "–"
    elif (true := of(slot)) is not None:
        assert holds(cell, true), (attack, defense, cell, true)
    else:
        assert cell in ("n/a", "failed", "not run"), cell


def check_rates(slot: dict[str, Run], cell: str, of: Of, told: bool) -> None:
    """ "(93 / 91 %)" beside every attack success: how often the answer comes with the trigger, and without."""
    found = re.search(r"\(([-0-9.e]+) / ([-0-9.e]+) %\)", cell)
    rates = two_rates(slot, of) if told else None
    assert (found is None) == (rates is None), (cell, rates)
    assert found is None or all(agrees(text, rate, 100.0) for text, rate in zip(found.groups(), rates, strict=True))  # type: ignore[arg-type]


def met_rows(attacks: list[str], defenses: list[str], parts: list[Part], key: str) -> list[tuple[Part, str]]:
    """The rows that a worst case is over: attacks that measure this, or may yet."""
    found = []
    for part in parts:
        for attack in attacks:
            slots = [part.slots.get((attack, defense), {}) for defense in defenses]
            done = any(run.done for slot in slots for run in slot.values())
            if attack != "none" and (any(rates_of(slot, key) for slot in slots) or not done):
                found.append((part, attack))
    return found


def check_ranking(
    folder: Folder, attacks: list[str], defenses: list[str], parts: list[Part], rows: list[list[str]]
) -> None:
    judged = [(title, key) for title, key, _ in shown_views(folder) if key]
    ranked = {key: mean_ranks(attacks, defenses, parts, key) for _, key in judged}
    assert sorted(row[0] for row in rows) == sorted(defenses)
    for row in rows:
        for place, (_, key) in enumerate(judged):
            rank = ranked[key].get(row[0])
            assert row[1 + place] == "n/a" if rank is None else agrees(row[1 + place].split()[0], rank)
            over = met_rows(attacks, defenses, parts, key)
            values = {(part.title, attack): shown_of(rates_of(part.slots.get((attack, row[0]), {}), key).values(), key)
                      for part, attack in over}  # fmt: skip
            known = {name: shown for name, shown in values.items() if shown is not None}
            cell, under = row[1 + len(judged) + 2 * place : 3 + len(judged) + 2 * place]
            if not known:
                assert (cell, under) == ("n/a", "–")
                continue
            most = max(harm(key, shown.value) for shown in known.values())
            worst = [name for name, shown in known.items() if harm(key, shown.value) == most]
            assert any(holds(cell, known[name]) for name in worst)
            assert all(attack in under for _, attack in worst[:3])
            assert (f", {len(known)} of {len(over)} attack" in under) == (len(known) < len(over))


def mean_ranks(attacks: list[str], defenses: list[str], parts: list[Part], key: str) -> dict[str, float]:
    blocks = []
    for part in parts:
        for attack in (name for name in attacks if name != "none"):
            slots = {defense: rates_of(part.slots.get((attack, defense), {}), key) for defense in defenses}
            for seed in {seed for rates in slots.values() for seed in rates}:
                blocks.append({d: harm(key, value_of(rates[seed])) for d, rates in slots.items() if seed in rates})
    ranked = [d for d in defenses if any(d in block for block in blocks)]
    whole = [block for block in blocks if all(d in block for d in ranked)]
    if not whole or len(ranked) < 2:
        return {}
    place = {d: [sum(block[o] < block[d] for o in ranked) + (sum(block[o] == block[d] for o in ranked) + 1) / 2
                 for block in whole] for d in ranked}  # fmt: skip
    return {d: sum(places) / len(whole) for d, places in place.items()}


def check_findings(folder: Folder, grid: Grid) -> None:
    """The first lines: who is best, over which attacks, and who cannot be told apart."""
    attacks, defenses, parts = parts_of(folder.path, folder.runs)
    text = " ".join(finding(grid, slices(grid), views(grid)))
    assert " ".join(text.split()) in " ".join(grid_page.summary_text(grid).split())
    for title, key, _ in shown_views(folder):
        if not key:
            continue
        rows = met_rows(attacks, defenses, parts, key)
        names = [d for d in defenses if d != "none"]
        shared = [(p, a) for p, a in rows if all(whole(p.slots.get((a, d), {}), key) for d in names)]
        cases = {d: case for d in names if (case := worst_case(shared, d, key)) is not None}
        bare = worst_case(rows, "none", key)
        if bare is not None:
            found = re.search(rf"[Ww]ithout a defense {title} is at worst (.+?) under", text)
            assert found is not None
            assert holds(found[1], shown_of(rates_of(bare, key).values(), key))
        if not cases:
            assert f"best worst case in {title}" not in text
            continue
        first = min(harm(key, mean_of(case, key)) for case in cases.values())
        best = [d for d, case in cases.items() if harm(key, mean_of(case, key)) == first]
        near = [d for d in cases if d not in best and not told_apart(cases[d], cases[best[0]], key)]
        true = shown_of(rates_of(cases[best[0]], key).values(), key)
        number = r"(\S+(?: %)?(?: \[[^\]]+\])?)"
        name = re.escape(listed(best))
        if len(cases) == 1:
            found = re.search(rf"[Ww]ith {name} {title} is at worst {number}", text)
        elif near and len(best) + len(near) == len(cases):
            head = rf"[Nn]o other defense can be told apart from the best worst case in {title}, that of {name}, "
            found = re.search(head + number, text)
        else:
            verb = "has" if len(best) == 1 else "share"
            found = re.search(rf"{name} {verb} the best worst case in {title}: {number}", text)
            assert (f"cannot be told apart from {'it' if len(best) == 1 else 'them'}" in text) >= bool(near)
        assert found is not None, (text, best, near, cases.keys())
        assert holds(found[1], true), (text, true)
        if len(shared) < len(rows):
            assert f"over the {len(shared)} of {len(rows)} attacks " in text.lower()


def whole(slot: dict[str, Run], key: str) -> bool:
    return bool(slot) and len(rates_of(slot, key)) == len(slot)


def mean_of(slot: dict[str, Run], key: str) -> float:
    return shown_of(rates_of(slot, key).values(), key).value  # type: ignore[union-attr]


def worst_case(rows: list[tuple[Part, str]], defense: str, key: str) -> dict[str, Run] | None:
    slots = [part.slots.get((attack, defense), {}) for part, attack in rows]
    known = [slot for slot in slots if rates_of(slot, key)]
    return max(known, key=lambda slot: harm(key, mean_of(slot, key)), default=None)


def told_apart(slot: dict[str, Run], other: dict[str, Run], key: str) -> bool:
    """Whether two worst cases differ by more than the interval of their difference, or share no seed."""
    own, their = rates_of(slot, key), rates_of(other, key)
    rows = [(*own[seed], *their[seed]) for seed in own if seed in their]
    return not rows or apart(rows, (1, 2) if key == "beyond" else (1,))


# ---------------------------------------------------------------- the page's own data


def check_page(folder: Folder, text: str, matrices: list[list[list[str]]]) -> None:
    heat = Heat()
    heat.feed(text)
    squares = iter(heat.texts)
    for cell in (cell for matrix in matrices for row in matrix for cell in row[1:]):
        square = re.sub(r"\s", "", next(squares))
        if re.match(r"-?\d|nan|inf", cell):
            assert square == re.sub(r"\s", "", cell).replace("(", "").replace(")", "")
        else:
            assert square.startswith(re.sub(r"\s", "", cell))
    data = data_of(text)["runs"]
    for run, entry in zip(folder.runs, data, strict=True):
        if not run.done:
            assert entry["state"] in ("failed", "not run")
            continue
        shown = {title: f"{value} {interval}".strip() for title, value, interval in entry["measures"]}
        for key, title in (("accuracy", "accuracy"), ("loss", "held-out loss"), ("asr", "attack success"),
                           ("false_trigger", "false triggers")):  # fmt: skip
            rate = run.last(key)
            if rate is not None:
                assert holds(shown[title], over_seeds([rate])), (run.slug, key, shown[title], rate)
        for block, key, title in (
            ("detection", "tpr", "malicious dropped"),
            ("detection", "weight_share", "malicious weight share"),
            ("detection", "fpr", "honest dropped"),
            ("robustness", None, "robustness ratio"),
        ):
            value = run.mean_of(block, key)
            assert (title in shown) == (value is not None)
            assert value is None or holds(shown[title], Shown(value, None, None)), (title, shown[title], value)
        if "decisions" in entry:
            check_decisions(run, entry["decisions"]["says"])
        for axis, label in entry["axes"].items():
            assert label == (run.places[0][axis] if len({at[axis] for at in run.places}) == 1 else "–")


def check_decisions(run: Run, says: str) -> None:
    """Rows of that round's attackers, in the rounds under attack, by their true weights."""
    rows = [(i in line["malicious"], line, i) for line in run.judged() for i in line["cohort"]
            if i not in line["quarantined"]]  # fmt: skip
    for who, bad in (("malicious", True), ("honest", False)):
        kept = [i in line["kept"] for is_bad, line, i in rows if is_bad is bad and line["kept"] is not None]
        found = re.search(rf"(\d+) of (\d+) {who} row", says)
        assert (found is None) == (not kept)
        if found is not None:
            assert (int(found[1]), int(found[2])) == (sum(kept), len(kept))
        if run.rule == "foolsgold":
            shares = [line["weights"][i] * len(line["weights"]) for is_bad, line, i in rows
                      if is_bad is bad and line["weights"]]  # fmt: skip
            found = re.search(rf"{who} rows ({'[-0-9.e+]+'}\b)", says)
            assert (found is None) == (not shares)
            assert found is None or agrees(found[1], sum(shares) / len(shares))


@settings(EASY, max_examples=70)
@given(name=SHAPES, fate=FATES)
def test_what_a_grid_shows_agrees_with_its_files(name: str, fate: made_up.Fate) -> None:
    with Folder(name, fate) as folder:
        check_results(folder)
        grid = read_grid(folder.path)
        check_maps(folder, grid)
        check_findings(folder, grid)


# ---------------------------------------------------------------- runs side by side

FREE = ("attack", "enable_attack", "defense", "enable_defense", "output", "compute")


def federation(run: Run) -> dict[str, Any]:
    return {key: value for key, value in run.recipe.items() if key not in FREE}


def check_runs(folder: Folder, chosen: list[Run]) -> None:
    runs = read_runs([run.folder for run in chosen])
    by_name = {read.name: run for read, run in zip(runs, chosen, strict=True)}
    table = tables.summary_table(runs)
    for cells in table.rows:
        row = {column.key: str(cell) for column, cell in zip(table.columns, cells, strict=True)}
        run = by_name[row["run"]]
        for key in ("accuracy", "loss", "asr", "false_trigger"):
            rate = run.last(key)
            assert holds(row.get(key, "n/a"), None if rate is None else over_seeds([rate])), (key, row, rate)
        for key in ("tpr", "weight_share", "fpr"):
            value = run.mean_of("detection", key)
            assert holds(row.get(key, "n/a"), None if value is None else Shown(value, None, None))
    for read in runs:
        check_decisions(by_name[read.name], decided.decisions_say(read))
    several = any(federation(run) != federation(chosen[0]) for run in chosen)
    assert any("not compared with each other" in note for note in page.warnings_of(runs)) == several
    for sentence in words.finding(runs):
        check_sentence(sentence, chosen)


def check_sentence(sentence: str, chosen: list[Run]) -> None:
    """A change is told only of an attack-free and an attacked run, undefended, of one federation with these values."""
    took = re.search(r"took the undefended model's .+? from (\S+) to ([-0-9.a-z+]+?)[.;]?(?:\s|$)", sentence)
    if took is None:
        return
    assert any(
        federation(clean) == federation(bare)
        and (clean.attacked, bare.attacked) == (False, True)
        and clean.rule == bare.rule == "mean"
        and any(
            (a := clean.last(key)) and (b := bare.last(key)) and agrees(took[1], a.value) and agrees(took[2], b.value)
            and apart([(a, b)])
            for key in ("accuracy", "loss")
        )
        for clean in chosen
        for bare in chosen
    ), sentence  # fmt: skip


@settings(EASY, max_examples=130)
@given(name=SHAPES, fate=FATES, pick=st.randoms(use_true_random=False))
def test_what_runs_side_by_side_show_agrees_with_their_files(name: str, fate: made_up.Fate, pick: Any) -> None:
    with Folder(name, fate) as folder:
        done = [run for run in folder.runs if run.done]
        if done:
            check_runs(folder, pick.sample(done, min(len(done), pick.randint(1, 5))))


def test_a_lifespan_is_written_with_its_bounds() -> None:
    assert lived_says({"value": None, "at_least": 3}) == "3 or more: not fallen when last measured"
    assert lived_says({"value": 2, "at_least": 0}) == "0 to 2"
    assert lived_says({"value": 0, "at_least": 0}) == "0"
