"""The gradient of the same trajectories, cut in many ways; run by ``update_checks``.

Writes ``gradients.pt``: {case: {parameter name: gradient}}, gradient norms and losses as results. Under one
rank it adds the gradients of plain transformers and autograd with whole logits, written from NUMERICS alone.

AdamW with β1 = 0 holds the last gradient as its first moment, and with lr = 0 it moves nothing, so one actor
serves all cuts of a ZeRO stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from integration.scripts.common import grouped_samples, random_samples
from searchrl.actor import Actor
from searchrl.config import (
    Aggregation,
    BatchingConfig,
    Config,
    DType,
    ImportanceConfig,
    Level,
    LossConfig,
    LossKind,
    ModelConfig,
    OptimizerConfig,
    RejectionConfig,
    RejectionLevel,
    UpdateConfig,
    WeightMode,
)
from searchrl.distributed import World, gather_objects
from searchrl.reference import Reference
from searchrl.trajectory import Sample
from searchrl.update import apply_update, prepare_update

Gradients = dict[str, Tensor]
TEMPERATURE = 0.7
SAMPLES = grouped_samples(0, groups=16, members=4)
LONGEST = max(len(sample.trajectory.token_ids) for sample in SAMPLES)
CUTS = {
    "1": (1, True),
    "4/packed": (4 * LONGEST, True),
    "4/padded": (4 * LONGEST, False),
    "all/packed": (100_000, True),
    "all/padded": (100_000, False),
}
"""Micro-batches of one trajectory, where packing and padding are the same; of about four; of all. As token
budget and packing."""
GLOBAL_CUTS = ("1", "4/padded", "all/packed")
"""Those that ``GLOBAL`` is measured over."""

PLAIN = Config(loss=LossConfig(), importance=ImportanceConfig(hi=2.0))
"""GRPO with token TIS; strictly on-policy, so nothing is known before the backward passes."""
GLOBAL = Config(
    loss=LossConfig(aggregation=Aggregation.sequence, kl_coef=0.1, entropy_coef=0.01),
    importance=ImportanceConfig(
        level=Level.token,
        mode=WeightMode.clip,
        lo=0.5,
        hi=2.0,
        normalize=True,
        rejection=RejectionConfig(level=RejectionLevel.geometric, lo=0.5, hi=1.5),
    ),
)
"""All that needs numbers of the whole batch: rejection, normalised weights, sequence means; KL, entropy."""
STEPS = Config(
    loss=LossConfig(kind=LossKind.gspo, eps_low=0.01, eps_high=0.01, llds_coef=0.1),
    update=UpdateConfig(epochs=2, minibatches=2),
)
"""Four optimizer steps with lr > 0: later gradients depend on the earlier ones and on π_old."""


def make_actor(model: Path, stage: int, world: World, lr: float) -> Actor:
    return Actor(
        model,
        model=ModelConfig(path=str(model), dtype=DType.float32),
        optimizer=OptimizerConfig(lr=lr, betas=(0.0, 0.98), weight_decay=0.0, max_grad_norm=1e9),
        zero_stage=stage,
        temperature=TEMPERATURE,
        logprob_chunk=16,
        total_steps=1,
        seed=0,
        world=world,
    )


def measure(
    actor: Actor, reference: Reference | None, cfg: Config, samples: Sequence[Sample], world: World
) -> tuple[Gradients, float, float]:
    """Last gradient, norm and mean loss of an update on all ranks' samples; a collective."""
    mine = samples[world.rank :: world.size]  # wherever they were sampled
    update = prepare_update(actor, reference if cfg.loss.kl_coef else None, mine, cfg=cfg, world=world)
    metrics = apply_update(update, actor, epochs=cfg.update.epochs, step=0)
    gradients = {name: moment.clone() for name, moment in actor.first_moments().items()}
    return gradients, metrics["update/grad_norm"], metrics["loss/total"]


def cases(stage: int) -> Iterator[tuple[str, Config]]:
    for name, (tokens, packing) in CUTS.items():
        batching = BatchingConfig(max_tokens=tokens, packing=packing)
        yield f"plain/zero{stage}/{name}", replace(PLAIN, batching=batching)
        if name in GLOBAL_CUTS:
            yield f"global/zero{stage}/{name}", replace(GLOBAL, batching=batching)


def stage_results(
    stage: int, tied: Path, untied: Path, world: World
) -> Iterator[tuple[str, tuple[Gradients, float, float]]]:
    """All that one ZeRO stage is asked."""
    reference = Reference(
        untied,
        model=ModelConfig(dtype=DType.float32),
        temperature=TEMPERATURE,
        logprob_chunk=16,
        world=world,
    )
    actor = make_actor(tied, stage, world, lr=0.0)
    for name, cfg in cases(stage):
        yield name, measure(actor, reference, cfg, SAMPLES, world)
    one, five = random_samples(1, 1), random_samples(2, 5)
    everything, single = BatchingConfig(max_tokens=100_000), BatchingConfig(max_tokens=1)
    # With two ranks one of them has nothing to do; has more micro-batches than the other.
    yield f"one/zero{stage}", measure(actor, reference, replace(PLAIN, batching=everything), one, world)
    yield f"five/zero{stage}", measure(actor, reference, replace(PLAIN, batching=single), five, world)
    actor = make_actor(untied, stage, world, lr=0.0)
    yield (
        f"untied/zero{stage}",
        measure(actor, reference, replace(PLAIN, batching=everything), SAMPLES, world),
    )
    actor = make_actor(tied, stage, world, lr=1e-3)
    tokens = 4 * LONGEST if stage % 2 else 100_000
    batching = BatchingConfig(max_tokens=tokens, packing=stage < 2)
    yield f"steps/zero{stage}", measure(actor, reference, replace(STEPS, batching=batching), SAMPLES, world)


def whole_logits(network: Any, sample: Sample) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of the loss tokens, from full logits."""
    ids = torch.tensor([sample.trajectory.token_ids])
    mask = torch.tensor(sample.trajectory.loss_mask)[1:]
    distribution = (network(input_ids=ids).logits[0, :-1] / TEMPERATURE).log_softmax(-1)[mask]
    logprobs = distribution.gather(-1, ids[0, 1:][mask, None])[:, 0]
    return logprobs, -(distribution.exp() * distribution).sum(-1)


def plain_loss(network: Any, samples: Sequence[Sample]) -> Tensor:
    """GRPO with token TIS: -ratio · A · min(w, 2), mean over tokens."""
    total, tokens = torch.zeros(()), 0
    for sample in samples:
        logprobs, _ = whole_logits(network, sample)
        old = logprobs.detach()
        weights = (old - sampling_logprobs(sample)).exp().clamp(max=2.0)
        total = total - ((logprobs - old).exp() * sample.advantage * weights).sum()
        tokens += len(logprobs)
    return total / tokens


def global_loss(network: Any, reference: Any, samples: Sequence[Sample]) -> Tensor:
    """``GLOBAL`` in full: which trajectories remain, the mean weight of their tokens, then means of means."""
    kept = []
    for sample in samples:
        logprobs, entropy = whole_logits(network, sample)
        log_ratio = logprobs.detach() - sampling_logprobs(sample)
        if 0.5 <= log_ratio.mean().exp() <= 1.5:
            kept.append((sample, logprobs, entropy, log_ratio.exp().clamp(0.5, 2.0)))
    assert len(samples) // 4 < len(kept) < len(samples), "some are rejected, not all"
    mean_weight = torch.cat([weights for *_, weights in kept]).mean()
    total = torch.zeros(())
    for sample, logprobs, entropy, weights in kept:
        with torch.no_grad():
            ref, _ = whole_logits(reference, sample)
        r = ref - logprobs
        policy = -(logprobs - logprobs.detach()).exp() * sample.advantage * weights / mean_weight
        total = total + (policy + 0.1 * (r.exp() - r - 1) - 0.01 * entropy).mean()
    return total / len(kept)


def sampling_logprobs(sample: Sample) -> Tensor:
    return torch.tensor([value for turn in sample.trajectory.turns for value in turn.logprobs])


def by_the_book(tied: Path, untied: Path) -> Iterator[tuple[str, tuple[Gradients, float, float]]]:
    """The expected gradients: one trajectory at a time, no DeepSpeed."""

    def load(path: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")

    reference = load(untied)
    for name, path, samples in (
        ("plain", tied, SAMPLES),
        ("global", tied, SAMPLES),
        ("untied", untied, SAMPLES),
        ("one", tied, random_samples(1, 1)),
        ("five", tied, random_samples(2, 5)),
    ):
        network = load(path)
        loss = global_loss(network, reference, samples) if name == "global" else plain_loss(network, samples)
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
        norm = torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum().sqrt()
        yield name, (gradients, float(norm), float(loss.detach()))


def check(out: Path, tied: Path, untied: Path, world: World) -> dict[str, dict[str, float]]:
    """Run every case on all ranks; norms and losses by case."""
    measured = {name: r for stage in range(4) for name, r in stage_results(stage, tied, untied, world)}
    if world.size == 1:
        measured |= dict(by_the_book(tied, untied))
        frozen = make_actor(tied, 0, world, lr=0.0)
        reference_of_steps = replace(STEPS, batching=BatchingConfig(max_tokens=100_000))
        measured["steps/frozen"] = measure(frozen, None, reference_of_steps, SAMPLES, world)
    norms = gather_objects({name: norm for name, (_, norm, _) in measured.items()})
    if world.is_main:
        assert all(other == norms[0] for other in norms), f"ranks disagree about the norm: {norms}"
        torch.save({name: gradients for name, (gradients, _, _) in measured.items()}, out / "gradients.pt")
    return {"norms": norms[0], "losses": {name: loss for name, (_, _, loss) in measured.items()}}
