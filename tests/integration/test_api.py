"""The Python API: several runs in one process; and `searchrl play` with an engine, at a terminal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from example import ROOT
from integration.launch import Checks, run_checks

pytestmark = pytest.mark.integration

PASSAGES = ('"Accra"\nAccra is the capital of Ghana.', '"Lima"\nLima is in Peru.')
QUESTIONS = ("What is the capital of Ghana?", "Where is Lima?", "Which town is in Peru?")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, questions, and ``examples``."""
    made = tmp_path_factory.mktemp("api")
    passages = [{"id": str(number), "contents": text} for number, text in enumerate(PASSAGES)]
    questions = [
        {
            "id": f"q{number}",
            "question": question,
            "golden_answers": ["Peru"],
            "data_source": "ab"[number % 2],
            "metadata": {"hops": 1},
        }
        for number, question in enumerate(QUESTIONS)
    ]
    for name, rows in (("corpus", passages), ("questions", questions)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (made / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    (made / "examples").symlink_to(ROOT / "examples")
    return made


@pytest.fixture(scope="module")
def checks(folder: Path) -> Checks:
    return run_checks("api_checks", folder)


def test_a_rollout_answers_every_question_so_many_times(checks: Checks) -> None:
    assert checks.results["questions"] == ["Who? " * 3, "Where?"]
    for group in checks.results["rollout"]:
        first, second = group
        assert first != second  # each of its own
        assert all(any(turns) for turns in group)


def test_a_run_leaves_no_engine_no_group_no_process_and_no_rank(checks: Checks) -> None:
    for left in checks.results["left"]:
        assert left == {"variables": [], "groups": False, "children": [], "threads": ["MainThread"]}


def test_training_returns_what_it_made(checks: Checks) -> None:
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(checks.results["model"])
    assert checks.results["steps"] == [0, 1, 1]
    (cost,) = (cost for cost in checks.results["searches"] if cost is not None)
    assert cost == 0  # a custom reward pays for searches itself
    assert "reward: " in checks.printed
    assert "exact match: " in checks.printed


@pytest.mark.parametrize(("name", "questions"), [("before", 2), ("after", 2), ("held out", 3)])
def test_evaluations_have_intervals(checks: Checks, name: str, questions: int) -> None:
    result = checks.results[name]
    low, value, high = result["interval"]
    assert 0 <= low <= value <= high <= 1
    assert low < high
    assert (result["questions"], result["sources"]) == (questions, ["a", "b"])


def test_a_process_trains_twice_with_a_function_of_the_script(checks: Checks) -> None:
    step = next(record for record in checks.results["again"] if "update/grad_norm" in record)
    assert step["reward/custom"] == pytest.approx(step["reward/mean"])
    assert step["update/grad_norm"] > 0
    assert "  import_path: __main__:by_length" in checks.results["reward"]


def test_errors_are_exceptions_and_only_training_and_evaluation_write(checks: Checks) -> None:
    kind, message = checks.results["refused"]
    assert kind == "ConfigError"
    assert "runs/again holds a run already" in message
    assert checks.results["run directories"] == ["again", "script", "script-all"]
