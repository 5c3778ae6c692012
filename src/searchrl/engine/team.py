"""The ranks that hold one engine together (tensor parallelism), and how they stay together.

Each of them runs a whole vLLM engine over a part of the weights, and each schedules and samples everything.
What they do follows from the requests alone, seeds included: they need the same ones before the same steps.
So the first rank leads and says before each step what comes, and the others follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from searchrl.distributed import World, gather_objects, side_group
from searchrl.engine.requests import EngineError, GenerationRequest


@dataclass(kw_only=True, slots=True, frozen=True)
class Orders:
    """What all ranks of a team do next."""

    add: Sequence[tuple[str, GenerationRequest]] = ()
    abort: Sequence[str] = ()
    is_last: bool = False
    """The leader's work has ended: there is no step."""
    error: str | None = None
    """Why the work failed, if it did."""


class Team:
    """This rank and those that hold the same engine; by default it is alone."""

    def __init__(self, world: World) -> None:
        self.leads = world.leads_engine
        """True on the first rank."""
        self.finished: list[tuple[str, list[int]]] = []
        """Requests that this rank's last step finished, with the tokens that it sampled."""
        self._group = side_group(world.engine_size, world.timeout_s)

    @property
    def is_alone(self) -> bool:
        """True if one rank holds the whole engine."""
        return self._group is None

    def agree(self, orders: Orders | None) -> Orders:
        """The leader's orders on every rank; the others give None. A collective of the team.

        Raises:
            EngineError: the ranks finished different tokens. Their schedules differ from here on, so the
                next step could hang.
        """
        told = [(orders, self.finished)]
        if self._group is not None:
            told = gather_objects(told[0], self._group)
        leaders, finished = told[0]
        if any(others != finished for _, others in told):
            raise EngineError(
                "the ranks of an engine sampled different tokens, so their parts of it have grown apart; are "
                "vLLM's version and settings (VLLM_*) the same on all of them?"
            )
        assert leaders is not None
        return leaders
