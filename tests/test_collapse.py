"""Signs of a collapsing policy, each on trajectories made by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchrl.collapse import (
    MAX_ANSWER_WORDS,
    collapse_terms,
    is_malformed_answer,
    is_unanswered,
    repeated_tokens,
    think_words,
)
from searchrl.trajectory import Finish, Outcome, Trajectory, Turn


def ended(*texts: str, answer: str | None = None) -> Trajectory:
    turns = [
        Turn(token_ids=[1, 2], logprobs=[-0.5, -1.0], text=text, finish=Finish.STOP, policy_version=0)
        for text in texts
    ]
    return Trajectory(prompt_ids=[0], turns=turns, outcome=Outcome.NO_ANSWER, answer=answer)


@pytest.mark.parametrize(
    ("token_ids", "repeated"),
    [
        ([], 0),
        ([1, 2], 0),  # shorter than an n-gram
        ([1, 2, 3], 0),
        ([1, 2, 3, 1, 2, 3], 3),  # the first occurrence does not count
        ([1, 2, 3, 9, 1, 2, 3, 8, 1, 2, 3], 6),
        ([1, 2, 3, 1, 2], 0),
        ([1, 2, 3, 4, 1, 2, 3, 4], 4),  # two overlapping 3-grams are four tokens
        ([5] * 10, 9),
        ([1, 2] * 4, 6),
    ],
)
def test_repeated_tokens(token_ids: list[int], repeated: int) -> None:
    assert repeated_tokens(token_ids, n=3) == repeated


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(1, 5))
def test_repeated_tokens_by_definition(token_ids: list[int], n: int) -> None:
    grams = [tuple(token_ids[start : start + n]) for start in range(len(token_ids) - n + 1)]
    later = [start for start, gram in enumerate(grams) if gram in grams[:start]]
    assert repeated_tokens(token_ids, n) == len({start + i for start in later for i in range(n)})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", 0),
        ("no thought at all", 0),
        ("<think></think>", 0),
        ("<think>one  two\nthree</think> four <search>five</search>", 3),
        ("<think>one</think><think>two three</think>", 3),
        ("<think>never closed, to the end", 5),
        ("one</think> two", 0),
    ],
)
def test_think_words(text: str, words: int) -> None:
    assert think_words(text) == words


@pytest.mark.parametrize(
    ("texts", "answer", "malformed", "unanswered"),
    [
        (["<answer>Rome</answer>"], "Rome", False, False),
        (["<search>Rome</search>", "I do not know"], None, False, True),  # no attempt
        (["<answer>Rome"], None, True, True),  # never completed
        (["<answer>Rome", "<search>Rome</search>"], None, True, True),
        (["<answer>Rome", "<answer>Rome</answer>"], "Rome", False, False),  # in the end it was
        (["<answer></answer>"], "", False, True),
        (["<answer>?</answer>"], "The ...", False, True),  # nothing is left of it
        (["…"], "<think>Rome</think>", True, False),
        (["…"], "Rome </information>", True, False),
        (["…"], "1 < 2", False, False),
        (["…"], "word " * MAX_ANSWER_WORDS, False, False),
        (["…"], "word " * (MAX_ANSWER_WORDS + 1), True, False),
    ],
)
def test_answers(texts: list[str], answer: str | None, malformed: bool, unanswered: bool) -> None:
    trajectory = ended(*texts, answer=answer)
    assert is_malformed_answer(trajectory) is malformed
    assert is_unanswered(trajectory) is unanswered


def test_terms_are_sums_with_their_weights() -> None:
    trajectory = ended("<think>one two</think>", "<think>three</think><answer>Rome</answer>", answer="Rome")
    trajectory.turns[1].token_ids = [7] * 10  # at 8 tokens an n-gram: nine are repeated
    trajectory.turns[1].logprobs = [-0.25] * 10
    assert collapse_terms(trajectory, correct=True) == {
        "logprob_correct": (-1.5 - 2.5, 12),
        "think_words": (3, 1.0),
        "repetition": (9, 12),
        "malformed_answer": (0.0, 1.0),
        "unanswered": (0.0, 1.0),
    }
    assert "logprob_wrong" in collapse_terms(trajectory, correct=False)
    assert "logprob_correct" not in collapse_terms(trajectory, correct=False)


def test_turns_do_not_repeat_one_another() -> None:
    """Two turns may well ask for the same thing; what counts is going round in circles within one."""
    trajectory = ended("…", "…")
    for turn in trajectory.turns:
        turn.token_ids, turn.logprobs = list(range(20)), [0.0] * 20
    assert collapse_terms(trajectory, correct=False)["repetition"] == (0, 40)
