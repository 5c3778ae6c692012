"""Stops a run in which too much fails: what survives is no fair sample of the questions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from searchrl.errors import CleanStop
from searchrl.preemption import NEVER, StopRequest

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class TooManyFailures(CleanStop):
    """More trajectories are void than ``retrieval.max_failed_fraction`` allows."""


def check_failures(
    errors: Sequence[str],
    count: int,
    *,
    max_failed_fraction: float,
    stop: StopRequest = NEVER,
    group: ProcessGroup | None = None,
) -> None:
    """Raise if too large a share of all ranks' trajectories is void. A collective.

    Args:
        errors: why trajectories of this rank are void, one each.
        count: trajectories of this rank.
        max_failed_fraction: the largest share that is allowed.
        stop: whether this rank was asked to stop.
        group: the ranks' process group, if this is not the thread that uses the default one.

    Raises:
        Preempted: on every rank, if any was asked to stop.
        TooManyFailures: on every rank, with the number and some of the reasons.
    """
    parts = stop.gather((count, list(errors)), group)
    total = sum(count for count, _ in parts)
    everywhere = [error for _, part in parts for error in part]
    if len(everywhere) > max_failed_fraction * total:
        raise TooManyFailures(
            f"{len(everywhere)} of {total} trajectories are void, more than retrieval.max_failed_fraction="
            f"{max_failed_fraction:g} allows; what failed: " + "; ".join(sorted(set(everywhere))[:3])
        )
