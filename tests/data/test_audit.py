"""The audit of a corpus: against ``contains_answer``, over any number of processes, and when they die."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example as always
from hypothesis import given
from hypothesis import strategies as st

from searchrl.answers import contains_answer, normalize
from searchrl.data import DataError, data_cli, occurrence, read_examples
from searchrl.data.audit import Audit, Verdict, audit, parts, table, write_answerable, write_report
from searchrl.data.occurrence import AnswerFinder, search_corpus
from searchrl.trajectory import Example

PASSAGES = [
    '"Lisbon"\nThe capital of Portugal, on the Tagus.',
    '"U.S.A."\nFounded in 1776; its capital is Washington, D.C.',
    '"Ångström"\nA unit of length: 0.1 nm. «The» is an article.',
    '"The Bank"\nof a river. Yes, and no.',
]
EXPECTED = {
    "lisbon": Verdict.ANSWERABLE,
    "the Capital of a Portugal": Verdict.ANSWERABLE,
    "Lisbon capital": Verdict.ANSWERABLE,  # across title and text, once the article between them is gone
    "bank of river": Verdict.ANSWERABLE,
    "Washington DC": Verdict.ANSWERABLE,
    "USA": Verdict.ANSWERABLE,
    "ÅNGSTRÖM": Verdict.ANSWERABLE,
    "01 nm": Verdict.ANSWERABLE,
    "« » is": Verdict.ANSWERABLE,
    "Lis": Verdict.UNANSWERABLE,
    "capital Portugal": Verdict.UNANSWERABLE,
    "Tagus USA": Verdict.UNANSWERABLE,  # in two passages
    "177": Verdict.UNANSWERABLE,
    "Yes": Verdict.YES_NO,
    "no.": Verdict.YES_NO,
    "The The?": Verdict.EMPTY,
}


def example(number: int, *golds: str, source: str = "set", hops: int = 0) -> Example:
    metadata: dict[str, object] = {"hops": hops} if hops else {}
    return Example(
        id=f"q{number}",
        question=f"What {number}?",
        golden_answers=golds,
        data_source=source,
        metadata=metadata,
    )


def row(each: Example) -> dict[str, object]:
    return {
        "id": each.id,
        "question": each.question,
        "golden_answers": list(each.golden_answers),
        "data_source": each.data_source,
        "metadata": each.metadata,
    }


def write_corpus(path: Path, passages: list[str], *, repeat: int = 1) -> Path:
    lines = "".join(
        json.dumps({"id": str(number), "contents": passage}, ensure_ascii=number % 2 == 0) + "\n"
        for number, passage in enumerate(passages)
    )
    data = (lines * repeat).encode()
    path.write_bytes(gzip.compress(data, 1) if path.suffix == ".gz" else data)
    return path


def write_questions(path: Path, examples: list[Example]) -> Path:
    path.write_text("".join(json.dumps(row(each)) + "\n" for each in examples), encoding="utf-8")
    return path


# --- what occurs ----------------------------------------------------------------------------------------

TEXTS = st.text('aAx2ñΣςİ\u0301’«.-_"\n\u00a0\x1c   ', max_size=12)


@given(st.lists(TEXTS, max_size=4), st.lists(TEXTS, max_size=5))
@always(["x xx", "xx x"], ["x x"])  # beginnings and ends of tokens
@always(["x 2", "x", "x 2"], ["x", "2", "x 2", "x 2 x"])  # answers that share their longest token
def test_found_is_what_is_contained(passages: list[str], golds: list[str]) -> None:
    finder = AnswerFinder(golds)
    seen: set[str] = set()
    for text in passages:
        expected = {normalize(gold) for gold in golds if contains_answer(text, [gold])}
        found = finder.find(text)
        assert sorted(found) == sorted(expected - seen), "each answer once, in the first text that has it"
        seen |= expected


def judged(*pairs: tuple[Example, Verdict]) -> Audit:
    return Audit(examples=[pair[0] for pair in pairs], verdicts=[pair[1] for pair in pairs], passages=7)


MIXED = judged(
    (example(1, "x", source="nq"), Verdict.ANSWERABLE),
    (example(2, "x", source="hop", hops=3), Verdict.UNANSWERABLE),
    (example(3, "x", source="hop", hops=2), Verdict.ANSWERABLE),
    (example(4, "x", source="hop", hops=2), Verdict.YES_NO),
    (example(5, "x", source="hop", hops=2), Verdict.UNANSWERABLE),
    (example(6, "y", "z", source="hop"), Verdict.UNANSWERABLE),
    (example(7, "the", source="odd"), Verdict.EMPTY),
)


def test_counts_by_source_and_hops() -> None:
    assert table(MIXED) == [
        ["hop", "5", "1", "0", "1", "3", "0.250"],
        ["hop, 2 hops", "3", "1", "0", "1", "1", "0.500"],
        ["hop, 3 hops", "1", "0", "0", "0", "1", "0.000"],
        ["nq", "1", "0", "0", "1", "0", "1.000"],
        ["odd", "1", "0", "1", "0", "0", "n/a"],
        ["all", "7", "1", "1", "2", "3", "0.400"],
    ]
    assert (parts(MIXED)[0].share, parts(MIXED)[4].share, parts(MIXED)[-1].source) == (0.25, None, None)


def test_the_report_names_what_is_missing(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "report"
    for _ in range(2):  # the second replaces the first
        write_report(MIXED, out, questions=Path("q.jsonl"), corpus=Path("c.jsonl"))
    assert sorted(path.name for path in out.iterdir()) == ["audit.json", "audit.md"]
    report = json.loads((out / "audit.json").read_text())
    assert (report["passages"], report["questions"], report["corpus"]) == (7, "q.jsonl", "c.jsonl")
    assert report["unanswerable"] == {"hop": ["q2", "q5", "q6"]}
    assert report["empty"] == {"odd": ["q7"]}
    assert report["examples"]["hop"][2] == {"id": "q6", "question": "What 6?", "golden_answers": ["y", "z"]}
    assert report["parts"][-1]["unanswerable"] == 3
    text = (out / "audit.md").read_text()
    assert "| hop, 2 hops | 3 | 1 | 0 | 1 | 1 | 0.500 |" in text
    assert "- What 6? (y; z)" in text


@pytest.mark.parametrize("name", ["q.jsonl", "q.jsonl.gz"])
def test_kept_rows_stay_as_they_are(tmp_path: Path, name: str) -> None:
    lines = [json.dumps(row(each), indent=None) for each in MIXED.examples]
    lines[2] = json.dumps(row(MIXED.examples[2]) | {"extra": ["é", 1.0]}, separators=(",", " :  "))
    questions = tmp_path / name
    content = "\n".join([lines[0], "", *lines[1:4], "  ", *lines[4:]]).encode()
    questions.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    out = tmp_path / "kept" / "o.jsonl"
    assert write_answerable(MIXED, questions, out) == 3
    assert out.read_text(encoding="utf-8") == f"{lines[0]}\n{lines[2]}\n{lines[3]}\n"
    assert read_examples(out) == [MIXED.examples[number] for number in (0, 2, 3)]


def test_rows_of_parquet_become_json_lines(tmp_path: Path) -> None:
    questions = tmp_path / "q.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"id": [each.id for each in MIXED.examples]}), questions)
    assert write_answerable(MIXED, questions, tmp_path / "o.jsonl") == 3
    assert read_examples(tmp_path / "o.jsonl") == [MIXED.examples[number] for number in (0, 2, 3)]


def test_a_set_of_which_nothing_is_left_is_not_written(tmp_path: Path) -> None:
    questions = write_questions(tmp_path / "q.jsonl", [example(1, "x")])
    with pytest.raises(DataError, match=r"no question of .*q\.jsonl is answerable"):
        write_answerable(judged((example(1, "x"), Verdict.UNANSWERABLE)), questions, tmp_path / "o.jsonl")
    assert not (tmp_path / "o.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep-answerable", "q.jsonl"], "--keep-answerable q.jsonl is the question set itself"),
        (["--out", "q.jsonl"], r"no results can be written to q\.jsonl"),
        (["--keep-answerable", "q.jsonl/x"], r"no results can be written to q\.jsonl"),
        (["--corpus", "none"], r"cannot read the corpus: .*'none'"),
        (["--corpus", "."], r"cannot read the corpus: .*'\.'"),
        (["--corpus", "empty"], "empty holds no passages"),
        (["--corpus", "cut.gz"], r"cut\.gz is damaged after line 0"),
        (["--questions", "none"], "none does not exist"),
        (["--workers", "0"], "workers=0: at least one process"),
    ],
)
def test_what_cannot_be_audited_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_questions(Path("q.jsonl"), [example(1, "Lisbon")])
    write_corpus(Path("c.jsonl"), PASSAGES)
    Path("empty").touch()
    Path("cut.gz").write_bytes(write_corpus(Path("c.gz"), PASSAGES).read_bytes()[:-20])
    with pytest.raises(DataError, match=message):
        data_cli.main(["audit", "--questions", "q.jsonl", "--corpus", "c.jsonl", *arguments])


# --- processes ------------------------------------------------------------------------------------------


@pytest.mark.integration
@pytest.mark.parametrize(("workers", "name"), [(1, "c.jsonl"), (2, "c.jsonl"), (3, "c.jsonl.gz")])
def test_any_number_of_workers_finds_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, name: str
) -> None:
    monkeypatch.setattr(occurrence, "BLOCK_BYTES", 100)  # about every passage is a block
    filler = [f'"Nothing {number}"\nhere' for number in range(50)]
    corpus = write_corpus(tmp_path / name, filler + PASSAGES[:2] + filler + PASSAGES[2:])
    if workers == 2:  # the last newline may be missing
        corpus.write_bytes(corpus.read_bytes().removesuffix(b"\n"))
    examples = [example(number, gold) for number, gold in enumerate(EXPECTED)]
    examples += [example(100, "Lis", "The", "USA"), example(101, "Lisbon", "no")]
    read: list[int] = []
    result = audit(examples, corpus, workers=workers, on_bytes=read.append)
    assert result.verdicts == [*EXPECTED.values(), Verdict.ANSWERABLE, Verdict.YES_NO]
    for each, verdict in zip(examples, result.verdicts, strict=True):
        if verdict in (Verdict.ANSWERABLE, Verdict.UNANSWERABLE):
            contained = any(contains_answer(passage, each.golden_answers) for passage in PASSAGES)
            assert (verdict is Verdict.ANSWERABLE) == contained
    assert result.passages == 104
    assert sum(read) == corpus.stat().st_size
    assert multiprocessing.active_children() == []


@pytest.mark.integration
@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not valid JSON in UTF-8"),
        (b"", "not valid JSON in UTF-8"),
        (b'{"id": "1", "contents": "\xff"}', "not valid JSON in UTF-8"),
        (b'{"id": "1", "text": "x"}', 'expected {"id": …, "contents": "…"}'),
    ],
)
def test_the_first_malformed_line_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: bytes, message: str
) -> None:
    monkeypatch.setattr(occurrence, "BLOCK_BYTES", 100)
    corpus = write_corpus(tmp_path / "c.jsonl", PASSAGES)
    good = corpus.read_bytes()
    corpus.write_bytes(good + line + b"\n" + good + b"[]\n" + good)
    with pytest.raises(DataError) as caught:
        search_corpus(["x"], corpus, workers=2)
    assert f"{corpus}, line {len(PASSAGES) + 1}: {message}" in str(caught.value)
    assert multiprocessing.active_children() == []


@pytest.mark.integration
def test_an_archive_that_is_cut_off_is_refused_after_its_good_part(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c.gz", PASSAGES, repeat=10_000)
    corpus.write_bytes(corpus.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"c\.gz is damaged after line [1-9]\d+"):
        search_corpus(["x"], corpus, workers=1)


@pytest.mark.integration
@pytest.mark.parametrize("name", ["c.jsonl", "c.gz"])
def test_a_killed_worker_ends_the_audit(tmp_path: Path, name: str) -> None:
    corpus = write_corpus(tmp_path / name, PASSAGES, repeat=50_000)  # 17 blocks

    def kill_one(_: int) -> None:
        os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)

    with pytest.raises(DataError, match=r"a process that searched .* was killed, often a sign of too little"):
        search_corpus(["x"], corpus, workers=2, on_bytes=kill_one)
    assert multiprocessing.active_children() == []


@pytest.mark.integration
@pytest.mark.parametrize("kill", ["ctrl-c", "kill -9 of the parent"])
def test_no_worker_outlives_the_audit(tmp_path: Path, kill: str) -> None:
    questions = write_questions(tmp_path / "q.jsonl", [example(1, "x")])
    corpus = write_corpus(tmp_path / "c.jsonl", [text * 20 for text in PASSAGES], repeat=20_000)  # 100 MB
    command = [sys.executable, "-m", "searchrl.cli", "data", "audit", "--workers", "2"]
    audit_process = subprocess.Popen(
        [*command, "--questions", str(questions), "--corpus", str(corpus)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # A shell lets what it runs in the background ignore Ctrl-C, and that is inherited.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    try:
        wait_until(lambda: len(list(workers_at_work(audit_process.pid))) == 2)
        found = list(workers_at_work(audit_process.pid))
        if kill == "ctrl-c":
            os.killpg(audit_process.pid, signal.SIGINT)
        else:
            audit_process.kill()
        output, _ = audit_process.communicate(timeout=60)
        assert audit_process.returncode == (130 if kill == "ctrl-c" else -signal.SIGKILL), output
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in found))
    finally:
        audit_process.kill()
        corpus.unlink()  # pytest keeps folders of earlier runs


def workers_at_work(parent: int) -> Iterator[int]:
    """Children that ignore Ctrl-C: a worker that has started."""
    for pid in map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split()):
        fields = dict(
            line.split(":\t", 1)
            for line in Path(f"/proc/{pid}/status").read_text().splitlines()
            if ":\t" in line
        )
        command = Path(f"/proc/{pid}/cmdline").read_text()
        if "spawn_main" in command and int(fields["SigIgn"], 16) & 1 << (signal.SIGINT - 1):
            yield pid


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.integration
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    examples = [example(number, gold, hops=1 + number % 2) for number, gold in enumerate(EXPECTED)]
    questions = write_questions(tmp_path / "q.jsonl", examples)
    corpus = write_corpus(tmp_path / "c.jsonl.gz", PASSAGES)
    command = ["audit", "--questions", str(questions), "--corpus", str(corpus), "--workers", "1"]
    data_cli.main(
        [*command, "--out", str(tmp_path / "out"), "--keep-answerable", str(tmp_path / "kept.jsonl")]
    )
    said = capsys.readouterr().out
    assert "4 passages of" in said
    (line,) = (line for line in said.splitlines() if line.startswith("│ all"))
    assert [cell.strip() for cell in line.split("│")[1:-1]] == ["all", "16", "2", "1", "9", "4", "0.692"]
    assert f"{tmp_path / 'kept.jsonl'} has 11 of 16 questions; 5 were dropped" in said.replace("\n", "")
    assert len(read_examples(tmp_path / "kept.jsonl")) == 11
    assert json.loads((tmp_path / "out" / "audit.json").read_text())["unanswerable"]["set"] == [
        "q9",
        "q10",
        "q11",
        "q12",
    ]
