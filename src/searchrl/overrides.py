"""Settings given as Python values, in the words of the command line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from types import FunctionType
from typing import Any

from searchrl.config import ConfigError

Overrides = Mapping[str, object] | Sequence[str]
"""Settings by name, ``{"optimizer.lr": 1e-5}``, or as on the command line, ``["optimizer.lr=1e-5"]``."""

_CHOICES = {"importance": "importance.mode"}
"""The setting that chooses a function of one's own, where it is not ``SECTION.kind``."""


def command_line_overrides(overrides: Overrides) -> list[str]:
    """Overrides as Hydra reads them on the command line.

    Texts of a mapping are quoted, so that nothing in them has a meaning but ``${…}``, as in YAML.

    Raises:
        ConfigError: a value that no setting can hold.
    """
    if isinstance(overrides, str):
        raise ConfigError(f"overrides={overrides!r} is one text; give a list, [{overrides!r}], or a mapping")
    if isinstance(overrides, Mapping):
        return [f"{key}={_hydra_value(key, value)}" for key, value in overrides.items()]
    return list(overrides)


def function_overrides(functions: Mapping[str, Callable[..., Any] | None]) -> list[str]:
    """The overrides that put functions in place of what the sections of these names are configured to do.

    Raises:
        ConfigError: a function cannot be found by its name.
    """
    words: list[str] = []
    for section, function in functions.items():
        if function is not None:
            path = _import_path(function, section)
            words += [f"{_CHOICES.get(section, f'{section}.kind')}=custom", f"{section}.import_path='{path}'"]
    return words


def _import_path(function: Callable[..., Any], section: str) -> str:
    found: object = None
    if isinstance(function, FunctionType):
        found = vars(sys.modules[function.__module__]).get(function.__name__)
    if found is not function:
        raise ConfigError(
            f"{section}={function!r} cannot be found by its name, as a run has to; define it with `def` at "
            f"the top level of a module, and give more arguments as overrides={{'+{section}.kwargs.NAME': …}}"
        )
    return f"{function.__module__}:{function.__name__}"


def _hydra_value(key: str, value: object) -> str:
    from hydra.core.override_parser.types import Quote, QuotedString

    match value:
        case None:
            return "null"
        case Enum():
            return _hydra_value(key, value.value)
        case bool():
            return "true" if value else "false"
        case int():
            return str(int(value))
        case float():  # numpy's would print its name too
            return repr(float(value))
        case str() | Path():
            return QuotedString(text=str(value), quote=Quote.single).with_quotes()
        case Mapping():
            return "{" + ",".join(f"{name}:{_hydra_value(key, item)}" for name, item in value.items()) + "}"
        case list() | tuple():
            return "[" + ",".join(_hydra_value(key, item) for item in value) + "]"
        case _:
            raise ConfigError(
                f"overrides[{key!r}]={value!r} is a {type(value).__name__}; a setting is a number, a text, a "
                "path, true or false, None, or a list or mapping of these"
            )
