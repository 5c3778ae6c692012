"""Saves a run so that it can be continued, and continues it exactly: what is saved, and what need not be.

A checkpoint holds weights and moments, the sampler's place, and the token budget. The learning rate follows
from the step. Random numbers are functions of the seed and of what they are drawn for: those of a generation
of (group, member, turn), see ``rollout``; all others of (step, rank), see ``begin_step``. What the watch
remembers follows from ``metrics.jsonl``. A rollout that ran ahead is played again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from searchrl.actor import Actor
from searchrl.checkpoint import Checkpoints, Progress, Saved
from searchrl.data.sampler import Sampler
from searchrl.distributed import derived_seed, seed_everything
from searchrl.out_of_memory import TokenBudget
from searchrl.overlap import Rollouts
from searchrl.records import drop_later
from searchrl.setup import Run
from searchrl.sinks import MetricLog
from searchrl.weight_sync import WeightSync


def begin_step(run: Run, step: int) -> None:
    """Name the step in the log, and seed Python, NumPy and torch anew, with a seed of this step and rank.

    What draws from them (a custom reward or loss, a model's dropout) so draws the same in a resumed run.
    """
    run.env.phases.step = step + 1
    seed_everything(derived_seed(run.env.cfg.seed, f"step {step} of rank {run.env.world.rank}"))


def resume(run: Run, saved: Saved | None, *, actor: Actor, sampler: Sampler, budget: TokenBudget) -> int:
    """Continue from ``saved``, or begin if it is None; the number of steps that are done. A collective."""
    say = run.env.console.say
    if saved is None:
        if run.env.cfg.resume:
            say(f"resume: no checkpoint in {run.env.run_dir / 'checkpoints'}, starting from the beginning")
        return 0
    actor.load(saved.folder)
    sampler.load_state_dict(saved.progress.sampler)
    budget.load_state_dict(saved.progress.token_budget)
    ranks = f", which {saved.world_size} ranks saved" if saved.world_size != run.env.world.size else ""
    say(f"resume: continuing after step {saved.progress.step} from {saved.folder}{ranks}")
    return saved.progress.step


def open_log(run: Run, resolved: dict[str, Any], saved: Saved | None) -> MetricLog | None:
    """The metrics' log on the main rank, which first forgets what was written about steps after ``saved``.

    Args:
        run: the run.
        resolved: its configuration as plain containers.
        saved: what it continues from.

    Raises:
        SinkError: a sink cannot be opened, before the first step.
    """
    if not run.env.world.is_main:
        return None
    done = Progress() if saved is None else saved.progress
    drop_later(run.env.run_dir, done.step)
    return MetricLog(
        run.env.run_dir,
        run.env.cfg.logger,
        resolved,
        say=run.env.console.say,
        resumed_step=done.step,
        wandb_run=done.wandb_run,
    )


def make_room(run: Run, actor: Actor) -> None:
    """The engine sleeps and the optimizer comes back, unless the engine is at the next rollout already."""
    if not run.env.cfg.overlap:
        run.engine.sleep()
    actor.reload()


@dataclass(slots=True, frozen=True)
class Saver:
    """Saves checkpoints of a run."""

    run: Run
    actor: Actor
    sync: WeightSync
    checkpoints: Checkpoints
    rollouts: Rollouts[Any]
    budget: TokenBudget
    log: MetricLog | None
    """On the main rank."""

    def save(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Save after ``step``, unless there is that checkpoint. A collective.

        It needs the optimizer, which takes the engine's place once more.

        Args:
            step: steps done.
            metrics: of the step; the best checkpoint is the one with the highest ``eval/exact_match``.

        Raises:
            CheckpointError: it cannot be written.
        """
        if step <= self.checkpoints.newest:
            return
        phases = self.run.env.phases
        phases.beat("saving")
        make_room(self.run, self.actor)
        phases.event("checkpoint_begun")
        progress = Progress(
            step=step,
            sampler=self.rollouts.sampler_state(),
            token_budget=self.budget.state_dict(),
            wandb_run="" if self.log is None else self.log.wandb_run,
            exact_match=(metrics or {}).get("eval/exact_match"),
        )
        path = self.checkpoints.save(self.actor.save, progress)
        phases.event("checkpoint_saved", path=path.name)
        self.actor.offload()
        if self.run.engine.is_asleep:
            self.sync(self.run.env.runner, version=step)
