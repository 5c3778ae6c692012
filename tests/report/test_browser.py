"""The page in a real browser: Chromium, without a window, from file:// and from the server that watches."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from report.generated import make_run, syllables
from report.test_report import HOSTILE
from searchrl.report import page as page_module
from searchrl.report.command import main

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)"),
]


@dataclass(slots=True)
class Opened:
    """A page, and what went wrong in it."""

    page: Page
    faults: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def opened(browser: Browser) -> Iterator[Opened]:
    """A page that fails its test if anything is logged as an error or asked of the network."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    found = Opened(context.new_page())
    found.page.on("pageerror", lambda error: found.faults.append(str(error)))
    found.page.on(
        "console", lambda m: found.faults.append(m.text) if m.type in ("error", "warning") else None
    )
    yield found
    context.close()
    assert found.faults == []


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20,000 trajectories, one of them hostile, and a report."""
    folder = tmp_path_factory.mktemp("report") / "run"
    make(folder, steps=50, groups=50)
    path = folder / "trajectories/step-000002.rank0.jsonl"
    first, rest = path.read_text(encoding="utf-8").split("\n", 1)
    path.write_text(json.dumps(hostile(json.loads(first))) + "\n" + rest, encoding="utf-8")
    main([str(folder)])
    return folder


def make(folder: Path, *, steps: int, groups: int, seed: int = 0) -> Path:
    tokenizer = syllables()
    make_run(
        folder,
        steps=steps,
        groups=groups,
        length=1,
        encode=lambda text: tokenizer.encode(text).ids,
        seed=seed,
    )
    (folder / "model").mkdir()
    tokenizer.save(str(folder / "model/tokenizer.json"))
    return folder


def hostile(record: dict[str, Any]) -> dict[str, Any]:
    """The record with ``HOSTILE`` wherever text stands."""
    text = HOSTILE + " hostile"
    turn = {**record["turns"][0], "sampled": text, "query": text, "appended": f"Doc 1(Title: {text}) {text}"}
    turn["documents"] = [{"id": text, "title": text, "score": 1.0}]
    turns = [turn, {**record["turns"][1], "appended": text, "appended_by": "inserted", "documents": []}]
    texts = dict.fromkeys(("question", "question_id", "answer", "error"), text)
    return {**record, **texts, "golden_answers": [text], "turns": [*turns, record["turns"][2]]}


def chart(page: Page, title: str) -> Locator:
    return page.locator("figure", has=page.get_by_role("heading", name=title, exact=True))


def wait_for_list(page: Page, text: str) -> None:
    expect(page.locator("#count")).to_have_text(text)


def test_curves_are_drawn(run: Path, opened: Opened) -> None:
    page = opened.page
    page.goto((run / "report.html").as_uri())
    page.wait_for_selector("html[data-charts=drawn]")
    titles = page.locator("figure:not([hidden]) h2").all_text_contents()
    assert {"Exact match", "Reward", "Time of a step", "Memory at its peak", "Entropy"} <= set(titles)
    lines = chart(page, "Exact match").locator(".scatterlayer .js-line")
    assert len(lines.first.get_attribute("d") or "") > 100
    page.select_option("#metric", "update/lr")
    expect(chart(page, "Any metric").locator(".js-line")).to_have_count(1)
    page.keyboard.press("2")
    expect(page.locator("#tables h2").first).to_have_text("Key figures")
    page.keyboard.press("1")
    chart(page, "Entropy").locator(".nsewdrag").click()
    expect(page.locator("#count")).to_have_text("400 of 20,000")


def test_twenty_thousand_trajectories_are_filtered_and_walked_through(run: Path, opened: Opened) -> None:
    page = opened.page
    page.goto(f"{(run / 'report.html').as_uri()}#trajectories")
    wait_for_list(page, "20,000 of 20,000")
    assert page.locator("#list .row").count() < 60, "rows out of sight exist"
    begin = time.perf_counter()
    page.select_option("select[name=exact]", "1")
    page.fill("input[aria-label='step, to']", "3")
    page.select_option("select[name=hops]", "2")
    kept = page.text_content("#count") or ""
    assert time.perf_counter() - begin < 5
    assert 0 < int(kept.split()[0].replace(",", "")) < 600
    assert page.locator("#list .row:not(.right)").count() == 0
    expect(page.locator("#transcript .where")).to_contain_text("2 hop")
    page.click("#filters button[type=reset]")
    wait_for_list(page, "20,000 of 20,000")
    page.fill("input[aria-label='reward, from']", "1.4")
    page.select_option("select[name=sort]", "-reward")
    expect(page.locator("#list .row .reward").first).to_have_text("1.4")
    page.click("#filters button[type=reset]")
    page.focus("#list")
    page.keyboard.press("End")
    expect(page.locator("#transcript .where")).to_contain_text("step 50, group 2499, #7")
    page.keyboard.press("k")
    expect(page.locator("#transcript .where")).to_contain_text("group 2499, #6")
    page.keyboard.press("/")
    page.keyboard.type("generated-1234")
    wait_for_list(page, "8 of 20,000")
    page.keyboard.press("Escape")
    page.keyboard.press("j")
    expect(page.locator("#transcript .where")).to_contain_text("group 1234, #1")


def test_tokens_have_their_provenance_and_numbers(run: Path, opened: Opened) -> None:
    page = opened.page
    page.goto(f"{(run / 'report.html').as_uri()}#trajectories")
    record = json.loads((run / "trajectories/step-000001.rank0.jsonl").read_text().splitlines()[0])
    trainer = json.loads((run / "trainer_logprobs/step-000001.rank0.jsonl").read_text().splitlines()[0])
    expect(page.locator("#transcript .token")).to_have_count(
        sum(len(t["token_ids"]) for t in record["turns"])
    )
    labels = page.locator("#transcript .block h4").all_text_contents()
    assert [label.split("turn")[0].split("3 doc")[0].strip() for label in labels] == [
        *("prompt", "sampled", "observation", "sampled", "observation", "sampled")
    ]
    page.locator("#transcript .token").nth(2).hover()
    told = dict(
        zip(
            page.locator("#tip dt").all_text_contents(),
            page.locator("#tip dd").all_text_contents(),
            strict=True,
        )
    )
    engine, ours = record["turns"][0]["logprobs"][2], trainer["logprobs"][2]
    assert float(told["engine log-prob"].split()[0].replace("−", "-")) == pytest.approx(engine, abs=1e-4)
    assert float(told["trainer log-prob"].replace("−", "-")) == pytest.approx(ours, abs=1e-4)
    assert float(told["ratio"]) == pytest.approx(2.718281828 ** (ours - engine), abs=1e-4)
    details = page.locator("#transcript .observation details")
    expect(details).to_have_count(6)
    assert not details.first.evaluate("element => element.open")
    page.focus("#list")
    page.keyboard.press("d")
    assert details.first.evaluate("element => element.open")
    page.keyboard.press("g")
    expect(page.locator("#transcript .member")).to_have_count(8)
    expect(page.locator("#transcript .member.chosen")).to_have_count(1)
    page.keyboard.press("ArrowRight")
    expect(page.locator("#spoken")).to_contain_text("engine log-prob")


def test_hostile_text_is_shown_and_does_nothing(run: Path, opened: Opened) -> None:
    page = opened.page
    page.goto(f"{(run / 'report.html').as_uri()}#trajectories")
    page.fill("input[type=search]", "onerror")
    wait_for_list(page, "8 of 20,000")
    expect(page.locator("#transcript h2")).to_contain_text("<img src=x onerror")
    page.focus("#list")
    page.keyboard.press("d")
    page.keyboard.press("g")
    expect(page.locator("#transcript .member")).to_have_count(8)
    assert page.locator("img").count() == 0
    assert "owned" not in page.title()
    assert page.locator("#transcript .inserted").first.text_content()


def test_what_is_injected_all_the_same_may_not_run(run: Path, opened: Opened) -> None:
    """The content security policy is the second wall: markup that somehow got in has no rights."""
    page = opened.page
    page.goto((run / "report.html").as_uri())
    page.wait_for_selector("html[data-ready=yes]")
    page.evaluate(
        "() => { document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"owned = 1\">') }"
    )
    page.evaluate("() => fetch('http://127.0.0.1:9/').catch(() => null)")
    assert page.evaluate("() => typeof owned") == "undefined"
    assert opened.faults, "the policy says nothing"
    assert all("Content Security Policy" in fault for fault in opened.faults), opened.faults
    opened.faults.clear()


def test_runs_are_compared(tmp_path: Path, opened: Opened) -> None:
    runs = [make(tmp_path / name, steps=4, groups=2, seed=n) for n, name in enumerate("ab")]
    main(["--compare", *map(str, runs)])
    page = opened.page
    page.goto((runs[0] / "compare.html").as_uri())
    page.wait_for_selector("html[data-charts=drawn]")
    expect(chart(page, "Entropy").locator(".legendtext")).to_have_text(["a", "b"])
    page.keyboard.press("3")
    page.select_option("select[name=run]", label="b")
    wait_for_list(page, "64 of 64")
    question = json.loads((runs[1] / "trajectories/step-000001.rank0.jsonl").read_text().splitlines()[0])
    expect(page.locator("#transcript h2")).to_have_text(question["question"])


def test_transcripts_beside_the_page_are_read_from_there(
    tmp_path: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_module, "INLINE_LIMIT", 1000)
    run = make(tmp_path / "run", steps=2, groups=2)
    main([str(run)])
    opened.page.goto(f"{(run / 'report.html').as_uri()}#trajectories")
    expect(opened.page.locator("#transcript .where")).to_contain_text("step 1")
    opened.page.focus("#list")
    opened.page.keyboard.press("End")
    expect(opened.page.locator("#transcript .where")).to_contain_text("step 2")


@contextmanager
def watching(run: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The command itself, and the address that it says."""
    source = str(Path(__file__).parents[2] / "src")
    command = [sys.executable, "-m", "searchrl.cli", "report", str(run), "--watch", "--port", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": source}
    ) as process:
        try:
            assert process.stdout is not None
            address = re.match(r"(http://127\.0\.0\.1:\d+/)", process.stdout.readline())
            assert address is not None
            yield address[1], process
        finally:
            process.kill()


def test_a_run_is_watched(tmp_path: Path, opened: Opened) -> None:
    """New steps arrive by themselves; the filters, what is chosen and how far one has read stay."""
    whole = make(tmp_path / "whole", steps=3, groups=4)
    run = make(tmp_path / "run", steps=2, groups=4)
    page = opened.page
    with watching(run) as (address, process):
        page.goto(f"{address}#trajectories")
        wait_for_list(page, "64 of 64")
        page.select_option("select[name=hops]", "2")
        wait_for_list(page, "32 of 64")
        page.focus("#list")
        page.keyboard.press("End")
        expect(page.locator("#transcript .where")).to_contain_text("step 2, group 7, #7")
        page.locator("#transcript").evaluate("element => { element.scrollTop = 50 }")
        for name in ("trajectories", "trainer_logprobs"):
            shutil.copy(whole / name / "step-000003.rank0.jsonl", run / name)
        line = (whole / "metrics.jsonl").read_text().splitlines()[2]
        with (run / "metrics.jsonl").open("a") as file:
            file.write(line + "\n")
        wait_for_list(page, "48 of 96")
        expect(page.locator("#subtitle")).to_contain_text("3 steps, 96 trajectories")
        expect(page.locator("#transcript .where")).to_contain_text("step 2, group 7, #7")
        assert page.locator("#transcript").evaluate("element => element.scrollTop") == 50
        page.focus("#list")
        page.keyboard.press("End")
        expect(page.locator("#transcript .where")).to_contain_text("step 3, group 11, #7")
        page.keyboard.press("1")
        page.wait_for_selector("html[data-charts=drawn]")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0
        page.wait_for_selector("html[data-connection=down]")
        page.goto("about:blank")  # it would ask again, and the browser itself logs that nobody answers
        opened.faults.clear()
