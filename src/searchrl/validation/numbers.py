"""Numbers that no setting can mean: looked for first, so that everything else may compare what there is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

_UNBOUNDED = ("importance.hi", "importance.rejection.hi")
"""Infinite: never truncated, never rejected."""


def number_problems(section: Any, prefix: str = "") -> Iterator[str]:
    """Floats that are not finite, and integers that some library below cannot hold, a sentence each.

    Sections that are not used are looked at as well: there is no reason to write such a number anywhere.
    """
    for entry in fields(section):
        name, value = prefix + entry.name, getattr(section, entry.name)
        if is_dataclass(value):
            yield from number_problems(value, f"{name}.")
            continue
        for number in value if isinstance(value, tuple | list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                if not (number == math.inf and name in _UNBOUNDED):
                    yield f"{name}={number:g} must be a finite number"
            elif isinstance(number, int) and abs(number) >= 2**32:  # numpy's bound for seeds; enough for all
                yield f"{name}={number} must be below 2^32"
