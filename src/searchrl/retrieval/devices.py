"""Where encoders and dense indexes compute: the CPU, or some GPUs."""

from __future__ import annotations

import re
from collections.abc import Sequence

from searchrl.errors import InputError


class DeviceError(InputError, ValueError):
    """Devices that are no such thing, or on which an index cannot be searched."""


def gpu_numbers(devices: Sequence[str]) -> list[int]:
    """Return the numbers of the GPUs in ``devices``, none for ``["cpu"]``.

    Raises `DeviceError` if they are neither the CPU alone nor GPUs alone, each once.
    """
    if list(devices) == ["cpu"]:
        return []
    numbers = [int(match[1]) for device in devices if (match := re.fullmatch(r"cuda:(\d+)", device))]
    if not numbers or len(set(numbers)) < len(devices):
        raise DeviceError(
            f"devices [{', '.join(devices)}] are neither the CPU alone nor GPUs alone: "
            "write cpu, or cuda:0, cuda:1"
        )
    return numbers
