"""The line of key figures of a step: columns that line up from step to step, whatever the numbers.

    step          time    left   reward      EM  searches   tokens  signal    void     grad     ESS    probe
    step 9/50      42s  28m42s    0.281   0.281      1.02       34     38%    0.0%     1.45   1.000  3.6e-05
    step 10/50   1m03s  28m00s    0.313   0.313      1.05       31      0%    1.6%            1.000  4.1e-05

The header names the columns instead of each line: so a line fits into 100 to 140 characters, and what a step
lacks (here the gradient: no group had a signal) leaves its place blank. ``step 9/50`` stands at the left of
its column, so that it can be searched for as it is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

_GAP = "  "


def number(value: float, width: int, digits: int) -> str:
    """``value`` with at most so many decimals in at most ``width`` >= 7 characters.

    Decimals go first where it is too long; then, or where only zeros would be left, the exponent comes.
    """
    if not math.isfinite(value):
        return str(value)
    for places in range(digits, -1, -1):
        text = f"{value:.{places}f}"
        if len(text) <= width:
            if value == 0 or float(text) != 0:
                return text
            break
    return exponent(value, width)


def exponent(value: float, width: int) -> str:
    """``value`` as ``3.6e-05``, or as ``4e-05`` where only that fits into ``width`` >= 7 characters."""
    text = f"{value:.1e}"
    return text if len(text) <= width else f"{value:.0e}"


def duration(seconds: float) -> str:
    """Such as ``4.2s``, ``3m12s``, ``1h05m``, ``2d03h``: at most six characters below 10,000 days."""
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60}h{minutes % 60:02}m"
    hours = round(seconds / 3600)
    return f"{hours // 24}d{hours % 24:02}h" if hours < 2400 else f"{hours // 24}d"


@dataclass(slots=True, frozen=True)
class _Column:
    label: str
    metric: str
    width: int
    form: Callable[[float], str]


def _decimals(digits: int) -> Callable[[float], str]:
    return lambda value: number(value, 7, digits)


_COLUMNS = (  # the most important first: a narrow terminal shows as many as fit
    _Column("reward", "reward/mean", 7, _decimals(3)),
    _Column("EM", "reward/exact_match", 6, "{:.3f}".format),
    _Column("searches", "search_r1/search_calls_per_sample", 8, _decimals(2)),
    _Column("tokens", "rollout/sampled_tokens", 7, _decimals(0)),
    _Column("signal", "rollout/informative_groups", 6, "{:.0%}".format),
    _Column("void", "rollout/void", 6, "{:.1%}".format),
    _Column("grad", "update/grad_norm", 7, _decimals(2)),
    _Column("ESS", "tis/ess_ratio", 6, "{:.3f}".format),
    _Column("probe", "sync/probe_max_abs_diff", 7, partial(exponent, width=7)),
    _Column("rollout", "time/rollout", 7, duration),
    _Column("update", "time/update", 6, duration),
)


@dataclass(kw_only=True, slots=True, frozen=True)
class StepLines:
    """Header and lines of a run's steps."""

    steps: int
    """Of the run: they fix how wide the first column is."""
    width: int
    """Characters that a line may have."""

    def header(self) -> str:
        """What the columns are."""
        return self._line("step", "time", "left", [column.label for column in _COLUMNS])

    def row(self, step: int, metrics: Mapping[str, float], left_s: float) -> str:
        """The figures of a step; the place of those that it lacks stays blank.

        Args:
            step: steps done, this one included.
            metrics: its record.
            left_s: seconds that the rest of the steps will take.
        """
        time_s = metrics.get("time/step")
        cells = [
            column.form(metrics[column.metric]) if column.metric in metrics else "" for column in _COLUMNS
        ]
        spent = "" if time_s is None else duration(time_s)
        return self._line(f"step {step}/{self.steps}", spent, duration(left_s), cells)

    def _line(self, step: str, time: str, left: str, cells: list[str]) -> str:
        line = f"{step:<{len(f'step {self.steps}/{self.steps}')}}{_GAP}{time:>6}{_GAP}{left:>6}"
        for column, cell in zip(_COLUMNS, cells, strict=True):
            if len(line) + len(_GAP) + column.width > self.width:
                break
            line += f"{_GAP}{cell:>{column.width}}"
        return line.rstrip()
