"""Values that no setting can mean: looked for first, so that everything else may compare what there is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

_UNBOUNDED = ("importance.hi", "importance.rejection.hi")
"""Infinite: never truncated, never rejected."""


def value_problems(section: Any, prefix: str = "") -> Iterator[str]:
    """Lists in lists, floats that are not finite, integers that libraries below cannot hold, a sentence each.

    Sections that are not used are looked at as well: there is no reason to write such a value anywhere.
    """
    for entry in fields(section):
        name, value = prefix + entry.name, getattr(section, entry.name)
        if is_dataclass(value):
            yield from value_problems(value, f"{name}.")
            continue
        for item in value if isinstance(value, tuple | list) else [value]:
            if isinstance(value, list) and isinstance(item, list | dict):  # OmegaConf checks plain items only
                yield f"{name} holds {item}; write a list of plain values"
            elif isinstance(item, float) and not math.isfinite(item):
                if not (item == math.inf and name in _UNBOUNDED):
                    yield f"{name}={item:g} must be a finite number"
            elif isinstance(item, int) and abs(item) >= 2**32:  # numpy's bound for seeds; enough for all
                yield f"{name}={item} must be below 2^32"
