"""Episodes against a scripted policy: the real protocol, tokenizer and limits; only the engine is a stand-in.

The stand-in sits where vLLM begins. It knows nothing of the protocol: it returns scripted tokens, cut at the
request's limit, and keeps every request for the tests to look at.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from searchrl.config import EpisodeConfig, SamplingConfig
from searchrl.engine import Engine, Generation, GenerationRequest
from searchrl.protocol import Protocol
from searchrl.rollout import Rollout
from searchrl.tools import ToolError
from searchrl.trajectory import (
    Document,
    Example,
    Finish,
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


@dataclass
class Library:
    """A search tool with one document, failing where it is told to."""

    fail_at: int = -1
    documents: tuple[Document, ...] = DOCUMENTS
    calls: list[ToolCall] = field(default_factory=list)

    async def __call__(self, call: ToolCall) -> ToolResult:
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
            examples,
            first_group=first_group,
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


def test_a_rollout_that_hangs_ends_with_the_name_of_its_limit(tokenizer: PreTrainedTokenizerFast) -> None:
    limits = EpisodeConfig(prompt_template="{question}", deadline_s=0.05)
    rollout = Rollout(
        engine=cast(Engine, ScriptedEngine(tokenizer, [], hang=True)),
        protocol=Protocol(tokenizer, limits),
        tool=Library(),
        limits=limits,
        seed=0,
    )
    message = (
        r"^episodes were still running after episode\.deadline_s=0\.05 seconds; "
        r"raise it, or lower groups_per_step or the token limits$"
    )
    with pytest.raises(TimeoutError, match=message):
        asyncio.run(rollout.groups([EXAMPLE], first_group=0, group_size=2, sampling=SAMPLING))


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
        asyncio.run(rollout.groups([EXAMPLE], first_group=0, group_size=2, sampling=SAMPLING))
    assert caught.group_contains(IndexError)
