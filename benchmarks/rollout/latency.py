"""Rollouts while searches take time: continuous against lock-step, with latency against without.

    python benchmarks/rollout/latency.py --policy smollm2 --episodes 64 --latencies 0 0.2 1

The run's own engine, episodes and search client, and a real search server that sleeps lognormal seconds for
every query (``latency_server.py``; a request waits for its slowest query). Lock-step is the same code with a
tool that lets nobody search before all who still play have asked, and nobody go on before all are answered.
Every setting plays the same questions with the same seeds; settings alternate within a round.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

sys.path.append(str(Path(__file__).resolve().parents[1]))
from latency_server import serving
from policies import POLICIES, warm_start

from searchrl.compose import load_config
from searchrl.data.sampler import Sampler
from searchrl.environment import matmul_gflops, prepare_environment
from searchrl.retrieval.client import HttpRetriever
from searchrl.setup import Run, open_run
from searchrl.tools import SearchTool, Tool
from searchrl.trajectory import Example, ToolCall, ToolResult, Trajectory


class LockStep:
    """A tool that serves whole rounds: it waits for all who still play, and answers all together."""

    def __init__(self, tool: Tool, episodes: int) -> None:
        self._tool = tool
        self._playing = episodes
        self._asked: list[tuple[ToolCall, Example, asyncio.Future[ToolResult]]] = []
        self._round: asyncio.Task[None] | None = None

    async def __call__(self, call: ToolCall, example: Example) -> ToolResult:
        future: asyncio.Future[ToolResult] = asyncio.get_running_loop().create_future()
        self._asked.append((call, example, future))
        self._serve_if_complete()
        return await future

    def ended(self, trajectory: Trajectory) -> None:
        """An episode has ended; the round may be complete without it."""
        del trajectory
        self._playing -= 1
        self._serve_if_complete()

    def _serve_if_complete(self) -> None:
        if self._asked and len(self._asked) == self._playing:
            asked, self._asked = self._asked, []
            self._round = asyncio.create_task(self._serve(asked))

    async def _serve(self, asked: Sequence[tuple[ToolCall, Example, asyncio.Future[ToolResult]]]) -> None:
        results = await asyncio.gather(*(self._tool(call, example) for call, example, _ in asked))
        for (_, _, future), result in zip(asked, results, strict=True):
            future.set_result(result)


@dataclass(kw_only=True, slots=True, frozen=True)
class Played:
    """What one rollout took and made."""

    seconds: float
    sampled: int
    searches: int
    searching_s: float
    """Seconds of all searches together, as the episodes saw them."""


def play(run: Run, tool: Tool, questions: Sequence[tuple[int, Example]], *, lock_step: bool) -> Played:
    """One rollout from an empty prefix cache."""
    cfg = run.env.cfg
    run.engine.reset_prefix_cache()
    lock = LockStep(tool, len(questions) * cfg.group_size)
    rollout = replace(run.rollout, tool=lock if lock_step else tool)
    start = time.perf_counter()
    groups = run.env.runner.run(
        rollout.groups(questions, group_size=cfg.group_size, sampling=cfg.sampling, on_finish=lock.ended)
    )
    seconds = time.perf_counter() - start
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    results = [turn.result for t in trajectories for turn in t.turns if turn.result is not None]
    return Played(
        seconds=seconds,
        sampled=sum(trajectory.num_sampled for trajectory in trajectories),
        searches=len(results),
        searching_s=sum(result.seconds for result in results),
    )


def measure(run: Run, tools: Sequence[tuple[float, Tool]], episodes: int, rounds: int) -> None:
    """Play all settings ``rounds`` times in turn, and print the table."""
    cfg = run.env.cfg
    sampler = Sampler(run.env.train_examples, seed=cfg.seed)
    questions = sampler.take(episodes // cfg.group_size)
    settings = [(lock_step, *tool) for lock_step in (False, True) for tool in tools]
    found: list[list[Played]] = [[] for _ in settings]
    play(run, tools[0][1], questions[:1], lock_step=False)  # what is made at first use
    speeds = []
    for _ in range(rounds):
        for results, (lock_step, _, tool) in zip(found, settings, strict=True):
            speeds.append(matmul_gflops())
            results.append(play(run, tool, questions, lock_step=lock_step))
    print("| rollout | mean latency s | s | episodes/s | sampled tokens/s | searches | s a search | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for results, (lock_step, mean_s, _) in zip(found, settings, strict=True):
        name = "lock-step" if lock_step else "continuous"
        seconds = median(played.seconds for played in results)
        searches, sampled = results[0].searches, results[0].sampled
        wait = median(played.searching_s / played.searches for played in results)
        # Against continuous rollouts without latency, round by round.
        ratios = [first.seconds / played.seconds for first, played in zip(found[0], results, strict=True)]
        print(
            f"| {name} | {mean_s:g} | {seconds:.2f} | {episodes / seconds:.2f} | {sampled / seconds:.0f} "
            f"| {searches} | {wait:.3f} | {median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) |"
        )
    print(f"{episodes} episodes, {rounds} rounds, {min(speeds):.0f} to {max(speeds):.0f} GFLOP/s")


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", choices=list(POLICIES), default="smollm2")
    parser.add_argument("--episodes", type=int, default=64, help="8 for each question")
    parser.add_argument("--latencies", type=float, nargs="+", default=[0.0, 0.2, 1.0], help="mean seconds")
    parser.add_argument("--max-num-seqs", type=int, default=64, help="episodes that generate together")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    checkpoint = warm_start(args.policy)
    with ExitStack() as stack:
        urls = [stack.enter_context(serving(mean_s=mean_s)) for mean_s in args.latencies]
        overrides = [*POLICIES[args.policy], f"checkpoint={checkpoint}", "group_size=8"]
        overrides += [
            f"engine.max_num_seqs={args.max_num_seqs}",
            "retrieval=http",
            f"retrieval.urls=[{urls[0]}]",
        ]
        cfg, _ = load_config(overrides)
        prepare_environment("cpu")
        run = stack.enter_context(open_run(cfg))
        retrievers = [HttpRetriever([url]) for url in urls]
        tools = [SearchTool(retriever, top_k=cfg.episode.top_k) for retriever in retrievers]
        measure(run, list(zip(args.latencies, tools, strict=True)), args.episodes, args.rounds)
        for retriever in retrievers:
            run.env.runner.run(retriever.aclose())


if __name__ == "__main__":
    main()
