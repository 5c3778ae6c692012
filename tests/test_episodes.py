"""Episodes against a scripted policy: the real protocol, tokenizer and limits; only the engine is a stand-in.

The stand-in sits where vLLM begins. It knows nothing of the protocol: it returns scripted tokens, cut at the
request's limit, and keeps every request for the tests to look at.
"""

from __future__ import annotations

import asyncio
import json
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from searchrl.config import EpisodeConfig, SamplingConfig
from searchrl.engine import Engine, Generation, GenerationRequest
from searchrl.episodes import Rollout
from searchrl.preemption import StopRequest
from searchrl.protocol import Protocol
from searchrl.retrieval.client import HttpRetriever
from searchrl.retrieval.meter import RetrievalMeter
from searchrl.tools import SearchTool, Tool, ToolError
from searchrl.trajectory import (
    Document,
    Example,
    Finish,
    Group,
    Outcome,
    Provenance,
    ToolCall,
    ToolResult,
    Trajectory,
)

SEARCH, ANSWER, TALK = "<search>rome</search>", "<answer>Tiber</answer>", "Let me see."
EOS = "<|im_end|>"
DOCUMENTS = (Document(id="1", contents='"Rome"\nOn the Tiber.', score=2.0),)


@dataclass
class ScriptedEngine:
    """Returns the next scripted text for each question, however many others are being asked."""

    tokenizer: PreTrainedTokenizerFast
    script: Sequence[str]
    policy_version: int = 7
    hang: bool = False
    requests: list[GenerationRequest] = field(default_factory=list)
    turns: dict[int, int] = field(default_factory=dict)

    async def generate(self, request: GenerationRequest) -> Generation:
        task = id(asyncio.current_task())
        number = self.turns.get(task, 0)
        self.turns[task] = number + 1
        self.requests.append(request)
        if self.hang:
            await asyncio.Event().wait()
        await asyncio.sleep(0)  # others come in between
        text = self.script[number]
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if len(ids) > request.max_tokens or text == "":
            ids, finish = ids[: request.max_tokens], Finish.LENGTH
        else:
            finish = Finish.EOS if text.endswith(EOS) else Finish.STOP
        return Generation(token_ids=ids, logprobs=[-0.01 * i for i in ids], finish=finish)

    async def drain(self) -> None:
        """Nothing goes on behind a script."""


@dataclass
class Library:
    """A search tool with one document, failing where it is told to."""

    fail_at: int = -1
    documents: tuple[Document, ...] = DOCUMENTS
    calls: list[ToolCall] = field(default_factory=list)

    async def __call__(self, call: ToolCall, example: Example) -> ToolResult:
        del example
        self.calls.append(call)
        await asyncio.sleep(0)
        if len(self.calls) - 1 == self.fail_at:
            raise ToolError("no connection to http://127.0.0.1:1")
        return ToolResult(documents=self.documents, seconds=0.0)


@dataclass
class Played:
    """An episode and what was seen of it from outside."""

    trajectory: Trajectory
    engine: ScriptedEngine
    library: Library
    protocol: Protocol


EXAMPLE = Example(id="q", question="Which river?", golden_answers=("Tiber",), data_source="test")
BASE = EpisodeConfig(prompt_template="{question}", max_turn_tokens=200, max_context_tokens=2000)
SAMPLING = SamplingConfig(temperature=0.7)


def play(
    tokenizer: PreTrainedTokenizerFast,
    script: Iterable[str],
    *,
    library: Library | None = None,
    limits: dict[str, Any] | None = None,
) -> Played:
    config = replace(BASE, **(limits or {}))
    engine = ScriptedEngine(tokenizer, list(script))
    library = library or Library()
    protocol = Protocol(tokenizer, config)
    rollout = Rollout(engine=cast(Engine, engine), protocol=protocol, tool=library, limits=config, seed=3)
    trajectory = asyncio.run(rollout.episode(EXAMPLE, SAMPLING, key="5/0"))
    check_stream(trajectory, engine, config)
    return Played(trajectory, engine, library, protocol)


def check_stream(trajectory: Trajectory, engine: ScriptedEngine, limits: EpisodeConfig) -> None:
    """Promise 1: what the engine was given at each turn is the prompt and everything recorded before it."""
    stream = list(trajectory.prompt_ids)
    assert len(engine.requests) == len(trajectory.turns)
    for request, turn in zip(engine.requests, trajectory.turns, strict=True):
        assert request.prompt_ids == stream
        assert request.max_tokens == min(limits.max_turn_tokens, limits.max_context_tokens - len(stream))
        assert turn.logprobs == [-0.01 * i for i in turn.token_ids]
        assert turn.policy_version == 7
        stream += turn.token_ids + turn.observation_ids
    assert stream == trajectory.token_ids
    assert len(stream) <= max(limits.max_context_tokens, len(trajectory.prompt_ids))
    assert not trajectory.turns or trajectory.turns[-1].observation_ids == []


# --- how episodes end -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "limits", "outcome", "answer", "searches"),
    [
        ([ANSWER], {}, Outcome.ANSWERED, "Tiber", 0),
        ([SEARCH, ANSWER], {}, Outcome.ANSWERED, "Tiber", 1),
        ([SEARCH, SEARCH, ANSWER], {}, Outcome.ANSWERED, "Tiber", 2),
        ([TALK + EOS, ANSWER], {}, Outcome.ANSWERED, "Tiber", 0),
        (["<answer></answer>"], {}, Outcome.ANSWERED, "", 0),
        (["<answer>a</answer><search>q</search>"], {}, Outcome.ANSWERED, "a", 0),
        # After max_searches a search is no longer executed.
        ([SEARCH, SEARCH, SEARCH], {}, Outcome.TURN_LIMIT, None, 2),
        ([SEARCH, SEARCH, TALK + EOS], {}, Outcome.TURN_LIMIT, None, 2),
        ([SEARCH], {"max_searches": 0}, Outcome.TURN_LIMIT, None, 0),
        ([ANSWER], {"max_searches": 0}, Outcome.ANSWERED, "Tiber", 0),
        ([SEARCH, SEARCH], {"max_searches": 1}, Outcome.TURN_LIMIT, None, 1),
        # Invalid turns in a row; a search in between starts the count anew.
        ([TALK + EOS, TALK + EOS], {}, Outcome.NO_ANSWER, None, 0),
        ([TALK], {"max_consecutive_invalid": 1}, Outcome.NO_ANSWER, None, 0),
        ([TALK, SEARCH, TALK, ANSWER], {}, Outcome.ANSWERED, "Tiber", 1),
        ([TALK, SEARCH, TALK, TALK], {}, Outcome.NO_ANSWER, None, 1),
        (["<search> </search>", "<search></search>"], {}, Outcome.NO_ANSWER, None, 0),
        # Cut by the turn's limit; an action that was complete before the cut still counts.
        ([TALK * 5], {"max_turn_tokens": 10}, Outcome.TOKEN_LIMIT, None, 0),
        ([SEARCH, TALK * 5], {"max_turn_tokens": 20}, Outcome.TOKEN_LIMIT, None, 1),
        ([ANSWER + TALK * 9], {"max_turn_tokens": 40}, Outcome.ANSWERED, "Tiber", 0),
        ([SEARCH + TALK * 9, ANSWER], {"max_turn_tokens": 40}, Outcome.ANSWERED, "Tiber", 1),
        ([SEARCH, SEARCH, TALK * 9], {"max_turn_tokens": 20}, Outcome.TOKEN_LIMIT, None, 2),
        # Cut by the context, before, in and after a turn.
        ([], {"max_context_tokens": 5}, Outcome.CONTEXT_LIMIT, None, 0),
        ([TALK * 9], {"max_context_tokens": 50}, Outcome.CONTEXT_LIMIT, None, 0),
        ([SEARCH], {"max_context_tokens": 70}, Outcome.CONTEXT_LIMIT, None, 1),
        ([TALK], {"max_context_tokens": 70}, Outcome.CONTEXT_LIMIT, None, 0),
    ],
)
def test_outcomes(
    tokenizer: PreTrainedTokenizerFast,
    script: list[str],
    limits: dict[str, int],
    outcome: Outcome,
    answer: str | None,
    searches: int,
) -> None:
    played = play(tokenizer, script, limits=limits)
    assert (played.trajectory.outcome, played.trajectory.answer) == (outcome, answer)
    assert played.trajectory.num_searches == len(played.library.calls) == searches
    assert len(played.trajectory.turns) == len(script)
    assert played.trajectory.error is None


def test_the_context_limit_is_exact(tokenizer: PreTrainedTokenizerFast) -> None:
    """A stream may fill it; an observation that would leave no room for a token ends the episode."""
    whole = play(tokenizer, [SEARCH, ANSWER]).trajectory
    length = len(whole.token_ids)
    assert (
        play(tokenizer, [SEARCH, ANSWER], limits={"max_context_tokens": length}).trajectory.token_ids
        == whole.token_ids
    )
    before = length - len(whole.turns[1].token_ids)  # prompt, search, observation
    barely = play(tokenizer, [SEARCH, ANSWER], limits={"max_context_tokens": before + 1})
    assert barely.trajectory.outcome is Outcome.CONTEXT_LIMIT
    assert [len(turn.token_ids) for turn in barely.trajectory.turns[1:]] == [1]
    full = play(tokenizer, [SEARCH], limits={"max_context_tokens": before})
    assert full.trajectory.outcome is Outcome.CONTEXT_LIMIT
    assert full.trajectory.turns[0].observation_ids == []
    assert full.trajectory.num_searches == 1


def test_the_smaller_limit_gives_a_cut_turn_its_outcome(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = len(play(tokenizer, [ANSWER]).trajectory.prompt_ids)
    for room, outcome in ((9, Outcome.CONTEXT_LIMIT), (10, Outcome.TOKEN_LIMIT), (11, Outcome.TOKEN_LIMIT)):
        limits = {"max_turn_tokens": 10, "max_context_tokens": prompt + room}
        assert play(tokenizer, [TALK * 5], limits=limits).trajectory.outcome is outcome


def test_a_failed_search_voids_the_episode(tokenizer: PreTrainedTokenizerFast) -> None:
    played = play(tokenizer, [SEARCH, SEARCH], library=Library(fail_at=1))
    assert played.trajectory.outcome is Outcome.TOOL_FAILED
    assert played.trajectory.outcome.is_void
    assert played.trajectory.error == "no connection to http://127.0.0.1:1"
    assert played.trajectory.answer is None
    assert played.trajectory.num_searches == 1
    failed = played.trajectory.turns[-1]
    assert (failed.call, failed.result, failed.observation_ids) == (ToolCall(query="rome"), None, [])


# --- what is appended -----------------------------------------------------------------------------------


def test_an_observation_is_what_the_tool_found(tokenizer: PreTrainedTokenizerFast) -> None:
    played = play(tokenizer, [SEARCH, ANSWER])
    turn = played.trajectory.turns[0]
    expected = played.protocol.observation(DOCUMENTS)
    assert (turn.observation_ids, turn.observation_text) == (expected.token_ids, expected.text)
    assert turn.observation_provenance is Provenance.OBSERVATION
    assert turn.call == ToolCall(query="rome")
    assert turn.result is not None
    assert turn.result.documents == DOCUMENTS
    assert not turn.is_invalid


def test_feedback_is_inserted_and_not_sampled(tokenizer: PreTrainedTokenizerFast) -> None:
    played = play(tokenizer, [TALK + EOS, ANSWER])
    turn = played.trajectory.turns[0]
    feedback = played.protocol.feedback()
    assert (turn.observation_ids, turn.observation_text) == (feedback.token_ids, feedback.text)
    assert turn.is_invalid
    p, s, i, a = (
        len(part)
        for part in (
            played.trajectory.prompt_ids,
            turn.token_ids,
            feedback.token_ids,
            played.trajectory.turns[1].token_ids,
        )
    )
    tags = [Provenance.PROMPT] * p + [Provenance.SAMPLED] * s
    tags += [Provenance.INSERTED] * i + [Provenance.SAMPLED] * a
    assert played.trajectory.provenance == tags
    assert (turn.call, turn.result) == (None, None)


@pytest.mark.parametrize("tail", ["", "\n", "\n\n"])
def test_a_stop_string_inside_a_token_stays_as_it_was_sampled(
    tokenizer: PreTrainedTokenizerFast, tail: str
) -> None:
    """``>`` merges with the newlines behind it; cutting the text at the stop string would change the ids."""
    search, answer = "<search>rome</search>" + tail, "<answer>Tiber</answer>" + tail
    played = play(tokenizer, [search, answer])
    sampled = tokenizer.encode(search, add_special_tokens=False)
    assert str(tokenizer.decode(sampled[-1])) == ">" + tail or not tail
    assert played.trajectory.turns[0].token_ids == sampled
    assert played.trajectory.turns[0].text == search
    assert played.trajectory.outcome is Outcome.ANSWERED
    assert played.library.calls == [ToolCall(query="rome")]


def test_ids_that_no_text_encodes_to_are_kept(tokenizer: PreTrainedTokenizerFast) -> None:
    """A policy may spell a word letter by letter; the stream keeps its spelling."""

    class Speller(ScriptedEngine):
        async def generate(self, request: GenerationRequest) -> Generation:
            self.requests.append(request)
            text = self.script[len(self.requests) - 1]
            ids = [i for letter in text for i in self.tokenizer.encode(letter, add_special_tokens=False)]
            return Generation(token_ids=ids, logprobs=[-0.01 * i for i in ids], finish=Finish.STOP)

    engine = Speller(tokenizer, [SEARCH, ANSWER])
    rollout = Rollout(
        engine=cast(Engine, engine),
        protocol=Protocol(tokenizer, BASE),
        tool=Library(),
        limits=BASE,
        seed=0,
    )
    trajectory = asyncio.run(rollout.episode(EXAMPLE, SAMPLING, key="0/0"))
    check_stream(trajectory, engine, BASE)
    assert trajectory.turns[0].token_ids != tokenizer.encode(SEARCH, add_special_tokens=False)
    assert len(trajectory.turns[0].token_ids) == len(SEARCH)
    assert trajectory.answer == "Tiber"


# --- any script -----------------------------------------------------------------------------------------

moves = st.sampled_from(
    [SEARCH, SEARCH + "\n\n", ANSWER, TALK, TALK + EOS, "<search> </search>", "<think>" + "so " * 40, EOS]
)


@settings(deadline=None, max_examples=60)
@given(
    script=st.lists(moves, max_size=4),
    max_searches=st.integers(0, 3),
    patience=st.integers(1, 3),
    turn_tokens=st.sampled_from([12, 60, 200]),
    context=st.integers(40, 600),
    fail_at=st.integers(-1, 3),
)
def test_any_episode_keeps_the_promises(
    tokenizer: PreTrainedTokenizerFast,
    script: list[str],
    max_searches: int,
    patience: int,
    turn_tokens: int,
    context: int,
    fail_at: int,
) -> None:
    played = play(  # which checks the stream
        tokenizer,
        [*script, *[ANSWER] * 12],  # the script may run out, the engine may not
        library=Library(fail_at=fail_at),
        limits={
            "max_searches": max_searches,
            "max_consecutive_invalid": patience,
            "max_turn_tokens": turn_tokens,
            "max_context_tokens": context,
        },
    )
    trajectory, calls = played.trajectory, played.library.calls
    turns = trajectory.turns
    failed = trajectory.outcome is Outcome.TOOL_FAILED
    assert len(calls) == trajectory.num_searches + failed <= max_searches
    assert failed == (0 <= fail_at < len(calls))
    assert (trajectory.error is not None) == failed
    assert (trajectory.answer is not None) == (trajectory.outcome is Outcome.ANSWERED)
    for turn in turns:
        assert turn.text == tokenizer.decode(turn.token_ids, skip_special_tokens=False)
        assert (turn.call is not None) == (turn.result is not None) or (failed and turn is turns[-1])
    for turn in turns[:-1]:  # the environment answered every turn but the last, in one of two ways
        assert turn.observation_ids
        assert turn.is_invalid == (turn.result is None)
    in_a_row = longest = 0
    for turn in turns:
        in_a_row = in_a_row + 1 if turn.is_invalid else 0
        longest = max(longest, in_a_row)
    assert longest <= patience
    if trajectory.outcome is Outcome.TURN_LIMIT:
        assert trajectory.num_searches == max_searches
    if trajectory.outcome is Outcome.TOKEN_LIMIT:
        assert turns[-1].finish is Finish.LENGTH
        assert len(turns[-1].token_ids) == turn_tokens


# --- many at once ---------------------------------------------------------------------------------------


def gather(
    tokenizer: PreTrainedTokenizerFast, questions: int, group_size: int, first_group: int, *, seed: int = 3
) -> tuple[list[list[Trajectory]], dict[tuple[int, ...], set[int]]]:
    """Groups, and the seeds that were asked for by the stream they continued."""
    engine = ScriptedEngine(tokenizer, [SEARCH, ANSWER])
    rollout = Rollout(
        engine=cast(Engine, engine),
        protocol=Protocol(tokenizer, BASE),
        tool=Library(),
        limits=BASE,
        seed=seed,
    )
    examples = [
        Example(id=str(n), question=f"Question {first_group + n}?", golden_answers=("x",), data_source="t")
        for n in range(questions)
    ]
    finished: list[Trajectory] = []
    groups = asyncio.run(
        rollout.groups(
            list(enumerate(examples, first_group)),
            group_size=group_size,
            sampling=SAMPLING,
            on_finish=finished.append,
        )
    )
    assert [group.id for group in groups] == list(range(first_group, first_group + questions))
    assert [group.example for group in groups] == examples
    played = [trajectory for group in groups for trajectory in group.trajectories]
    assert sorted(map(id, finished)) == sorted(map(id, played))
    seeds: dict[tuple[int, ...], set[int]] = {}
    for request in engine.requests:
        assert (request.temperature, request.top_p, request.top_k) == (0.7, 1.0, 0)
        seeds.setdefault(tuple(request.prompt_ids), set()).add(request.seed)
    return [group.trajectories for group in groups], seeds


def test_groups_hold_their_question_s_episodes(tokenizer: PreTrainedTokenizerFast) -> None:
    groups, _ = gather(tokenizer, questions=3, group_size=4, first_group=10)
    assert [len(trajectories) for trajectories in groups] == [4, 4, 4]
    for number, trajectories in enumerate(groups):
        for trajectory in trajectories:
            assert f"Question {10 + number}?" in tokenizer.decode(trajectory.prompt_ids)
            assert trajectory.outcome is Outcome.ANSWERED


def test_seeds_do_not_depend_on_who_else_runs(tokenizer: PreTrainedTokenizerFast) -> None:
    _, together = gather(tokenizer, questions=4, group_size=3, first_group=0)
    _, alone = gather(tokenizer, questions=1, group_size=3, first_group=2)
    assert len(together) == 8  # four questions, two turns each
    assert all(together[stream] == seeds for stream, seeds in alone.items())
    every = [seed for seeds in together.values() for seed in seeds]
    assert len(every) == len(set(every)) == 4 * 3 * 2  # each generation has its own
    assert all(0 <= seed < 2**31 for seed in every)
    _, other = gather(tokenizer, questions=1, group_size=3, first_group=2, seed=4)
    assert all(not seeds & other[stream] for stream, seeds in alone.items())


class Slow(Library):
    """Answers the first search at once, and every other one never."""

    async def __call__(self, call: ToolCall, example: Example) -> ToolResult:
        is_first = not self.calls
        result = await super().__call__(call, example)
        if not is_first:
            await asyncio.Event().wait()
        return result


def test_what_still_runs_at_the_deadline_is_void_and_keeps_its_turns(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """One episode of three is fast enough; the others wait for their search."""
    engine = ScriptedEngine(tokenizer, [SEARCH, ANSWER])
    rollout = replace(rollout_of(engine, Slow()), limits=replace(BASE, deadline_s=0.3))
    finished: list[Trajectory] = []
    start = time.monotonic()
    (group,) = asyncio.run(
        rollout.groups([(0, EXAMPLE)], group_size=3, sampling=SAMPLING, on_finish=finished.append)
    )
    assert time.monotonic() - start < 5
    assert [t.outcome for t in group.trajectories].count(Outcome.ANSWERED) == 1
    late = [t for t in group.trajectories if t.outcome is Outcome.ABORTED]
    assert [len(t.turns) for t in late] == [1, 1]
    for trajectory in late:
        assert trajectory.outcome.is_void
        assert trajectory.error == "the episode was still running after episode.deadline_s=0.3 s"
        assert trajectory.turns[0].call == ToolCall(query="rome")
        assert (trajectory.turns[0].result, trajectory.turns[0].observation_ids) == (None, [])
    assert len(finished) == 3


def test_a_pause_of_the_searches_does_not_count_towards_the_deadline(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    meter = RetrievalMeter()

    class Down(Library):
        async def __call__(self, call: ToolCall, example: Example) -> ToolResult:
            with meter.pausing():
                await asyncio.sleep(0.6)
            return await super().__call__(call, example)

    rollout = rollout_of(ScriptedEngine(tokenizer, [SEARCH, ANSWER]), Down())
    hasty = replace(rollout, limits=replace(BASE, deadline_s=0.3))
    for played, outcome in (
        (hasty, Outcome.ABORTED),
        (replace(hasty, paused_s=meter.paused_s), Outcome.ANSWERED),
    ):
        cast(ScriptedEngine, played.engine).turns.clear()
        (group,) = asyncio.run(played.groups([(0, EXAMPLE)], group_size=1, sampling=SAMPLING))
        assert group.trajectories[0].outcome is outcome


def test_what_the_episodes_do_is_counted_to_the_end_of_each(tokenizer: PreTrainedTokenizerFast) -> None:
    """Seen from within the searches, and from within the engine; the third episode's search never ends."""
    seen: list[str] = []

    class Watched(Library):
        async def __call__(self, call: ToolCall, example: Example) -> ToolResult:
            seen.append(str(rollout.activity))
            if len(seen) == 3:
                await asyncio.Event().wait()
            if len(seen) == 1:
                raise ToolError("no connection")
            return await super().__call__(call, example)

    class Counted(ScriptedEngine):
        async def generate(self, request: GenerationRequest) -> Generation:
            seen.append(str(rollout.activity))
            return await super().generate(request)

    library, engine = Watched(), ScriptedEngine(tokenizer, [SEARCH, ANSWER])
    rollout = replace(rollout_of(engine, library), limits=replace(BASE, deadline_s=0.3))
    assert str(rollout.activity) == "0 generating, 0 searching"
    (group,) = asyncio.run(rollout.groups([(0, EXAMPLE)], group_size=3, sampling=SAMPLING))
    assert seen == ["2 generating, 1 searching", "1 generating, 1 searching", "0 generating, 2 searching"]
    assert {t.outcome for t in group.trajectories} == {Outcome.TOOL_FAILED, Outcome.ANSWERED, Outcome.ABORTED}
    assert str(rollout.activity) == "0 generating, 0 searching"  # however they ended
    seen.clear()
    rollout = rollout_of(Counted(tokenizer, [ANSWER]), Library())
    asyncio.run(rollout.groups([(0, EXAMPLE)], group_size=2, sampling=SAMPLING))
    assert seen == ["1 generating, 0 searching", "2 generating, 0 searching"]


@pytest.mark.parametrize("at", ["the beginning", "the second group"])
def test_a_request_to_stop_drops_what_runs(tokenizer: PreTrainedTokenizerFast, at: str) -> None:
    stop = StopRequest()
    engine = Sluggish(tokenizer, [SEARCH, ANSWER])

    def is_enough(group: Group) -> bool:
        stop.ask(signal.SIGTERM)
        return False

    if at == "the beginning":
        stop.ask(signal.SIGUSR1)
    questions = [ask(1, "slow"), ask(2, "quick"), ask(3, "slow")]
    start = time.monotonic()
    groups = asyncio.run(
        rollout_of(engine, Library()).groups(
            questions, group_size=2, sampling=SAMPLING, is_enough=is_enough, stop=stop
        )
    )
    assert time.monotonic() - start < 5
    assert [group.id for group in groups] == ([] if at == "the beginning" else [2])
    assert engine.dropped == (0 if at == "the beginning" else 4)


def test_a_fault_of_the_engine_is_no_outcome(tokenizer: PreTrainedTokenizerFast) -> None:
    """What is not the tool's failure stops the rollout: it must not be mistaken for a bad answer."""
    rollout = Rollout(
        engine=cast(Engine, ScriptedEngine(tokenizer, [SEARCH])),  # the script ends: IndexError
        protocol=Protocol(tokenizer, BASE),
        tool=Library(),
        limits=BASE,
        seed=0,
    )
    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(rollout.groups([(0, EXAMPLE)], group_size=2, sampling=SAMPLING))
    assert caught.group_contains(IndexError)


# --- an early end ---------------------------------------------------------------------------------------


@dataclass
class Sluggish(ScriptedEngine):
    """Never answers questions with ``slow`` in them."""

    dropped: int = 0

    async def generate(self, request: GenerationRequest) -> Generation:
        if "slow" in self.tokenizer.decode(request.prompt_ids):
            self.requests.append(request)
            try:
                await asyncio.Event().wait()
            finally:
                self.dropped += 1
        return await super().generate(request)


def ask(id_: int, question: str) -> tuple[int, Example]:
    return id_, Example(id=str(id_), question=question, golden_answers=("x",), data_source="t")


def rollout_of(engine: ScriptedEngine, tool: Tool) -> Rollout:
    limits = replace(BASE, deadline_s=8.0)  # what is not aborted shows soon
    protocol = Protocol(engine.tokenizer, limits)
    return Rollout(engine=cast(Engine, engine), protocol=protocol, tool=tool, limits=limits, seed=0)


def test_what_is_not_needed_is_aborted_and_left_out_as_a_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    """Of four groups two never end. The first to be complete is not enough, the second is."""
    engine = Sluggish(tokenizer, [SEARCH, ANSWER])
    finished: list[Trajectory] = []
    complete: list[Group] = []

    def is_enough(group: Group) -> bool:
        complete.append(group)
        return len(complete) == 2

    questions = [ask(9, "quick"), ask(4, "slow"), ask(7, "quick"), ask(2, "slow")]
    groups = asyncio.run(
        rollout_of(engine, Library()).groups(
            questions, group_size=3, sampling=SAMPLING, on_finish=finished.append, is_enough=is_enough
        )
    )
    assert [group.id for group in groups] == [7, 9]  # in order
    assert groups == sorted(complete, key=lambda group: group.id)
    assert [len(group.trajectories) for group in groups] == [3, 3]
    assert len(finished) == 6
    assert engine.dropped == 6
    alone = Sluggish(tokenizer, [SEARCH, ANSWER])
    again = rollout_of(alone, Library()).groups([questions[2]], group_size=3, sampling=SAMPLING)
    assert asyncio.run(again) == groups[:1]  # who else was aborted changes nothing


def test_after_enough_nobody_is_asked_and_nothing_counts(tokenizer: PreTrainedTokenizerFast) -> None:
    """Groups that would end in the same turn of the loop are aborted like all others."""
    engine = Sluggish(tokenizer, [ANSWER])
    asked: list[int] = []

    def is_enough(group: Group) -> bool:
        asked.append(group.id)
        return True

    questions = [ask(n, "quick") for n in range(5)]
    groups = asyncio.run(
        rollout_of(engine, Library()).groups(questions, group_size=2, sampling=SAMPLING, is_enough=is_enough)
    )
    assert [group.id for group in groups] == asked
    assert len(asked) == 1


def test_nothing_is_aborted_where_all_is_needed(tokenizer: PreTrainedTokenizerFast) -> None:
    engine = ScriptedEngine(tokenizer, [ANSWER])
    complete: list[Group] = []

    def is_enough(group: Group) -> bool:
        complete.append(group)
        return len(complete) == 3

    rollout = rollout_of(engine, Library())
    questions = [ask(n, "quick") for n in range(3)]
    stopped = asyncio.run(rollout.groups(questions, group_size=2, sampling=SAMPLING, is_enough=is_enough))
    requests, engine.requests = engine.requests, []
    engine.turns.clear()
    assert asyncio.run(rollout.groups(questions, group_size=2, sampling=SAMPLING)) == stopped
    assert requests == engine.requests


@contextmanager
def search_server(asked: threading.Event, release: threading.Event) -> Iterator[str]:
    """Tells when it is asked, and answers once it is released."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            queries = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["queries"]
            asked.set()
            release.wait(10)
            documents = [[{"document": {"id": q, "contents": q}, "score": 1.0}] for q in queries]
            self.reply({"result": documents})

        def do_GET(self) -> None:
            self.reply({})

        def reply(self, record: object) -> None:
            body = json.dumps(record).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        release.set()
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("pause_s", [0.0, 0.5])
def test_searches_work_after_some_were_aborted(tokenizer: PreTrainedTokenizerFast, pause_s: float) -> None:
    """An update of the policy may follow: the loop stands still for longer than a search may take."""
    asked, release = threading.Event(), threading.Event()

    class Bystander(ScriptedEngine):
        async def generate(self, request: GenerationRequest) -> Generation:
            if "idle" in self.tokenizer.decode(request.prompt_ids):
                while not asked.is_set():
                    await asyncio.sleep(0.005)
                return Generation(token_ids=answer, logprobs=[0.0] * len(answer), finish=Finish.STOP)
            return await super().generate(request)

    answer = tokenizer.encode(ANSWER, add_special_tokens=False)
    engine = Bystander(tokenizer, [SEARCH, ANSWER])
    with search_server(asked, release) as url, asyncio.Runner() as runner:
        retriever = HttpRetriever([url], timeout_s=0.4, deadline_s=5.0)
        rollout = rollout_of(engine, SearchTool(retriever, top_k=1))
        searching = [ask(n, "search") for n in range(20)]
        groups = runner.run(
            rollout.groups(
                [*searching, ask(20, "idle")], group_size=2, sampling=SAMPLING, is_enough=lambda _: True
            )
        )
        release.set()
        time.sleep(pause_s)
        engine.turns.clear()
        later = runner.run(rollout.groups(searching, group_size=2, sampling=SAMPLING))
        runner.run(retriever.aclose())
    assert [group.id for group in groups] == [20]
    assert [group.id for group in later] == list(range(20))
    assert {t.outcome for group in later for t in group.trajectories} == {Outcome.ANSWERED}
