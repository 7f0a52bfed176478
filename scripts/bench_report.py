"""How large the page of a grid is, and how long a browser takes to open it.

    python scripts/bench_report.py [--runs 500] [--repeats 7]

The grid is synthetic: copies of one run of 120 clients over 50 rounds, whose decision map is the largest that a page
holds. Needs Chromium (Debian: apt-get install chromium). Prints the page's bytes, the CPU seconds of making it, and
the median milliseconds until the page is loaded, until something is painted, and until a clicked run is drawn.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from fedllm_sec.report.page import write_report
from tests.report.browser import Browser, chromium
from tests.report.conftest import write_run
from tests.report.test_grid_page import large_grid

TIMES = """(() => {
  const [loaded] = performance.getEntriesByType("navigation");
  const painted = performance.getEntriesByName("first-contentful-paint")[0];
  return [loaded.loadEventEnd, painted ? painted.startTime : NaN];
})()"""
CLICK = """new Promise((done) => {
  const start = performance.now();
  document.querySelectorAll("table.heat td a")[17].click();
  requestAnimationFrame(() => setTimeout(() => done(performance.now() - start)));
})"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=500, help="a multiple of 100: 10 attacks x 10 defenses x seeds")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    program = chromium()
    if program is None:
        raise SystemExit("chromium is not installed (Debian: apt-get install chromium)")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        run = write_run(place / "run", rounds=50, clients=120, malicious=36, rule="multi_krum", quarantine=True)
        grid = large_grid(place / "grid", run, 10, 10, max(1, options.runs // 100))
        begun = time.process_time()
        page = write_report(grid)
        print(f"{page.stat().st_size:,} bytes, made in {time.process_time() - begun:.1f} CPU seconds")
        browser = Browser(program, place / "profile")
        rows = []
        for _ in range(options.repeats):
            browser.open(page)
            rows.append((*browser.run(TIMES), browser.run(CLICK)))
        browser.close()
        for name, values in zip(("loaded", "first paint", "a run opened"), zip(*rows, strict=True), strict=True):
            print(f"{name}: {statistics.median(values):.0f} ms (from {min(values):.0f} to {max(values):.0f})")


if __name__ == "__main__":
    main()
