"""Greedy rollouts on held-out questions: exact match by hop count, with confidence intervals."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from searchrl.config import RewardConfig, RewardKind, SamplingConfig
from searchrl.distributed import World, gather_objects
from searchrl.records import write_trajectories
from searchrl.rewards import ScoredGroup, score_group
from searchrl.rollout import Rollout
from searchrl.trajectory import Example, Trajectory

_Z = 1.96  # two-sided 95 %
_GREEDY = SamplingConfig(temperature=0.0)


@dataclass(kw_only=True, slots=True, frozen=True)
class Result:
    """One held-out question."""

    id: str
    hops: int
    exact_match: bool
    valid_format: bool
    retrieval_hit: bool
    searches: int
    error: str | None
    """Why the trajectory is void, if it is: counted as wrong, and shown."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Interval:
    """An estimate with its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """``0.412 [0.370, 0.455]``."""
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def wilson(successes: int, n: int) -> Interval:
    """Wilson's score interval of a proportion (1927); sensible at 0 and n, unlike the normal one."""
    share = successes / n
    centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2)) / (1 + _Z**2 / n)
    return Interval(value=share, low=max(0.0, centre - half), high=min(1.0, centre + half))


def paired_difference(before: Sequence[Result], after: Sequence[Result]) -> Interval:
    """Mean difference in exact match over the same questions, normal approximation over questions.

    Raises:
        ValueError: the two are not about the same questions in the same order, or fewer than two.
    """
    if [result.id for result in before] != [result.id for result in after] or len(before) < 2:
        raise ValueError("a paired difference needs the same questions, at least two, in the same order")
    pairs = zip(before, after, strict=True)
    differences = [float(b.exact_match) - float(a.exact_match) for a, b in pairs]
    n = len(differences)
    mean = sum(differences) / n
    half = _Z * math.sqrt(sum((d - mean) ** 2 for d in differences) / (n - 1) / n)
    return Interval(value=mean, low=mean - half, high=mean + half)


def evaluate(
    rollout: Rollout,
    runner: asyncio.Runner,
    examples: Sequence[Example],
    *,
    eos_text: str,
    world: World,
    log: Path | None = None,
    on_finish: Callable[[Trajectory], None] = lambda _: None,
) -> list[Result]:
    """Answer every example greedily; the ranks share the work. A collective.

    Args:
        rollout: engine, protocol and tool.
        runner: runs the episodes.
        examples: the same on every rank; none is dropped.
        eos_text: the end-of-message token as text.
        world: this rank.
        log: where this rank's trajectories are written.
        on_finish: called with each trajectory of this rank as it ends.

    Returns:
        Results in the order of ``examples``, on every rank.
    """
    mine = list(enumerate(examples[world.rank :: world.size]))
    groups = runner.run(rollout.groups(mine, group_size=1, sampling=_GREEDY, on_finish=on_finish))
    scored = [score_group(group, RewardConfig(kind=RewardKind.em), eos_text) for group in groups]
    if log is not None:
        write_trajectories(log, scored)
    results: dict[str, Result] = {}
    for part in gather_objects([_result(item) for item in scored]):
        results |= {result.id: result for result in part}
    return [results[example.id] for example in examples]


def _result(item: ScoredGroup) -> Result:
    trajectory, reward = item.group.trajectories[0], item.rewards[0]
    return Result(
        id=item.group.example.id,
        hops=item.group.example.hops,
        exact_match=reward is not None and reward.exact_match == 1.0,
        valid_format=reward is not None and reward.valid_format,
        retrieval_hit=reward is not None and reward.retrieval_hit,
        searches=trajectory.num_searches,
        error=trajectory.error,
    )


def by_hops(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Results of all questions under ``all``, then by hop count where the data has one."""
    parts = {"all": list(results)}
    for hops in sorted({result.hops for result in results} - {0}):
        parts[f"{hops} hop"] = [result for result in results if result.hops == hops]
    return parts


def table_rows(results: Sequence[Result]) -> list[list[str]]:
    """Rows as ``TABLE_COLUMNS``; "gold shown": share with a gold answer in a document that was read."""
    return [
        [
            name,
            str(len(part)),
            str(wilson(sum(result.exact_match for result in part), len(part))),
            f"{_mean([result.searches for result in part]):.2f}",
            f"{_mean([result.retrieval_hit for result in part]):.3f}",
            f"{_mean([result.valid_format for result in part]):.3f}",
            str(sum(result.error is not None for result in part)),
        ]
        for name, part in by_hops(results).items()
    ]


TABLE_COLUMNS = ("questions", "n", "exact match [95 %]", "searches", "gold shown", "valid format", "void")


def comparison_rows(before: Sequence[Result], after: Sequence[Result]) -> list[list[str]]:
    """Rows of ``COMPARISON_COLUMNS``, all questions first, then by hop count."""
    rows = []
    after_parts = by_hops(after)
    for name, old in by_hops(before).items():
        new = after_parts[name]
        rows.append(
            [
                name,
                str(len(old)),
                f"{_mean([result.exact_match for result in old]):.3f}",
                f"{_mean([result.exact_match for result in new]):.3f}",
                str(paired_difference(old, new)) if len(old) > 1 else "n/a",
                f"{_mean([result.retrieval_hit for result in old]):.3f}",
                f"{_mean([result.retrieval_hit for result in new]):.3f}",
                f"{_mean([result.searches for result in old]):.2f}",
                f"{_mean([result.searches for result in new]):.2f}",
            ]
        )
    return rows


COMPARISON_COLUMNS = (
    "questions",
    "n",
    "exact match before",
    "exact match after",
    "paired difference [95 %]",
    "gold shown before",
    "gold shown after",
    "searches before",
    "searches after",
)


def eval_metrics(results: Sequence[Result]) -> dict[str, float]:
    """``eval/...`` numbers for the log."""
    metrics = {"eval/void": float(sum(result.error is not None for result in results))}
    for name, part in by_hops(results).items():
        suffix = "" if name == "all" else "_" + name.replace(" ", "_")
        metrics[f"eval/exact_match{suffix}"] = _mean([result.exact_match for result in part])
        metrics[f"eval/gold_shown{suffix}"] = _mean([result.retrieval_hit for result in part])
        metrics[f"eval/searches{suffix}"] = _mean([result.searches for result in part])
    return metrics


def save_results(path: Path, results: Sequence[Result]) -> None:
    """Write results as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(result) for result in results]), encoding="utf-8")


def load_results(path: Path) -> list[Result]:
    """Read what ``save_results`` wrote."""
    return [Result(**row) for row in json.loads(path.read_text(encoding="utf-8"))]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
