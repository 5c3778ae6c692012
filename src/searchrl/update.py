"""From samples to optimizer steps: what has to be known before them, and the steps themselves.

``prepare_update`` cuts the samples of all ranks into optimizer steps, spreads each over the ranks, and runs
the forward passes that must come first: π_old, π_ref and the importance weights. ``apply_update`` makes the
steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from searchrl.actor import Actor, StepStats
from searchrl.algorithm.aggregation import denominator
from searchrl.algorithm.importance import ImportanceInputs, correct, needs_global
from searchrl.algorithm.losses import kl_penalty
from searchrl.algorithm.mismatch import ImportanceTotals, measure
from searchrl.batching import MicroBatch, balance, make_batches, split_minibatches
from searchrl.config import Aggregation, Config, KlPlacement, OldPolicy
from searchrl.distributed import World, gather_objects, reduce_values
from searchrl.guards import Fault, batch_fault, logprob_fault, meet
from searchrl.objective import KnownTerms, PolicyObjective, make_objective, reduce_totals
from searchrl.out_of_memory import OutOfMemoryError, TokenBudget
from searchrl.policy import ReferencePolicy, TokenOutputs
from searchrl.trajectory import Sample
from searchrl.zero import NonFiniteGradientError

BySample = dict[str, Tensor]
"""Values of each sample's loss tokens, [S], by sample id."""

OnBatch = Callable[[MicroBatch], None]
"""Called with each micro-batch of samples as its backward pass is about to begin."""


@dataclass(kw_only=True, slots=True)
class Cut:
    """This rank's samples as micro-batches, which are cut again where memory runs out."""

    samples: list[list[Sample]]
    """Of each optimizer step of an epoch; none, where other ranks have all."""
    cfg: Config
    budget: TokenBudget
    minibatches: list[list[MicroBatch]] = field(init=False)
    """The same as micro-batches."""

    def __post_init__(self) -> None:
        self.minibatches = [make_batches(part, self.cfg, self.budget.tokens) for part in self.samples]

    @property
    def batches(self) -> list[MicroBatch]:
        """Those of all optimizer steps."""
        return [batch for part in self.minibatches for batch in part]

    @property
    def everything(self) -> list[Sample]:
        """The samples of all optimizer steps."""
        return [sample for part in self.samples for sample in part]

    def smaller(self, failure: OutOfMemoryError) -> None:
        """Cut into smaller micro-batches, alike on all ranks.

        Raises:
            OutOfMemoryError: that cannot help; names what would.
        """
        try:
            self.budget.lower(failure)
        except OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"{error}; {_knobs(self.cfg)}", tokens=error.tokens, can_retry=False
            ) from error
        self.__post_init__()


@dataclass(kw_only=True, slots=True)
class Update:
    """All optimizer steps on one rollout, as far as this rank takes part."""

    cut: Cut
    denominators: list[float]
    """What each step's loss is divided by: the same on all ranks."""
    objective: PolicyObjective

    @property
    def microbatches(self) -> int:
        """Of this rank in one epoch."""
        return len(self.cut.batches)


def prepare_update(
    actor: Actor,
    reference: ReferencePolicy | None,
    samples: Sequence[Sample],
    *,
    cfg: Config,
    world: World,
    budget: TokenBudget | None = None,
) -> Update:
    """Cut, spread, and find out what has to be known before the first step. A collective.

    Args:
        actor: the policy, as it sampled.
        reference: for the KL penalty; None without one.
        samples: this rank's; those of other ranks are fetched.
        cfg: the run's.
        world: this rank.
        budget: the run's; None: ``batching.max_tokens``, for this update alone.

    Raises:
        NonFiniteStepError: an advantage or a log-probability is NaN or infinite; names the trajectories.
        OutOfMemoryError: memory ran out, and smaller micro-batches cannot help.
    """
    everything = [sample for part in gather_objects(list(samples)) for sample in part]
    parts = split_minibatches(everything, cfg.update.minibatches)
    cut = Cut(
        samples=[balance(part, world.size)[world.rank] for part in parts],
        cfg=cfg,
        budget=budget or TokenBudget(tokens=cfg.batching.max_tokens),
    )
    sampling = _by_sample(
        cut.batches, [batch.sampling_logprobs[batch.loss_mask] for batch in cut.batches], world
    )
    objective = make_objective(cfg)
    bypass = cfg.update.old_policy is OldPolicy.rollout
    old = ref = weights = keep = None
    totals = objective.importance_totals
    fault = batch_fault(cut.batches)
    corrects = not bypass and (cfg.update.epochs * len(parts) > 1 or needs_global(cfg.importance))
    if bypass:
        old = sampling
    elif corrects:
        old, broken = _logprobs(actor, cut, world, "trainer")
        fault = fault or broken
    if reference is not None and cfg.loss.kl_in is KlPlacement.loss:
        ref, broken = _logprobs(reference, cut, world, "reference")
        fault = fault or broken
    meet(fault, cut.everything, KnownTerms(old_logprobs=old, ref_logprobs=ref).of)
    if corrects and old is not None:
        weights, keep, totals = _corrections(old, sampling, objective, world)
    counted = None if cfg.importance.dropped_in_denominator else keep
    denominators = [_denominator(part, cfg.loss.aggregation, counted, world) for part in cut.minibatches]
    known = KnownTerms(old_logprobs=old, ref_logprobs=ref, weights=weights, keep=keep)
    return Update(
        cut=cut,
        denominators=reduce_values(denominators, "sum"),
        objective=replace(objective, known=known, importance_totals=totals),
    )


def apply_update(
    update: Update, actor: Actor, *, epochs: int, step: int, on_batch: OnBatch = lambda _: None
) -> dict[str, float]:
    """Make the optimizer steps; returns their metrics. A collective.

    A step of which the importance correction has dropped every token is left out and counted: AdamW would
    move the weights even without a gradient.

    Args:
        update: what ``prepare_update`` returned.
        actor: the policy.
        epochs: passes over the mini-batches.
        step: steps of the run already done, for the learning rate.
        on_batch: called at every micro-batch of this rank.

    Raises:
        NonFiniteStepError: the loss or the gradient is NaN or infinite; that step is not made.
        OutOfMemoryError: memory ran out, and smaller micro-batches cannot help.
    """
    losses, norms, skipped, lr = [], [], 0, None
    for _ in range(epochs):
        for part, divisor in enumerate(update.denominators):
            if divisor == 0:
                skipped += 1
                continue
            stats = _make_step(update, actor, part, step, on_batch)
            losses.append(reduce_values([update.objective.loss_sum], "sum")[0] / divisor)
            norms.append(stats.grad_norm)
            lr = stats.lr
    metrics = {"update/optimizer_steps": float(len(losses)), "update/skipped_steps": float(skipped)}
    metrics["update/oom_retries"] = float(update.cut.budget.take_retries())
    if lr is not None:
        metrics |= {"loss/total": sum(losses) / len(losses), "update/lr": lr}
        metrics["update/grad_norm"] = sum(norms) / len(norms)
    return metrics | update.objective.metrics()


def _make_step(update: Update, actor: Actor, part: int, step: int, on_batch: OnBatch) -> StepStats:
    """One optimizer step on the micro-batches of ``part``; smaller ones as long as memory runs out."""
    samples, divisor = update.cut.samples[part], update.denominators[part]
    while True:
        # A copy, so that the totals of an attempt that failed are counted nowhere.
        attempt = replace(update.objective, loss_sum=0.0)
        batches = update.cut.minibatches[part]

        def stop_together(attempt: PolicyObjective = attempt) -> None:
            meet(attempt.fault, samples, attempt.known.of, divisor)

        def loss_sum(outputs: TokenOutputs, attempt: PolicyObjective = attempt) -> Tensor:
            loss = attempt(outputs)
            if outputs.batch.trajectory_ids:  # else it only keeps this rank in step with others
                on_batch(outputs.batch)
            return loss

        try:
            stats = actor.update(batches, loss_sum, denominator=divisor, step=step, before_step=stop_together)
        except OutOfMemoryError as failure:
            update.cut.smaller(failure)
        except NonFiniteGradientError as error:  # on all ranks, which have added their gradients up
            ids = [sample.id for sample in samples]
            fault = Fault(f"{error} after all the step's micro-batches", ids, "gradient") if ids else None
            meet(fault, samples, attempt.known.of, divisor)
        else:
            update.objective = replace(attempt, old_is_current=False)
            return stats


def reward_penalties(
    actor: Actor,
    reference: ReferencePolicy,
    samples: Sequence[Sample],
    *,
    cfg: Config,
    world: World,
    budget: TokenBudget | None = None,
) -> dict[str, float]:
    """``loss.kl_coef`` x the KL of the sampling to the reference policy, summed over tokens, by sample id.

    For ``loss.kl_in=reward``. ``budget``: as for ``prepare_update``. A collective.

    Raises:
        NonFiniteStepError: a log-probability is NaN or infinite; names the trajectories.
        OutOfMemoryError: memory ran out, and smaller micro-batches cannot help.
    """
    cut = Cut(samples=[list(samples)], cfg=cfg, budget=budget or TokenBudget(tokens=cfg.batching.max_tokens))
    current, fault = _logprobs(actor, cut, world, "trainer")
    ref, broken = _logprobs(reference, cut, world, "reference")
    meet(fault or broken, samples, KnownTerms(old_logprobs=current, ref_logprobs=ref).of)
    return {
        name: cfg.loss.kl_coef * float(kl_penalty(current[name], ref[name], cfg.loss.kl_estimator).sum())
        for name in current
    }


def _logprobs(
    policy: Actor | ReferencePolicy, cut: Cut, world: World, source: str
) -> tuple[BySample, Fault | None]:
    """Log-probabilities of this rank's samples, and what in them is not finite.

    In smaller micro-batches as long as memory runs out.
    """
    while True:
        try:
            values = policy.logprobs(cut.batches)
        except OutOfMemoryError as failure:
            cut.smaller(failure)
        else:
            return _by_sample(cut.batches, values, world), logprob_fault(source, cut.batches, values)


def _knobs(cfg: Config) -> str:
    """What lowers the memory of a single micro-batch, with its values."""
    checkpointing = "" if cfg.model.gradient_checkpointing else "model.gradient_checkpointing=true or "
    return (
        f"try {checkpointing}lower values of batching.max_tokens={cfg.batching.max_tokens}, "
        f"batching.logprob_chunk={cfg.batching.logprob_chunk}, engine.kv_cache_gib="
        f"{cfg.engine.kv_cache_gib:g} or episode.max_context_tokens={cfg.episode.max_context_tokens}"
    )


def _corrections(
    old: BySample, sampling: BySample, objective: PolicyObjective, world: World
) -> tuple[BySample, BySample, ImportanceTotals]:
    """Weights of this rank's samples, normalised over all ranks; what is kept; this rank's totals."""
    lengths = [len(values) for values in sampling.values()]
    index = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.long))
    nothing = torch.zeros(0, device=world.device)  # for a rank without samples
    inputs = ImportanceInputs(
        old_logprobs=torch.cat([nothing, *(old[name] for name in sampling)]),
        sampling_logprobs=torch.cat([nothing, *sampling.values()]),
        trajectory_index=index.to(world.device),
        trajectory_ids=list(sampling),
    )
    objective.compared = [inputs]
    correction = correct(inputs, objective.importance, objective.custom_weights)
    totals = measure(inputs, correction)
    weights = correction.weights / reduce_totals(totals).normalizer(objective.importance)
    return (
        dict(zip(sampling, weights.split(lengths), strict=True)),
        dict(zip(sampling, correction.keep.split(lengths), strict=True)),
        totals,
    )


def _denominator(
    batches: Sequence[MicroBatch], aggregation: Aggregation, keep: BySample | None, world: World
) -> float:
    """This rank's share of a step's denominator; all tokens count unless ``keep`` says otherwise."""
    total = 0.0
    for batch in batches:
        index = batch.trajectory_index[batch.loss_mask].to(world.device)
        counted = torch.ones_like(index, dtype=torch.bool) if keep is None else batch.join(keep)
        total += denominator(aggregation, counted, index)
    return total


def _by_sample(batches: Sequence[MicroBatch], values: Sequence[Tensor], world: World) -> BySample:
    merged: BySample = {}
    for batch, value in zip(batches, values, strict=True):
        merged |= batch.split(value.to(world.device))
    return merged
