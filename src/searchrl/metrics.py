"""Numbers of a step, counted on every rank and reduced once; and what is read back of them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from searchrl.distributed import gather_objects


@dataclass(slots=True)
class Tally:
    """Means by name as (sum, weight), so that the mean over ranks is the mean over everything."""

    totals: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, name: str, value: float, weight: float = 1.0) -> None:
        """Add one observation; ``value`` is already multiplied by ``weight``."""
        total, count = self.totals.get(name, (0.0, 0.0))
        self.totals[name] = (total + value, count + weight)

    def reduce(self) -> dict[str, float]:
        """Means over all ranks; a name without weight anywhere is left out. A collective."""
        merged: dict[str, tuple[float, float]] = {}
        for totals in gather_objects(self.totals):
            for name, (value, weight) in totals.items():
                total, count = merged.get(name, (0.0, 0.0))
                merged[name] = (total + value, count + weight)
        return {name: total / count for name, (total, count) in merged.items() if count > 0}


class Transcript(NamedTuple):
    """One trajectory of a sample that sinks show for reading; its fields are the columns of a table."""

    question: str
    answer: str
    """Empty if there was none."""
    gold: str
    """The accepted answers, with ``|`` between them."""
    outcome: str
    reward: float | None
    """None: it is void."""
    searches: int
    transcript: str
    """What the policy wrote and what was appended to it, in order."""


def read_records(run_dir: Path, last_step: int) -> list[dict[str, float]]:
    """The records of ``run_dir`` up to ``last_step``, in order; none if it has no ``metrics.jsonl``.

    The last line of a killed run may be cut short; it is no record.
    """
    path = run_dir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in records if record["step"] <= last_step]
