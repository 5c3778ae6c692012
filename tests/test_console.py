"""What a person sees: in a real terminal (a pty), and where there is none."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from integration.launch import environment
from searchrl.console import Console

HIDDEN_CURSOR = "\x1b[?25l"

RUN = """\
import sys, time
from searchrl.console import Console

class Activity:
    searching = 0
    def __str__(self):
        return f"{self.searching} searching"

activity = Activity()
console = Console(enabled=True)
console.say("model: [bold]x[/] :cat:")
for step in range(1, 23):
    with console.progress(f"step {step} episodes", 8, detail=activity, in_step=True) as advance:
        for item in range(8 if step > 1 else 5):
            advance(item)
        if step == 1:
            activity.searching = 2
            time.sleep(0.6)
            print("printed meanwhile", flush=True)
    console.step(step, 1000, {"time/step": 0.2, "reward/mean": 10.0 ** step, "rollout/void": 0.125})
console.warn("watch: entropy")
console.table("t", ("questions", "n"), [("all [0.1]", "4")])
console.step(23, 1000, {"time/step": 0.2})
"""

UPDATE_BESIDE_A_ROLLOUT = """\
import time
from searchrl.console import Console

console = Console(enabled=True)
with console.progress("step 2 episodes", 8):
    with console.progress("step 1 update", 4):
        time.sleep(0.6)
    time.sleep(0.6)
"""

STOPPED = """\
import os, signal, sys, time
from searchrl.console import Console
from searchrl.environment import say_stopping

asked = []
def notice(number, frame):
    asked.append(number)
    say_stopping(number)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
signal.signal(signal.SIGINT, notice)
console = Console(enabled=True, is_stopping=lambda: bool(asked))
console.say("before")
with console.progress("step 1 episodes", 8) as advance:
    time.sleep(0.6)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.6)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
"""


def in_a_terminal(script: str, *, columns: int = 130, **variables: str) -> tuple[str, int]:
    """What ``script`` writes to a terminal, and its exit code."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    inherited = {name: value for name, value in environment().items() if name not in ("COLUMNS", "NO_COLOR")}
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=inherited | {"TERM": "xterm-256color"} | variables,
    ) as process:
        os.close(theirs)
        written = b""
        try:
            while part := os.read(ours, 65536):
                written += part
        except OSError:  # EIO: the last who could write has gone
            pass
        os.close(ours)
    return written.decode(), process.returncode


def screen(written: str) -> list[str]:
    """What the terminal shows in the end: it knows carriage return, newline, line up, and erasing a line."""
    lines, row, column = [""], 0, 0
    for text, code in re.findall(r"([^\x1b\r\n]+)|(\x1b\[[0-9;?]*[A-Za-z]|\r|\n)", written):
        if text:
            lines[row] = lines[row][:column].ljust(column) + text + lines[row][column + len(text) :]
            column += len(text)
        elif code == "\r":
            column = 0
        elif code == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif code == "\x1b[1A":
            row -= 1
        elif code == "\x1b[2K":
            lines[row] = ""
        elif code == "\x1b[K":
            lines[row] = lines[row][:column]
        else:
            assert code.endswith("m"), repr(code)
    return lines


def test_a_run_in_a_terminal_leaves_lines_that_line_up_and_no_bar() -> None:
    written, code = in_a_terminal(RUN)
    assert code == 0, written
    assert HIDDEN_CURSOR not in written  # nobody could bring it back after kill -9
    bar = re.search(r"step 1 episodes .*?5/8.*? 2 searching .*?\d:\d\d:\d\d", written)
    assert bar is not None, written
    shown = screen(written)
    assert "printed meanwhile" in shown
    assert not any("searching" in line for line in shown)
    assert "model: [bold]x[/] :cat:" in shown  # text of models is not interpreted
    steps = [line for line in shown if line.startswith("step ")]
    headers = [line for line in steps if line.startswith("step  ")]
    assert len(headers) == 3  # at first, after 20 steps, after a table
    assert [steps.index(header, at) for header, at in zip(headers, (0, 1, 22), strict=True)] == [0, 21, 24]
    rows = [line for line in steps if line not in headers]
    assert [line.split()[1] for line in rows] == [f"{step}/1000" for step in range(1, 24)]
    end = headers[0].index("void") + len("void")
    assert {line[end - 5 : end] for line in rows[:22]} == {"12.5%"}
    assert "\x1b[1;33mwatch: entropy" in written


def test_colours_can_be_refused() -> None:
    written, code = in_a_terminal(RUN, NO_COLOR="1")
    assert code == 0
    assert re.search(r"\x1b\[[0-9;]*3[0-9]", written) is None
    assert "watch: entropy" in written


def test_of_two_bars_one_is_shown() -> None:
    written, code = in_a_terminal(UPDATE_BESIDE_A_ROLLOUT)
    assert code == 0, written
    first, second = written.index("step 1 update"), written.rindex("step 2 episodes")
    assert first < second
    assert "\x1b[1A" not in written  # never more than a line, which another process can take away
    assert screen(written) == [""]


def test_nothing_half_drawn_is_left_by_ctrl_c_nor_by_a_second_one() -> None:
    written, code = in_a_terminal(STOPPED)
    assert code == -signal.SIGINT
    assert "step 1 episodes" in written
    assert HIDDEN_CURSOR not in written
    assert screen(written) == ["before", "searchrl: SIGINT: stopping; from now on Ctrl-C leaves at once", ""]


@pytest.mark.parametrize("script", [RUN, UPDATE_BESIDE_A_ROLLOUT])
def test_without_a_terminal_there_are_whole_lines_and_nothing_else(script: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=True
    )
    assert ended.stderr == ""
    assert re.search(r"[\x00-\x09\x0b-\x1f\x7f]", ended.stdout) is None
    assert "episodes" not in ended.stdout
    if script == RUN:
        assert len([line for line in ended.stdout.splitlines() if re.match(r"step \d", line)]) == 23


def test_errors_of_a_run_in_a_terminal_go_where_they_should(tmp_path: Path) -> None:
    errors = tmp_path / "errors"
    script = (
        "import os, sys; sys.stderr = open(os.environ['ERRORS'], 'w')\n"
        "from searchrl.console import Console\n"
        "with Console(enabled=True).progress('x', 2):\n"
        "    print('broken', file=sys.stderr, flush=True)\n"
    )
    written, _ = in_a_terminal(script, ERRORS=str(errors))
    assert errors.read_text(encoding="utf-8") == "broken\n"
    assert "broken" not in written


def test_a_long_wait_says_now_and_then_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("searchrl.console.PLAIN_PROGRESS_S", 0.0)
    console = Console(enabled=True)
    with (
        console.progress("evaluation", 3) as advance,
        console.progress("episodes", 3, in_step=True) as silent,
    ):
        for item in range(3):
            advance(item)
            silent(item)
    lines = capsys.readouterr().out.splitlines()
    assert [re.sub(r"\d+\.\ds", "0.0s", line) for line in lines] == [
        "evaluation: 1/3, 0.0s left",
        "evaluation: 2/3, 0.0s left",
        "evaluation: 3/3, 0.0s left",
    ]


def test_a_table_breaks_names_of_columns_before_numbers() -> None:
    script = (
        "from searchrl.console import Console\n"
        "title, columns = 'a title that is longer than its table ' * 2, ['exact match before'] * 4\n"
        "rows = [('all', *['0.166 [0.126, 0.206]'] * 4)]\n"
        "Console(enabled=True).table(title, ('questions', *columns), rows)\n"
    )
    written, _ = in_a_terminal(script, columns=110)
    shown = screen(written)
    assert shown[0] == "a title that is longer than its table " * 2
    assert any(line.count("0.166 [0.126, 0.206]") == 4 for line in shown)


def test_the_comparison_at_the_end_fits_80_columns() -> None:
    script = (
        "from searchrl.console import Console\n"
        "from searchrl.evaluation.comparison import SIDE_BY_SIDE\n"
        "row = '2 hop|1200|0.162→0.328|-0.012 [-0.081, -0.001]|0.29→0.41|1.01→2.00'.split('|')\n"
        "Console(enabled=True).table('t', SIDE_BY_SIDE, [row])\n"
    )
    written, _ = in_a_terminal(script, columns=80)
    (line,) = (line for line in screen(written) if "2 hop" in line)
    for cell in ("1200", "0.162→0.328", "-0.012 [-0.081, -0.001]", "0.29→0.41", "1.01→2.00"):
        assert cell in line


def test_text_of_models_cannot_act_on_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(enabled=True)
    console.say("a\x1b[2Jb\r\x07c\x9bd\ne")
    console.table("t", ("x",), [("\x1b]0;title\x07",)])
    printed = capsys.readouterr().out
    assert printed.startswith("a\\x1b[2Jb\\x0d\\x07c\\x9bd\ne\n")
    assert "\\x1b]0;title\\x07" in printed
    assert re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", printed) is None


def test_other_ranks_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(enabled=False)
    console.say("x")
    console.warn("x")
    console.step(1, 2, {})
    console.table("x", ("a",), [("b",)])
    with console.progress("x", 1) as advance:
        advance(0)
    console.close()
    assert capsys.readouterr() == ("", "")
