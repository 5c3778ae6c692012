"""What an optimizer step minimises: the policy loss, importance-weighted, with its penalties, aggregated.

Glue between the pure functions of ``algorithm`` and the actor: gathers what each loss token needs out of the
micro-batch, and adds up metrics so that one reduction a step is exact.

What is not finite is remembered, not raised: this rank is amid a pass that others take part in. ``guards``
stops all ranks before the optimizer's step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from searchrl.algorithm.aggregation import token_weights
from searchrl.algorithm.importance import (
    CustomWeights,
    ImportanceInputs,
    NonFiniteError,
    check_finite,
    correct,
)
from searchrl.algorithm.losses import CustomLoss, LossInputs, kl_penalty, llds_penalty, policy_loss
from searchrl.algorithm.mismatch import MAX_KEYS, SUM_KEYS, ImportanceTotals, measure
from searchrl.config import Config, ImportanceConfig, LossConfig, LossKind, OldPolicy, WeightMode
from searchrl.distributed import gather_objects, reduce_values
from searchrl.extensions import load_function
from searchrl.guards import Fault, KnownValues
from searchrl.policy import TokenOutputs


@dataclass(kw_only=True, slots=True)
class KnownTerms:
    """What is known of this rank's samples before the first backward pass: fp32 by sample id, [S] each.

    A mapping is None if its values are not needed, or are only known as micro-batches come by.
    """

    old_logprobs: Mapping[str, Tensor] | None = None
    """logπ_old; None: it is not needed, because the current policy is π_old throughout."""
    ref_logprobs: Mapping[str, Tensor] | None = None
    """logπ_ref."""
    weights: Mapping[str, Tensor] | None = None
    """Importance weights, normalised; None: each micro-batch computes its own."""
    keep: Mapping[str, Tensor] | None = None
    """bool: not dropped by the correction; goes with ``weights``."""

    def of(self, ids: Sequence[str]) -> KnownValues:
        """What is known of these trajectories, as plain numbers by the names above."""
        terms = {
            "old_logprobs": self.old_logprobs,
            "ref_logprobs": self.ref_logprobs,
            "weights": self.weights,
            "keep": self.keep,
        }
        return {
            name: {sample_id: values[sample_id].tolist() for sample_id in ids}
            for name, values in terms.items()
            if values is not None
        }


@dataclass(kw_only=True, slots=True)
class PolicyObjective:
    """Callable for ``Actor.update``; one a rollout, whose totals it collects over all its steps."""

    loss: LossConfig
    importance: ImportanceConfig
    constant_length: int
    """L of ``loss.aggregation=constant``."""
    custom_loss: CustomLoss | None
    custom_weights: CustomWeights | None
    known: KnownTerms
    old_is_current: bool
    """π_old is the trainer's and no optimizer step has been made: the current policy *is* π_old. Recomputed
    values differ from it by rounding, which LLDS would take for likelihood that fell."""
    importance_totals: ImportanceTotals
    """Of this rank's samples: measured before the update if corrections are known by then, else during it."""
    sums: dict[str, float] = field(default_factory=dict)
    """Loss metrics summed over kept tokens."""
    compared: list[ImportanceInputs] = field(default_factory=list)
    """The trainer's log-probabilities beside the engine's, as the correction has seen them."""
    loss_sum: float = 0.0
    """This rank's share of the loss of the current optimizer step, times its denominator."""
    fault: Fault | None = None
    """The first micro-batch of that step whose loss, or what it is made of, is not finite."""

    def __call__(self, outputs: TokenOutputs) -> Tensor:
        """The micro-batch's loss summed over its tokens; for the denominator see ``update.Update``.

        Where it is not finite, ``fault`` says so, and what is returned means nothing.
        """
        try:
            return self._loss(outputs)
        except NonFiniteError as error:
            if self.fault is None:
                self.fault = Fault(str(error), outputs.batch.trajectory_ids)
            return outputs.logprobs.sum() * 0.0

    def _loss(self, outputs: TokenOutputs) -> Tensor:
        batch, token = outputs.batch, outputs.positions.token
        index = batch.trajectory_index.flatten()[token]
        weights, keep = self._correction(outputs, index)
        inputs = LossInputs(
            logprobs=outputs.logprobs,
            old_logprobs=self._old_logprobs(outputs),
            advantages=batch.advantages.flatten()[token],
            trajectory_index=index,
            turn_index=_turn_index(token),
        )
        result = policy_loss(inputs, self.loss, self.custom_loss)
        losses = result.token_losses * weights
        metrics = result.metrics | {"policy_loss": losses.detach(), "entropy": outputs.entropy.detach()}
        if self.known.ref_logprobs is not None:
            ref_logprobs = batch.join(self.known.ref_logprobs)
            kl = kl_penalty(outputs.logprobs, ref_logprobs, self.loss.kl_estimator)
            metrics["ref_kl"] = kl.detach()
            losses = losses + self.loss.kl_coef * kl
        if self.loss.entropy_coef:
            losses = losses - self.loss.entropy_coef * outputs.entropy
        if self.loss.llds_coef:
            penalty = llds_penalty(inputs)
            metrics["llds"] = penalty.detach()
            losses = losses + self.loss.llds_coef * penalty
        counted = torch.ones_like(keep) if self.importance.dropped_in_denominator else keep
        shares = token_weights(self.loss.aggregation, counted, index, self.constant_length)
        total = (losses * shares * keep).sum()
        self._add(metrics, keep, total.detach())
        if not math.isfinite(self.loss_sum):
            check_finite(outputs.logprobs, "trainer", index, batch.trajectory_ids)
            bad = sorted(set(index[~torch.isfinite(losses.detach())].tolist()))  # none: their sum overflows
            names = ", ".join(batch.trajectory_ids[number] for number in bad) or "none of them alone"
            raise NonFiniteError(f"the loss is NaN or infinite in trajectories {names}")
        return total

    def metrics(self) -> dict[str, float]:
        """``loss/*``: means over kept tokens of all optimizer steps and ranks; ``tis/*``. A collective."""
        sums = merge_sums(gather_objects(self.sums))
        tokens = sums.pop("tokens", 0.0)
        means = {f"loss/{name}": value / tokens for name, value in sums.items()} if tokens else {}
        return means | reduce_totals(self.importance_totals).finalize()

    def _old_logprobs(self, outputs: TokenOutputs) -> Tensor:
        """logπ_old [N]."""
        known = self.known.old_logprobs
        if self.old_is_current or known is None:
            return outputs.logprobs.detach()
        return outputs.batch.join(known)

    def _correction(self, outputs: TokenOutputs, index: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and what is kept: as known, or from the micro-batch's own tokens."""
        batch, known = outputs.batch, self.known
        if known.weights is not None and known.keep is not None:
            return batch.join(known.weights), batch.join(known.keep)
        inputs = ImportanceInputs(
            old_logprobs=outputs.logprobs.detach(),
            sampling_logprobs=batch.sampling_logprobs.flatten()[outputs.positions.token],
            trajectory_index=index,
            trajectory_ids=batch.trajectory_ids,
        )
        correction = correct(inputs, self.importance, self.custom_weights)
        self.importance_totals = self.importance_totals.merge(measure(inputs, correction))
        self.compared = [*self.compared, inputs]  # a new list: an attempt that fails leaves the old one
        return correction.weights, correction.keep

    def _add(self, metrics: Mapping[str, Tensor], keep: Tensor, total: Tensor) -> None:
        """Add to ``sums`` and ``loss_sum``, in one transfer: on a GPU each waits for the device."""
        named = {**metrics, "tokens": torch.ones_like(keep)}
        terms = [(term * keep).sum(dtype=torch.float64) for term in named.values()]
        *values, loss = torch.stack([*terms, total.double()]).tolist()
        self.sums = merge_sums([self.sums, dict(zip(named, values, strict=True))])
        self.loss_sum += loss


def make_objective(cfg: Config) -> PolicyObjective:
    """The objective of the run's next optimizer step, as long as nothing is known of its samples."""
    custom_loss = custom_weights = None
    if cfg.loss.kind is LossKind.custom:
        custom_loss = load_function(cfg.loss.import_path, cfg.loss.kwargs, section="loss", positional=1)
    if cfg.importance.mode is WeightMode.custom:
        custom_weights = load_function(
            cfg.importance.import_path, cfg.importance.kwargs, section="importance", positional=1
        )
    longest = (cfg.episode.max_searches + 1) * cfg.episode.max_turn_tokens
    return PolicyObjective(
        loss=cfg.loss,
        importance=cfg.importance,
        constant_length=cfg.loss.constant_length or longest,
        custom_loss=custom_loss,
        custom_weights=custom_weights,
        known=KnownTerms(),
        old_is_current=cfg.update.old_policy is not OldPolicy.rollout,
        importance_totals=ImportanceTotals.empty(),
    )


def reduce_totals(totals: ImportanceTotals) -> ImportanceTotals:
    """The totals of all ranks together. A collective."""
    sums = reduce_values([totals.sums[key] for key in SUM_KEYS], "sum")
    maxima = reduce_values([totals.maxima[key] for key in MAX_KEYS], "max")
    return ImportanceTotals(
        sums=dict(zip(SUM_KEYS, sums, strict=True)), maxima=dict(zip(MAX_KEYS, maxima, strict=True))
    )


def merge_sums(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Sums by name of several parts; a name may be missing in some."""
    merged: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            merged[name] = merged.get(name, 0.0) + value
    return merged


def _turn_index(token: Tensor) -> Tensor:
    """Turns of the loss tokens at flat positions ``token`` [N], counted through the micro-batch.

    Something that was not sampled stands before every turn: a prompt, an observation, an inserted note.
    """
    starts = torch.ones_like(token)
    starts[1:] = token[1:] != token[:-1] + 1
    return starts.cumsum(0) - 1
