"""Importance correction: the engine samples from not quite what the trainer differentiates.

Each loss token is weighted by π_old / π_roll, or left out where the two are too unlike. That corrects for the
mismatch between the two engines and for staleness; observations are masked and need none. Everything here
looks at one trajectory at a time, so it is exact under any cut of a batch into whole trajectories. What is
global (the weights' mean, the loss's denominators) follows from ``mismatch.ImportanceTotals``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from searchrl.algorithm.losses import LOG_RATIO_BOUND
from searchrl.config import ImportanceConfig, Level, RejectionConfig, RejectionLevel, WeightMode
from searchrl.errors import SearchrlError


class NonFiniteError(SearchrlError, ValueError):
    """A log-probability is NaN or infinite. Always an error: a replaced value would train on noise."""


@dataclass(kw_only=True, slots=True)
class ImportanceInputs:
    """The N loss tokens of one micro-batch, flattened, of T whole trajectories."""

    old_logprobs: Tensor
    """[N] logπ_old: the trainer's at the start of the update."""
    sampling_logprobs: Tensor
    """[N] logπ_roll: the engine's, as sampled."""
    trajectory_index: Tensor
    """long [N], each token's entry in ``trajectory_ids``."""
    trajectory_ids: Sequence[str]
    """The T trajectories' names; one without loss tokens is allowed and counts nowhere."""

    def log_ratio(self) -> Tensor:
        """Float64 [N] logπ_old - logπ_roll, detached and not clamped.

        In float64 because sums over thousands of tokens are compared with bounds close to 1.
        """
        return self.old_logprobs.detach().double() - self.sampling_logprobs.detach().double()

    def per_trajectory(self, values: Tensor) -> Tensor:
        """Float64 [T]: ``values`` [N] summed over the tokens of each trajectory."""
        sums = torch.zeros(len(self.trajectory_ids), dtype=torch.float64, device=values.device)
        return sums.index_add_(0, self.trajectory_index, values.double())

    def lengths(self) -> Tensor:
        """Float64 [T]: each trajectory's number of loss tokens."""
        return self.per_trajectory(torch.ones_like(self.trajectory_index))

    def ratio(self, level: Level) -> Tensor:
        """Float64 [N] π_old / π_roll of each token or of its trajectory: what weights are made from.

        ``token``: exp(log-ratio); ``sequence``: exp of the trajectory's sum of log-ratios; ``geometric``: of
        their mean. What is exponentiated is clamped to ±20.
        """
        exponent = self.log_ratio()
        if level is not Level.token:
            sums = self.per_trajectory(exponent)[self.trajectory_index]
            exponent = sums if level is Level.sequence else sums / self.lengths()[self.trajectory_index]
        return exponent.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()


CustomWeights = Callable[[ImportanceInputs], Tensor]
"""Mode ``custom``: weights [N], finite and not negative; a weight of 0 is a weight, it drops nothing."""


@dataclass(kw_only=True, slots=True)
class Correction:
    """What to do with each of the N tokens, detached. The reasons for dropping may overlap."""

    weights: Tensor
    """fp32 [N], not normalised; 0 where dropped."""
    keep: Tensor
    """bool [N], False where mask, rejection or veto dropped the token."""
    truncated: Tensor
    """bool [N]: truncate or clip moved the weight away from the ratio."""
    masked: Tensor
    """bool [N]: dropped by mode ``mask``."""
    rejected: Tensor
    """bool [N]: dropped by the rejection."""
    vetoed: Tensor
    """bool [N]: its trajectory holds a token with a ratio below the veto."""


def correct(
    inputs: ImportanceInputs, config: ImportanceConfig, custom: CustomWeights | None = None
) -> Correction:
    """Weights and dropped tokens, up to normalisation (see ``ImportanceTotals.normalizer``).

    Token-level ``truncate`` is TIS (Yao et al. 2025, *Your Efficient RL Framework Secretly Brings You
    Off-Policy RL Training*), token-level ``mask`` IcePop (arXiv 2510.18855), sequence-level ``mask`` Seq-MIS
    (Liu, Li et al. 2025, *When Speed Kills Stability*). Weights, rejection and veto look at the raw ratios,
    never at one another. Identical policies give weights of exactly 1 and drop nothing (mode ``custom``
    aside).

    Args:
        inputs: the micro-batch's tokens; there may be none.
        config: the settings; not ``enabled``, all weights are 1 and everything is kept.
        custom: mode ``custom``: ``config.import_path``'s function with its ``kwargs`` bound.

    Raises:
        NonFiniteError: a log-probability is NaN or infinite; names the trajectories.
        ValueError: bounds that do not hold 1; mode ``custom`` without a function, or weights from it that are
            not [N], finite and at least 0.
    """
    check_finite(inputs.old_logprobs, "trainer", inputs.trajectory_index, inputs.trajectory_ids)
    check_finite(inputs.sampling_logprobs, "engine", inputs.trajectory_index, inputs.trajectory_ids)
    ratio = inputs.ratio(config.level)
    weights = torch.ones_like(ratio)
    truncated = masked = rejected = vetoed = torch.zeros_like(ratio, dtype=torch.bool)
    if config.enabled:
        lo, hi = bounds(config.level, config.lo, config.hi)
        match config.mode:
            case WeightMode.none:
                pass
            case WeightMode.truncate:
                weights = ratio.clamp(max=hi)
                truncated = weights != ratio
            case WeightMode.clip:
                weights = ratio.clamp(lo, hi)
                truncated = weights != ratio
            case WeightMode.mask:
                weights = ratio
                masked = (ratio < lo) | (ratio > hi)
            case WeightMode.custom:
                weights = _custom_weights(inputs, config.import_path, custom)
        rejected = _rejected(inputs, config.rejection)
        below = inputs.ratio(Level.token) < config.veto
        vetoed = inputs.per_trajectory(below)[inputs.trajectory_index] > 0
    keep = ~(masked | rejected | vetoed)
    return Correction(
        weights=weights.where(keep, 0.0).float(),
        keep=keep,
        truncated=truncated,
        masked=masked,
        rejected=rejected,
        vetoed=vetoed,
    )


def needs_global(config: ImportanceConfig) -> bool:
    """Whether a token's share of the loss depends on other trajectories' corrections.

    So it is when weights are normalised, or when tokens can be dropped and leave the denominators with it.
    The caller then needs all of an optimizer step's corrections, over all ranks, before any backward pass.
    """
    can_drop = (
        config.mode is WeightMode.mask
        or config.rejection.level is not RejectionLevel.none
        or config.veto > 0.0
    )
    return config.enabled and (config.normalize or (can_drop and not config.dropped_in_denominator))


def bounds(level: Level, lo: float | None, hi: float | None) -> tuple[float, float]:
    """(lo, hi) of a ratio, with defaults: ``hi`` 2, at the geometric level 1.01; ``lo`` 1 / ``hi``.

    Raises:
        ValueError: not 0 ≤ lo ≤ 1 ≤ hi. The ratio of identical policies, 1, must always be inside.
    """
    if hi is None:
        hi = 1.01 if level is Level.geometric else 2.0
    if not (hi >= 1.0 and (lo is None or 0.0 <= lo <= 1.0)):
        raise ValueError(f"importance bounds must satisfy 0 <= lo <= 1 <= hi, got lo={lo}, hi={hi}")
    return (1.0 / hi if lo is None else lo), hi


def check_finite(
    values: Tensor, source: str, trajectory_index: Tensor, trajectory_ids: Sequence[str]
) -> None:
    """Raise if any of ``values`` [N] is NaN or infinite.

    Args:
        values: log-probabilities [N].
        source: who computed them, for the message.
        trajectory_index: long [N], each token's entry in ``trajectory_ids``.
        trajectory_ids: names of the micro-batch's trajectories.

    Raises:
        NonFiniteError: names the source and the trajectories.
    """
    bad = ~torch.isfinite(values)
    if not bool(bad.any()):
        return
    names = [trajectory_ids[index] for index in sorted(set(trajectory_index[bad].tolist()))]
    raise NonFiniteError(
        f"the {source}'s log-probabilities are NaN or infinite at {int(bad.sum())} of "
        f"{values.numel()} tokens, in trajectories {', '.join(names)}"
    )


def _rejected(inputs: ImportanceInputs, config: RejectionConfig) -> Tensor:
    """Bool [N]: tokens whose ratio, or whose trajectory's, is out of the rejection's bounds."""
    if config.level is RejectionLevel.none:
        return torch.zeros_like(inputs.trajectory_index, dtype=torch.bool)
    level = Level(config.level.value)
    lo, hi = bounds(level, config.lo, config.hi)
    ratio = inputs.ratio(level)
    return (ratio < lo) | (ratio > hi)


def _custom_weights(inputs: ImportanceInputs, import_path: str, custom: CustomWeights | None) -> Tensor:
    """Float64 [N]: what the user's function returns, once it is known to be weights."""
    if custom is None:
        raise ValueError("importance.mode=custom needs a function; set importance.import_path")
    weights = custom(inputs).detach().float()
    shape = inputs.trajectory_index.shape
    if weights.shape != shape:
        raise ValueError(
            f"importance.import_path={import_path} must return weights of shape {tuple(shape)}, "
            f"got {tuple(weights.shape)}"
        )
    if not bool((torch.isfinite(weights) & (weights >= 0.0)).all()):
        raise ValueError(
            f"importance.import_path={import_path} returned weights that are negative, NaN or infinite"
        )
    return weights.double()
