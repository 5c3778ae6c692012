"""What a person at the terminal sees: progress while it lasts, one line per step, tables at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

PLAIN_PROGRESS_S = 20.0
"""Seconds between lines of progress where there is no terminal to draw a bar in."""

_STEP_COLUMNS = (
    ("reward", "reward/mean", "{:.3f}"),
    ("em", "reward/exact_match", "{:.3f}"),
    ("searches", "search_r1/search_calls_per_sample", "{:.2f}"),
    ("tokens", "rollout/sampled_tokens", "{:.0f}"),
    ("signal", "rollout/informative_groups", "{:.0%}"),
    ("grad", "update/grad_norm", "{:.2f}"),
    ("ess", "tis/ess_ratio", "{:.3f}"),
    ("probe", "sync/probe_max_abs_diff", "{:.1e}"),
    ("rollout s", "time/rollout", "{:.0f}"),
    ("update s", "time/update", "{:.0f}"),
)


class Console:
    """Prints on the main rank only; plain text when standard output is no terminal."""

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        # Files and pipes get whole lines, whatever width somebody's terminal would have.
        self._rich = RichConsole(width=None if sys.stdout.isatty() else 140, highlight=False)

    def say(self, text: str) -> None:
        """One line."""
        if self._enabled:
            self._rich.print(text, markup=False)

    def step(self, step: int, steps: int, metrics: dict[str, float]) -> None:
        """The line of key figures of a step; figures that this step has not are left out."""
        parts = [
            f"{label} {form.format(metrics[name])}" for label, name, form in _STEP_COLUMNS if name in metrics
        ]
        self.say(f"step {step}/{steps}  " + "  ".join(parts))

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table; the first column is text, the others numbers."""
        if not self._enabled:
            return
        table = Table(title=title, title_justify="left")
        for number, column in enumerate(columns):
            table.add_column(column, justify="left" if number == 0 else "right")
        for row in rows:
            table.add_row(*row)
        self._rich.print(table)

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator[Callable[[object], None]]:
        """Yields a function to be called once per finished item. Without a terminal: a line now and then."""
        if not self._enabled:
            yield lambda _: None
        elif not self._rich.is_terminal:
            yield self._plain_progress(label, total)
        else:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            with Progress(*columns, console=self._rich, transient=True) as bar:
                task = bar.add_task(label, total=total)
                yield lambda _: bar.advance(task)

    def _plain_progress(self, label: str, total: int) -> Callable[[object], None]:
        done, said = 0, time.monotonic()

        def advance(_: object) -> None:
            nonlocal done, said
            done += 1
            if time.monotonic() - said >= PLAIN_PROGRESS_S:
                said = time.monotonic()
                self.say(f"{label}: {done}/{total}")

        return advance
