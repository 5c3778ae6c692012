"""Checks of a composed configuration that types cannot express; all problems are reported at once."""

from __future__ import annotations

from searchrl.config import Config, ConfigError
from searchrl.validation.algorithm import algorithm_problems
from searchrl.validation.general import general_problems
from searchrl.validation.logger import logger_problems
from searchrl.validation.model import model_problems
from searchrl.validation.retrieval import retrieval_problems
from searchrl.validation.reward import reward_problems
from searchrl.validation.secrets import secret_problems
from searchrl.validation.values import value_problems


def validate(
    cfg: Config, *, world_size: int = 1, local_world_size: int | None = None, training: bool = True
) -> None:
    """Raise ``ConfigError`` listing every problem, each with the value and the remedy.

    Values that can mean nothing are reported alone: what else they break is of no interest.

    Args:
        cfg: converted by ``OmegaConf.to_object``.
        world_size: ranks of the run.
        local_world_size: ranks of this node; None: all.
        training: False for an evaluation, which needs no training questions and may ask an oracle.
    """
    # First and alone: other messages show values, and compare them.
    problems = list(secret_problems(cfg)) or list(value_problems(cfg))
    problems = problems or [
        *general_problems(cfg, world_size, local_world_size or world_size, training),
        *algorithm_problems(cfg),
        *reward_problems(cfg),
        *model_problems(cfg),
        *retrieval_problems(cfg.retrieval, training),
        *(logger_problems(cfg.logger) if training else ()),
    ]
    if problems:
        raise ConfigError("the configuration cannot run:\n" + "\n".join(f"  - {p}" for p in problems))
