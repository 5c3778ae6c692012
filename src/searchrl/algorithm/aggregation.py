"""What token losses are averaged over. Denominators add up over micro-batches and ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from searchrl.config import Aggregation


def token_weights(
    aggregation: Aggregation, counted: Tensor, trajectory_index: Tensor, constant_length: int
) -> Tensor:
    """What each token's loss is multiplied by before the sum: [N], 0 where ``counted`` is False.

    The loss of an optimizer step is ``Σ weight · token loss / Σ denominator``, both sums over all ranks::

        token     1              / counted tokens
        sequence  1 / |o_i|      / trajectories           |o_i|: the trajectory's counted tokens
        constant  1 / L          / trajectories           Dr. GRPO, arXiv 2503.20783

    Args:
        aggregation: which of the three.
        counted: bool [N], False for tokens that have left the loss.
        trajectory_index: long [N]; all tokens of a trajectory are among the N.
        constant_length: L in tokens, read for ``constant`` only.
    """
    weights = counted.to(torch.float32)
    match aggregation:
        case Aggregation.token:
            return weights
        case Aggregation.sequence:
            lengths = _counted_lengths(counted, trajectory_index)
            return weights / lengths[trajectory_index].clamp(min=1)
        case Aggregation.constant:
            return weights / constant_length


def denominator(aggregation: Aggregation, counted: Tensor, trajectory_index: Tensor) -> float:
    """This part's share of what the step's sum is divided by; a trajectory without counted tokens is none.

    Arguments as for :func:`token_weights`.
    """
    match aggregation:
        case Aggregation.token:
            return float(counted.sum())
        case Aggregation.sequence | Aggregation.constant:
            return float((_counted_lengths(counted, trajectory_index) > 0).sum())


def _counted_lengths(counted: Tensor, trajectory_index: Tensor) -> Tensor:
    """Counted tokens of each trajectory, long [trajectories]."""
    count = int(trajectory_index.max()) + 1 if trajectory_index.numel() else 0
    lengths = torch.zeros(count, dtype=torch.long, device=counted.device)
    return lengths.index_add_(0, trajectory_index, counted.long())
