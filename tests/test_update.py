"""What an update finds out before its first step, and which steps it makes: a real actor, the tiny model.

Gradients are tests/integration/test_gradients.py's; this is about π_old, corrections, denominators, counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from integration.scripts.common import grouped_samples
from searchrl.actor import Actor, init_communication
from searchrl.algorithm.importance import NonFiniteError
from searchrl.algorithm.losses import LossInputs, LossOutputs
from searchrl.batching import MicroBatch
from searchrl.config import (
    Aggregation,
    BatchingConfig,
    Config,
    DType,
    ImportanceConfig,
    KlEstimator,
    KlPlacement,
    LossConfig,
    LossKind,
    ModelConfig,
    OldPolicy,
    OptimizerConfig,
    RejectionConfig,
    RejectionLevel,
    UpdateConfig,
    WeightMode,
)
from searchrl.distributed import World, init_world
from searchrl.reference import Reference
from searchrl.trajectory import Sample
from searchrl.update import apply_update, prepare_update, reward_penalties

pytestmark = pytest.mark.integration

MODEL = ModelConfig(dtype=DType.float32)
SAMPLES = grouped_samples(3, groups=4, members=3)
TOKENS = sum(sample.trajectory.num_sampled for sample in SAMPLES)


@pytest.fixture(scope="module")
def world() -> World:
    alone = init_world("cpu")
    init_communication(alone)
    return alone


@pytest.fixture(scope="module")
def actor(tiny_model: Path, world: World) -> Actor:
    """Learns nothing, so that tests can share it."""
    return make_actor(tiny_model, world, lr=0.0)


@pytest.fixture(scope="module")
def reference(tiny_model_untied: Path, world: World) -> Reference:
    return Reference(tiny_model_untied, model=MODEL, temperature=1.0, logprob_chunk=64, world=world)


def make_actor(path: Path, world: World, lr: float) -> Actor:
    return Actor(
        path,
        model=MODEL,
        optimizer=OptimizerConfig(lr=lr, weight_decay=0.0),
        zero_stage=0,
        temperature=1.0,
        logprob_chunk=64,
        total_steps=1,
        seed=0,
        world=world,
    )


def on_policy(actor: Actor, world: World) -> list[Sample]:
    """The samples as the trainer itself would have sampled them."""
    batches = prepare_update(actor, None, SAMPLES, cfg=Config(), world=world).cut.minibatches[0]
    logprobs = {
        name: values
        for batch, flat in zip(batches, actor.logprobs(batches), strict=True)
        for name, values in batch.split(flat).items()
    }
    made = []
    for sample in SAMPLES:
        turns, start = [], 0
        for turn in sample.trajectory.turns:
            values = logprobs[sample.id][start : start + len(turn.token_ids)].tolist()
            turns.append(replace(turn, logprobs=values))
            start += len(turn.token_ids)
        made.append(replace(sample, trajectory=replace(sample.trajectory, turns=turns)))
    return made


def settings() -> Iterator[tuple[str, Config, bool]]:
    """Configurations and whether π_old has to be known before the first step."""
    yield "on-policy", Config(), False
    yield "on-policy, normalised", Config(importance=ImportanceConfig(normalize=True)), True
    yield "two epochs", Config(update=UpdateConfig(epochs=2)), True
    yield "two mini-batches", Config(update=UpdateConfig(minibatches=2)), True
    veto = ImportanceConfig(veto=1e-4)
    yield "veto", Config(importance=veto), True
    yield "veto that stays", Config(importance=replace(veto, dropped_in_denominator=True)), False
    off = ImportanceConfig(enabled=False)
    yield "bypass", Config(importance=off, update=UpdateConfig(old_policy=OldPolicy.rollout)), True


@pytest.mark.parametrize(("cfg", "known"), [pytest.param(c, k, id=name) for name, c, k in settings()])
def test_a_forward_pass_is_made_only_where_it_is_needed(
    cfg: Config, known: bool, actor: Actor, world: World
) -> None:
    update = prepare_update(actor, None, SAMPLES, cfg=cfg, world=world)
    old = update.objective.known.old_logprobs
    assert (old is not None) == known
    if cfg.update.old_policy is OldPolicy.rollout:
        assert old is not None
        expected = [value for turn in SAMPLES[0].trajectory.turns for value in turn.logprobs]
        assert old[SAMPLES[0].id].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("cfg", [pytest.param(cfg, id=name) for name, cfg, _ in settings()])
def test_what_the_trainer_says_of_the_tokens_is_kept(cfg: Config, actor: Actor, world: World) -> None:
    """Of every sample, whether it was known before the first step or came by during it: reports show it."""
    update = prepare_update(actor, None, SAMPLES, cfg=cfg, world=world)
    apply_update(update, actor, epochs=cfg.update.epochs, step=0)
    batches = update.cut.batches
    expected = {
        name: values.tolist()
        for batch, flat in zip(batches, actor.logprobs(batches), strict=True)
        for name, values in batch.split(flat).items()
    }
    for inputs in update.objective.compared:
        index = inputs.trajectory_index
        for number, name in enumerate(inputs.trajectory_ids):
            assert inputs.old_logprobs[index == number].tolist() == pytest.approx(expected[name], abs=1e-5)
    seen = {name for inputs in update.objective.compared for name in inputs.trajectory_ids}
    assert seen == {sample.id for sample in SAMPLES}


def test_identical_policies_give_plain_grpo(actor: Actor, world: World) -> None:
    """Every weight 1, nothing dropped; the loss is minus the tokens' mean advantage, whatever corrects."""
    samples = on_policy(actor, world)
    expected = -sum(sample.advantage * sample.trajectory.num_sampled for sample in samples) / TOKENS
    strict = ImportanceConfig(
        mode=WeightMode.mask,
        normalize=True,
        veto=1e-4,
        rejection=RejectionConfig(level=RejectionLevel.geometric),
    )
    for importance in (ImportanceConfig(), ImportanceConfig(enabled=False), strict):
        update = prepare_update(actor, None, samples, cfg=Config(importance=importance), world=world)
        metrics = apply_update(update, actor, epochs=1, step=0)
        assert metrics["loss/total"] == pytest.approx(expected, rel=1e-4)
        assert metrics["tis/weight_mean"] == pytest.approx(1.0, abs=1e-5)
        assert metrics["tis/kept_fraction"] == 1.0
        assert metrics["tis/k3"] == pytest.approx(0.0, abs=1e-9)
        assert metrics["loss/ratio"] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("packing", [True, False])
def test_rejected_trajectories_leave_the_denominators(packing: bool, actor: Actor, world: World) -> None:
    """One trajectory was sampled by something else entirely; of the other eleven all tokens count."""
    good = on_policy(actor, world)
    victim = good[5]
    turns = [replace(t, logprobs=[v - 3.0 for v in t.logprobs]) for t in victim.trajectory.turns]
    bad = replace(victim, trajectory=replace(victim.trajectory, turns=turns))
    samples = [*good[:5], bad, *good[6:]]
    lost = bad.trajectory.num_sampled
    reject = ImportanceConfig(rejection=RejectionConfig(level=RejectionLevel.geometric, lo=0.9, hi=1.1))
    expected = {
        (Aggregation.token, False): TOKENS - lost,
        (Aggregation.token, True): TOKENS,
        (Aggregation.sequence, False): len(samples) - 1,
        (Aggregation.sequence, True): len(samples),
        (Aggregation.constant, False): len(samples) - 1,
        (Aggregation.constant, True): len(samples),
    }
    for (aggregation, stays), denominator in expected.items():
        cfg = Config(
            loss=LossConfig(aggregation=aggregation),
            importance=replace(reject, dropped_in_denominator=stays),
            batching=BatchingConfig(packing=packing, max_tokens=64),
        )
        update = prepare_update(actor, None, samples, cfg=cfg, world=world)
        assert update.denominators == [denominator], (aggregation, stays)
        metrics = apply_update(update, actor, epochs=1, step=0)
        assert metrics["tis/rejected_fraction"] == pytest.approx(lost / TOKENS)


def test_a_step_that_lost_every_token_is_left_out_and_counted(tiny_model: Path, world: World) -> None:
    actor = make_actor(tiny_model, world, lr=0.1)
    before = {name: tensor.clone() for name, tensor in actor.named_weights()}
    foreign = [
        replace(
            sample,
            trajectory=replace(
                sample.trajectory,
                turns=[replace(t, logprobs=[-40.0] * len(t.logprobs)) for t in sample.trajectory.turns],
            ),
        )
        for sample in SAMPLES
    ]
    cfg = Config(importance=ImportanceConfig(rejection=RejectionConfig(level=RejectionLevel.token)))
    update = prepare_update(actor, None, foreign, cfg=cfg, world=world)
    metrics = apply_update(update, actor, epochs=1, step=0)
    assert metrics["update/optimizer_steps"] == 0
    assert metrics["update/skipped_steps"] == 1
    assert metrics["tis/kept_fraction"] == 0
    assert "loss/total" not in metrics
    assert all(torch.equal(tensor, before[name]) for name, tensor in actor.named_weights())


def test_no_samples_no_steps(actor: Actor, world: World) -> None:
    update = prepare_update(actor, None, [], cfg=Config(), world=world)
    metrics = apply_update(update, actor, epochs=3, step=0)
    assert metrics == {
        "update/optimizer_steps": 0.0,
        "update/skipped_steps": 0.0,
        "update/oom_retries": 0.0,
    }


def test_steps_are_epochs_times_mini_batches(tiny_model: Path, world: World) -> None:
    """The first step sees its own policy; later ones the drift of those before, which llds makes pay."""
    actor = make_actor(tiny_model, world, lr=1e-3)
    cfg = Config(
        loss=LossConfig(kind=LossKind.clip, llds_coef=0.5), update=UpdateConfig(epochs=2, minibatches=3)
    )
    update = prepare_update(actor, None, SAMPLES, cfg=cfg, world=world)
    assert len(update.cut.minibatches) == len(update.denominators) == 3
    assert sum(update.denominators) == TOKENS
    cut = replace(update.cut, samples=update.cut.samples[:1])
    first = replace(update, cut=cut, denominators=update.denominators[:1])
    metrics = apply_update(first, actor, epochs=1, step=0)
    assert metrics["loss/ratio"] == 1.0, "exactly: π_old is the current policy"
    assert metrics["loss/llds"] == 0.0
    seen: list[MicroBatch] = []
    metrics = apply_update(update, actor, epochs=2, step=0, on_batch=seen.append)
    assert len(seen) == 2 * update.microbatches == 2 * len(update.cut.batches)
    assert metrics["update/optimizer_steps"] == 6
    assert metrics["loss/llds"] > 0
    assert metrics["loss/policy_k3"] > 0
    assert metrics["loss/ratio"] != 1.0


def test_a_penalty_in_the_reward_is_the_kl_of_the_whole_trajectory(
    actor: Actor, reference: Reference, world: World
) -> None:
    loss = LossConfig(kl_coef=0.5, kl_in=KlPlacement.reward, kl_estimator=KlEstimator.k1)
    cfg = Config(loss=loss, batching=BatchingConfig(max_tokens=64))
    penalties = reward_penalties(actor, reference, SAMPLES, cfg=cfg, world=world)
    assert penalties.keys() == {sample.id for sample in SAMPLES}
    batches = prepare_update(actor, None, SAMPLES[:1], cfg=Config(), world=world).cut.minibatches[0]
    current, ref = actor.logprobs(batches)[0], reference.logprobs(batches)[0]
    assert penalties[SAMPLES[0].id] == pytest.approx(0.5 * float((current - ref).sum()), rel=1e-4)
    update = prepare_update(actor, reference, SAMPLES, cfg=cfg, world=world)
    assert update.objective.known.ref_logprobs is None, "paid already"


def test_the_kl_penalty_and_the_entropy_bonus_are_part_of_the_loss(
    actor: Actor, reference: Reference, world: World
) -> None:
    losses = {}
    for name, loss in {
        "plain": LossConfig(),
        "kl": LossConfig(kl_coef=0.1),
        "entropy": LossConfig(entropy_coef=0.1),
    }.items():
        with_reference = reference if loss.kl_coef else None
        update = prepare_update(actor, with_reference, SAMPLES, cfg=Config(loss=loss), world=world)
        losses[name] = apply_update(update, actor, epochs=1, step=0)
    plain = losses["plain"]["loss/total"]
    assert "loss/ref_kl" not in losses["plain"]
    assert losses["kl"]["loss/total"] - plain == pytest.approx(0.1 * losses["kl"]["loss/ref_kl"], rel=1e-3)
    expected = -0.1 * losses["entropy"]["loss/entropy"]
    assert losses["entropy"]["loss/total"] - plain == pytest.approx(expected, rel=1e-3)


def test_a_number_that_is_none_names_the_trajectory(actor: Actor, world: World) -> None:
    turns = SAMPLES[2].trajectory.turns
    broken = replace(turns[0], logprobs=[float("nan"), *turns[0].logprobs[1:]])
    trajectory = replace(SAMPLES[2].trajectory, turns=[broken, *turns[1:]])
    samples = [*SAMPLES[:2], replace(SAMPLES[2], trajectory=trajectory)]
    cfg = Config(importance=ImportanceConfig(normalize=True))
    with pytest.raises(NonFiniteError, match=r"the engine's log-probabilities .* in trajectories 0/2"):
        prepare_update(actor, None, samples, cfg=cfg, world=world)


def a_loss_without_a_number(inputs: LossInputs) -> LossOutputs:
    """NaN for the third trajectory."""
    broken = torch.where(inputs.trajectory_index == 2, math.nan, 1.0)
    return LossOutputs(token_losses=inputs.logprobs * broken, metrics={})


def test_a_loss_that_is_no_number_names_the_trajectory(actor: Actor, world: World) -> None:
    loss = LossConfig(kind=LossKind.custom, import_path=f"{__name__}:a_loss_without_a_number")
    update = prepare_update(actor, None, SAMPLES[:4], cfg=Config(loss=loss), world=world)
    with pytest.raises(NonFiniteError, match="the loss is NaN or infinite in trajectories 0/2"):
        apply_update(update, actor, epochs=1, step=0)
