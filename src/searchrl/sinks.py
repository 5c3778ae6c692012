"""Where a step's numbers go: ``metrics.jsonl`` always, Weights & Biases and TensorBoard if asked for.

The same names everywhere. ``metrics.jsonl`` is the record: if it cannot be written, the run ends. The others
are copies for looking at: one that fails is given up, said and counted, and the run goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from searchrl.config import LoggerConfig, WandbMode
from searchrl.data.files import replacing
from searchrl.errors import SearchrlError
from searchrl.metrics import Transcript, read_records

FINISH_TIMEOUT_S = 300.0
"""How long the end of a run waits for Weights & Biases to upload the rest."""


class SinkError(SearchrlError, RuntimeError):
    """A sink that was asked for cannot be opened; the message says what to do."""


class Sink(Protocol):
    """Takes records. Its methods may raise whatever its library does."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add values of a step; a step may get several records, with other names each."""

    def show(self, step: int, transcripts: Sequence[Transcript]) -> None:
        """Show some trajectories of a step."""

    def close(self) -> None:
        """Write what is left, and let go."""


class JsonlSink:
    """``metrics.jsonl``, a line a record."""

    def __init__(self, run_dir: Path, *, resumed_step: int | None) -> None:
        """Open; records after ``resumed_step`` are dropped, because those steps are done again."""
        path = run_dir / "metrics.jsonl"
        if resumed_step is not None and path.exists():
            kept = [json.dumps(record) + "\n" for record in read_records(run_dir, resumed_step)]
            with replacing(path) as fresh:
                fresh.write_text("".join(kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line, on the disk when this returns: a checkpoint counts on it, after a power cut too."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def show(self, step: int, transcripts: Sequence[Transcript]) -> None:
        """Nothing: ``trajectories/`` has them all."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class WandbSink:
    """A run of Weights & Biases, which its own process uploads, or, offline, writes to ``wandb/``."""

    def __init__(
        self, run_dir: Path, config: LoggerConfig, run_config: Mapping[str, Any], *, run_id: str
    ) -> None:
        """Begin a run, or continue the one with the id ``run_id`` unless that is empty."""
        import wandb

        wandb.setup(wandb.Settings(show_info=False))  # its warnings and errors are still told
        online = config.wandb is WandbMode.online
        self._run = wandb.init(
            project=config.wandb_project,
            name=run_dir.name,
            dir=str(run_dir.resolve()),  # its service may stand in another folder
            mode="online" if online else "offline",
            config=dict(run_config),
            id=run_id or None,
            # Offline nothing can be looked up: the id alone joins the parts when they are synced.
            resume="allow" if run_id and online else None,
            settings=wandb.Settings(quiet=True, finish_timeout=FINISH_TIMEOUT_S, finish_timeout_raises=True),
        )
        self._table, self._teardown = wandb.Table, wandb.teardown
        self._first = self._run.starting_step
        self.run_id: str = self._run.id
        """Its id there."""
        self.place: str = self._run.url if online else str(Path(self._run.dir).parent)
        """Where it can be seen, or offline the folder that `wandb sync` takes."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One step; those that a continued run has there already it keeps: done again they are the same."""
        if step >= self._first:
            self._run.log(dict(values), step=step)

    def show(self, step: int, transcripts: Sequence[Transcript]) -> None:
        """The table ``trajectories``."""
        if step >= self._first:
            table = self._table(columns=list(Transcript._fields), data=[list(row) for row in transcripts])
            self._run.log({"trajectories": table}, step=step)

    def close(self) -> None:
        """Wait until all is uploaded, but not for ever; its process ends."""
        try:
            self._run.finish()
        finally:
            self._teardown()  # else its exit hook tells of a process that died with a traceback


class TensorBoardSink:
    """TensorBoard's event files, in ``tensorboard/``."""

    def __init__(self, run_dir: Path, run_config: Mapping[str, Any], *, resumed_step: int | None) -> None:
        """Open; what earlier files hold about steps after ``resumed_step`` is not shown any more."""
        from torch.utils.tensorboard import SummaryWriter

        purge = None if resumed_step is None else resumed_step + 1
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge)
        self._writer.add_text("config", _verbatim(json.dumps(run_config, indent=2)), resumed_step or 0)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """A scalar each; in the file when this returns, so that a killed run shows all that it did."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def show(self, step: int, transcripts: Sequence[Transcript]) -> None:
        """The text ``trajectories``."""
        shown = [
            f"**{row.question}** {row.outcome}, reward {row.reward}, {row.searches} searches, "
            f"answer `{row.answer}`, gold `{row.gold}`\n\n{_verbatim(row.transcript)}"
            for row in transcripts
        ]
        self._writer.add_text("trajectories", "\n\n".join(shown), step)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class MetricLog:
    """All sinks of a run. Used on the main rank only."""

    def __init__(
        self,
        run_dir: Path,
        config: LoggerConfig,
        run_config: Mapping[str, Any],
        *,
        say: Callable[[str], None],
        resumed_step: int | None = None,
        wandb_run: str = "",
    ) -> None:
        """Open the sinks.

        Args:
            run_dir: the run directory.
            config: which sinks.
            run_config: the resolved configuration, which the sinks record.
            say: is told what happens to them.
            resumed_step: the step of the checkpoint that the run continues from, if it does.
            wandb_run: the id of the run that Weights & Biases is to continue; empty: a new one.

        Raises:
            SinkError: one cannot be opened. A run that is under way goes on without it instead.
        """
        self._say, self._every, self._resumes = say, config.trajectories_every, bool(resumed_step)
        self._sinks: dict[str, Sink] = {}
        self._given_up = self._lost = self._step = 0
        self.wandb_run = wandb_run
        """The id of its run at Weights & Biases; empty: there never was one."""
        if config.wandb is not WandbMode.disabled:
            self._open("wandb", lambda: WandbSink(run_dir, config, run_config, run_id=wandb_run))
        if config.tensorboard:
            self._open("tensorboard", lambda: TensorBoardSink(run_dir, run_config, resumed_step=resumed_step))
        wandb = self._sinks.get("wandb")
        if isinstance(wandb, WandbSink):
            self.wandb_run = wandb.run_id
            say(f"wandb: {wandb.place}")
        # Last: a run that did not begin leaves no metrics.jsonl, which would make its folder that of a run.
        self._records = JsonlSink(run_dir, resumed_step=resumed_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One record: ``step`` and the values; a step's first tells how many the sinks have missed so far.

        Raises:
            OSError: ``metrics.jsonl`` cannot be written.
        """
        if (self._sinks or self._given_up) and step != self._step:
            values = {**values, "logger/lost_records": float(self._lost)}
        self._step = step
        self._records.write(step, values)
        for name, sink in list(self._sinks.items()):
            try:
                sink.write(step, values)
            except Exception as error:  # whatever its library raises: a copy is not worth the run
                self._give_up(name, error)
                with suppress(Exception):  # it has failed already, and that is said
                    sink.close()
        self._lost += self._given_up

    def show(self, step: int, transcripts: Sequence[Transcript]) -> None:
        """Show these trajectories of a step, if ``logger.trajectories_every`` says so.

        A sink that cannot is not given up for it: for a table, unlike for numbers, Weights & Biases asks its
        server first, some twenty seconds if it is out of reach.
        """
        if not self._every or step % self._every:
            return
        for name, sink in self._sinks.items():
            try:
                sink.show(step, transcripts)
            except Exception as error:  # whatever its library raises
                self._lost += 1
                self._say(f"logger: {name} did not take the trajectories of step {step} ({_told(error)})")

    def close(self) -> None:
        """Close the sinks; Weights & Biases gets some minutes to upload the rest."""
        self._records.close()
        for name, sink in list(self._sinks.items()):
            try:
                sink.close()
            except Exception as error:  # whatever its library raises
                self._give_up(name, error)

    def _open(self, name: str, make: Callable[[], Sink]) -> None:
        try:
            self._sinks[name] = make()
        except Exception as error:  # whatever its library raises
            if not self._resumes:
                raise SinkError(
                    f"logger.{name} cannot be opened: {_told(error)}; {_REMEDIES[name]}"
                ) from error
            self._give_up(name, error)

    def _give_up(self, name: str, error: Exception) -> None:
        self._sinks.pop(name, None)
        self._given_up += 1
        self._say(
            f"logger: {name} failed ({_told(error)}) and is given up until the run is resumed; metrics.jsonl "
            "has every record"
        )


_REMEDIES = {
    "wandb": "check the network and the key, or write files to upload later with logger=wandb_offline",
    "tensorboard": "check that the run directory can be written, or leave it out",
}


def _told(error: Exception) -> str:
    """An error as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _verbatim(text: str) -> str:
    """As Markdown that is shown letter by letter."""
    return "\n".join(f"    {line}" for line in text.splitlines())
