"""Numbers of a step: counted on every rank, reduced once, written to every sink under the same names."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from searchrl.config import LoggerConfig, WandbMode
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


class MetricLog:
    """``metrics.jsonl`` and, if asked for, Weights & Biases. Used on the main rank only."""

    def __init__(
        self,
        run_dir: Path,
        config: LoggerConfig,
        run_config: dict[str, Any],
        *,
        resumed_step: int | None = None,
        wandb_run: str = "",
    ) -> None:
        """Open the sinks.

        Args:
            run_dir: the run directory.
            config: which sinks.
            run_config: the resolved configuration, recorded by Weights & Biases.
            resumed_step: the step of the checkpoint that the run continues from, if it does; records of
                later steps are dropped, because those steps are done again.
            wandb_run: the id of the run that Weights & Biases is to continue; empty: a new one. Steps that it
                has already it keeps: those done again are the same.
        """
        path = run_dir / "metrics.jsonl"
        if resumed_step is not None and path.exists():
            _drop_records_after(path, resumed_step)
        self._file: TextIO = path.open("a", encoding="utf-8")
        self._wandb: Any = None
        if config.wandb is not WandbMode.disabled:
            import wandb

            self._wandb = wandb.init(
                project=config.wandb_project,
                name=run_dir.name,
                dir=str(run_dir),
                mode="online" if config.wandb is WandbMode.online else "offline",
                config=run_config,
                id=wandb_run or None,
                # Offline nothing can be looked up: the id alone joins the parts when they are synced.
                resume="allow" if wandb_run and config.wandb is WandbMode.online else None,
            )
        self.wandb_run: str = "" if self._wandb is None else self._wandb.id
        """Its id there."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """One record: ``step`` and the values."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())  # a checkpoint counts on what stands here, after a power cut too
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def close(self) -> None:
        """Flush and close the sinks."""
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_records(run_dir: Path, last_step: int) -> list[dict[str, float]]:
    """The records of ``run_dir`` up to ``last_step``, in order; none if it has no ``metrics.jsonl``.

    The last line of a killed run may be cut short; it is no record.
    """
    path = run_dir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in records if record["step"] <= last_step]


def _drop_records_after(path: Path, step: int) -> None:
    kept = [json.dumps(record) + "\n" for record in read_records(path.parent, step)]
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write("".join(kept))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
