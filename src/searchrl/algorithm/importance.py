"""Truncated importance sampling (TIS): the engine samples from not quite what the trainer differentiates.

Weights correct for the mismatch between the two engines and for staleness. Observations are masked and need
none. Truncated weights hide drift, so the diagnostics here come from the untruncated ratios.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from searchrl.algorithm.losses import LOG_RATIO_BOUND, k3
from searchrl.errors import SearchrlError

SUM_KEYS = (
    "tokens",
    "trajectories",
    "weight",
    "ratio",
    "truncated",
    "k1",
    "k3",
    "abs_logprob_diff",
    "trajectory_weight",
    "trajectory_weight_squared",
)
"""Keys of :attr:`ImportanceTotals.sums`, in a fixed order so that every rank builds the same vector."""

MAX_KEYS = ("ratio_max", "negative_ratio_min", "abs_logprob_diff_max")
"""Keys of :attr:`ImportanceTotals.maxima`; a minimum travels as the maximum of its negative."""


class NonFiniteError(SearchrlError, ValueError):
    """A log-probability is NaN or infinite. Always an error: a replaced value would train on noise."""


@dataclass(kw_only=True, slots=True)
class ImportanceTotals:
    """Sums and extrema over tokens and trajectories, exact under any cut of the batch.

    Over ranks: all-reduce ``sums`` with SUM and ``maxima`` with MAX, in the order of the keys; then
    ``finalize``. A trajectory must lie in one micro-batch, as ``batching`` guarantees.
    """

    sums: dict[str, float]
    """One entry per ``SUM_KEYS``."""
    maxima: dict[str, float]
    """One entry per ``MAX_KEYS``; -inf where there was no token."""

    @classmethod
    def empty(cls) -> ImportanceTotals:
        """The totals of no tokens: ``merge``'s neutral element."""
        return cls(sums=dict.fromkeys(SUM_KEYS, 0.0), maxima=dict.fromkeys(MAX_KEYS, -math.inf))

    def merge(self, other: ImportanceTotals) -> ImportanceTotals:
        """The totals of both parts together."""
        return ImportanceTotals(
            sums={key: self.sums[key] + other.sums[key] for key in SUM_KEYS},
            maxima={key: max(self.maxima[key], other.maxima[key]) for key in MAX_KEYS},
        )

    def finalize(self) -> dict[str, float]:
        """Metrics of the whole batch, ready to log; empty if there was no token.

        ``tis/ratio_*``: π_old / π_roll before truncation; ``tis/weight_mean``: after it; ``tis/k1``,
        ``tis/k3``: KL of π_roll to π_old in nats a token; ``tis/effective_sample_size``: (Σw)² / Σw² over
        trajectories, w their geometric-mean ratio before truncation; ``tis/ess_ratio``: that over the number
        of trajectories.
        """
        tokens, trajectories = self.sums["tokens"], self.sums["trajectories"]
        if tokens == 0:
            return {}
        effective = self.sums["trajectory_weight"] ** 2 / self.sums["trajectory_weight_squared"]
        return {
            "tis/weight_mean": self.sums["weight"] / tokens,
            "tis/ratio_mean": self.sums["ratio"] / tokens,
            "tis/ratio_min": -self.maxima["negative_ratio_min"],
            "tis/ratio_max": self.maxima["ratio_max"],
            "tis/truncated_fraction": self.sums["truncated"] / tokens,
            "tis/k1": self.sums["k1"] / tokens,
            "tis/k3": self.sums["k3"] / tokens,
            "tis/abs_logprob_diff_mean": self.sums["abs_logprob_diff"] / tokens,
            "tis/abs_logprob_diff_max": self.maxima["abs_logprob_diff_max"],
            "tis/effective_sample_size": effective,
            "tis/ess_ratio": effective / trajectories,
        }


def truncated_importance_weights(
    old_logprobs: Tensor,
    sampling_logprobs: Tensor,
    trajectory_index: Tensor,
    trajectory_ids: Sequence[str],
    *,
    hi: float = 2.0,
) -> tuple[Tensor, ImportanceTotals]:
    """Token-level weights ``w = min(exp(logπ_old - logπ_roll), hi)``; log-ratios are clamped to ±20 first.

    Args:
        old_logprobs: fp32 [N], the trainer's at the start of the update.
        sampling_logprobs: fp32 [N], the engine's.
        trajectory_index: long [N], each token's entry in ``trajectory_ids``.
        trajectory_ids: names of the micro-batch's trajectories; one without loss tokens is not counted.
        hi: the truncation bound, above 0.

    Returns:
        Detached weights [N] and the totals for the metrics.

    Raises:
        ValueError: ``hi`` is not positive.
        NonFiniteError: a log-probability is NaN or infinite; names the trajectories.
    """
    if not hi > 0:
        raise ValueError(f"the truncation bound must be positive, got {hi}")
    check_finite(old_logprobs, "trainer", trajectory_index, trajectory_ids)
    check_finite(sampling_logprobs, "engine", trajectory_index, trajectory_ids)
    difference = old_logprobs.detach() - sampling_logprobs
    log_ratio = difference.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    ratio = log_ratio.exp()
    weights = ratio.clamp(max=hi)
    if difference.numel() == 0:
        return weights, ImportanceTotals.empty()
    counts = torch.bincount(trajectory_index, minlength=len(trajectory_ids))
    present = counts > 0
    log_sums = torch.zeros(len(trajectory_ids), dtype=torch.float64, device=ratio.device)
    log_sums.index_add_(0, trajectory_index, difference.double())
    mean_log_ratio = log_sums[present] / counts[present]
    trajectory_weight = mean_log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    terms = {
        "tokens": torch.ones_like(ratio),
        "trajectories": present,
        "weight": weights,
        "ratio": ratio,
        "truncated": ratio > hi,
        "k1": -difference,
        "k3": k3(difference),
        "abs_logprob_diff": difference.abs(),
        "trajectory_weight": trajectory_weight,
        "trajectory_weight_squared": trajectory_weight.square(),
    }
    extrema = (ratio.max(), (-ratio).max(), difference.abs().max())
    # Two transfers for all numbers: on a GPU every separate .item() would wait for the device.
    sums = torch.stack([terms[key].sum(dtype=torch.float64) for key in SUM_KEYS]).tolist()
    maxima = torch.stack(extrema).tolist()
    return weights, ImportanceTotals(
        sums=dict(zip(SUM_KEYS, sums, strict=True)), maxima=dict(zip(MAX_KEYS, maxima, strict=True))
    )


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
