"""Settings of the watch over a run's metrics."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class WatchAction(StrEnum):
    """What happens when a metric leaves its bound."""

    warn = "warn"
    """A line on the console."""
    stop = "stop"
    """That, a checkpoint, and the end of the run with exit code 1."""


@dataclass(kw_only=True, slots=True)
class WatchConfig:
    """Rules that notice a collapsing policy early: ``searchrl.watch``, table in docs/operations.md."""

    action: WatchAction = WatchAction.warn
    """``warn`` or ``stop``. A stopped run goes on with ``resume=true watch.action=warn``."""
    window: int = 5
    """Steps that a metric is averaged over before it is judged. Longer: later, but calmer."""
    likelihood_fall: float = 0.3
    """Nats per token that the log-probability of correct trajectories may lose against its best window."""
    min_ess_ratio: float = 0.5
    """Effective sample size / trajectories below which engine and trainer disagree too much, PROTOCOL §5."""
    ignore: tuple[str, ...] = ()
    """Names of rules that are left out, say [thinking] if thoughts are meant to get shorter."""
