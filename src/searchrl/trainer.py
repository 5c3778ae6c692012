"""The training loop, top to bottom: questions, episodes, rewards, advantages, one optimizer step, sync."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from searchrl.actor import Actor
from searchrl.checkpoint import Checkpoints
from searchrl.collect import Collected, collect
from searchrl.config import Config, Device, KlPlacement
from searchrl.data.readers import first_of_each_source
from searchrl.data.sampler import Sampler
from searchrl.distributed import broadcast_object, gather_objects, reduce_values, side_group
from searchrl.dumps import dumped
from searchrl.environment import matmul_gflops
from searchrl.evaluation.comparison import (
    COMPARISON_COLUMNS,
    TABLE_COLUMNS,
    comparison_rows,
    eval_metrics,
    table_rows,
)
from searchrl.evaluation.results import AnswerLog, Result, load_results, save_results
from searchrl.evaluation.rollouts import evaluate
from searchrl.failures import check_failures
from searchrl.metrics import MetricLog, Tally, read_records
from searchrl.out_of_memory import TokenBudget
from searchrl.overlap import Rollouts
from searchrl.plan import MEMORY_COLUMNS, memory_rows
from searchrl.policy import ReferencePolicy
from searchrl.records import policy_lag, rollout_tally, write_trajectories
from searchrl.reference import Reference
from searchrl.retrieval.meter import RetrievalStats, merge_stats
from searchrl.rewards import ScoredGroup
from searchrl.samples import to_samples, unscored_samples
from searchrl.setup import Run, make_actor, open_run
from searchrl.trajectory import Example, Group, Sample
from searchrl.update import apply_update, prepare_update, reward_penalties
from searchrl.watch import CollapseError, Watch
from searchrl.weight_sync import WeightSync

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def train(cfg: Config, resolved: dict[str, Any]) -> Path:
    """Train, evaluate before and after, and return the folder of the final model.

    Args:
        cfg: a validated configuration.
        resolved: the same as plain containers, for the logs.
    """
    with open_run(cfg) as run, _rollouts(run) as rollouts:
        env, phases = run.env, run.env.phases
        actor = make_actor(run)
        reference = _reference(run, actor)
        checkpoints = Checkpoints(folder=env.run_dir / "checkpoints", keep=cfg.saving.keep, world=env.world)
        sync = _weight_sync(run, actor)
        start = _resume(run, actor, rollouts.sampler, checkpoints) if cfg.resume else 0
        # Main's numbers on every rank: a watch that stops the run must stop it everywhere.
        watch = Watch(cfg.watch, broadcast_object(read_records(env.run_dir, start)))
        log = MetricLog(env.run_dir, cfg.logger, resolved, resumed_step=start) if env.world.is_main else None
        actor.offload()
        first = sync(env.runner, version=start)
        env.console.say(f"sync: engine and trainer agree to {first.probe_max_abs_diff:.2g} nats")
        before = _evaluate_before(run, start)
        budget = TokenBudget(tokens=cfg.batching.max_tokens, say=env.console.say)

        for step in range(start, cfg.steps):
            if watch.must_stop():
                raise _stopped(watch, checkpoints.path(step))
            phases.step = step + 1
            with phases("rollout"):
                played = _take(run, rollouts, step)
            rollouts.start_early(step + 1)
            with phases("swap"):
                _make_room(run, actor)
            with _dumped(run, actor, resolved), phases("logprob"):
                samples, penalized = _samples(run, actor, reference, played.collected.chosen, budget)
                update = prepare_update(actor, reference, samples, cfg=cfg, world=env.world, budget=budget)
            with _dumped(run, actor, resolved), phases("update"):
                updated = apply_update(update, actor, epochs=cfg.update.epochs, step=step)
            with phases("rollout"):
                rollouts.wait()
            with phases("swap"):
                actor.offload()
            with phases("sync"):
                synced = sync(env.runner, version=step + 1)
            metrics = _step_metrics(run, played, samples, step) | penalized | updated | synced.metrics()
            alarms = watch.observe(broadcast_object(metrics))
            metrics |= watch.metrics()
            if cfg.eval.every and (step + 1) % cfg.eval.every == 0 and step + 1 < cfg.steps:
                metrics |= eval_metrics(_evaluate(run, step + 1, cfg.eval.interim_questions))
            if log is not None:
                log.write(step + 1, metrics)
            env.console.step(step + 1, cfg.steps, metrics)
            for alarm in alarms:
                env.console.say(f"watch: {alarm}")
            if watch.must_stop() or cfg.saving.is_due(step + 1):
                _save(run, actor, sync, rollouts, checkpoints, step + 1)

        _save(run, actor, sync, rollouts, checkpoints, max(start, cfg.steps))
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
    sampler, group = _sampler(run), side_group(run.env.world.size)
    return Rollouts(
        lambda step: _rollout(run, sampler, step, group),
        cfg=run.env.cfg,
        sampler=sampler,
        runner=run.env.runner,
    )


def _rollout(run: Run, sampler: Sampler, step: int, group: ProcessGroup | None) -> Played:
    """This rank's groups of the step, scored. Runs in a thread of its own."""
    cfg, world, env = run.env.cfg, run.env.world, run.env
    begin = time.perf_counter()
    env.searches.take()  # those of evaluations and of the warm start are not this step's
    share = cfg.groups_per_step // world.engines
    with env.console.progress(f"step {step + 1} episodes", share * cfg.group_size) as advance:

        def play(questions: Sequence[tuple[int, Example]], is_enough: Callable[[Group], bool]) -> list[Group]:
            episodes = run.rollout.groups(
                questions,
                group_size=cfg.group_size,
                sampling=cfg.sampling,
                on_finish=advance,
                is_enough=is_enough,
            )
            return run.engine.run(env.runner, episodes)

        collected = collect(
            sampler,
            play,
            env.score,
            groups_per_step=cfg.groups_per_step,
            resampling=cfg.resampling,
            group=group,
        )
    return Played(collected=collected, searches=env.searches.take(), seconds=time.perf_counter() - begin)


def _take(run: Run, rollouts: Rollouts[Played], step: int) -> Played:
    """The step's rollout, written down, unless too much of it is void."""
    played = rollouts.take(step)
    scored = played.collected.scored
    name = f"step-{step + 1:06d}.rank{run.env.world.rank}.jsonl"
    write_trajectories(run.env.run_dir / "trajectories" / name, scored)
    members = [(item, index) for item in scored for index in range(len(item.rewards))]
    check_failures(
        [str(item.error(index)) for item, index in members if item.rewards[index] is None],
        len(members),
        max_failed_fraction=run.env.cfg.retrieval.max_failed_fraction,
    )
    return played


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


def _make_room(run: Run, actor: Actor) -> None:
    """The engine sleeps and the optimizer comes back, unless the engine is at the next rollout already."""
    if not run.env.cfg.overlap:
        run.engine.sleep()
    actor.reload()


def _save(
    run: Run,
    actor: Actor,
    sync: WeightSync,
    rollouts: Rollouts[Played],
    checkpoints: Checkpoints,
    step: int,
) -> None:
    """Save after ``step``. A checkpoint needs the optimizer: it takes the engine's place once more."""
    _make_room(run, actor)
    path = checkpoints.save(actor, step=step, sampler=rollouts.sampler_state())
    run.env.phases.event("checkpoint_saved", path=path.name)
    actor.offload()
    if run.engine.is_asleep:
        sync(run.env.runner, version=step)


def _resume(run: Run, actor: Actor, sampler: Sampler, checkpoints: Checkpoints) -> int:
    state = checkpoints.resume(actor)
    if state is None:
        run.env.console.say(f"resume: no checkpoint in {checkpoints.folder}, starting from the beginning")
        return 0
    sampler.load_state_dict(state["sampler"])
    run.env.console.say(f"resume: continuing after step {state['step']}")
    return int(state["step"])


def _evaluate(run: Run, step: int, questions: int) -> list[Result]:
    env = run.env
    examples = first_of_each_source(env.eval_examples, questions)
    log = AnswerLog(env.run_dir / "trajectories" / f"eval-{step:06d}.rank{env.world.rank}.jsonl")
    progress = env.console.progress(f"evaluation after step {step}", len(examples[:: env.world.engines]))
    with log, progress as advance:
        answered = evaluate(
            run.rollout,
            env.runner,
            list(enumerate(examples)),
            eos_text=env.protocol.eos_text,
            world=env.world,
            max_num_seqs=env.cfg.engine.max_num_seqs,
            max_failed_fraction=env.cfg.retrieval.max_failed_fraction,
            keep=log.write,
            on_finish=advance,
        )
    results = [result for example in examples for result in answered[example.id]]
    if env.world.is_main:
        save_results(env.run_dir / "eval" / f"step-{step:06d}.json", results)
    env.console.table(f"after step {step}", TABLE_COLUMNS, table_rows(results))
    return results


def _evaluate_before(run: Run, start: int) -> list[Result] | None:
    """The initial policy's results: measured now or, in a resumed run, read back."""
    saved = run.env.run_dir / "eval" / "step-000000.json"
    if start > 0:
        return load_results(saved) if saved.exists() else None
    return _evaluate(run, 0, run.env.cfg.eval.questions) if run.env.cfg.eval.before else None


def _finish(run: Run, actor: Actor, before: list[Result] | None, log: MetricLog | None) -> Path:
    """Export and evaluate the trained policy; the folder that it is in."""
    env = run.env
    final = env.run_dir / "model"
    actor.export(final, env.tokenizer)
    after = _evaluate(run, env.cfg.steps, env.cfg.eval.questions)
    if log is not None:
        log.write(env.cfg.steps, eval_metrics(after))
        log.close()
    _report(run, before, after, final)
    return final


def _report(run: Run, before: list[Result] | None, after: list[Result], final: Path) -> None:
    if before is not None:
        title = "held-out questions, before and after reinforcement learning"
        run.env.console.table(title, COMPARISON_COLUMNS, comparison_rows(before, after))
        if run.env.world.is_main:
            rows = [dict(zip(COMPARISON_COLUMNS, row, strict=True)) for row in comparison_rows(before, after)]
            (run.env.run_dir / "comparison.json").write_text(json.dumps(rows, indent=2), encoding="utf-8")
    memory = memory_rows(
        run.env.cfg, read_records(run.env.run_dir, run.env.cfg.steps), world_size=run.env.world.size
    )
    if memory:
        title = "memory of a rank at its peak, GiB, without what libraries take"
        run.env.console.table(title, MEMORY_COLUMNS, memory)
    run.env.console.say(f"model: {final}\nmetrics: {run.env.run_dir / 'metrics.jsonl'}")
    run.env.console.say(f"trajectories: {run.env.run_dir / 'trajectories'}")
