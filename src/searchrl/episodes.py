"""Episodes: the policy thinks, searches, reads, answers. Each is a coroutine; none waits for another."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar
from typing import Protocol as Interface

from searchrl.config import EpisodeConfig, SamplingConfig
from searchrl.distributed import derived_seed
from searchrl.engine import Generation, GenerationRequest
from searchrl.preemption import NEVER, StopRequest
from searchrl.protocol import Answer, Invalid, Protocol, Search
from searchrl.tools import Tool, ToolError
from searchrl.trajectory import Example, Finish, Group, Outcome, Provenance, Trajectory, Turn

T = TypeVar("T")

_POLL_S = 0.1
"""How often a rollout looks whether its time is over."""


@dataclass(slots=True)
class Activity:
    """What the episodes under way are doing, for whoever watches them."""

    running: int = 0
    """Begun and not ended."""
    searching: int = 0
    """Of these: their turn is the tool's; the others wait for the engine."""

    @contextmanager
    def episode(self) -> Iterator[None]:
        """The block is an episode."""
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1

    @contextmanager
    def search(self) -> Iterator[None]:
        """Within an episode the block is a call of the tool."""
        self.searching += 1
        try:
            yield
        finally:
            self.searching -= 1

    def __str__(self) -> str:
        """``12 generating, 4 searching``."""
        return f"{self.running - self.searching} generating, {self.searching} searching"


class Player(Interface):
    """What acts in episodes: an engine, or something in its place."""

    policy_version: int
    """Stamped on every turn."""

    def run(self, runner: asyncio.Runner, work: Coroutine[Any, Any, list[T]]) -> list[T]:
        """Run episodes, which await ``generate``, to their end; nothing runs afterwards."""
        ...

    async def generate(self, request: GenerationRequest) -> Generation:
        """The next turn of the stream ``request.prompt_ids``."""
        ...


@dataclass(kw_only=True, slots=True, frozen=True)
class Rollout:
    """What every episode of a run shares."""

    engine: Player
    protocol: Protocol
    tool: Tool
    limits: EpisodeConfig
    seed: int
    paused_s: Callable[[], float] = lambda: 0.0
    """Seconds that searches have paused so far: they do not count towards a deadline."""
    activity: Activity = field(default_factory=Activity)
    """Counts; nothing depends on it."""

    async def groups(
        self,
        questions: Sequence[tuple[int, Example]],
        *,
        group_size: int,
        sampling: SamplingConfig,
        on_finish: Callable[[Trajectory], None] = lambda _: None,
        is_enough: Callable[[Group], bool] = lambda _: False,
        stop: StopRequest = NEVER,
    ) -> list[Group]:
        """``group_size`` concurrent episodes for every question.

        Args:
            questions: group ids with their examples; an id fixes what its group samples.
            group_size: episodes per question.
            sampling: the distribution sampled from; temperature 0 is greedy.
            on_finish: called with each trajectory as it ends.
            is_enough: called with each group as its last episode ends; True drops all groups that still run.
            stop: a request to stop drops them too.

        Returns:
            The complete groups in the order of their ids. A dropped group is left out as a whole; episodes
            that still run at ``episode.deadline_s`` are aborted, and void members of theirs.
        """
        complete: list[Group] = []
        running: list[asyncio.Task[None]] = []
        episodes: list[asyncio.Task[Trajectory]] = []
        late = asyncio.Event()

        async def one(group_id: int, index: int, example: Example) -> Trajectory:
            trajectory = await self.episode(example, sampling, key=f"{group_id}/{index}", late=late)
            on_finish(trajectory)
            return trajectory

        async def play(group_id: int, example: Example) -> None:
            async with asyncio.TaskGroup() as tasks:
                row = [tasks.create_task(one(group_id, i, example)) for i in range(group_size)]
                episodes.extend(row)
            group = Group(id=group_id, example=example, trajectories=[task.result() for task in row])
            complete.append(group)
            if is_enough(group):
                for task in running:  # this one too, which is at its end
                    task.cancel()

        clock = asyncio.create_task(self._look_at_the_clock(running, episodes, late, stop))
        try:
            async with asyncio.TaskGroup() as tasks:
                running += [tasks.create_task(play(*question)) for question in questions]
        finally:
            clock.cancel()
        return sorted(complete, key=lambda group: group.id)

    async def _look_at_the_clock(
        self,
        groups: Sequence[asyncio.Task[None]],
        episodes: Sequence[asyncio.Task[Trajectory]],
        late: asyncio.Event,
        stop: StopRequest,
    ) -> None:
        """Drop the groups when a stop is asked for; when the time is over, abort the episodes."""
        begun = time.monotonic() - self.paused_s()
        while (left := begun + self.limits.deadline_s + self.paused_s() - time.monotonic()) > 0:
            if stop.asked is not None:
                for group in groups:
                    group.cancel()
                return
            await asyncio.sleep(min(left, _POLL_S))
        late.set()
        for episode in episodes:
            episode.cancel()

    async def episode(
        self, example: Example, sampling: SamplingConfig, *, key: str, late: asyncio.Event | None = None
    ) -> Trajectory:
        """One episode, PROTOCOL §1.

        Args:
            example: the question.
            sampling: the distribution sampled from.
            key: names the episode and, with the run's seed, fixes its sampling.
            late: cancelled while this is set, the episode ends aborted, with the turns it has.
        """
        prompt_ids = self.protocol.prompt(example)
        turns: list[Turn] = []
        try:
            with self.activity.episode():
                return await self._play(prompt_ids, turns, example, sampling, key)
        except asyncio.CancelledError:
            if late is None or not late.is_set():
                raise
            error = f"the episode was still running after episode.deadline_s={self.limits.deadline_s:g} s"
            return Trajectory(
                prompt_ids=prompt_ids, turns=turns, outcome=Outcome.ABORTED, answer=None, error=error
            )

    async def _play(
        self,
        prompt_ids: list[int],
        turns: list[Turn],
        example: Example,
        sampling: SamplingConfig,
        key: str,
    ) -> Trajectory:
        """The episode itself; ``turns``, empty at first, holds what there is of it at any time."""
        stream = list(prompt_ids)  # what the engine is given: always prompt + everything recorded so far
        invalid_in_a_row = 0

        def end(outcome: Outcome, answer: str | None = None, error: str | None = None) -> Trajectory:
            trajectory = Trajectory(
                prompt_ids=prompt_ids, turns=turns, outcome=outcome, answer=answer, error=error
            )
            if turns and trajectory.token_ids[: len(stream)] != stream:
                raise AssertionError(f"episode {key}: the engine's stream and the record differ")
            return trajectory

        while True:
            room = self.limits.max_context_tokens - len(stream)
            if room <= 0:
                return end(Outcome.CONTEXT_LIMIT)
            turn = await self._generate(stream, room, sampling, f"{key}/{len(turns)}")
            turns.append(turn)
            action = self.protocol.parse(turn.text)
            turn.is_invalid = isinstance(action, Invalid)
            searches = sum(turn.call is not None for turn in turns)
            match action:
                case Answer(text=text):
                    return end(Outcome.ANSWERED, answer=text)
                case Search(call=call) if searches < self.limits.max_searches:
                    invalid_in_a_row = 0
                    turn.call = call
                    try:
                        with self.activity.search():
                            turn.result = await self.tool(call, example)
                    except ToolError as error:
                        return end(Outcome.TOOL_FAILED, error=str(error))
                    said = self.protocol.observation(turn.result.documents)
                    turn.observation_provenance = Provenance.OBSERVATION
                case _ if turn.finish is Finish.LENGTH:
                    cut_by_context = room < self.limits.max_turn_tokens
                    return end(Outcome.CONTEXT_LIMIT if cut_by_context else Outcome.TOKEN_LIMIT)
                case _ if searches >= self.limits.max_searches:  # the forced-answer turn did not answer
                    return end(Outcome.TURN_LIMIT)
                case Invalid() | Search():
                    invalid_in_a_row += 1
                    if invalid_in_a_row >= self.limits.max_consecutive_invalid:
                        return end(Outcome.NO_ANSWER)
                    said = self.protocol.feedback()
                    turn.observation_provenance = Provenance.INSERTED
            if len(stream) + len(turn.token_ids) + len(said.token_ids) >= self.limits.max_context_tokens:
                return end(Outcome.CONTEXT_LIMIT)
            turn.observation_ids, turn.observation_text = said.token_ids, said.text
            stream = stream + turn.token_ids + turn.observation_ids

    async def _generate(self, stream: list[int], room: int, sampling: SamplingConfig, key: str) -> Turn:
        request = GenerationRequest(
            prompt_ids=stream,
            max_tokens=min(self.limits.max_turn_tokens, room),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=derived_seed(self.seed, key),  # the same whoever else is running
        )
        generation = await self.engine.generate(request)
        return Turn(
            token_ids=generation.token_ids,
            logprobs=generation.logprobs,
            text=self.protocol.decode(generation.token_ids),
            finish=generation.finish,
            policy_version=self.engine.policy_version,
        )
