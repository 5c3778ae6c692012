"""Progress of long work on standard error: a bar with the time left, or a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from searchrl.console import PLAIN_PROGRESS_S, Terminal


@contextmanager
def progress(
    label: str, total: int, *, done: int = 0, enabled: bool = True
) -> Iterator[Callable[[int], None]]:
    """Yield a function to call with the number of items finished since its last call.

    ``done`` of ``total`` items were finished before; they do not count for the speed.
    """
    if not enabled:
        yield lambda _: None
    elif not sys.stderr.isatty():
        yield _lines(label, total, done)
    else:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        # The speed of the last ten minutes: parts of a corpus differ in length.
        with Progress(*columns, console=Terminal(stderr=True), speed_estimate_period=600) as bar:
            task = bar.add_task(label, total=total, completed=done)
            yield lambda items: bar.advance(task, items)


def say(text: str) -> None:
    """One line on standard error."""
    print(text, file=sys.stderr, flush=True)


def _lines(label: str, total: int, done: int) -> Callable[[int], None]:
    first: tuple[int, float] | None = None
    said = 0.0

    def advance(items: int) -> None:
        nonlocal done, first, said
        done += items
        now = time.monotonic()
        if first is None:  # the speed counts from here: before it, models were loaded
            first, said = (done, now), now
        elif now - said >= PLAIN_PROGRESS_S:
            said = now
            speed = (done - first[0]) / (now - first[1])
            left = _duration((total - done) / speed)
            say(f"{label}: {done:,} of {total:,} ({done / total:.0%}), {speed:,.0f}/s, {left} left")

    return advance


def _duration(seconds: float) -> str:
    minutes, hours = round(seconds / 60), seconds / 3600
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes} min" if minutes < 100 else f"{hours:.1f} h"
