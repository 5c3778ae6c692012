"""A reward that means nothing, but differs within a group: policies of random weights are trained on it."""

from __future__ import annotations

import zlib
from array import array

from searchrl.trajectory import Example, Trajectory


def parity(trajectory: Trajectory, example: Example) -> float:
    """0 or 1, by the tokens alone."""
    return float(zlib.crc32(array("q", trajectory.token_ids).tobytes()) & 1)
