"""What a trajectory earns. Pure functions of (trajectory, example); only sampled text is looked at.

Observations are recognised by provenance, never by searching for tags, so nothing that was retrieved can
be rewarded; the prompt contains example tags and is never scored. What others decide, a function of the
user's own or a judge, comes in as an argument.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

from searchrl.answers import contains_answer, exact_match, f1, normalize, sub_exact_match
from searchrl.config import AnswerScore, RewardConfig, RewardKind
from searchrl.errors import SearchrlError
from searchrl.trajectory import Example, Group, Outcome, Trajectory

FORMAT_CREDIT = 0.2
EVIDENCE_CREDIT = 0.4
"""Below half an exact match: evidence without the answer never pays as much as the answer."""
ATTEMPT_CREDIT = 0.1
"""search_r1: a wrong answer in an invalid format."""

_BODY = r"(?:(?!</?(?:think|search|information|answer)>).)*"
_SEARCH_TURN = re.compile(rf"\s*<think>{_BODY}</think>\s*<search>{_BODY}</search>\s*", re.DOTALL)
_ANSWER_TURN = re.compile(rf"\s*<think>{_BODY}</think>\s*<answer>{_BODY}</answer>\s*", re.DOTALL)


class RewardError(SearchrlError, ValueError):
    """A reward function of the user's own returned something that is no reward."""


class JudgeError(SearchrlError, RuntimeError):
    """The judge gave no verdict: no answer, an error, or a reply that is neither yes nor no."""


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
class Components:
    """What a reward is the sum of; each is logged as ``reward/<name>``. 0: the configuration pays nothing."""

    answer: float = 0.0
    """For being right, as ``reward.answer_score`` measures it."""
    format: float = 0.0
    """For the format; below 0 where the preset takes credit from a right answer in an invalid format."""
    evidence: float = 0.0
    """For having read all gold passages."""
    retrieval: float = 0.0
    """For having found a gold answer without giving it."""
    custom: float = 0.0
    """What the user's own function said."""
    search_cost: float = 0.0
    """Never above 0: executed searches x ``reward.search_cost``, subtracted."""
    invalid_penalty: float = 0.0
    """Never above 0: turns without a complete action x ``reward.invalid_penalty``, subtracted."""

    def by_name(self) -> dict[str, float]:
        """The components by the names they are logged under."""
        return asdict(self)


@dataclass(kw_only=True, slots=True, frozen=True)
class Reward:
    """A trajectory's reward: credit by component, and what it was given for, as rates to be logged."""

    components: Components
    exact_match: float
    """0 or 1, whatever the answer was scored by."""
    judged: bool | None
    """Correct, said the judge or exact match in its stead; None without a judge."""
    valid_format: bool
    retrieval_hit: bool
    evidence: bool | None
    """See ``has_evidence``."""

    @property
    def total(self) -> float:
        """The sum of the components, rounded once."""
        return math.fsum(self.components.by_name().values())


def score(
    trajectory: Trajectory,
    example: Example,
    config: RewardConfig,
    eos_text: str,
    *,
    custom: float = 0.0,
    judged: bool | None = None,
) -> Reward:
    """Score one trajectory.

    Args:
        trajectory: the finished episode.
        example: its question.
        config: preset and options.
        eos_text: the end-of-message token as text.
        custom: what the user's function gave, for ``kind=custom`` and ``custom_group``.
        judged: the verdict, for ``answer_score=judge``.

    Raises:
        ValueError: the trajectory is void: a failure is never a reward of 0; the preset pays for evidence
            that the question does not name; or a judge should have decided and did not.
    """
    if trajectory.outcome.is_void:
        raise ValueError(
            f"a void trajectory ({trajectory.outcome}) of question {example.id} cannot be scored"
        )
    valid = is_valid_format(trajectory, eos_text)
    hit = is_retrieval_hit(trajectory, example)
    evidence = has_evidence(trajectory, example)
    right = _answer_score(trajectory, example, config.answer_score, judged)
    earned: dict[str, float]
    match config.kind:
        case RewardKind.em:
            earned = {"answer": right}
        case RewardKind.em_plus_format:
            earned = {"answer": right, "format": FORMAT_CREDIT * valid}
        case RewardKind.em_plus_evidence:
            if evidence is None:
                raise ValueError(f"question {example.id} names no metadata.gold_passages to reward")
            earned = {"answer": right, "evidence": EVIDENCE_CREDIT * evidence}
        case RewardKind.search_r1:
            bonus = config.retrieval_bonus * hit
            earned = _search_r1(right, valid=valid, answered=bool(trajectory.answer), bonus=bonus)
        case RewardKind.custom | RewardKind.custom_group:
            earned = {"custom": custom}
    return Reward(
        components=Components(
            **earned,
            search_cost=0.0 - config.search_cost * trajectory.num_searches,
            invalid_penalty=0.0 - config.invalid_penalty * sum(turn.is_invalid for turn in trajectory.turns),
        ),
        exact_match=float(exact_match(trajectory.answer, example.golden_answers)),
        judged=judged,
        valid_format=valid,
        retrieval_hit=hit,
        evidence=evidence,
    )


def _answer_score(trajectory: Trajectory, example: Example, how: AnswerScore, judged: bool | None) -> float:
    match how:
        case AnswerScore.exact_match:
            return float(exact_match(trajectory.answer, example.golden_answers))
        case AnswerScore.f1:
            return f1(trajectory.answer, example.golden_answers)
        case AnswerScore.sub_exact_match:
            return float(sub_exact_match(trajectory.answer, example.golden_answers))
        case AnswerScore.judge:
            if judged is None:
                raise ValueError(f"the answer to question {example.id} has not been judged")
            return float(judged)


def _search_r1(right: float, *, valid: bool, answered: bool, bonus: float) -> dict[str, float]:
    """Search-R1's table (arXiv 2505.15117 and its repository, scripts v0.3), linear between wrong and right.

    ======================  =============  ==============
    ..                      valid format   invalid format
    ======================  =============  ==============
    right                   1              1 - 0.2
    wrong, answered         0.2 (+ bonus)  0.1
    no answer               cannot be      0
    ======================  =============  ==============

    The numbers are those of ``qa_em_format.py``; what they are given for is PROTOCOL §2's, not the code's:

    * The original reads prompt, samples and results as one text. It finds an answer only if the text has two
      answer tags, the first being the prompt's example, and takes the last pair wherever it stands; a format
      is valid only behind ChatML's assistant marker, never with a base model's plain prompt. Here the answer
      is the policy's, and the prompt is not looked at.
    * Any text after the answer spoils the original's format, the end-of-message token too. Here that one may
      follow.
    * An empty answer earns the original's 0.1 or 0.2. Here it is none: 0.
    * The original finds a gold inside words ("7" in "1975") and in results that the policy wrote itself. Here
      it stands as whole words in a document that was shown, be it in the part that did not fit.
    """
    wrong = 1.0 - right
    if valid:
        return {"answer": right, "format": FORMAT_CREDIT * wrong, "retrieval": bonus * wrong}
    if not answered:
        return {}
    return {"answer": right, "format": ATTEMPT_CREDIT * wrong - FORMAT_CREDIT * right}


# --- groups ---------------------------------------------------------------------------------------------


class Claim(NamedTuple):
    """An answer that a judge is asked about."""

    question: str
    golden_answers: tuple[str, ...]
    answer: str


Verdicts = Mapping[Claim, bool | JudgeError]
"""Correct or not, or why nobody knows."""

CustomReward = Callable[[Sequence[Trajectory], Example], Sequence[float]]
"""A reward of the user's own: what each of a group's trajectories, none of them void, earns."""


@dataclass(kw_only=True, slots=True, frozen=True)
class ScoredGroup:
    """A group with its rewards."""

    group: Group
    rewards: list[Reward | None]
    """One per trajectory, in order; None for a void one."""
    unscored: dict[int, str] = field(default_factory=dict)
    """Void for want of a score: why, by index. The episode itself went well."""

    @property
    def survivors(self) -> list[tuple[int, Trajectory, Reward]]:
        """(index, trajectory, reward) of those that are not void."""
        pairs = zip(self.group.trajectories, self.rewards, strict=True)
        return [(i, trajectory, reward) for i, (trajectory, reward) in enumerate(pairs) if reward is not None]

    def error(self, index: int) -> str | None:
        """Why the trajectory of this index is void, None if it is not."""
        return self.unscored.get(index, self.group.trajectories[index].error)


def open_claims(groups: Iterable[Group]) -> set[Claim]:
    """The answers that only a judge can decide: given, not void, and no exact match."""
    return {
        claim
        for group in groups
        for trajectory in group.trajectories
        if not trajectory.outcome.is_void and isinstance(claim := _claim(trajectory, group.example), Claim)
    }


def score_group(
    group: Group,
    config: RewardConfig,
    eos_text: str,
    *,
    custom: CustomReward | None = None,
    verdicts: Verdicts | None = None,
) -> ScoredGroup:
    """Score every trajectory that is not void.

    Args:
        group: the episodes of one question.
        config: preset and options.
        eos_text: the end-of-message token as text.
        custom: the function that ``kind=custom`` or ``custom_group`` stands for.
        verdicts: on ``open_claims``, for ``answer_score=judge``. Where one is an error, the trajectory is
            void like one whose search failed: no verdict is no reward of 0.

    Raises:
        RewardError: ``custom`` did not return one finite number for each trajectory.
        ValueError: see ``score``.
    """
    alive = [i for i, trajectory in enumerate(group.trajectories) if not trajectory.outcome.is_void]
    values = dict.fromkeys(alive, 0.0)
    if custom is not None and alive:
        given = _custom_values(custom, [group.trajectories[i] for i in alive], group.example)
        values = dict(zip(alive, given, strict=True))
    rewards: list[Reward | None] = [None] * len(group.trajectories)
    unscored: dict[int, str] = {}
    for i in alive:
        trajectory = group.trajectories[i]
        judged = None if verdicts is None else _verdict(trajectory, group.example, verdicts)
        if isinstance(judged, JudgeError):
            unscored[i] = str(judged)
        else:
            rewards[i] = score(trajectory, group.example, config, eos_text, custom=values[i], judged=judged)
    return ScoredGroup(group=group, rewards=rewards, unscored=unscored)


def _claim(trajectory: Trajectory, example: Example) -> Claim | bool:
    """What a judge has to decide, or the verdict where nobody needs to be asked."""
    if trajectory.answer is None or not normalize(trajectory.answer):
        return False
    if exact_match(trajectory.answer, example.golden_answers):
        return True
    return Claim(example.question, example.golden_answers, trajectory.answer)


def _verdict(trajectory: Trajectory, example: Example, verdicts: Verdicts) -> bool | JudgeError:
    claim = _claim(trajectory, example)
    return verdicts[claim] if isinstance(claim, Claim) else claim


def _custom_values(custom: CustomReward, trajectories: Sequence[Trajectory], example: Example) -> list[float]:
    given = custom(trajectories, example)
    try:
        values = [float(value) for value in given]
    except (TypeError, ValueError):
        values = []
    if len(values) != len(trajectories) or not all(map(math.isfinite, values)):
        raise RewardError(
            f"the custom reward of question {example.id} is {given!r}; reward.import_path must give one "
            f"finite number for each of its {len(trajectories)} trajectories that are not void"
        )
    return values
