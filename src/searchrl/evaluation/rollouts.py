"""Held-out questions answered by the engines together, in bounded chunks, each scored as it finishes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial

from searchrl.config import SamplingConfig
from searchrl.distributed import World, gather_objects
from searchrl.episodes import Rollout
from searchrl.evaluation.results import Result, score_result
from searchrl.failures import check_failures
from searchrl.preemption import NEVER, StopRequest
from searchrl.trajectory import Example, Group, Trajectory

GREEDY = SamplingConfig(temperature=0.0)

ENGINE_FILLS = 4
"""Episodes of a chunk, in fillings of the engine, which runs empty only at a chunk's end."""


def chunk_questions(max_num_seqs: int, samples: int) -> int:
    """Questions that an engine plays together; bounds memory and what ``episode.deadline_s`` has to cover."""
    return max(1, ENGINE_FILLS * max_num_seqs // samples)


def evaluate(
    rollout: Rollout,
    runner: asyncio.Runner,
    questions: Sequence[tuple[int, Example]],
    *,
    eos_text: str,
    world: World,
    max_num_seqs: int,
    max_failed_fraction: float,
    samples: int = 1,
    sampling: SamplingConfig = GREEDY,
    finished: int = 0,
    keep: Callable[[Group, Sequence[Result]], None] = lambda *_: None,
    on_finish: Callable[[Trajectory], None] = lambda _: None,
    stop: StopRequest = NEVER,
) -> dict[str, list[Result]]:
    """Answer every question; the engines share the work. A collective.

    Args:
        rollout: engine, protocol and tool.
        runner: runs the episodes.
        questions: group ids with their examples, the same on every rank; an id fixes what is sampled.
        eos_text: the end-of-message token as text.
        world: this rank.
        max_num_seqs: sequences that fill the engine; sets the size of a chunk.
        max_failed_fraction: share of all trajectories, those to come included, that may be void.
        samples: answers to each question.
        sampling: the distribution they are sampled from.
        finished: answers that were there before, none of them void.
        keep: called with each question of this rank as soon as it is finished.
        on_finish: called with each trajectory of this rank as it ends.
        stop: whether this rank was asked to stop.

    Returns the results by question id, on every rank. Raises `CleanStop`: too many searches failed, or a rank
    was asked to stop.
    """
    mine = questions[world.engine_index :: world.engines]
    chunk = chunk_questions(max_num_seqs, samples)
    play = partial(rollout.groups, group_size=samples, sampling=sampling, stop=stop)
    results: dict[str, list[Result]] = {}

    def finish(group: Group) -> bool:
        scored = [score_result(t, group.example, eos_text) for t in group.trajectories]
        results[group.example.id] = scored
        keep(group, scored)
        return False  # there is never enough: every question is answered

    # The first engine's share is the longest: as many rounds, and so as many checks, on every rank.
    for start in range(0, len(questions[:: world.engines]), chunk):
        episodes = play(mine[start : start + chunk], on_finish=on_finish, is_enough=finish)
        rollout.engine.run(runner, episodes)
        answers = (result for scored in results.values() for result in scored)
        check_failures(
            [str(result.error) for result in answers if result.outcome.is_void],
            len(questions) * samples + finished if world.is_main else 0,
            max_failed_fraction=max_failed_fraction,
            stop=stop,
        )
    return {id_: scored for part in gather_objects(results) for id_, scored in part.items()}
