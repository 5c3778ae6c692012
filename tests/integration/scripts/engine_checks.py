"""Drives a real engine the way episodes do: ``engine_checks OUT MODEL``."""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Awaitable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeVar, cast
from unittest.mock import patch

from transformers import AutoTokenizer

from integration.scripts.common import random_ids, write_results
from searchrl.actor import Actor, init_communication
from searchrl.batching import pack
from searchrl.config import DType, EngineConfig, EpisodeConfig, ModelConfig, OptimizerConfig, SamplingConfig
from searchrl.distributed import init_world
from searchrl.engine import Engine, EngineError, Generation, GenerationRequest
from searchrl.episodes import Rollout
from searchrl.protocol import Protocol
from searchrl.tools import Tool
from searchrl.trajectory import Example, Outcome, Sample, Trajectory, Turn

CONTEXT, MAX_SEQS = 512, 8
Results = dict[str, object]
T = TypeVar("T")


def request(prompt_ids: list[int], *, tokens: int, temperature: float, seed: int) -> GenerationRequest:
    """A generation that only its token limit ends."""
    return GenerationRequest(
        prompt_ids=prompt_ids,
        max_tokens=tokens,
        temperature=temperature,
        top_p=1.0,
        top_k=0,
        seed=seed,
        stop=(),
        ignore_eos=True,
    )


def crowd(temperature: float) -> list[GenerationRequest]:
    """Twice as many requests as the engine runs together, of all lengths; some share a prefix."""
    rng = random.Random(3)
    shared = random_ids(rng, 70)
    return [
        request(
            (shared if seed % 3 == 0 else []) + random_ids(rng, rng.randint(1, 120)),
            tokens=rng.randint(1, 24),
            temperature=temperature,
            seed=seed,
        )
        for seed in range(2 * MAX_SEQS)
    ]


def plain(generations: Sequence[Generation]) -> list[dict[str, object]]:
    """For JSON."""
    return [asdict(generation) for generation in generations]


async def together(engine: Engine, requests: Sequence[GenerationRequest]) -> list[Generation]:
    """Every request joins a little later than the one before, while others run."""

    async def late(number: int, one: GenerationRequest) -> Generation:
        await asyncio.sleep(0.01 * number)
        return await engine.generate(one)

    return await asyncio.gather(*(late(number, one) for number, one in enumerate(requests)))


async def alone(engine: Engine, requests: Sequence[GenerationRequest]) -> list[Generation]:
    """One after another."""
    return [await engine.generate(one) for one in requests]


async def idle(engine: Engine) -> bool:
    """True if the engine soon runs nothing."""
    for _ in range(100):
        try:
            engine.reset_prefix_cache()
        except EngineError:
            await asyncio.sleep(0.02)
        else:
            return True
    return False


async def concurrency(engine: Engine) -> Results:
    """Alone or in a crowd, sampled or greedy."""
    results: Results = {}
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        requests = crowd(temperature)
        results[name] = {
            "limits": [one.max_tokens for one in requests],
            "crowd": plain(await together(engine, requests)),
            "alone": plain(await alone(engine, requests)),
        }
    rng = random.Random(4)
    long = [request(random_ids(rng, 200), tokens=8, temperature=1.0, seed=n) for n in range(MAX_SEQS)]
    at_once = await asyncio.gather(*map(engine.generate, long))
    results["long prompts"] = {"crowd": plain(at_once), "alone": plain(await alone(engine, long))}
    other_seeds = [replace(one, seed=one.seed + 1000) for one in crowd(1.0)]
    results["other seeds"] = plain(await together(engine, other_seeds))
    return results


async def stops(engine: Engine, model: Path) -> Results:
    """A stop string that ends within a token; found by sampling without it first."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    for seed in range(50):
        free = request([5, 6, 7], tokens=60, temperature=1.0, seed=seed)
        generation = await engine.generate(free)
        pieces = [str(tokenizer.decode([i])) for i in generation.token_ids]
        at = next((n for n, p in enumerate(pieces) if p in (" answer", " search", "information")), None)
        if at is not None:
            # The token's first two characters, so that it reaches beyond the stop string.
            stop = pieces[at][:2]
            stopped = await engine.generate(replace(free, stop=("never", stop)))
            return {
                "free": generation.token_ids,
                "stop": stop,
                "stopped": asdict(stopped),
                "text": tokenizer.decode(stopped.token_ids),
            }
    raise AssertionError("no generation holds a token of several characters")


async def cancellation(engine: Engine) -> Results:
    """Half of a crowd is cancelled, then all of it by a timeout, then one before it begins."""
    requests = [
        request([n, 1, 2], tokens=30 if n % 2 else 400, temperature=1.0, seed=n) for n in range(MAX_SEQS)
    ]
    tasks = [asyncio.create_task(engine.generate(one)) for one in requests]
    await asyncio.sleep(0.15)
    for task in tasks[::2]:
        task.cancel()
    kept = await asyncio.gather(*tasks[1::2])
    cancelled = await asyncio.gather(*tasks[::2], return_exceptions=True)
    results: Results = {
        "kept": plain(kept),
        "kept alone": plain(await alone(engine, requests[1::2])),
        "cancelled": [type(one).__name__ for one in cancelled],
        "idle after cancel": await idle(engine),
    }
    try:
        async with asyncio.timeout(0.15):
            await together(engine, requests[::2])
    except TimeoutError:
        results["timed out"] = True
    results["idle after timeout"] = await idle(engine)
    immediately = asyncio.create_task(engine.generate(requests[0]))
    await asyncio.sleep(0)
    immediately.cancel()
    await asyncio.gather(immediately, return_exceptions=True)
    results["idle after at once"] = await idle(engine)
    results["afterwards"] = plain(await alone(engine, requests[1:2]))
    return results


def early_end(engine: Engine, model: Path, runner: asyncio.Runner) -> Results:
    """A rollout ends while others generate: the one whose prompt leaves room for a few tokens is enough."""
    limits = EpisodeConfig(
        prompt_template="{question}",
        max_searches=0,
        max_turn_tokens=CONTEXT,
        max_context_tokens=CONTEXT,
        deadline_s=60.0,
    )
    rollout = Rollout(
        engine=engine,
        protocol=Protocol(AutoTokenizer.from_pretrained(model), limits),
        tool=cast(Tool, None),  # nobody may search
        limits=limits,
        seed=0,
    )
    questions = [
        (n, Example(id=str(n), question="x" * length, golden_answers=("y",), data_source="t"))
        for n, length in enumerate((10, 20, CONTEXT - 60, 30))
    ]
    sampling = SamplingConfig()
    early = rollout.groups(questions, group_size=3, sampling=sampling, is_enough=lambda group: group.id == 2)
    groups = engine.run(runner, early)
    try:
        engine.reset_prefix_cache()  # refused while a request runs; the loop stands still
        at_rest = True
    except EngineError:
        at_rest = False
    again = engine.run(runner, rollout.groups(questions[2:3], group_size=3, sampling=sampling))
    return {
        "ids": [group.id for group in groups],
        "at rest": at_rest,
        "early": [t.token_ids for group in groups if group.id == 2 for t in group.trajectories],
        "alone": [t.token_ids for group in again for t in group.trajectories],
    }


async def refusals(engine: Engine) -> Results:
    """Requests that the engine refuses, among others that are fine."""
    good = [request([n, 3, 4], tokens=30, temperature=0.0, seed=n) for n in range(3)]
    bad = {
        "too long": request([1] * (CONTEXT + 8), tokens=4, temperature=0.0, seed=0),
        "empty": request([], tokens=4, temperature=0.0, seed=0),
        "no such token": request([10_000_000], tokens=4, temperature=0.0, seed=0),
    }
    results: Results = {"alone": plain(await alone(engine, good))}
    for name, refused in bad.items():
        running = asyncio.create_task(engine.generate(good[0]))
        await asyncio.sleep(0.02)
        outcomes = await asyncio.gather(
            running,
            engine.generate(good[1]),
            engine.generate(refused),
            engine.generate(good[2]),
            return_exceptions=True,
        )
        results[name] = [told(outcome) for outcome in outcomes]
    return results


async def failure(engine: Engine) -> Results:
    """The engine itself fails while several wait."""
    requests = [request([n, 5, 6], tokens=20, temperature=0.0, seed=n) for n in range(4)]
    tasks = [asyncio.create_task(engine.generate(one)) for one in requests]
    await asyncio.sleep(0.02)
    with patch.object(engine._engine, "step", side_effect=RuntimeError("out of paper")):
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    first = await together(engine, requests)
    return {
        "outcomes": [told(outcome) for outcome in outcomes],
        "afterwards": plain(first),
        "alone": plain(await alone(engine, requests)),
        "idle": await idle(engine),
    }


def told(outcome: Generation | BaseException) -> object:
    """What somebody who waited got."""
    return asdict(outcome) if isinstance(outcome, Generation) else f"{type(outcome).__name__}: {outcome}"


def trainer_difference(engine: Engine, model: Path, runner: asyncio.Runner, temperature: float) -> float:
    """Largest difference between engine's and trainer's log-probabilities of sampled tokens."""
    requests = crowd(temperature)
    samples = []
    for one, generation in zip(requests, runner.run(bounded(together(engine, requests))), strict=True):
        turn = Turn(
            token_ids=generation.token_ids,
            logprobs=generation.logprobs,
            text="",
            finish=generation.finish,
            policy_version=0,
        )
        trajectory = Trajectory(
            prompt_ids=one.prompt_ids, turns=[turn], outcome=Outcome.ANSWERED, answer=None
        )
        samples.append(Sample(trajectory=trajectory, advantage=0.0, id=str(one.seed)))
    actor = Actor(
        model,
        model=ModelConfig(path=str(model), dtype=DType.float32),
        optimizer=OptimizerConfig(),
        zero_stage=0,
        temperature=temperature,
        logprob_chunk=64,
        total_steps=1,
        seed=0,
        world=init_world("cpu"),
    )
    batches = pack(samples, 400)
    differences = [
        (logprobs - batch.sampling_logprobs[batch.loss_mask]).abs().max()
        for batch, logprobs in zip(batches, actor.logprobs(batches), strict=True)
    ]
    return float(max(differences))


async def bounded(work: Awaitable[T]) -> T:
    """Hanging is a failure too."""
    async with asyncio.timeout(60):
        return await work


def main(out: Path, model: Path) -> None:
    """Run all checks."""
    world = init_world("cpu")
    init_communication(world)
    engine = Engine(
        model,
        EngineConfig(max_num_seqs=MAX_SEQS, kv_cache_gib=0.0625, max_num_batched_tokens=CONTEXT),
        dtype=DType.float32,
        max_context_tokens=CONTEXT,
        seed=0,
        world=world,
    )
    runner = asyncio.Runner()
    results = {
        "concurrency": runner.run(bounded(concurrency(engine))),
        "stops": runner.run(bounded(stops(engine, model))),
        "cancellation": runner.run(bounded(cancellation(engine))),
        "early end": early_end(engine, model, runner),
        "refusals": runner.run(bounded(refusals(engine))),
        "failure": runner.run(bounded(failure(engine))),
        "trainer": {str(t): trainer_difference(engine, model, runner, t) for t in (0.7, 1.0)},
    }
    runner.close()
    write_results(out, results)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
