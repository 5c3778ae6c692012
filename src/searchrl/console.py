"""What a person at the terminal sees: progress while it lasts, a line of figures per step, tables at the end.

Without a terminal (a file, a pipe, a cluster's log) the same without bars and control characters.
"""

from __future__ import annotations

import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from searchrl.figures import StepLines, duration

PLAIN_PROGRESS_S = 60.0
"""Seconds between lines of progress where there is no terminal to draw a bar in."""
PLAIN_WIDTH = 140
"""Columns of a file or a pipe, whatever somebody's terminal would have."""
HEADER_EVERY = 20
"""Steps between headers."""

_WRITTEN_OUT = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
"""Control characters in the text of a model or a corpus must not reach the terminal."""


class Console:
    """Prints on the main rank only; plain text when standard output is no terminal."""

    def __init__(self, *, enabled: bool, is_stopping: Callable[[], bool] = lambda: False) -> None:
        """Print nothing yet.

        Args:
            enabled: False: nothing is ever printed.
            is_stopping: asked whenever a bar would be drawn. None is drawn once the run was asked to stop:
                what comes next may end the process at any moment, and would leave half a bar.
        """
        self._enabled = enabled
        # Text of a model or a corpus is shown as it is: no markup, no emoji by their names.
        self._rich = Terminal(
            width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False, markup=False, emoji=False
        )
        self._bars = _Bars(self._rich, is_stopping)
        self._lock = threading.Lock()
        self._rows = 0
        self._pace = _Pace()

    def say(self, text: str, *, style: str | None = None) -> None:
        """One line, or several. ``style``: rich's, on a terminal with colours."""
        if self._enabled:
            self._rich.print(text.translate(_WRITTEN_OUT), style=style, soft_wrap=True)

    def warn(self, text: str) -> None:
        """A line that should not be overlooked: what is wrong, but stops nothing."""
        self.say(text, style="bold yellow")

    def step(self, step: int, steps: int, metrics: dict[str, float]) -> None:
        """The line of key figures of a step, under a header now and then."""
        lines = StepLines(steps=steps, width=self._rich.width)
        if self._rows % HEADER_EVERY == 0:
            self.say(lines.header(), style="bold")
        self._rows += 1
        self.say(lines.row(step, metrics, self._pace.left_s(steps - step, metrics.get("time/step", 0.0))))

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table; the first column is text, the others numbers."""
        if not self._enabled:
            return
        self.say(title, style="bold")  # rich would break a title into lines as short as its table
        table = Table()
        for number, column in enumerate(_fitting(columns, rows, self._rich.width)):
            table.add_column(column, justify="left" if number == 0 else "right")
        for row in rows:
            table.add_row(*(cell.translate(_WRITTEN_OUT) for cell in row))
        self._rich.print(table)
        self._rows = 0  # the columns of steps are named anew below it

    @contextmanager
    def progress(
        self, label: str, total: int, *, detail: object = "", in_step: bool = False
    ) -> Iterator[Callable[[object], None]]:
        """Yields a function to be called once per finished item, from any thread.

        Args:
            label: what is counted.
            total: how many there will be.
            detail: ``str(detail)`` stands beside the bar, asked for anew whenever it is drawn.
            in_step: it is a part of a step, which has its line anyway. Without a terminal nothing is said of
                it, and of everything else a line now and then.
        """
        if not self._enabled or (in_step and not self._rich.is_terminal):
            yield lambda _: None
        elif not self._rich.is_terminal:
            yield self._plain_progress(label, total)
        else:
            with self._lock:
                self._bars.start()
                task = self._bars.add_task(label, total=total, detail=detail)
            try:
                yield lambda _: self._bars.advance(task)
            finally:
                with self._lock:
                    self._bars.remove_task(task)
                    if not self._bars.tasks:
                        self._bars.stop()

    def close(self) -> None:
        """Take away what is drawn, whoever may still want to draw."""
        with self._lock:
            if self._bars.live.is_started:  # else, without a terminal, rich would print an empty line
                self._bars.stop()

    def _plain_progress(self, label: str, total: int) -> Callable[[object], None]:
        done, begun = 0, time.monotonic()
        said = begun

        def advance(_: object) -> None:
            nonlocal done, said
            done, now = done + 1, time.monotonic()
            if now - said >= PLAIN_PROGRESS_S:
                said = now
                # The first of many that began together tell little.
                left = (
                    f", {duration((now - begun) / done * (total - done))} left" if 10 * done >= total else ""
                )
                self.say(f"{label}: {done}/{total}{left}")

        return advance


def _fitting(names: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Names of columns, broken into lines where the table would be too wide: rich would break numbers too."""
    cells = [max((len(row[number]) for row in rows), default=0) for number in range(len(names))]
    whole = sum(max(len(name), cell) + len(" | ") for name, cell in zip(names, cells, strict=True)) + 1
    if whole <= width:
        return list(names)
    return [
        "\n".join(textwrap.wrap(name, max([cell, *map(len, name.split())]), break_long_words=False))
        for name, cell in zip(names, cells, strict=True)
    ]


class Terminal(RichConsole):
    """rich's, but the cursor is never hidden: whoever kills the process could not bring it back."""

    def show_cursor(self, show: bool = True) -> bool:
        """Leave it as it is."""
        del show
        return False


class _Bars(Progress):
    """One line, whatever goes on: of several bars (an update while the next rollout runs) the newest.

    More lines could not be taken away by another process, which has to where this one is killed.
    """

    def __init__(self, console: RichConsole, is_stopping: Callable[[], bool]) -> None:
        self._is_stopping = is_stopping
        super().__init__(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            refresh_per_second=4,
            # rich would print to standard output what goes to standard error, even if that is a file.
            redirect_stderr=sys.stderr.isatty(),
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        """What is drawn."""
        if not self._is_stopping():
            yield self.make_tasks_table(self.tasks[-1:])


class _Pace:
    """How fast a run's steps follow one another, evaluations and checkpoints between them included."""

    def __init__(self) -> None:
        self._steps = 0
        self._begun = 0.0

    def left_s(self, steps: int, seconds: float) -> float:
        """Seconds that ``steps`` more will take, called at the end of each, which took ``seconds``."""
        if self._steps == 0:
            self._begun = time.monotonic() - seconds
        self._steps += 1
        return steps * (time.monotonic() - self._begun) / self._steps
