"""`searchrl eval` end to end: killed in the middle, resumed on two ranks, and the same as in one go.

Greedy answers do not depend on the seed or on the rank; with one sequence at a time not even on who shares a
batch, which could change the last bits of a log-probability. So answers are compared, log-probabilities not.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from integration.launch import python, run, started

pytestmark = pytest.mark.integration

QUESTIONS = 8
SETTINGS = (
    "+experiment=smoke",
    "data={train: '', eval: questions.jsonl}",  # a model and questions are enough
    "warmstart.demonstrations=0",
    "retrieval=oracle",
    "retrieval.corpus=corpus.jsonl",
    "episode={max_turn_tokens: 300, max_context_tokens: 1024}",
    "engine.max_num_seqs=1",  # and so chunks of four questions
)


def command(name: str, *overrides: str, ranks: int = 1) -> list[str]:
    return python("searchrl.cli", ["eval", *SETTINGS, f"name={name}", *overrides], ranks=ranks)


def write_questions(folder: Path) -> None:
    passage = {"id": "p", "contents": '"Rome"\nRome lies on the Tiber.'}
    rows = [
        {
            "id": f"q{n}",
            "question": f"On which river lies city number {n}?",
            "golden_answers": ["Tiber"],
            "data_source": "nq" if n % 2 else "bamboogle",
            "metadata": {"gold_passages": ["p"], "hops": 1 + n % 2},
        }
        for n in range(QUESTIONS)
    ]
    (folder / "corpus.jsonl").write_text(json.dumps(passage) + "\n", encoding="utf-8")
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "questions.jsonl").write_text(lines, encoding="utf-8")


def results(folder: Path) -> dict[str, Any]:
    lines = [line for path in folder.glob("results.*") for line in path.read_text("utf-8").splitlines()]
    return {row["id"]: row["results"] for row in map(json.loads, lines)}


def test_a_killed_evaluation_ends_as_one_that_was_not(tmp_path: Path) -> None:
    write_questions(tmp_path)
    ended = run(command("whole"), cwd=tmp_path, timeout_s=300)
    assert ended.returncode == 0, ended.stdout
    assert "exact match beside published results" in ended.stdout
    assert "Warning" not in ended.stdout

    file = tmp_path / "runs" / "killed" / "eval" / "results.rank0.jsonl"
    with started(command("killed"), cwd=tmp_path, timeout_s=300) as process:
        while not file.exists() or file.read_bytes().count(b"\n") < 2:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.kill()
        process.wait()
    answered = file.read_bytes().count(b"\n")
    assert 2 <= answered < QUESTIONS

    refused = run(command("killed"), cwd=tmp_path, timeout_s=300)
    assert refused.returncode == 2
    assert "runs/killed holds a run already; continue it with resume=true" in refused.stdout

    ended = run(command("killed", "resume=true", ranks=2), cwd=tmp_path, timeout_s=300)
    assert ended.returncode == 0, ended.stdout
    assert f"resume: {answered} of {QUESTIONS} questions are answered already" in ended.stdout

    whole, killed = tmp_path / "runs" / "whole" / "eval", file.parent
    assert len(results(whole)) == QUESTIONS
    assert results(killed) == results(whole)
    summaries = [json.loads((folder / "summary.json").read_text("utf-8")) for folder in (killed, whole)]
    assert summaries[0]["settings"] == summaries[1]["settings"]
    assert summaries[0]["parts"] == summaries[1]["parts"]
    assert [part["name"] for part in summaries[0]["parts"]] == [
        "nq", "bamboogle", "1 hop", "2 hop", "all", "average"
    ]  # fmt: skip
    assert [part["questions"] for part in summaries[0]["parts"]] == [4, 4, 4, 4, 8, 8]
    table = (whole / "table.md").read_text("utf-8")
    assert "| this model (partial) |" in table
    assert "4 of 125" in table

    # Everything is answered: only settings and tables are left to do.
    again = run(command("killed", "resume=true", "eval.samples=2"), cwd=tmp_path, timeout_s=300)
    assert again.returncode == 2
    assert "- samples: 'greedy' there, '2 at temperature 1, seed 0' here" in again.stdout
