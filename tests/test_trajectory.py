"""Provenance, mask and log-probabilities of a stream, as tables of letters.

P: prompt, S: sampled, O: observation, I: inserted; ``|`` ends a turn. The tokens count up from 0, and the
log-probability of sampled token ``t`` is ``-t / 8``, so that a table says everything about its stream.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchrl.trajectory import Document, Example, Finish, Outcome, Provenance, ToolResult, Trajectory, Turn

LETTERS = {
    "P": Provenance.PROMPT,
    "S": Provenance.SAMPLED,
    "O": Provenance.OBSERVATION,
    "I": Provenance.INSERTED,
}


def stream(table: str) -> Trajectory:
    """The trajectory that a table like ``PPP SSOO| SSII| S`` describes."""
    prompt, *rest = table.split(" ", 1)
    turns, count = [], len(prompt)
    for letters in rest[0].replace(" ", "").split("|") if rest else []:
        sampled = letters.rstrip("OI")
        appended = letters[len(sampled) :]
        assert set(sampled) <= {"S"}
        assert len(set(appended)) <= 1
        first = count
        count += len(letters)
        turns.append(
            Turn(
                token_ids=list(range(first, first + len(sampled))),
                logprobs=[-t / 8 for t in range(first, first + len(sampled))],
                text="",
                finish=Finish.STOP,
                policy_version=0,
                observation_ids=list(range(first + len(sampled), count)),
                observation_provenance=LETTERS[appended[0]] if appended else Provenance.OBSERVATION,
            )
        )
    return Trajectory(prompt_ids=list(range(len(prompt))), turns=turns, outcome=Outcome.ANSWERED, answer="x")


TABLES = [
    # table, mask, number of sampled tokens
    ("PPP", "000", 0),
    ("PPP S", "0001", 1),
    ("PPP SSSOOOO|SS", "000111000011", 5),  # the module's own example
    ("P SIII|SSOO|S", "01000110" + "01", 4),
    ("PP SO|SO|SI|S", "001010101", 4),
    ("PP |S", "001", 1),  # an empty generation
    ("PP OO|S", "00001", 1),  # and one that was answered all the same
]


@pytest.mark.parametrize(("table", "mask", "sampled"), TABLES)
def test_tables(table: str, mask: str, sampled: int) -> None:
    trajectory = stream(table)
    letters = table.replace(" ", "").replace("|", "")
    assert trajectory.provenance == [LETTERS[letter] for letter in letters]
    assert trajectory.loss_mask == [bit == "1" for bit in mask]
    assert trajectory.token_ids == list(range(len(letters)))
    assert trajectory.logprobs == [-t / 8 if bit == "1" else 0.0 for t, bit in enumerate(mask)]
    assert trajectory.num_sampled == sampled


def test_reading_the_stream_leaves_the_parts_alone() -> None:
    trajectory = stream("PP SO|S")
    trajectory.token_ids.append(99)
    trajectory.logprobs.append(99.0)
    assert trajectory.prompt_ids == [0, 1]
    assert trajectory.token_ids == [0, 1, 2, 3, 4]
    assert trajectory.turns[0].logprobs == [-0.25]


shapes = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 5), st.sampled_from("OI")), min_size=0, max_size=5
)


@given(st.integers(1, 6), shapes)
def test_nothing_is_lost_and_every_list_has_the_stream_s_length(
    prompt: int, turns: list[tuple[int, int, str]]
) -> None:
    table = "P" * prompt + " " + "|".join("S" * s + letter * o for s, o, letter in turns)
    trajectory = stream(table)
    length = prompt + sum(s + o for s, o, _ in turns)
    ids, tags = trajectory.token_ids, trajectory.provenance
    assert ids == list(range(length))  # each token once, in order
    assert len(tags) == len(trajectory.loss_mask) == len(trajectory.logprobs) == length
    assert trajectory.loss_mask == [tag is Provenance.SAMPLED for tag in tags]
    assert sum(trajectory.loss_mask) == trajectory.num_sampled == sum(s for s, _, _ in turns)
    assert [p for p, m in zip(trajectory.logprobs, trajectory.loss_mask, strict=True) if m] == [
        p for turn in trajectory.turns for p in turn.logprobs
    ]
    assert not any(p for p, m in zip(trajectory.logprobs, trajectory.loss_mask, strict=True) if not m)


@given(st.integers(1, 6), shapes)
def test_the_stream_before_each_turn_is_a_prefix_of_the_whole(
    prompt: int, turns: list[tuple[int, int, str]]
) -> None:
    whole = stream("P" * prompt + " " + "|".join("S" * s + letter * o for s, o, letter in turns))
    so_far = list(whole.prompt_ids)
    for k, turn in enumerate(whole.turns):
        before = Trajectory(
            prompt_ids=whole.prompt_ids, turns=whole.turns[:k], outcome=whole.outcome, answer=None
        )
        assert before.token_ids == so_far == whole.token_ids[: len(so_far)]
        assert before.loss_mask == whole.loss_mask[: len(so_far)]
        assert before.logprobs == whole.logprobs[: len(so_far)]
        so_far += turn.token_ids + turn.observation_ids
    assert so_far == whole.token_ids


def test_documents_count_as_shown_only_if_they_were_appended() -> None:
    document = Document(id="0", contents='"Rome"\nA city.', score=1.0)
    turn = Turn(
        token_ids=[1],
        logprobs=[-1.0],
        text="",
        finish=Finish.STOP,
        policy_version=0,
        result=ToolResult(documents=(document,), seconds=0.1),
    )
    assert turn.shown_documents == ()  # the observation did not fit the context
    assert replace(turn, observation_ids=[2]).shown_documents == (document,)


def test_void_outcomes_are_the_ones_that_say_nothing_about_the_policy() -> None:
    assert {outcome for outcome in Outcome if outcome.is_void} == {Outcome.TOOL_FAILED, Outcome.ABORTED}
    assert len(Outcome) == 7


@pytest.mark.parametrize(
    ("contents", "title", "text"),
    [
        ('"Lisbon"\nIs a city.', "Lisbon", "Is a city."),
        ('"Lisbon"\nIs\na city.', "Lisbon", "Is\na city."),
        ("Lisbon\nIs a city.", "Lisbon", "Is a city."),
        ('"Lisbon"', "Lisbon", ""),
        ("", "", ""),
        ('\n"text"', "", '"text"'),
    ],
)
def test_a_document_is_a_title_line_and_a_text(contents: str, title: str, text: str) -> None:
    document = Document(id="1", contents=contents, score=0.5)
    assert (document.title, document.text) == (title, text)


@pytest.mark.parametrize(("metadata", "hops"), [({}, 0), ({"hops": 2}, 2), ({"hops": "2"}, 0)])
def test_hops_come_from_the_metadata(metadata: dict[str, object], hops: int) -> None:
    example = Example(id="1", question="?", golden_answers=("x",), data_source="s", metadata=metadata)
    assert example.hops == hops


def test_the_tables_cover_every_provenance() -> None:
    letters = {letter for table, _, _ in TABLES for letter, _ in groupby(table)} - {" ", "|"}
    assert letters == set(LETTERS)
