"""Episodes: the policy thinks, searches, reads, answers. Each is a coroutine; none waits for another."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from searchrl.config import EpisodeConfig, SamplingConfig
from searchrl.distributed import derived_seed
from searchrl.engine import Engine, GenerationRequest
from searchrl.protocol import Answer, Invalid, Protocol, Search
from searchrl.tools import Tool, ToolError
from searchrl.trajectory import Example, Finish, Group, Outcome, Provenance, Trajectory, Turn


@dataclass(kw_only=True, slots=True, frozen=True)
class Rollout:
    """What every episode of a run shares."""

    engine: Engine
    protocol: Protocol
    tool: Tool
    limits: EpisodeConfig
    seed: int

    async def groups(
        self,
        questions: Sequence[tuple[int, Example]],
        *,
        group_size: int,
        sampling: SamplingConfig,
        on_finish: Callable[[Trajectory], None] = lambda _: None,
        is_enough: Callable[[Group], bool] = lambda _: False,
    ) -> list[Group]:
        """``group_size`` concurrent episodes for every question.

        Args:
            questions: group ids with their examples; an id fixes what its group samples.
            group_size: episodes per question.
            sampling: the distribution sampled from; temperature 0 is greedy.
            on_finish: called with each trajectory as it ends.
            is_enough: called with each group as its last episode ends; True aborts all groups that still run.

        Returns:
            The complete groups in the order of their ids. An aborted group is left out as a whole.

        Raises:
            TimeoutError: episodes were still running after ``episode.deadline_s``.
        """
        complete: list[Group] = []
        running: list[asyncio.Task[None]] = []

        async def one(group_id: int, index: int, example: Example) -> Trajectory:
            trajectory = await self.episode(example, sampling, key=f"{group_id}/{index}")
            on_finish(trajectory)
            return trajectory

        async def play(group_id: int, example: Example) -> None:
            async with asyncio.TaskGroup() as tasks:
                row = [tasks.create_task(one(group_id, i, example)) for i in range(group_size)]
            group = Group(id=group_id, example=example, trajectories=[task.result() for task in row])
            complete.append(group)
            if is_enough(group):
                for task in running:  # this one too, which is at its end
                    task.cancel()

        try:
            async with asyncio.timeout(self.limits.deadline_s):
                async with asyncio.TaskGroup() as tasks:
                    running += [tasks.create_task(play(*question)) for question in questions]
        except TimeoutError as error:
            raise TimeoutError(
                f"episodes were still running after episode.deadline_s={self.limits.deadline_s:g} seconds; "
                "raise it, or lower groups_per_step or the token limits"
            ) from error
        return sorted(complete, key=lambda group: group.id)

    async def episode(self, example: Example, sampling: SamplingConfig, *, key: str) -> Trajectory:
        """One episode, PROTOCOL §1. ``key`` names it and, with the run's seed, fixes its sampling."""
        prompt_ids = self.protocol.prompt(example)
        stream = list(prompt_ids)  # what the engine is given: always prompt + everything recorded so far
        turns: list[Turn] = []
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
