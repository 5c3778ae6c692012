"""Twenty updates of a tiny policy on fixed trajectories, and their metrics; run by ``update_checks``.

The trajectories are made up, not sampled: an engine's rounding differs from machine to machine, and one token
sampled otherwise would change everything after it. From rewards on, all is what a run does.
"""

from __future__ import annotations

import random
from pathlib import Path

from builders import plain_reward
from integration.scripts.common import grouped_samples
from searchrl.actor import Actor
from searchrl.config import (
    BatchingConfig,
    Config,
    DType,
    ImportanceConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    UpdateConfig,
)
from searchrl.distributed import World
from searchrl.reference import Reference
from searchrl.rewards import ScoredGroup
from searchrl.samples import to_samples
from searchrl.trajectory import Example, Group
from searchrl.update import apply_update, prepare_update

STEPS, GROUPS, MEMBERS = 20, 6, 4
LOGGED = ("loss/total", "loss/policy_loss", "loss/ref_kl", "loss/entropy", "update/grad_norm", "tis/k3")
EXAMPLE = Example(id="q", question="?", golden_answers=("x",), data_source="golden")


def scored_groups(step: int) -> list[ScoredGroup]:
    """The groups of one step, rewarded by a fixed die: some right, some wrong, some groups all alike."""
    rng = random.Random(step)
    samples = grouped_samples(step, GROUPS, MEMBERS)
    groups = []
    for group in range(GROUPS):
        members = samples[group * MEMBERS : (group + 1) * MEMBERS]
        groups.append(
            ScoredGroup(
                group=Group(
                    id=step * GROUPS + group,
                    example=EXAMPLE,
                    trajectories=[sample.trajectory for sample in members],
                ),
                rewards=[plain_reward(float(rng.random() < 0.4)) for _ in members],
            )
        )
    return groups


def check(path: Path, world: World) -> dict[str, list[float]]:
    """Train on all ranks; what each step logged, by metric."""
    model = ModelConfig(path=str(path), dtype=DType.float32)
    cfg = Config(
        model=model,
        loss=LossConfig(kl_coef=0.01),
        importance=ImportanceConfig(normalize=True),
        update=UpdateConfig(minibatches=2),
        batching=BatchingConfig(max_tokens=64),
    )
    actor = Actor(
        path,
        model=model,
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=2),
        zero_stage=2,
        temperature=1.0,
        logprob_chunk=16,
        total_steps=STEPS,
        seed=0,
        world=world,
    )
    reference = Reference(path, model=model, temperature=1.0, logprob_chunk=16, world=world)
    share = GROUPS // world.size
    logged = []
    for step in range(STEPS):
        mine = scored_groups(step)[world.rank * share : (world.rank + 1) * share]
        samples = to_samples(mine, advantage=cfg.advantage, filters=cfg.filters, world=world)
        update = prepare_update(actor, reference, samples, cfg=cfg, world=world)
        metrics = apply_update(update, actor, epochs=cfg.update.epochs, step=step)
        logged.append({name: metrics[name] for name in LOGGED})
    return {name: [step[name] for step in logged] for name in LOGGED}
