"""Signs of a collapsing policy, read off its trajectories: pure functions, summed up by ``records``.

Runs of GRPO on this task tend to collapse: first the likelihood of correct trajectories stagnates and falls,
then low-confidence tokens inflate the gradient, and in the end the text degenerates (lazy likelihood
displacement, arXiv 2512.04220). ``watch`` has rules over what is measured here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from searchrl.answers import normalize
from searchrl.trajectory import Trajectory

REPEATED_NGRAM = 8
"""Tokens that have to recur in order to count as repeated: more than a name or a turn of phrase has."""

MAX_ANSWER_WORDS = 32
"""A longer answer is none of the short ones that were asked for."""

_THOUGHT = re.compile(r"<think>(.*?)(?:</think>|\Z)", re.DOTALL)
_TAG = re.compile(r"</?(?:think|search|information|answer)\b")


def collapse_terms(trajectory: Trajectory, *, correct: bool) -> dict[str, tuple[float, float]]:
    """(sum, weight) of each metric ``collapse/*``, to be added up over trajectories that are not void.

    Args:
        trajectory: a finished episode.
        correct: its answer is an exact match.

    Returns:
        ``logprob_correct`` or ``logprob_wrong``: log-probability, as the engine sampled, per sampled token;
        ``think_words``: see ``think_words``, per trajectory;
        ``repetition``: share of sampled tokens that are ``repeated_tokens`` of their turn;
        ``malformed_answer``, ``unanswered``: shares of trajectories, see the functions of these names.
    """
    sampled = trajectory.num_sampled
    logprob = sum(sum(turn.logprobs) for turn in trajectory.turns)
    return {
        "logprob_correct" if correct else "logprob_wrong": (logprob, sampled),
        "think_words": (sum(think_words(turn.text) for turn in trajectory.turns), 1.0),
        "repetition": (sum(repeated_tokens(turn.token_ids) for turn in trajectory.turns), sampled),
        "malformed_answer": (float(is_malformed_answer(trajectory)), 1.0),
        "unanswered": (float(is_unanswered(trajectory)), 1.0),
    }


def think_words(text: str) -> int:
    """Words inside ``<think>`` of one turn's sampled text; a thought that is never closed goes to its end."""
    return sum(len(thought.split()) for thought in _THOUGHT.findall(text))


def repeated_tokens(token_ids: Sequence[int], n: int = REPEATED_NGRAM) -> int:
    """Tokens that lie in an n-gram which occurred before, that is started earlier in the same sequence.

    The first occurrence does not count. Occurrences may overlap: of one token ten times, nine are repeated.
    """
    seen: set[tuple[int, ...]] = set()
    repeated = covered = 0  # tokens before ``covered`` have been counted, if they are to be
    for start in range(len(token_ids) - n + 1):
        gram = tuple(token_ids[start : start + n])
        if gram in seen:
            repeated += start + n - max(covered, start)
            covered = start + n
        seen.add(gram)
    return repeated


def is_malformed_answer(trajectory: Trajectory) -> bool:
    """True if an answer was begun but never completed, holds a tag of the protocol, or is no short answer.

    Short is at most ``MAX_ANSWER_WORDS`` words.
    """
    answer = trajectory.answer
    if answer is None:
        return any("<answer" in turn.text for turn in trajectory.turns)
    return _TAG.search(answer) is not None or len(answer.split()) > MAX_ANSWER_WORDS


def is_unanswered(trajectory: Trajectory) -> bool:
    """True if there is no answer, whatever the outcome, or one that normalises to nothing."""
    return not normalize(trajectory.answer or "")
