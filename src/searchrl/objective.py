"""From scored groups to what an optimizer step minimises: the importance-corrected clip loss.

Glue between the pure functions of ``algorithm`` and the actor: gathers what each loss token needs out of the
micro-batch, and adds up metrics so that one reduction a step is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from searchrl.actor import Reference, TokenOutputs
from searchrl.algorithm.advantages import group_advantages
from searchrl.algorithm.importance import (
    MAX_KEYS,
    SUM_KEYS,
    ImportanceTotals,
    truncated_importance_weights,
)
from searchrl.algorithm.losses import LossInputs, clip_loss
from searchrl.config import ImportanceConfig, LossConfig
from searchrl.distributed import reduce_values
from searchrl.rewards import ScoredGroup
from searchrl.trajectory import Sample

LOSS_KEYS = ("tokens", "policy_loss", "clip_low", "clip_high", "policy_k3", "ref_k3", "entropy")


def to_samples(scored: Sequence[ScoredGroup]) -> list[Sample]:
    """Survivors of groups with a signal, with group-relative advantages.

    Groups whose rewards do not vary leave numerator and denominator alike: they are not even computed.
    """
    samples = []
    for item in scored:
        advantages = group_advantages([reward.total for _, _, reward in item.survivors])
        if advantages is not None:
            samples += [
                Sample(trajectory=trajectory, advantage=advantage, id=f"{item.group.id}/{index}")
                for (index, trajectory, _), advantage in zip(item.survivors, advantages, strict=True)
            ]
    return samples


@dataclass(slots=True)
class PolicyObjective:
    """Callable for ``Actor.update``; one instance per optimizer step, whose totals it collects."""

    loss: LossConfig
    importance: ImportanceConfig
    reference: Reference | None
    importance_totals: ImportanceTotals = field(default_factory=ImportanceTotals.empty)
    loss_totals: dict[str, float] = field(default_factory=lambda: dict.fromkeys(LOSS_KEYS, 0.0))

    def __call__(self, outputs: TokenOutputs) -> Tensor:
        """The micro-batch's loss summed over its tokens.

        The update is strictly on-policy (one optimizer step a rollout), so π_old is the detached current
        policy and costs no forward pass of its own.
        """
        batch, token = outputs.batch, outputs.positions.token
        old_logprobs = outputs.logprobs.detach()
        sampling_logprobs = batch.sampling_logprobs.flatten()[token]
        weights, totals = truncated_importance_weights(
            old_logprobs,
            sampling_logprobs,
            batch.trajectory_index.flatten()[token],
            batch.trajectory_ids,
            hi=self.importance.hi or 2.0,
        )
        inputs = LossInputs(
            logprobs=outputs.logprobs,
            old_logprobs=old_logprobs,
            sampling_logprobs=sampling_logprobs,
            ref_logprobs=None if self.reference is None else self.reference.logprobs(batch),
            advantages=batch.advantages.flatten()[token],
            weights=weights if self.importance.enabled else torch.ones_like(weights),
        )
        result = clip_loss(
            inputs, eps_low=self.loss.eps_low, eps_high=self.loss.eps_high, kl_coef=self.loss.kl_coef
        )
        self.importance_totals = self.importance_totals.merge(totals)
        terms = result.metrics | {"entropy": outputs.entropy.sum()}
        for key in LOSS_KEYS:
            if key in terms:  # reference metrics exist only with a reference
                self.loss_totals[key] += float(terms[key])
        return result.loss_sum

    def metrics(self) -> dict[str, float]:
        """Means over the whole step, all ranks included. A collective."""
        names = [*SUM_KEYS, *LOSS_KEYS]
        sums = reduce_values(
            [*(self.importance_totals.sums[k] for k in SUM_KEYS), *self.loss_totals.values()], "sum"
        )
        maxima = reduce_values([self.importance_totals.maxima[key] for key in MAX_KEYS], "max")
        loss = dict(zip(names[len(SUM_KEYS) :], sums[len(SUM_KEYS) :], strict=True))
        totals = ImportanceTotals(
            sums=dict(zip(SUM_KEYS, sums[: len(SUM_KEYS)], strict=True)),
            maxima=dict(zip(MAX_KEYS, maxima, strict=True)),
        )
        tokens = loss.pop("tokens")
        if tokens == 0:
            return {}
        if self.reference is None:
            del loss["ref_k3"]
        return {f"loss/{key}": value / tokens for key, value in loss.items()} | totals.finalize()
