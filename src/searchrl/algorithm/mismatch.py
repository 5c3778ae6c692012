"""How unlike engine and trainer are, and what the importance correction made of it: sums, then metrics.

Truncated weights hide drift, so the mismatch itself is measured on the raw ratios.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from searchrl.algorithm.importance import Correction, ImportanceInputs
from searchrl.algorithm.losses import LOG_RATIO_BOUND, k3
from searchrl.config import ImportanceConfig, Level

LENGTH_EDGES = (128, 512, 2048)
"""A trajectory's loss tokens: where one length bucket ends and the next begins."""

LENGTH_BUCKETS = ("len_lt_128", "len_128_511", "len_512_2047", "len_ge_2048")
"""Names of the length buckets."""

SUM_KEYS = (
    "tokens",
    "trajectories",
    "ratio",
    "ratio_squared",
    "k1",
    "k3",
    "abs_logprob_diff",
    "old_logprob",
    "sampling_logprob",
    "trajectory_ratio",
    "trajectory_ratio_squared",
    "kept",
    "kept_trajectories",
    "weight",
    "trajectory_weight",
    "truncated",
    "masked",
    "rejected",
    "vetoed_trajectories",
    *(f"tokens_{bucket}" for bucket in LENGTH_BUCKETS),
    *(f"kept_{bucket}" for bucket in LENGTH_BUCKETS),
)
"""Keys of :attr:`ImportanceTotals.sums`, in a fixed order so that every rank builds the same vector."""

MAX_KEYS = ("ratio_max", "negative_ratio_min", "abs_logprob_diff_max", "weight_max", "negative_weight_min")
"""Keys of :attr:`ImportanceTotals.maxima`; a minimum travels as the maximum of its negative."""


@dataclass(kw_only=True, slots=True)
class ImportanceTotals:
    """Sums and extrema over tokens and trajectories, exact under any cut of the batch.

    Over ranks: all-reduce ``sums`` with SUM and ``maxima`` with MAX, in the order of the keys; then
    ``normalizer`` and ``finalize``. A trajectory must lie in one micro-batch, as ``batching`` guarantees.
    """

    sums: dict[str, float]
    """One entry per ``SUM_KEYS``. ``kept`` and ``kept_trajectories`` (those with a kept token) are the loss's
    denominators where dropped tokens leave them, ``tokens`` and ``trajectories`` where they stay."""
    maxima: dict[str, float]
    """One entry per ``MAX_KEYS``; -inf where there was no token, or for weights no kept one."""

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

    def normalizer(self, config: ImportanceConfig) -> float:
        """What to divide all weights by: 1 unless ``config`` normalises.

        The mean weight of kept tokens; above the token level of kept trajectories, each by the mean of its
        kept tokens (which have the same weight, if it is not ``custom``). 1 where nothing was kept or all
        weights are 0: there is nothing to scale.
        """
        if config.level is Level.token:
            total, count = self.sums["weight"], self.sums["kept"]
        else:
            total, count = self.sums["trajectory_weight"], self.sums["kept_trajectories"]
        return total / count if config.normalize and total > 0.0 else 1.0

    def finalize(self) -> dict[str, float]:
        """Metrics of the whole batch, ready to log; empty if there was no token.

        Before the correction, means over tokens: ``tis/ratio_{mean,min,max}`` of π_old / π_roll; ``tis/k1``,
        ``tis/k3``: KL of π_roll to π_old in nats; ``tis/chi2``: mean squared ratio - 1;
        ``tis/abs_logprob_diff_{mean,max}``; ``tis/perplexity_{engine,trainer}``: exp of the mean negative
        log-probability. Over trajectories, w their geometric-mean ratio:
        ``tis/effective_sample_size``: (Σw)² / Σw²; ``tis/ess_ratio``: that over the number of trajectories.

        After it: ``tis/weight_{mean,min,max}`` over kept tokens and ``tis/trajectory_weight_mean`` over kept
        trajectories, both before normalisation, which divides by one of these means (see ``normalizer``);
        they are absent if nothing was kept. Fractions of all tokens: ``tis/truncated_fraction``,
        ``tis/masked_fraction``, ``tis/rejected_fraction``, ``tis/kept_fraction``, the last also by the
        trajectory's number of loss tokens (``tis/kept_fraction_len_lt_128`` …; absent where there are none).
        Of all trajectories: ``tis/vetoed_fraction``.
        """
        sums, maxima = self.sums, self.maxima
        tokens, trajectories = sums["tokens"], sums["trajectories"]
        if tokens == 0:
            return {}
        effective = sums["trajectory_ratio"] ** 2 / sums["trajectory_ratio_squared"]
        metrics = {
            "ratio_mean": sums["ratio"] / tokens,
            "ratio_min": -maxima["negative_ratio_min"],
            "ratio_max": maxima["ratio_max"],
            "k1": sums["k1"] / tokens,
            "k3": sums["k3"] / tokens,
            "chi2": sums["ratio_squared"] / tokens - 1.0,
            "abs_logprob_diff_mean": sums["abs_logprob_diff"] / tokens,
            "abs_logprob_diff_max": maxima["abs_logprob_diff_max"],
            "perplexity_engine": _perplexity(sums["sampling_logprob"] / tokens),
            "perplexity_trainer": _perplexity(sums["old_logprob"] / tokens),
            "effective_sample_size": effective,
            "ess_ratio": effective / trajectories,
            "truncated_fraction": sums["truncated"] / tokens,
            "masked_fraction": sums["masked"] / tokens,
            "rejected_fraction": sums["rejected"] / tokens,
            "vetoed_fraction": sums["vetoed_trajectories"] / trajectories,
            "kept_fraction": sums["kept"] / tokens,
        }
        if sums["kept"] > 0:
            metrics |= {
                "weight_mean": sums["weight"] / sums["kept"],
                "weight_min": -maxima["negative_weight_min"],
                "weight_max": maxima["weight_max"],
                "trajectory_weight_mean": sums["trajectory_weight"] / sums["kept_trajectories"],
            }
        for bucket in LENGTH_BUCKETS:
            if sums[f"tokens_{bucket}"] > 0:
                metrics[f"kept_fraction_{bucket}"] = sums[f"kept_{bucket}"] / sums[f"tokens_{bucket}"]
        return {f"tis/{name}": value for name, value in metrics.items()}


def measure(inputs: ImportanceInputs, correction: Correction) -> ImportanceTotals:
    """The totals of one micro-batch, from finite log-probabilities and their ``correct``ion."""
    if inputs.trajectory_index.numel() == 0:
        return ImportanceTotals.empty()
    ratio, difference = inputs.ratio(Level.token), inputs.log_ratio()
    weights, keep = correction.weights, correction.keep
    terms = {
        "tokens": torch.ones_like(ratio),
        "ratio": ratio,
        "ratio_squared": ratio.square(),
        "k1": -difference,
        "k3": k3(difference),
        "abs_logprob_diff": difference.abs(),
        "old_logprob": inputs.old_logprobs,
        "sampling_logprob": inputs.sampling_logprobs,
        "kept": keep,
        "weight": weights,  # dropped tokens weigh 0
        "truncated": correction.truncated,
        "masked": correction.masked,
        "rejected": correction.rejected,
    } | _trajectory_terms(inputs, correction)
    extrema = (
        ratio.max(),
        (-ratio).max(),
        difference.abs().max(),
        weights.where(keep, -math.inf).max(),
        (-weights).where(keep, -math.inf).max(),
    )
    # Two transfers for all numbers: on a GPU every separate .item() would wait for the device.
    sums = torch.stack([terms[key].detach().sum(dtype=torch.float64) for key in SUM_KEYS]).tolist()
    maxima = torch.stack([value.double() for value in extrema]).tolist()
    return ImportanceTotals(
        sums=dict(zip(SUM_KEYS, sums, strict=True)), maxima=dict(zip(MAX_KEYS, maxima, strict=True))
    )


def _trajectory_terms(inputs: ImportanceInputs, correction: Correction) -> dict[str, Tensor]:
    """The rest of ``SUM_KEYS``: terms [T] of trajectories."""
    # Trajectories without loss tokens have zeros everywhere: selecting the others would wait for the device.
    lengths, kept = inputs.lengths(), inputs.per_trajectory(correction.keep)
    present = lengths > 0
    mean_log_ratio = inputs.per_trajectory(inputs.log_ratio()) / lengths.clamp(min=1.0)
    ratio = mean_log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp() * present
    terms = {
        "trajectories": present,
        "trajectory_ratio": ratio,
        "trajectory_ratio_squared": ratio.square(),
        "kept_trajectories": kept > 0,
        "trajectory_weight": inputs.per_trajectory(correction.weights) / kept.clamp(min=1.0),
        "vetoed_trajectories": inputs.per_trajectory(correction.vetoed) > 0,
    }
    bucket = torch.bucketize(lengths, torch.tensor(LENGTH_EDGES).to(lengths), right=True)
    for number, name in enumerate(LENGTH_BUCKETS):
        inside = bucket == number
        terms[f"tokens_{name}"] = lengths * inside
        terms[f"kept_{name}"] = kept * inside
    return terms


def _perplexity(mean_logprob: float) -> float:
    """exp(-mean log-probability), the exponent at most 20 like everywhere: what is beyond is no model."""
    return math.exp(min(-mean_logprob, LOG_RATIO_BOUND))
