"""report.html as a file and in a real browser."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fedllm_sec.report.__main__ import main
from fedllm_sec.report.page import terminal_summary, write_report

MakeRun = Callable[..., Path]

EVIL = "<script>document.title='owned'</script><img src=x onerror=alert(1)>"
VOID = {"meta", "link", "br", "wbr", "img", "path", "use", "image", "rect", "stop", "circle", "line"}


class Outline(HTMLParser):
    """Tags, ids and whether every element is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self.ids += [values["id"]] if values.get("id") else []  # type: ignore[list-item]
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def outline(page: str) -> Outline:
    parser = Outline()
    parser.feed(page)
    return parser


def test_the_page_holds_finding_table_curves_clients_recipe_and_command(whole_page: str) -> None:
    page = whole_page
    assert "brought it down to" in page
    assert page.count('role="img"') == 10  # 4 curves, 4 of norms, one of decisions, one of weights
    assert "3 of 98304 values are not finite" in page
    assert "accelerate launch -m fedllm_sec.train recipes/llm/ag_news_backdoor.yaml" in page
    assert "local_steps: 12" in page
    assert "nothing of the other clients" in page
    assert "multi_krum kept 2 of 54 malicious rows" in page


def test_the_page_is_well_formed_has_unique_ids_and_needs_no_network(whole_page: str) -> None:
    found = outline(whole_page)
    assert found.open == []
    assert len(found.ids) == len(set(found.ids))
    assert all(link.startswith(("#", "data:")) for link in found.links)
    assert {link[1:] for link in found.links if link.startswith("#")} <= set(found.ids)
    assert found.tags.count("h1") == 1


def test_the_same_folder_gives_the_same_bytes(comparison: Path) -> None:
    folder = comparison / "multi_krum"
    assert write_report(folder).read_bytes() == write_report(folder).read_bytes()


def hostile(make_run: MakeRun, folder: Path) -> Path:
    def change(recipe: dict[str, Any]) -> None:
        recipe["attack"]["data"][0] |= {"trigger": EVIL, "target": EVIL}
        recipe["model"]["name"] = EVIL

    settings = {"rounds": 4, "clients": 5, "malicious": 1, "rule": "multi_krum", "quarantine": True}
    make_run(folder / "_$x^{2", change=change, **settings)
    path = folder / "_$x^{2" / "history.jsonl"
    path.write_text(path.read_text().replace('"4"', json.dumps(EVIL)).replace("3 of 98304 values", EVIL))
    environment = folder / "_$x^{2" / "environment.json"
    environment.write_text(json.dumps({"command": EVIL, "device": [EVIL], EVIL: 1}))
    return folder / "_$x^{2"


def test_nothing_from_a_file_becomes_markup(make_run: MakeRun, tmp_path: Path) -> None:
    page = write_report(hostile(make_run, tmp_path)).read_text()
    found = outline(page)
    assert found.tags.count("script") == 1
    assert "img" not in found.tags
    assert page.count("&lt;script&gt;") > 5


def test_a_hundred_clients_over_thirty_rounds_stay_small(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "big", clients=100, malicious=30, rounds=30, rule="multi_krum", quarantine=True)
    assert write_report(folder).stat().st_size < 500_000


def test_many_runs_leave_out_client_pictures_and_say_so(make_run: MakeRun, tmp_path: Path) -> None:
    for place in range(14):
        make_run(tmp_path / "grid" / f"run{place:02}", rounds=2, clients=4, malicious=1, rule="median", seed=place)
    page = write_report(tmp_path / "grid").read_text()
    assert "drawn for up to 12 runs; there are 14" in page
    assert "other runs" in page


def test_the_terminal_summary_has_the_finding_and_the_table(comparison: Path) -> None:
    text = terminal_summary(comparison)
    assert text.startswith('The trigger " cf" made')
    assert "97 % [92, 99]" in text


# ---------------------------------------------------------------- command


def test_the_command_writes_a_page_and_prints_where(comparison: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = comparison / "attack-free"
    assert main([str(folder)]) == 0
    assert (folder / "report.html").is_file()
    assert f"report: {folder / 'report.html'}" in capsys.readouterr().out


def test_a_table_alone_writes_no_page(comparison: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(comparison), "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("| run |")
    assert main([str(comparison), "--latex"]) == 0
    assert r"\begin{tabular}" in capsys.readouterr().out
    assert not (comparison / "report.html").exists()


def test_a_table_and_a_page_when_both_are_asked_for(comparison: Path, tmp_path: Path) -> None:
    assert main([str(comparison / "attacked"), "--latex", "--out", str(tmp_path / "x.html")]) == 0
    assert (tmp_path / "x.html").is_file()


def test_a_mistake_is_one_line_and_an_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1


# ---------------------------------------------------------------- browser

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--enable-logging=stderr", "--v=0"),
]
Browse = Callable[..., tuple[str, list[str]]]


@pytest.fixture
def browse(tmp_path: Path) -> Browse:
    """Load a page in headless Chromium: its DOM after loading, and what it wrote to the console."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("chromium is not installed (Debian: apt-get install chromium)")

    def load(page: Path) -> tuple[str, list[str]]:
        done = subprocess.run(
            [chromium, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]

    return load


def test_the_page_loads_without_a_word_on_the_console(whole_page: str, tmp_path: Path, browse: Browse) -> None:
    (tmp_path / "report.html").write_text(whole_page)
    dom, console = browse(tmp_path / "report.html")
    assert "What was attacked and defended" in dom
    assert console == []


def test_hostile_files_run_nothing_in_a_browser(make_run: MakeRun, tmp_path: Path, browse: Browse) -> None:
    dom, console = browse(write_report(hostile(make_run, tmp_path)))
    assert "<title>owned" not in dom
    assert console == []


def test_a_click_on_a_title_sorts_the_table(whole_page: str, tmp_path: Path, browse: Browse) -> None:
    clicks = """
      const buttons = [...document.querySelectorAll("thead button")];
      const title = buttons.find((b) => b.textContent === "attack success");
      const rows = document.querySelector("table").tBodies[0].rows;
      const names = () => [...rows].map((row) => row.cells[0].textContent.trim());
      title.click(); const up = names(); title.click(); const down = names();
      document.title = JSON.stringify({up, down, state: title.closest("th").getAttribute("aria-sort")});
    """
    page = re.sub(r"script-src '[^']*'", "script-src 'unsafe-inline'", whole_page)
    (tmp_path / "clicked.html").write_text(page.replace("</body>", f"<script>{clicks}</script></body>"))
    dom, console = browse(tmp_path / "clicked.html")
    assert console == []
    seen = json.loads(re.search(r"<title>(.*?)</title>", dom)[1])  # type: ignore[index]
    # what was not measured stays last either way
    assert seen["up"] == ["multi_krum", "geometric_median", "attacked", "attack-free"]
    assert seen["down"] == ["attacked", "geometric_median", "multi_krum", "attack-free"]
    assert seen["state"] == "descending"


def test_a_script_that_is_not_the_page_s_own_is_blocked(whole_page: str, tmp_path: Path, browse: Browse) -> None:
    script = "<script>document.title = 'owned'</script></body>"
    (tmp_path / "bad.html").write_text(whole_page.replace("</body>", script))
    dom, console = browse(tmp_path / "bad.html")
    assert "<title>owned" not in dom
    assert any("Content Security Policy" in line for line in console)
