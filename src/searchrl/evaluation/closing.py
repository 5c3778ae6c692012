"""A run's end in a few lines: what was reached, what it took, where everything is, how to look further."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from searchrl.evaluation.comparison import paired_difference
from searchrl.evaluation.intervals import wilson
from searchrl.evaluation.results import Result
from searchrl.figures import duration

_PLACES = (  # below the run directory
    ("model", "model"),
    ("metrics", "metrics.jsonl"),
    ("trajectories", "trajectories"),
    ("evaluations", "eval"),
    ("checkpoints", "checkpoints"),
    ("retriever", "retriever.log"),
)


_OF_THE_RUN = ("name", "run_dir", "resume", "resume_changes", "checkpoint", "steps", "group_size")
_OF_TRAINING = (
    "warmstart",
    "groups_per_step",
    "resampling",
    "filters",
    "batching",
    "overlap",
    "saving",
    "watch",
    "logger",
)
_OF_UPDATES = ("advantage", "loss", "importance", "update", "optimizer")
_LEFT_OUT = {*_OF_THE_RUN, *_OF_TRAINING, *_OF_UPDATES}
"""Settings that an evaluation of the trained model does not look at, or has of its own."""


def closing_lines(
    run_dir: Path,
    records: Sequence[Mapping[str, float]],
    *,
    group_size: int,
    before: Sequence[Result] | None,
    after: Sequence[Result],
) -> str:
    """The summary of a training run, several lines.

    Args:
        run_dir: of what may be in it, what exists is named.
        records: of ``metrics.jsonl``.
        group_size: trajectories of a group.
        before: the initial policy's results; None: it was not evaluated.
        after: the trained policy's.
    """
    lines = [("exact match", _reached(before, after))]
    steps = [record for record in records if "time/step" in record]
    if steps:
        played = [
            (step["rollout/groups_sampled"] - step["rollout/groups_aborted"]) * group_size for step in steps
        ]
        void = sum(share * n for share, n in zip((s["rollout/void"] for s in steps), played, strict=True))
        share = void / sum(played)
        lines.append(("steps", f"{len(steps):,}; {sum(played):,.0f} trajectories, {share:.1%} of them void"))
        lines.append(("time", _time(steps)))
    lines += [(name, str(run_dir / place)) for name, place in _PLACES if (run_dir / place).exists()]
    return _aligned(lines)


def commands(run_dir: Path, overrides: Sequence[str]) -> str:
    """What to type next, several lines that go on where ``closing_lines`` ends.

    Args:
        run_dir: of the training run.
        overrides: what it was started with; an evaluation with the same settings needs most of them.
    """
    kept = [override for override in overrides if _section(override) not in _LEFT_OUT]
    alone = [override for override in kept if not override.startswith("processes=")]
    model = f"checkpoint={run_dir / 'model'}"
    lines = [
        ("look further", shlex.join(["searchrl", "report", str(run_dir)])),
        ("", shlex.join(["searchrl", "eval", *kept, f"name={run_dir.name}_eval", model])),
        ("", shlex.join(["searchrl", "play", *alone, model])),
    ]
    return _aligned(lines)


def _section(override: str) -> str:
    """``optimizer`` of ``optimizer.lr=1e-6``."""
    return override.lstrip("+~").partition("=")[0].partition(".")[0]


def _reached(before: Sequence[Result] | None, after: Sequence[Result]) -> str:
    right = sum(result.exact_match for result in after)
    if before is None or len(after) < 2:
        return f"{wilson(right, len(after))} on {len(after):,} questions"
    earlier = sum(result.exact_match for result in before) / len(before)
    difference = paired_difference(before, after)
    return (
        f"{earlier:.3f} before, {right / len(after):.3f} after; difference {difference} "
        f"on {len(after):,} questions"
    )


def _time(steps: Sequence[Mapping[str, float]]) -> str:
    """All steps' seconds, and what took most of them."""
    total = sum(step["time/step"] for step in steps)
    parts = (
        (phase, sum(step.get(f"time/{phase}", 0.0) for step in steps) / total)
        for phase in ("rollout", "logprob", "update", "sync")
    )
    shares = ", ".join(f"{phase} {share:.0%}" for phase, share in parts)
    return f"{duration(total)} in steps: {shares}"


def _aligned(lines: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"{name:<12}  {text}" for name, text in lines)
