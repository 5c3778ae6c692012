"""Scored groups to what training needs of them: filters, the KL penalty in the reward, advantages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from searchrl.algorithm.advantages import compute_advantages
from searchrl.config import AdvantageConfig, AdvantageKind, FilterConfig
from searchrl.distributed import World, gather_objects
from searchrl.extensions import load_function
from searchrl.rewards import ScoredGroup
from searchrl.trajectory import Sample, Trajectory

NO_PENALTIES: Mapping[str, float] = {}


def to_samples(
    scored: Sequence[ScoredGroup],
    *,
    advantage: AdvantageConfig,
    filters: FilterConfig,
    world: World,
    penalties: Mapping[str, float] = NO_PENALTIES,
) -> list[Sample]:
    """This rank's samples, with advantages computed over the groups of all ranks. A collective.

    Args:
        scored: this rank's groups. Void trajectories take no part.
        advantage: how rewards become advantages.
        filters: what leaves the loss. Groups without variance leave before advantages are computed; over-long
            trajectories and those with void turns afterwards: their rewards remain in the baseline.
        world: this rank.
        penalties: subtracted from rewards, by sample id (see ``sample_id``).

    Raises:
        ValueError: a reward or an advantage is NaN or infinite.
    """
    mine = [
        [reward.total - penalties.get(sample_id(item, index), 0.0) for index, _, reward in item.survivors]
        for item in scored
    ]
    parts = gather_objects(mine)
    custom = None
    if advantage.kind is AdvantageKind.custom:
        custom = load_function(advantage.import_path, advantage.kwargs, section="advantage", positional=1)
    everywhere = compute_advantages(
        [group for part in parts for group in part],
        advantage,
        zero_variance_filter=filters.zero_variance,
        custom=custom,
    )
    first = sum(len(part) for part in parts[: world.rank])
    samples = []
    for item, advantages in zip(scored, everywhere[first : first + len(mine)], strict=True):
        if advantages is None:
            continue
        for (index, trajectory, _), value in zip(item.survivors, advantages, strict=True):
            if not _is_filtered(trajectory, filters):
                samples.append(Sample(trajectory=trajectory, advantage=value, id=sample_id(item, index)))
    return samples


def unscored_samples(scored: Sequence[ScoredGroup]) -> list[Sample]:
    """All trajectories that are not void, with advantage 0: for what comes before rewards are final."""
    return [
        Sample(trajectory=trajectory, advantage=0.0, id=sample_id(item, index))
        for item in scored
        for index, trajectory, _ in item.survivors
    ]


def sample_id(item: ScoredGroup, index: int) -> str:
    """``group/index``."""
    return f"{item.group.id}/{index}"


def _is_filtered(trajectory: Trajectory, filters: FilterConfig) -> bool:
    overlong = filters.overlong and trajectory.is_overlong
    return overlong or (filters.void_turns and trajectory.has_void_turn)
