"""Stops a run in which too much fails: what survives is no fair sample of the questions."""

from __future__ import annotations

from collections.abc import Sequence

from searchrl.distributed import gather_objects, reduce_values
from searchrl.errors import SearchrlError


class TooManyFailures(SearchrlError, RuntimeError):  # noqa: N818  # what the message says
    """More trajectories are void than ``retrieval.max_failed_fraction`` allows."""


def check_failures(errors: Sequence[str], count: int, *, max_failed_fraction: float) -> None:
    """Raise if too large a share of all ranks' trajectories is void. A collective.

    Args:
        errors: why trajectories of this rank are void, one each.
        count: trajectories of this rank.
        max_failed_fraction: the largest share that is allowed.

    Raises:
        TooManyFailures: on every rank, with the number and some of the reasons.
    """
    total = int(reduce_values([count], "sum")[0])
    everywhere = [error for part in gather_objects(list(errors)) for error in part]
    if len(everywhere) > max_failed_fraction * total:
        raise TooManyFailures(
            f"{len(everywhere)} of {total} trajectories are void, more than retrieval.max_failed_fraction="
            f"{max_failed_fraction:g} allows; what failed: " + "; ".join(sorted(set(everywhere))[:3])
        )
