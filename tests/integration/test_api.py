"""The Python API: several runs in one process; and `searchrl play` with an engine, at a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import time
from pathlib import Path

import pytest

from example import ROOT
from integration.launch import Checks, environment, python, run_checks

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
        assert left == {"variables": [], "groups": False, "children": [], "threads": []}


def test_training_returns_what_it_made(checks: Checks) -> None:
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(checks.results["model"])
    assert checks.results["steps"] == [1, 1]  # the step, and the evaluation after it
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


# --- searchrl play --------------------------------------------------------------------------------------

PLAY = (
    "+experiment=smoke",
    "model.path=random:tiny",
    "data={train: '', eval: questions.jsonl}",
    "retrieval.corpus=corpus.jsonl",
    "warmstart.demonstrations=0",
    "episode={prompt_template: '{question}', max_turn_tokens: 400, max_context_tokens: 2048}",
)


class Terminal:
    """A command at a terminal of its own: what it prints, piece by piece, and keys for it."""

    def __init__(self, command: list[str], folder: Path) -> None:
        self._master, slave = pty.openpty()
        variables = environment() | {"TMPDIR": str(folder), "TERM": "xterm", "NO_COLOR": "1"}

        def enter() -> None:
            os.login_tty(slave)
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's job in the background ignores it

        self.process = subprocess.Popen(command, cwd=folder, env=variables, preexec_fn=enter)
        os.close(slave)
        self.pieces = 0
        """How often something came from it."""
        self._unread = ""

    def until(self, text: str, timeout_s: float = 240) -> str:
        """What is printed up to ``text``."""
        deadline = time.monotonic() + timeout_s
        while text not in self._unread:
            ready, _, _ = select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"no {text!r} within {timeout_s} s:\n{self._unread}"
            try:
                self._unread += os.read(self._master, 65536).decode(errors="replace")
            except OSError:  # the other side has closed it
                raise AssertionError(f"it ended without printing {text!r}:\n{self._unread}") from None
            self.pieces += 1
        before, found, self._unread = self._unread.partition(text)
        return before + found

    def type(self, keys: str) -> None:
        """Press keys."""
        os.write(self._master, keys.encode())

    def close(self) -> None:
        """End what is left of it."""
        self.process.kill()
        self.process.wait()
        os.close(self._master)


def test_a_policy_is_watched_interrupted_and_left_at_a_terminal(folder: Path, tmp_path: Path) -> None:
    for name in ("corpus.jsonl", "questions.jsonl"):
        (tmp_path / name).symlink_to(folder / name)
    terminal = Terminal(python("searchrl.cli", ["play", *PLAY]), tmp_path)
    try:
        terminal.until("question> ")
        terminal.type(":example q0\n")
        before = terminal.pieces
        shown = terminal.until("gold answer read")
        assert terminal.pieces - before > 10, "tokens come as they are sampled, not at the end"
        assert "sampled     | " in shown
        assert re.search(r"outcome: \w+, \d search(es)?, \d{3,} sampled tokens", shown)
        assert "gold:    Peru" in shown
        assert "\x1b[3" not in shown, "no colours where NO_COLOR is set"
        terminal.until("question> ")
        terminal.type("Who?\n")
        terminal.until("sampled     | ")
        terminal.type("\x03")
        terminal.until("dropped")
        terminal.until("question> ")
        terminal.type("\x04")
        assert terminal.process.wait(60) == 0
    finally:
        terminal.close()
    assert not (tmp_path / "runs").exists()
    assert list(tmp_path.glob("searchrl-*")) == []
