"""Functions and classes of the user's own, named in the configuration by import path."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from searchrl.config import ConfigError
from searchrl.errors import did_you_mean


def load_function(
    import_path: str, kwargs: Mapping[str, Any], *, section: str, positional: int
) -> partial[Any]:
    """The function that ``import_path`` names, with ``kwargs`` filled in.

    Modules are looked for where Python looks, and in the current folder, from which an installed command
    would not import by itself.

    Args:
        import_path: ``module:function``.
        kwargs: keyword arguments that it is always called with.
        section: of the configuration, for messages: ``loss`` stands for ``loss.import_path``.
        positional: how many arguments it will be called with besides.

    Raises:
        ConfigError: it cannot be imported, or cannot be called so; names the value and the remedy.
    """
    setting = f"{section}.import_path={import_path}"
    module_name, colon, name = import_path.partition(":")
    if not (module_name and colon and name):
        raise ConfigError(f"{setting} is not of the form module:function, for example my_package.losses:loss")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises while it runs
        raise ConfigError(
            f"{setting} cannot be imported: {error!r}; modules are looked for in {os.getcwd()} and in the "
            "environment"
        ) from error
    if name not in vars(module):
        raise ConfigError(f"{setting}: {module_name} has no {name}{did_you_mean(name, vars(module))}")
    function = vars(module)[name]
    if not callable(function):
        raise ConfigError(f"{setting} is {function!r}, which cannot be called")
    try:
        inspect.signature(function).bind(*[None] * positional, **kwargs)
    except TypeError as error:
        raise ConfigError(
            f"{setting} cannot be called with {positional} argument{'s' * (positional != 1)} and {section}."
            f"kwargs={dict(kwargs)}: {error}"
        ) from error
    return partial(function, **kwargs)


def load_class(
    import_path: str, kwargs: Mapping[str, Any], *, section: str, methods: Mapping[str, Sequence[str]]
) -> Callable[[], Any]:
    """The class that ``import_path`` names, with ``kwargs`` filled in; see ``load_function``.

    Args:
        import_path: ``module:Class``.
        kwargs: keyword arguments that objects of it are made with.
        section: of the configuration, for messages.
        methods: the ``async`` methods that it must have, by name, with the names of their arguments.

    Raises:
        ConfigError: it cannot be imported or made so, is no class, or lacks a method.
    """
    make = load_function(import_path, kwargs, section=section, positional=0)
    setting, made = f"{section}.import_path={import_path}", make.func
    if not isinstance(made, type):
        raise ConfigError(f"{setting} is {made!r}, which is no class")
    for name, arguments in methods.items():
        method = inspect.getattr_static(made, name, None)
        wanted = f"async def {name}({', '.join(['self', *arguments])})"
        if not inspect.iscoroutinefunction(method):
            raise ConfigError(f"{setting} needs a method `{wanted}`")
        try:
            inspect.signature(method).bind(None, *arguments)
        except TypeError as error:
            raise ConfigError(f"{setting} needs a method `{wanted}`: {error}") from error
    return make
