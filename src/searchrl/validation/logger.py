"""Checks of where metrics go, before a run has loaded what it would have to throw away."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from searchrl.config import LoggerConfig, WandbMode


def logger_problems(logger: LoggerConfig) -> Iterator[str]:
    """Every problem of the sinks, a sentence each."""
    if logger.tensorboard and find_spec("tensorboard") is None:
        yield (
            "logger.tensorboard=true needs the package tensorboard, which is not installed; "
            "`pip install 'searchrl[tensorboard]'` installs it"
        )
    if logger.wandb is WandbMode.online and not _has_credentials():
        yield (
            "logger.wandb=online needs a key, from the environment variable WANDB_API_KEY or `wandb login`; "
            "without one, logger=wandb_offline writes what `wandb sync` uploads later"
        )
    if logger.trajectories_every < 0:
        yield f"logger.trajectories_every={logger.trajectories_every} must not be negative"


def _has_credentials() -> bool:
    """True if wandb may find a key; where it looks for one, without asking it, which takes a second."""
    if any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")):
        return True
    places = (os.environ.get("NETRC", ""), "~/.netrc", "~/_netrc")
    return any(place and Path(os.path.expanduser(place)).is_file() for place in places)
