"""The page of a grid as a file, and in a real browser: clicks, keys, sorting, sizes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fedllm_sec.records.files import write_json
from fedllm_sec.report.__main__ import main
from fedllm_sec.report.page import write_report
from tests.report.browser import Browser, chromium
from tests.report.fake_grid import replicate, write_grid
from tests.report.test_page import EVIL, outline

MakeRun = Callable[..., Path]


@pytest.fixture(scope="module")
def page(broken_grid: Path) -> Path:
    return write_report(broken_grid)


@pytest.fixture(scope="module")
def split_page(split_grid: Path) -> Path:
    return write_report(split_grid)


class Heat(HTMLParser):
    """The texts of the heat-map cells, and the runs they lead to."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.cell = False, False
        self.texts: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "table":
            self.inside = values.get("class") == "heat"
        if self.inside and tag == "td":
            self.cell = True
            self.texts.append("")
        if self.cell and tag == "a":
            self.links.append(values["href"] or "")

    def handle_endtag(self, tag: str) -> None:
        self.cell = self.cell and tag != "td"

    def handle_data(self, data: str) -> None:
        if self.cell:
            self.texts[-1] += data


def data_of(text: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_the_page_is_well_formed_has_unique_ids_and_needs_no_network(page: Path, split_page: Path) -> None:
    for path in (page, split_page):
        found = outline(path.read_text())
        assert found.open == []
        assert len(found.ids) == len(set(found.ids))
        assert all(link.startswith(("#", "data:")) for link in found.links)
        assert {link[1:] for link in found.links if link.startswith("#")} <= set(found.ids)
        assert found.tags.count("h1") == 1


def test_every_square_has_a_text_and_leads_to_its_run(page: Path) -> None:
    heat = Heat()
    heat.feed(page.read_text())
    assert len(heat.texts) == len(heat.links) == 3 * 3 * 3  # three measures, three attacks, none and two defenses
    assert all(heat.texts)
    runs = data_of(page.read_text())["runs"]
    first = runs[int(heat.links[0].removeprefix("#run-"))]
    assert (first["axes"]["attack"], first["axes"]["defense"]) == ("text_trigger", "none")


def test_cells_without_a_result_are_marked_and_listed_with_their_reason(page: Path) -> None:
    text = page.read_text()
    assert "17 of 20 runs are done: 1 failed, 1 stopped before the last round and 1 not run yet." in text
    assert text.count("DefenseError: multi_krum: needs n &gt;= 2f + 3 clients") >= 3
    assert "1 of 2 seeds" in text


def test_the_page_tells_who_knows_what_cost_and_command(page: Path) -> None:
    text = page.read_text()
    assert "the updates of honest clients" in text
    assert "What each defense cost" in text
    assert "python -m fedllm_sec.benchmark recipes/grids/quick.yaml" in text
    assert text.count('role="img"') == 6  # curves of accuracy and of attack success under three attacks


def test_the_same_grid_gives_the_same_bytes(broken_grid: Path, page: Path) -> None:
    before = page.read_bytes()
    assert write_report(broken_grid).read_bytes() == before


def hostile(folder: Path) -> Path:
    grid = write_grid(folder, attacks=["ipm"], defenses=["none", "multi_krum"], more={"seed": ["0"]}, rounds=2)
    content = json.loads((grid / "grid.json").read_text())
    content |= {"name": EVIL, "command": EVIL, "version": EVIL}
    content["axes"] |= {"attack": [EVIL], EVIL: [EVIL, "x"]}
    for cell in content["cells"]:
        cell["axes"] |= {EVIL: EVIL} | ({"attack": EVIL} if not cell["is_twin"] else {})
    content["cells"].append({"folder": "cells/evil", "axes": {"attack": EVIL, "defense": "none"}, "twin": None})
    write_json(grid / "grid.json", content)
    evil = "</script>" + EVIL
    write_json(grid / "cells" / "evil" / "error.json", {"type": evil, "message": evil, "traceback": evil})
    history = grid / "cells" / "ipm-multi_krum-0" / "history.jsonl"
    history.write_text(history.read_text().replace('"4"', json.dumps(evil)))
    return grid


def test_nothing_from_a_grid_becomes_markup(tmp_path: Path) -> None:
    text = write_report(hostile(tmp_path / "g")).read_text()
    found = outline(text)
    assert found.tags.count("script") == 2  # the page's own, and its data
    assert "img" not in found.tags
    assert data_of(text)["name"] == EVIL


def large_grid(folder: Path, source: Path, attacks: int, defenses: int, seeds: int) -> Path:
    """A grid whose cells are copies of one run."""
    axes = {
        "attack": [f"attack_{i}" for i in range(attacks)],
        "defense": [f"defense_{i}" for i in range(defenses)],
        "seed": [str(i) for i in range(seeds)],
    }
    cells = [
        {"folder": f"cells/{a}-{d}-{s}", "axes": {"attack": a, "defense": d, "seed": s}, "twin": None, "is_twin": False}
        for a in axes["attack"]
        for d in axes["defense"]
        for s in axes["seed"]
    ]
    replicate(folder, source, cells)
    write_json(folder / "grid.json", {"format": 1, "name": "large", "version": "0.1.0", "axes": axes, "cells": cells})
    return folder


def test_a_run_with_the_largest_decision_map_takes_less_than_its_share_of_ten_megabytes(
    make_run: MakeRun, tmp_path: Path
) -> None:
    source = make_run(tmp_path / "one", rounds=50, clients=120, malicious=36, rule="multi_krum", quarantine=True)
    folder = large_grid(tmp_path / "large", source, 4, 3, 2)
    size = write_report(folder).stat().st_size
    runs = data_of((folder / "report.html").read_text())["runs"]
    assert sum(len(row) for row in runs[0]["decisions"]["rows"]) == 6000
    assert len(json.dumps(runs)) / len(runs) + (size - len(json.dumps(runs))) / 500 < 10_000_000 / 500


@pytest.mark.slow
def test_five_hundred_runs_stay_below_ten_megabytes(make_run: MakeRun, tmp_path: Path) -> None:
    source = make_run(tmp_path / "one", rounds=50, clients=120, malicious=36, rule="multi_krum", quarantine=True)
    folder = large_grid(tmp_path / "large", source, 10, 10, 5)
    assert write_report(folder).stat().st_size < 10_000_000


# ---------------------------------------------------------------- command


def test_the_command_writes_the_page_of_a_grid(grid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(grid)]) == 0
    assert (grid / "report.html").is_file()
    out = capsys.readouterr().out
    assert "multi_krum has the best worst case" in out
    assert f"report: {grid / 'report.html'}" in out


def test_tables_for_papers_write_no_page(grid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(grid), "--latex"]) == 0
    assert r"\begin{table}" in capsys.readouterr().out
    assert main([str(grid), "--markdown"]) == 0
    assert "| attack | none | median |" in capsys.readouterr().out
    assert not (grid / "report.html").exists()


def test_a_grid_is_given_alone(grid: Path, comparison: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(comparison), str(grid)]) == 2
    assert "is a grid folder, which has a page of its own. Give it alone." in capsys.readouterr().err


# ---------------------------------------------------------------- browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = chromium()
    if program is None:
        pytest.skip("chromium is not installed (Debian: apt-get install chromium)")
    found = Browser(program, tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


def opened(browser: Browser) -> str | None:
    """The title of the open run, None where no run is open."""
    found = browser.run("document.querySelector('dialog[open] h2')?.textContent ?? null")
    return None if found is None else str(found)


def test_the_page_loads_without_a_word_on_the_console_or_a_request(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.console == []
    assert browser.requests == [page.as_uri()]
    assert browser.run("document.querySelectorAll('table.heat').length") == 3


def test_a_click_on_a_square_opens_its_run_and_escape_goes_back_to_it(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.click("table.heat td a", 8)
    assert opened(browser) == "ipm against multi_krum"
    text = browser.run("document.querySelector('dialog').innerText")
    assert "Whom the rule kept" in text
    assert "multi_krum kept 0 of 12 malicious rows and 28 of 28 honest rows under attack." in text
    assert "accelerate launch -m fedllm_sec.train" in text
    assert browser.run("location.hash").startswith("#run-")
    browser.press("Escape")
    assert opened(browser) is None
    assert browser.run("document.activeElement === document.querySelectorAll('table.heat td a')[8]")
    assert browser.console == []


def test_the_keyboard_walks_over_the_squares_and_opens_one(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.run("document.querySelector('table.heat td a').focus()")
    browser.press("ArrowRight")
    browser.press("ArrowDown")
    browser.press("Enter")
    assert opened(browser) == "alie against median"


def test_a_cell_with_several_seeds_leads_to_each_of_them(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.click("table.heat td a", 5)
    assert opened(browser) == "alie against multi_krum"
    assert browser.run("document.querySelector('.seeds strong').textContent") == "seed 1"
    browser.click("dialog .seeds a")
    text = browser.run("document.querySelector('dialog').innerText")
    assert "Failed. DefenseError: multi_krum: needs n >= 2f + 3 clients" in text
    assert "Traceback" in text


def test_an_address_with_a_run_opens_it(browser: Browser, page: Path) -> None:
    browser.open(page, fragment="#run-1")
    assert opened(browser) == "text_trigger against no defense"
    browser.click("dialog .close")
    assert opened(browser) is None


def test_a_click_on_a_title_sorts_the_ranking(browser: Browser, page: Path) -> None:
    browser.open(page)
    names = "[...document.querySelectorAll('.slice table.sortable tbody th')].map((cell) => cell.textContent)"
    assert browser.run(names) == ["multi_krum", "median", "none"]
    buttons = ".slice table.sortable thead button"
    titles = browser.run(f"[...document.querySelectorAll('{buttons}')].map((button) => button.textContent)")
    worst = titles.index("worst accuracy")
    browser.click(buttons, worst)
    assert browser.run(names) == ["none", "median", "multi_krum"]
    browser.click(buttons, worst)
    assert browser.run(names) == ["multi_krum", "median", "none"]


def test_a_further_axis_is_chosen_from_a_list(browser: Browser, split_page: Path) -> None:
    browser.open(split_page)
    shown = "[...document.querySelectorAll('section.slice:not([hidden]) h3')].map((title) => title.textContent)"
    assert browser.run(shown) == ["partition iid", "partition dirichlet"]
    browser.run(
        "(() => { const list = document.querySelector('.split select'); list.selectedIndex = 2;"
        " list.dispatchEvent(new Event('change', {bubbles: true})); })()"
    )
    assert browser.run(shown) == ["partition dirichlet"]
    assert browser.console == []


def test_a_phone_needs_no_sideways_scrolling_of_the_page(browser: Browser, page: Path) -> None:
    browser.open(page, width=390, height=800)
    assert browser.run("document.documentElement.scrollWidth") == 390
    browser.click("table.heat td a", 0)
    assert browser.run("document.querySelector('dialog').scrollWidth <= 390")


def test_a_table_that_is_wider_than_a_phone_says_that_it_scrolls(browser: Browser, page: Path) -> None:
    hint = "getComputedStyle(box, '::before').content.includes('scrolls sideways')"
    boxes = "[...document.querySelectorAll('.scroll')]"
    for width in (390, 1280):
        browser.open(page, width=width)
        browser.run("new Promise((done) => setTimeout(done, 200))")
        said = browser.run(f"{boxes}.map((box) => {hint})")
        assert said == browser.run(f"{boxes}.map((box) => box.scrollWidth > box.clientWidth + 1)")
        assert any(said) or width == 1280
        assert not all(said)
    assert browser.console == []


def test_an_opened_run_says_what_its_measures_mean(browser: Browser, page: Path) -> None:
    browser.open(page, fragment="#run-1")
    text = browser.run("document.querySelector('dialog .terms').textContent")
    assert "malicious dropped" not in text  # no rule selects in an undefended run
    assert "share of triggered held-out rows that got the attacker's answer" in text


def test_hostile_grids_run_nothing_in_a_browser(browser: Browser, tmp_path: Path) -> None:
    browser.open(write_report(hostile(tmp_path / "g")))
    for place in range(4):
        browser.run(f"location.hash = '#run-{place}'")
        browser.run("new Promise((done) => setTimeout(done, 50))")
        assert opened(browser) is not None
    assert browser.run("document.title").startswith("<script>")  # the name as text, not as a script
    assert not browser.run("Boolean(document.querySelector('img'))")
    assert browser.console == []
