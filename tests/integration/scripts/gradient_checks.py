"""The first gradient of the same trajectories, cut in many ways: ``gradient_checks OUT TIED UNTIED``.

Writes ``gradients.pt``: {case: {parameter name: gradient}}, and the gradient norms as results. Under one rank
it adds the gradients of plain transformers and autograd with whole logits.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from integration.scripts.common import random_samples, write_results
from searchrl.actor import Actor, init_communication
from searchrl.batching import balance, count_loss_tokens, pack
from searchrl.config import DType, ImportanceConfig, LossConfig, ModelConfig, OptimizerConfig
from searchrl.distributed import World, gather_objects, init_world
from searchrl.objective import PolicyObjective
from searchrl.trajectory import Sample

Gradients = dict[str, Tensor]
TEMPERATURE, TRUNCATE_AT, BETA1 = 0.7, 2.0, 0.9
TINY, ALL = 1, 100_000
"""Tokens of a packed row: every trajectory its own, all together."""

TWELVE, ONE, FIVE = random_samples(0, 12), random_samples(1, 1), random_samples(2, 5)
CASES: dict[str, tuple[str, int, int, Sequence[Sample]]] = {
    f"tied/twelve/zero{stage}/{name}": ("tied", stage, budget, TWELVE)
    for stage in (0, 1, 2, 3)
    for name, budget in (("tiny", TINY), ("all", ALL))
}
CASES |= {f"tied/one/zero{stage}/all": ("tied", stage, ALL, ONE) for stage in (0, 1, 2, 3)}
CASES |= {f"tied/five/zero{stage}/tiny": ("tied", stage, TINY, FIVE) for stage in (2, 3)}
CASES |= {f"untied/twelve/zero{stage}/tiny": ("untied", stage, TINY, TWELVE) for stage in (0, 2, 3)}


def actor_gradient(
    model: Path, stage: int, budget: int, samples: Sequence[Sample], world: World
) -> tuple[Gradients, float, float]:
    """Gradient, its norm and the mean loss of one update; a collective."""
    actor = Actor(
        model,
        model=ModelConfig(path=str(model), dtype=DType.float32),
        optimizer=OptimizerConfig(lr=1e-3, betas=(BETA1, 0.98), max_grad_norm=1e9),
        zero_stage=stage,
        temperature=TEMPERATURE,
        logprob_chunk=16,
        total_steps=1,
        seed=0,
        world=world,
    )
    objective = PolicyObjective(LossConfig(), ImportanceConfig(hi=TRUNCATE_AT), None)
    mine = balance(samples, world.size)[world.rank]
    denominator = count_loss_tokens(samples)
    stats = actor.update(pack(mine, budget), objective, denominator=denominator, step=0)
    gradients = {name: moment / (1 - BETA1) for name, moment in actor.first_moments().items()}
    return gradients, stats.grad_norm, objective.metrics()["loss/policy_loss"]


def reference_gradient(model: Path, samples: Sequence[Sample]) -> tuple[Gradients, float, float]:
    """The same by the book: one trajectory at a time, all logits at once, no DeepSpeed."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    total = torch.zeros(())
    for sample in samples:
        ids = torch.tensor([sample.trajectory.token_ids])
        logits = network(input_ids=ids).logits[0, :-1] / TEMPERATURE
        logprobs = logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        mask = torch.tensor(sample.trajectory.loss_mask)[1:]
        sampled_with = torch.tensor(sample.trajectory.logprobs)[1:]
        old = logprobs.detach()
        weights = (old - sampled_with).exp().clamp(max=TRUNCATE_AT)
        ratio = (logprobs - old).exp()
        total = total - (ratio * sample.advantage * weights)[mask].sum()
    loss = total / count_loss_tokens(samples)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    norm = torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum().sqrt()
    return gradients, float(norm), float(loss.detach())


def main(out: Path, tied: Path, untied: Path) -> None:
    """Run every case on all ranks."""
    folders = {"tied": tied, "untied": untied}
    world = init_world("cpu")
    init_communication(world)
    measured = {}
    for name, (model, stage, budget, samples) in CASES.items():
        measured[name] = actor_gradient(folders[model], stage, budget, samples, world)
    if world.size == 1:
        batches = {"tied/twelve": TWELVE, "tied/one": ONE, "tied/five": FIVE, "untied/twelve": TWELVE}
        for name, samples in batches.items():
            measured[name] = reference_gradient(folders[name.partition("/")[0]], samples)
    norms = gather_objects({name: norm for name, (_, norm, _) in measured.items()})
    if world.is_main:
        assert all(other == norms[0] for other in norms), f"ranks disagree about the norm: {norms}"
        torch.save({name: gradients for name, (gradients, _, _) in measured.items()}, out / "gradients.pt")
        losses = {name: loss for name, (_, _, loss) in measured.items()}
        write_results(out, {"norms": norms[0], "losses": losses})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
