"""A reward, an advantage, a loss and an importance weight of one's own, each one function.

From the folder that holds ``examples``, with all four::

    searchrl train +experiment=smoke name=custom \
        reward.kind=custom     reward.import_path=examples.custom:frugal  +reward.kwargs.cost=0.05 \
        advantage.kind=custom  advantage.import_path=examples.custom:ranks \
        loss.kind=custom       loss.import_path=examples.custom:softer  +loss.kwargs.negative=0.5 \
        importance.mode=custom importance.import_path=examples.custom:smooth

Each is imported and checked before anything loads; a wrong name or argument is a message, not a lost run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from searchrl.algorithm.importance import ImportanceInputs
from searchrl.algorithm.losses import LossInputs, LossOutputs
from searchrl.answers import exact_match
from searchrl.trajectory import Example, Trajectory


def frugal(trajectory: Trajectory, example: Example, *, cost: float) -> float:
    """Exact match, less ``cost`` for every search. Never called for a trajectory whose search failed."""
    return exact_match(trajectory.answer, example.golden_answers) - cost * trajectory.num_searches


def ranks(groups: Sequence[Sequence[float]]) -> list[list[float]]:
    """Ranks within the group, from -1 to 1, ties at their middle: blind to how far rewards lie apart."""
    return [
        [sum((a > b) - (a < b) for b in rewards) / max(1, len(rewards) - 1) for a in rewards]
        for rewards in groups
    ]


def softer(inputs: LossInputs, *, negative: float) -> LossOutputs:
    """REINFORCE in which tokens of worse trajectories weigh ``negative`` as much.

    Everything is [N], a value a loss token; weighting, averaging and penalties come afterwards.
    """
    scale = torch.where(inputs.advantages < 0, negative, 1.0)
    ratio = (inputs.logprobs - inputs.old_logprobs).detach().exp()
    return LossOutputs(token_losses=-scale * inputs.advantages * inputs.logprobs, metrics={"ratio": ratio})


def smooth(inputs: ImportanceInputs, *, hi: float = 2.0) -> Tensor:
    """Token ratios that approach ``hi`` instead of being cut there."""
    ratio = (inputs.old_logprobs - inputs.sampling_logprobs).clamp(max=20).exp()
    return hi * torch.tanh(ratio / hi)
