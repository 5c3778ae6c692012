"""Saving and resuming a run. A checkpoint appears whole, by one rename, or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from searchrl.actor import Actor
from searchrl.distributed import World, barrier
from searchrl.errors import SearchrlError

_STATE = "state.json"


class CheckpointError(SearchrlError, RuntimeError):
    """A checkpoint cannot be used; the message names it and the remedy."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Checkpoints:
    """The checkpoints of one run directory."""

    folder: Path
    keep: int
    world: World

    def path(self, step: int) -> Path:
        """Where the checkpoint after ``step`` stands, if there is one."""
        return self.folder / f"step-{step:06d}"

    def save(self, actor: Actor, *, step: int, sampler: Mapping[str, object]) -> Path:
        """Save after ``step`` optimizer steps, then drop all but the newest ``keep``. A collective."""
        final = self.path(step)
        partial = self.folder / f".{final.name}.partial"
        if self.world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        barrier()
        actor.save(partial, {"step": step})
        barrier()
        if self.world.is_main:
            state = {"step": step, "sampler": dict(sampler), "world_size": self.world.size}
            with (partial / _STATE).open("w", encoding="utf-8") as file:
                json.dump(state, file, indent=2)
                file.flush()
                os.fsync(file.fileno())
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            for old in self._complete()[: -self.keep]:
                shutil.rmtree(old)
        barrier()
        return final

    def resume(self, actor: Actor) -> dict[str, Any] | None:
        """Load the newest complete checkpoint and return its state; None if there is none. A collective.

        Raises:
            CheckpointError: it was saved by another number of ranks.
        """
        complete = self._complete()
        if not complete:
            return None
        newest = complete[-1]
        state: dict[str, Any] = json.loads((newest / _STATE).read_text(encoding="utf-8"))
        if state["world_size"] != self.world.size:
            raise CheckpointError(
                f"{newest} was saved by {state['world_size']} ranks and cannot be resumed by "
                f"{self.world.size}: start as many"
            )
        actor.load(newest)
        return state

    def _complete(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(path.parent for path in self.folder.glob(f"step-*/{_STATE}"))
