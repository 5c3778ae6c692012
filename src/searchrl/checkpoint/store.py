"""The checkpoints of a run: which are kept, how one appears, which one a run continues from.

::

    checkpoints/step-000050/rank0000-0000.safetensors   weights and moments: ``shards``
                            state.json                  ``Progress``, and what the checkpoint belongs to
                            manifest.json               sizes and hashes of the others
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from searchrl.checkpoint.files import (
    CheckpointError,
    find_damage,
    seal_files,
    write_json,
    write_manifest,
)
from searchrl.checkpoint.identity import refuse_differences
from searchrl.config import Config, SavingConfig, settings_to_keep
from searchrl.data.files import flush
from searchrl.distributed import World, barrier, broadcast_object, gather_objects
from searchrl.errors import SearchrlError

T = TypeVar("T")

_STATE = "state.json"


@dataclass(kw_only=True, slots=True, frozen=True)
class Progress:
    """How far a run has come, beside weights and moments."""

    step: int = 0
    """Steps done."""
    sampler: Mapping[str, int | str] = field(default_factory=dict)
    """``Sampler.state_dict``; empty before the first step."""
    token_budget: Mapping[str, int] = field(default_factory=dict)
    """``TokenBudget.state_dict``."""
    wandb_run: str = ""
    """The id that Weights & Biases knows the run by, if it does."""
    exact_match: float | None = None
    """Of the evaluation after this step, if there was one."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Saved:
    """A whole checkpoint."""

    folder: Path
    progress: Progress
    identity: Mapping[str, Any]
    """``identity_of`` the run that saved it."""
    world_size: int
    """Ranks that saved it."""


@dataclass(kw_only=True, slots=True)
class Checkpoints:
    """The checkpoints of one run directory."""

    folder: Path
    saving: SavingConfig
    world: World
    identity: Mapping[str, Any]
    """Of this run."""
    changes: tuple[str, ...] = ()
    """What of it may differ from a checkpoint's: ``resume_changes``."""
    say: Callable[[str], None] = lambda _: None
    """Tells a person."""
    newest: int = 0
    """Step of the checkpoint that was saved or found last."""

    def path(self, step: int) -> Path:
        """Where the checkpoint after ``step`` stands, if there is one."""
        return self.folder / f"step-{step:06d}"

    def save(self, write: Callable[[Path], None], progress: Progress) -> Path:
        """Save, then drop what is not kept. A collective.

        Args:
            write: writes this rank's share of weights and moments into a folder.
            progress: everything else.

        Raises:
            CheckpointError: a file cannot be written, on whatever rank. Older checkpoints are as they were.
        """
        final = self.path(progress.step)
        partial = self.folder / f".{final.name}.partial"
        try:
            self._together(partial, lambda: self._begin(partial))
            self._together(partial, lambda: write(partial))
            pattern = f"rank{self.world.rank:04d}-*"
            records = self._together(partial, lambda: seal_files(sorted(partial.glob(pattern))))
            files = {name: record for part in records for name, record in part.items()}
            self._together(partial, lambda: self._finish(partial, final, files, progress))
        except CheckpointError:
            if self.world.is_main:
                shutil.rmtree(partial, ignore_errors=True)  # may be what the disk is full of
            raise
        self.newest = progress.step
        return final

    def find(self, *, must: bool) -> Saved | None:
        """The newest whole checkpoint, None if there are none at all. A collective.

        Args:
            must: there has to be one.

        Raises:
            CheckpointError: there is none, although there must be; or none of those there are is whole.
            ConfigError: it belongs to another run; names all that differs.
        """
        folders = broadcast_object(_newest_first(self.folder))
        for number, folder in enumerate(folders):
            share = find_damage(folder, part=self.world.rank, parts=self.world.size)
            damage = next(filter(None, gather_objects(share)), "")
            if not damage:
                saved = _read(folder)
                refuse_differences(folder, saved.identity, self.identity, self.changes)
                self._set_aside(folders[:number])
                self.newest = saved.progress.step
                return saved
            self.say(f"resume: skipping the damaged checkpoint {folder}, which {damage}")
        if folders:
            raise CheckpointError(
                f"none of the checkpoints in {self.folder} is whole; delete them to start from the beginning"
            )
        if must:
            raise _nothing_saved(self.folder)
        return None

    def _set_aside(self, damaged: Sequence[Path]) -> None:
        """Under other names they neither count as kept nor stand in the way of the steps made again."""
        if self.world.is_main:
            for folder in damaged:
                aside = folder.with_name(f"damaged-{folder.name}")
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)
        barrier()

    def _begin(self, partial: Path) -> None:
        if self.world.is_main:
            for leftover in self.folder.glob(".step-*"):
                shutil.rmtree(leftover)
            partial.mkdir(parents=True)

    def _finish(self, partial: Path, final: Path, files: Mapping[str, Any], progress: Progress) -> None:
        """Write what ties the files together, let the folder appear, and drop old ones."""
        if not self.world.is_main:
            return
        state = {**asdict(progress), "identity": dict(self.identity), "world_size": self.world.size}
        write_json(partial / _STATE, state)
        write_manifest(partial, {**files, **seal_files([partial / _STATE])})
        flush(partial)
        if final.exists():  # of an earlier run, whose metrics somebody has deleted
            shutil.rmtree(final)
        partial.rename(final)
        flush(self.folder)
        for folder in self._superfluous():
            shutil.rmtree(folder)

    def _superfluous(self) -> list[Path]:
        """All but the newest ``keep`` and, with ``keep_best``, the best."""
        whole = [_read(folder) for folder in _newest_first(self.folder)]
        kept = {saved.folder for saved in whole[: self.saving.keep]}
        scored = [saved for saved in whole if saved.progress.exact_match is not None]
        if self.saving.keep_best and scored:  # the newest of equals
            kept.add(max(scored, key=lambda saved: saved.progress.exact_match or 0.0).folder)
        return [saved.folder for saved in whole if saved.folder not in kept]

    def _together(self, place: Path, work: Callable[[], T]) -> list[T]:
        """What ``work`` returns on each rank. If it fails on one, all raise: none waits for another."""
        outcome: T | None = None
        failure = ""
        try:
            outcome = work()
        except (OSError, SearchrlError) as error:
            failure = str(error)
        gathered = gather_objects((failure, outcome))
        failures = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(gathered) if text]
        if failures:
            raise CheckpointError(
                f"{place} cannot be saved: {'; '.join(failures)}. Older checkpoints are whole: make room, "
                "then continue with resume=true"
            )
        return [result for _, result in gathered]  # type: ignore[misc]  # no failure: every rank has one


def check_settings(cfg: Config) -> None:
    """Refuse early, before anything loads, to continue a run with other settings than its own, or none.

    Looks at the newest checkpoint that can be read at all, without checking it: ``Checkpoints.find`` does.

    Raises:
        CheckpointError: nothing is saved, although ``resume=true``.
        ConfigError: names what differs.
    """
    saved_in = Path(cfg.run_dir) / "checkpoints"
    folders = _newest_first(saved_in)
    if cfg.resume is True and not folders:
        raise _nothing_saved(saved_in)
    for folder in folders:
        try:
            saved = _read(folder)
        except CheckpointError:
            continue
        refuse_differences(folder, saved.identity, settings_to_keep(cfg), cfg.resume_changes)
        return


def _nothing_saved(folder: Path) -> CheckpointError:
    return CheckpointError(
        f"resume=true finds no checkpoint in {folder}; with resume=auto the run would begin"
    )


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), reverse=True)


def _read(folder: Path) -> Saved:
    """What ``state.json`` says.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        identity, world_size = state.pop("identity"), state.pop("world_size")
        return Saved(folder=folder, progress=Progress(**state), identity=identity, world_size=world_size)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / _STATE} cannot be read: {error}") from error
