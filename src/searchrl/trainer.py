"""The training loop, top to bottom: questions, episodes, rewards, advantages, one optimizer step, sync."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from searchrl.actor import Actor
from searchrl.collect import Collected, collect
from searchrl.config import Config, Device, KlPlacement
from searchrl.data.sampler import Sampler
from searchrl.distributed import broadcast_object, gather_objects, reduce_values, side_group
from searchrl.dumps import dumped
from searchrl.environment import matmul_gflops
from searchrl.evaluation.comparison import eval_metrics
from searchrl.evaluation.results import Result
from searchrl.evaluation.training import evaluate_before, evaluate_policy, report
from searchrl.failures import check_failures
from searchrl.heartbeat import Heartbeat
from searchrl.metrics import Tally, read_records
from searchrl.out_of_memory import TokenBudget
from searchrl.overlap import Rollouts
from searchrl.policy import ReferencePolicy
from searchrl.preemption import saved_before_stop
from searchrl.records import (
    policy_lag,
    rollout_tally,
    transcripts,
    write_trainer_logprobs,
    write_trajectories,
)
from searchrl.reference import Reference
from searchrl.resuming import Saver, begin_step, make_room, open_log, resume
from searchrl.retrieval.meter import RetrievalStats, merge_stats
from searchrl.rewards import ScoredGroup
from searchrl.samples import to_samples, unscored_samples
from searchrl.setup import Run, make_actor, open_training
from searchrl.sinks import MetricLog
from searchrl.trajectory import Example, Group, Sample
from searchrl.update import Update, apply_update, prepare_update, reward_penalties
from searchrl.watch import Alarm, CollapseError, Watch
from searchrl.weight_sync import WeightSync

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def train(cfg: Config, resolved: dict[str, Any]) -> Path:
    """Train, evaluate before and after, and return the folder of the final model.

    Args:
        cfg: a validated configuration.
        resolved: the same as plain containers, for the logs.
    """
    with open_training(cfg) as (run, checkpoints, saved), _heartbeat(run), _rollouts(run) as rollouts:
        env, phases = run.env, run.env.phases
        actor = make_actor(run)
        reference = _reference(run, actor)
        sync = _weight_sync(run, actor)
        budget = TokenBudget(tokens=cfg.batching.max_tokens, say=env.console.warn)
        start = resume(run, saved, actor=actor, sampler=rollouts.sampler, budget=budget)
        # Main's numbers on every rank: a watch that stops the run must stop it everywhere.
        watch = Watch(cfg.watch, broadcast_object(read_records(env.run_dir, start)))
        log = open_log(run, resolved, saved)
        saver = Saver(run, actor, sync, checkpoints, rollouts, budget, log)
        actor.offload()
        first = sync(env.runner, version=start)
        env.console.say(f"sync: engine and trainer agree to {first.probe_max_abs_diff:.2g} nats")
        safely = partial(saved_before_stop, save=saver.save, say=env.console.say)
        before = evaluate_before(run, start)

        for step in range(start, cfg.steps):
            with safely(step):
                if watch.must_stop():
                    raise _stopped(watch, checkpoints.path(step))
                begin_step(run, step)
                with phases("rollout"):
                    played = rollouts.take(step)
            rollouts.start_early(step + 1)
            with phases("swap"):
                make_room(run, actor)
            with _dumped(run, actor, resolved), phases("logprob"):
                samples, penalized = _samples(run, actor, reference, played.collected.chosen, budget)
                update = prepare_update(actor, reference, samples, cfg=cfg, world=env.world, budget=budget)
            with _dumped(run, actor, resolved), phases("update"), _shown(run, update) as on_batch:
                updated = apply_update(update, actor, epochs=cfg.update.epochs, step=step, on_batch=on_batch)
            write_trainer_logprobs(_step_file(run, "trainer_logprobs", step), update.objective.compared)
            with phases("rollout"):
                rollouts.wait()
            with phases("swap"):
                actor.offload()
            with phases("sync"):
                synced = sync(env.runner, version=step + 1)
            metrics = _step_metrics(run, played, samples, step) | penalized | updated | synced.metrics()
            alarms = watch.observe(broadcast_object(metrics))
            metrics |= watch.metrics()
            _tell(run, log, step + 1, metrics, alarms, played.collected.scored)
            if cfg.eval.every and (step + 1) % cfg.eval.every == 0 and step + 1 < cfg.steps:
                with safely(step + 1):
                    metrics |= _evaluate_between(run, step + 1, log)
            if cfg.saving.is_due(step + 1):
                saver.save(step + 1, metrics)

        saver.save(cfg.steps)
        return _finish(run, actor, before, log)


@dataclass(kw_only=True, slots=True, frozen=True)
class Played:
    """One step's rollout on this rank."""

    collected: Collected
    searches: RetrievalStats
    seconds: float
    """From its beginning to its end, whatever else went on."""


def _rollouts(run: Run) -> Rollouts[Played]:
    """What plays the rollouts of the run's steps."""
    sampler, group = _sampler(run), side_group(run.env.world.size, run.env.world.timeout_s)
    return Rollouts(
        lambda step: _rollout(run, sampler, step, group),
        cfg=run.env.cfg,
        sampler=sampler,
        runner=run.env.runner,
    )


def _heartbeat(run: Run) -> Heartbeat:
    env = run.env
    return Heartbeat(
        env.phases, env.stop, world=env.world, timeout_s=env.cfg.stall_timeout_s, run_dir=env.run_dir
    )


def _rollout(run: Run, sampler: Sampler, step: int, group: ProcessGroup | None) -> Played:
    """This rank's groups of the step, scored and written down. Runs in a thread of its own."""
    cfg, env = run.env.cfg, run.env
    begin = time.perf_counter()
    env.searches.take()  # those of evaluations and of the warm start are not this step's

    def play(questions: Sequence[tuple[int, Example]], is_enough: Callable[[Group], bool]) -> list[Group]:
        label, total = f"step {step + 1} episodes", len(questions) * cfg.group_size
        with env.console.progress(label, total, detail=run.rollout.activity, in_step=True) as advance:
            episodes = run.rollout.groups(
                questions,
                group_size=cfg.group_size,
                sampling=cfg.sampling,
                on_finish=env.phases.alive(advance),
                is_enough=is_enough,
                stop=env.stop,
            )
            return run.engine.run(env.runner, episodes)

    collected = collect(
        sampler,
        play,
        env.score,
        groups_per_step=cfg.groups_per_step,
        resampling=cfg.resampling,
        group=group,
        stop=env.stop,
    )
    write_trajectories(_step_file(run, "trajectories", step), collected.scored)
    members = [(item, index) for item in collected.scored for index in range(len(item.rewards))]
    check_failures(
        [str(item.error(index)) for item, index in members if item.rewards[index] is None],
        len(members),
        max_failed_fraction=cfg.retrieval.max_failed_fraction,
        stop=env.stop,
        group=group,
    )
    return Played(collected=collected, searches=env.searches.take(), seconds=time.perf_counter() - begin)


def _step_file(run: Run, folder: str, step: int) -> Path:
    return run.env.run_dir / folder / f"step-{step + 1:06d}.rank{run.env.world.rank}.jsonl"


def _samples(
    run: Run,
    actor: Actor,
    reference: ReferencePolicy | None,
    scored: Sequence[ScoredGroup],
    budget: TokenBudget,
) -> tuple[list[Sample], dict[str, float]]:
    """This rank's samples with their advantages, and metrics of a KL penalty in the reward."""
    cfg, world = run.env.cfg, run.env.world
    penalties: dict[str, float] = {}
    if reference is not None and cfg.loss.kl_in is KlPlacement.reward:
        penalties = reward_penalties(
            actor, reference, unscored_samples(scored), cfg=cfg, world=world, budget=budget
        )
    tally = Tally()
    for penalty in penalties.values():
        tally.add("reward/kl_penalty", penalty)
    samples = to_samples(
        scored, advantage=cfg.advantage, filters=cfg.filters, world=world, penalties=penalties
    )
    return samples, tally.reduce()


def _step_metrics(run: Run, played: Played, samples: Sequence[Sample], step: int) -> dict[str, float]:
    collected = played.collected
    tally = rollout_tally(collected.scored)
    tally.add("rollout/policy_lag", *policy_lag(collected.scored, version=step))
    metrics = tally.reduce() | collected.metrics | {"time/rollout_span": played.seconds}
    metrics["update/trained_tokens"] = reduce_values(
        [sum(len(sample.trajectory.token_ids) for sample in samples)], "sum"
    )[0]
    metrics |= merge_stats(gather_objects(played.searches)).metrics()
    return metrics | run.env.phases.metrics() | _machine_metrics(run.env.cfg)


def _tell(
    run: Run,
    log: MetricLog | None,
    step: int,
    metrics: dict[str, float],
    alarms: Sequence[Alarm],
    scored: Sequence[ScoredGroup],
) -> None:
    if log is not None:
        log.write(step, metrics)
        log.show(step, transcripts(scored))
    run.env.console.step(step, run.env.cfg.steps, metrics)
    for alarm in alarms:
        run.env.console.warn(f"watch: {alarm}")


def _shown(run: Run, update: Update) -> AbstractContextManager[Callable[[object], None]]:
    label, total = f"step {run.env.phases.step} update", update.microbatches * run.env.cfg.update.epochs
    return run.env.console.progress(label, total, in_step=True)


def _dumped(run: Run, actor: Actor, resolved: Mapping[str, Any]) -> AbstractContextManager[None]:
    """What the guards stop within is written down."""
    return dumped(
        run.env.run_dir,
        step=run.env.phases.step,
        resolved=resolved,
        world=run.env.world,
        reference=run.model,
        export=lambda folder: actor.export(folder, run.env.tokenizer),
    )


def _stopped(watch: Watch, checkpoint: Path) -> CollapseError:
    alarms = "\n".join(f"  - {alarm}" for alarm in watch.alarms)
    return CollapseError(
        f"stopped, because watch.action=stop and the policy seems to collapse:\n{alarms}\n"
        f"The last step is saved in {checkpoint}; resume=true watch.action=warn continues from there"
    )


def _machine_metrics(cfg: Config) -> dict[str, float]:
    return {"machine/matmul_gflops": matmul_gflops()} if cfg.device is Device.cpu else {}


def _reference(run: Run, actor: Actor) -> ReferencePolicy | None:
    cfg = run.env.cfg
    if cfg.loss.kl_coef == 0.0:
        return None
    if cfg.model.lora.rank > 0:
        return actor.reference()
    return Reference(
        run.model,
        model=cfg.model,
        temperature=cfg.sampling.temperature,
        logprob_chunk=cfg.batching.logprob_chunk,
        world=run.env.world,
        offloads=cfg.takes_turns,
    )


def _sampler(run: Run) -> Sampler:
    hops = run.env.cfg.data.train_hops
    return Sampler(
        [example for example in run.env.train_examples if not hops or example.hops in hops],
        seed=run.env.cfg.seed,
        engine=run.env.world.engine_index,
        engines=run.env.world.engines,
    )


def _weight_sync(run: Run, actor: Actor) -> WeightSync:
    prompts = [run.env.protocol.prompt(example) for example in run.env.train_examples[:256]]
    # A stale prefix cache shows only in prompts that fill a whole cache block: of the longest the ends, where
    # questions differ. More than one block proves nothing more and costs both sides time.
    longest = sorted(prompts, key=len)[-run.env.cfg.sync.probe_sequences :]
    prompts = [prompt[-(run.env.cfg.engine.block_size + 1) :] for prompt in longest]
    return WeightSync(
        actor=actor,
        engine=run.engine,
        config=run.env.cfg.sync,
        temperature=run.env.cfg.sampling.temperature,
        prompts=prompts,
        events=run.env.phases.event,
    )


def _evaluate_between(run: Run, step: int, log: MetricLog | None) -> dict[str, float]:
    metrics = eval_metrics(evaluate_policy(run, step, run.env.cfg.eval.interim_questions))
    if log is not None:
        log.write(step, metrics)
    return metrics


def _finish(run: Run, actor: Actor, before: list[Result] | None, log: MetricLog | None) -> Path:
    """Export and evaluate the trained policy; the folder that it is in."""
    env = run.env
    final, partial = env.run_dir / "model", env.run_dir / ".model.partial"
    actor.export(partial, env.tokenizer)
    if env.world.is_main:  # whole or not at all: a killed run may be resumed, a model be read meanwhile
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    after = evaluate_policy(run, env.cfg.steps, env.cfg.eval.questions)
    if log is not None:
        log.write(env.cfg.steps, eval_metrics(after))
    report(run, before, after)
    if log is not None:
        log.close()  # last, for a sink may wait for its server
    return final
