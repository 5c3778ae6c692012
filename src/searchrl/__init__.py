"""searchrl: teach language models to search while they reason.

From Python: ``from searchrl import train, evaluate, rollout`` (docs/python.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from searchrl.api import Evaluation, Policy, TrainingResult, evaluate, open_policy, rollout, train

__version__ = "0.1.0"

__all__ = ["Evaluation", "Policy", "TrainingResult", "evaluate", "open_policy", "rollout", "train"]


def __getattr__(name: str) -> Any:
    """The names of ``searchrl.api``, imported when they are first asked for (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from searchrl import api

    return getattr(api, name)
