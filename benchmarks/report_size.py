"""How long `searchrl report` takes for a run of many trajectories, how large it is, and when it can be used.

    python benchmarks/report_size.py --trajectories 100000

The run is generated: random words, a third of its tokens uncertain, three turns a trajectory. Chromium opens
the page from ``file://``: *interactive* is when the list stands there and the first transcript is open. A
search goes through all trajectories; the last transcript is one that was not read before.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from playwright.sync_api import Page, sync_playwright
from tokenizers import Tokenizer

from searchrl.report.command import main as report

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from report.generated import make_run

GROUPS, SIZE = 64, 8


def measure(page: Page, path: Path) -> dict[str, float]:
    """Seconds of what a reader waits for."""
    seconds = {}

    def timed(name: str, begin: float) -> None:
        seconds[name] = time.perf_counter() - begin

    begin = time.perf_counter()
    page.goto(f"{path.as_uri()}#trajectories", wait_until="commit")
    page.wait_for_selector("#transcript h2")
    timed("interactive", begin)
    page.wait_for_load_state("load")
    timed("all of it loaded", begin)
    begin = time.perf_counter()
    total = page.text_content("#count")
    page.fill("input[type=search]", "ba")
    page.wait_for_function("total => document.getElementById('count').textContent !== total", arg=total)
    timed("first search", begin)
    begin = time.perf_counter()
    page.fill("input[type=search]", "")
    page.wait_for_function("total => document.getElementById('count').textContent === total", arg=total)
    timed("second search", begin)
    before = page.text_content("#transcript .where")
    page.focus("#list")
    begin = time.perf_counter()
    page.keyboard.press("End")
    page.wait_for_function(
        "before => document.querySelector('#transcript .where').textContent !== before", arg=before
    )
    timed("last transcript", begin)
    begin = time.perf_counter()
    page.keyboard.press("1")
    page.wait_for_selector("html[data-charts=drawn]")
    timed("curves", begin)
    return seconds


def main() -> None:
    """Generate, write, open."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trajectories", type=int, default=100_000)
    parser.add_argument("--tokenizer", default="assets/models/smollm2-135m-instruct/tokenizer.json")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--folder", type=Path, help="an earlier run of this benchmark (default: a new one)")
    given = parser.parse_args()
    tokenizer = Tokenizer.from_file(given.tokenizer)
    with tempfile.TemporaryDirectory() as scratch:
        run = given.folder or Path(scratch) / "run"
        if not run.exists():
            make_run(
                run,
                steps=-(-given.trajectories // (GROUPS * SIZE)),
                groups=GROUPS,
                size=SIZE,
                encode=lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids),
            )
            (run / "model").mkdir()
            (run / "model" / "tokenizer.json").write_bytes(Path(given.tokenizer).read_bytes())
        size = sum(path.stat().st_size for path in run.rglob("*.jsonl"))
        print(f"run: {size / 2**20:.0f} MiB of JSON lines", flush=True)
        report([str(run)])
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=given.chromium, args=["--no-sandbox"])
            for name, value in measure(browser.new_page(), run / "report.html").items():
                print(f"{name}: {value:.2f} s")
            browser.close()


if __name__ == "__main__":
    main()
