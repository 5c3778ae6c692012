"""Who acts in an episode that somebody watches: the engine, its tokens shown as they come, or a person."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from searchrl.engine import Engine, Generation, GenerationRequest
from searchrl.play.screen import Screen, Unfolding
from searchrl.protocol import Protocol
from searchrl.tools import Tool
from searchrl.trajectory import Example, Finish, Provenance, ToolCall, ToolResult

T = TypeVar("T")


class DroppedError(Exception):
    """The person broke the episode off."""


@dataclass(kw_only=True, slots=True)
class Stage:
    """What both players share: the stream so far, and where it is shown."""

    screen: Screen
    protocol: Protocol
    exact: bool
    """Prompt and observations are shown word by word, as the policy reads them."""
    shown: int = 0
    """Tokens of the stream that are on the screen."""
    searched: bool = False
    """A search was answered since the last turn."""

    def catch_up(self, stream: list[int]) -> None:
        """Show what has been appended since the last turn, the prompt at first: what the policy reads."""
        if self.shown == 0:
            who = Provenance.PROMPT
        else:
            who = Provenance.OBSERVATION if self.searched else Provenance.INSERTED
        appended, self.shown = stream[self.shown :], len(stream)
        if self.exact or who is Provenance.INSERTED:  # else it is known, or on the screen as documents
            self.screen.write(who, self.protocol.decode(appended).strip("\n"))
            self.screen.close()
        self.searched = False


@dataclass(kw_only=True, slots=True)
class WatchedTool:
    """The run's own tool, and what it is asked and answers on the screen."""

    tool: Tool
    stage: Stage

    async def __call__(self, call: ToolCall, example: Example) -> ToolResult:
        """Answer as the tool does."""
        self.stage.screen.close()
        result = await self.tool(call, example)
        self.stage.searched = True
        if not self.stage.exact:
            self.stage.screen.documents(result.documents, result.seconds)
        return result


@dataclass(kw_only=True, slots=True)
class WatchedEngine:
    """The engine, its tokens on the screen as it samples them."""

    engine: Engine
    stage: Stage
    policy_version: int = field(init=False)

    def __post_init__(self) -> None:
        self.policy_version = self.engine.policy_version

    def run(self, runner: asyncio.Runner, work: Coroutine[Any, Any, list[T]]) -> list[T]:
        """As the engine does."""
        return self.engine.run(runner, work)

    async def generate(self, request: GenerationRequest) -> Generation:
        """The engine's next turn."""
        stage, text = self.stage, Unfolding(self.stage.protocol)
        stage.catch_up(request.prompt_ids)
        generation = await self.engine.generate(
            request, lambda token_ids: stage.screen.write(Provenance.SAMPLED, text.more(token_ids))
        )
        stage.screen.write(Provenance.SAMPLED, text.more(generation.token_ids, is_last=True))
        stage.screen.close()
        stage.shown += len(generation.token_ids)
        return generation


@dataclass(kw_only=True, slots=True)
class Person:
    """Somebody who types the policy's turns, a line each."""

    stage: Stage
    ask: Callable[[str], str]
    """Reads a line; raises ``EOFError`` at the end of the input, ``KeyboardInterrupt`` at Ctrl-C."""
    echoes: bool
    """Show what was read, which did not appear as it was typed."""
    policy_version: int = 0

    def run(self, runner: asyncio.Runner, work: Coroutine[Any, Any, list[T]]) -> list[T]:
        """Nothing goes on behind a person."""
        return runner.run(work)

    async def generate(self, request: GenerationRequest) -> Generation:
        """The next turn: what was typed, cut where an engine would have stopped.

        Raises:
            DroppedError: Ctrl-C.
            EOFError: the input has ended.
        """
        stage = self.stage
        stage.catch_up(request.prompt_ids)
        typed = ""
        while not typed.strip():  # an accidental return is no turn
            try:
                typed = self.ask(f"you ({request.max_tokens} tokens left)> ")
            except KeyboardInterrupt:
                raise DroppedError from None
        text, stopped = cut_at_stop(typed, request.stop)
        if text != typed:
            stage.screen.say(
                f"(nothing is sampled behind {text[text.rindex('<') :]}: the rest is cut)", "dim"
            )
        ids = stage.protocol.written(text, ends=not stopped)
        finish = Finish.STOP if stopped else Finish.EOS
        if len(ids) > request.max_tokens:
            ids, finish = ids[: request.max_tokens], Finish.LENGTH
            stage.screen.say(f"(cut after {request.max_tokens} tokens)", "dim")
        if self.echoes:
            stage.screen.write(Provenance.SAMPLED, stage.protocol.decode(ids))
            stage.screen.close()
        stage.shown += len(ids)
        return Generation(token_ids=ids, logprobs=[0.0] * len(ids), finish=finish)


def cut_at_stop(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """The text up to the first stop string, that included, and whether there is one."""
    ends = [text.index(mark) + len(mark) for mark in stop if mark in text]
    return (text[: min(ends)], True) if ends else (text, False)
