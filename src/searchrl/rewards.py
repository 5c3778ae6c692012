"""What a trajectory earns. Pure functions of (trajectory, example); only sampled text is looked at.

Observations are recognised by provenance, never by searching for tags, so nothing that was retrieved can
be rewarded; the prompt contains example tags and is never scored.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from searchrl.answers import contains_answer, exact_match
from searchrl.config import RewardKind
from searchrl.trajectory import Example, Group, Outcome, Trajectory

FORMAT_CREDIT = 0.2
EVIDENCE_CREDIT = 0.4
"""Below half an exact match: evidence without the answer never pays as much as the answer."""

_BODY = r"(?:(?!</?(?:think|search|information|answer)>).)*"
_SEARCH_TURN = re.compile(rf"\s*<think>{_BODY}</think>\s*<search>{_BODY}</search>\s*", re.DOTALL)
_ANSWER_TURN = re.compile(rf"\s*<think>{_BODY}</think>\s*<answer>{_BODY}</answer>\s*", re.DOTALL)


def is_valid_format(trajectory: Trajectory, eos_text: str) -> bool:
    """Think, then (search, think)*, then a non-empty answer; all text inside tags, nothing after the answer.

    Args:
        trajectory: the finished episode.
        eos_text: the end-of-message token as text, allowed once at the very end.
    """
    answered = trajectory.outcome is Outcome.ANSWERED and bool(trajectory.answer)
    if not answered or any(turn.is_invalid for turn in trajectory.turns):
        return False
    *searches, last = trajectory.turns
    if not all(_SEARCH_TURN.fullmatch(turn.text) for turn in searches):
        return False
    return _ANSWER_TURN.fullmatch(last.text.removesuffix(eos_text)) is not None


def is_retrieval_hit(trajectory: Trajectory, example: Example) -> bool:
    """True if any document that the policy read contains a gold answer."""
    return any(
        contains_answer(document.contents, example.golden_answers)
        for turn in trajectory.turns
        for document in turn.shown_documents
    )


def has_evidence(trajectory: Trajectory, example: Example) -> bool | None:
    """True if the policy read every passage that an answer rests on; None if the data does not name them.

    All or nothing: a share for the first passage alone would reinforce whatever came after it as well.
    """
    if not example.gold_passages:
        return None
    read = {document.id for turn in trajectory.turns for document in turn.shown_documents}
    return read.issuperset(example.gold_passages)


@dataclass(kw_only=True, slots=True, frozen=True)
class Reward:
    """A trajectory's reward and its components, logged by name."""

    total: float
    exact_match: float
    """0 or 1."""
    format_credit: float
    """What the format added to ``total``; 0 under presets without format credit."""
    evidence_credit: float
    """What the evidence read added to ``total``; 0 under presets without evidence credit."""
    valid_format: bool
    retrieval_hit: bool
    evidence: bool | None
    """See ``has_evidence``."""


CustomReward = Callable[[Trajectory, Example], float]
"""A reward of the user's own: what a trajectory earns in all."""


def score(
    trajectory: Trajectory,
    example: Example,
    kind: RewardKind,
    eos_text: str,
    custom: CustomReward | None = None,
) -> Reward:
    """Score one trajectory.

    Args:
        trajectory: the finished episode.
        example: its question.
        kind: the preset.
        eos_text: the end-of-message token as text.
        custom: the function that ``kind=custom`` stands for.

    Raises:
        ValueError: the trajectory is void: a failure is never a reward of 0; the preset pays for evidence
            that the question does not name; or a custom reward is no finite number.
    """
    if trajectory.outcome.is_void:
        raise ValueError(
            f"a void trajectory ({trajectory.outcome}) of question {example.id} cannot be scored"
        )
    matched = float(exact_match(trajectory.answer, example.golden_answers))
    valid = is_valid_format(trajectory, eos_text)
    evidence = has_evidence(trajectory, example)
    format_credit = evidence_credit = 0.0
    total = matched
    match kind:
        case RewardKind.em:
            pass
        case RewardKind.custom:
            assert custom is not None  # loaded wherever the kind is custom
            total = float(custom(trajectory, example))
            if not math.isfinite(total):
                raise ValueError(f"the custom reward of question {example.id} is {total}")
        case RewardKind.em_plus_format:
            format_credit = FORMAT_CREDIT * valid
            total += format_credit
        case RewardKind.em_plus_evidence:
            if evidence is None:
                raise ValueError(f"question {example.id} names no metadata.gold_passages to reward")
            evidence_credit = EVIDENCE_CREDIT * evidence
            total += evidence_credit
    return Reward(
        total=total,
        exact_match=matched,
        format_credit=format_credit,
        evidence_credit=evidence_credit,
        valid_format=valid,
        retrieval_hit=is_retrieval_hit(trajectory, example),
        evidence=evidence,
    )


@dataclass(kw_only=True, slots=True, frozen=True)
class ScoredGroup:
    """A group with its rewards."""

    group: Group
    rewards: list[Reward | None]
    """One per trajectory, in order; None for a void one."""

    @property
    def survivors(self) -> list[tuple[int, Trajectory, Reward]]:
        """(index, trajectory, reward) of those that are not void."""
        pairs = zip(self.group.trajectories, self.rewards, strict=True)
        return [(i, trajectory, reward) for i, (trajectory, reward) in enumerate(pairs) if reward is not None]


def score_group(
    group: Group, kind: RewardKind, eos_text: str, custom: CustomReward | None = None
) -> ScoredGroup:
    """Score every trajectory that is not void; arguments as for ``score``."""
    rewards = [
        None if trajectory.outcome.is_void else score(trajectory, group.example, kind, eos_text, custom)
        for trajectory in group.trajectories
    ]
    return ScoredGroup(group=group, rewards=rewards)
