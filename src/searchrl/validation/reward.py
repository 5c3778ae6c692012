"""Checks of what a trajectory earns."""

from __future__ import annotations

import math
from collections.abc import Iterator

import httpx

from searchrl.config import AnswerScore, Config, ConfigError, JudgeConfig, RewardConfig, RewardKind
from searchrl.judge import KEY_VARIABLE
from searchrl.retrieval.web_engine import secret
from searchrl.rewards import FORMAT_CREDIT
from searchrl.validation.addresses import is_http_address

_RIGHT_BUT_INVALID = 1.0 - FORMAT_CREDIT
_MAX_CONCURRENCY = 100


def reward_problems(cfg: Config) -> Iterator[str]:
    """Every problem of the reward, a sentence each. Import paths are checked with those of the algorithm."""
    reward = cfg.reward
    yield from _numbers(reward)
    if reward.answer_score is AnswerScore.judge:
        yield from _judge(reward.judge)
        if cfg.resampling.oversample > 1:
            yield (
                f"resampling.oversample={cfg.resampling.oversample:g} needs rewards while episodes run, but "
                "reward.answer_score=judge judges a step's answers together at their end; set it to 1"
            )
    elif reward.judge.url or reward.judge.model or reward.judge.cache:
        yield (
            f"reward.judge is only used with reward.answer_score=judge, not {reward.answer_score}; set that, "
            "or leave it out"
        )
    is_custom = reward.kind in (RewardKind.custom, RewardKind.custom_group)
    if is_custom and reward.answer_score is not AnswerScore.exact_match:
        yield (
            f"reward.answer_score={reward.answer_score} is for presets, but reward.kind={reward.kind} scores "
            "answers itself; leave it out"
        )


def _numbers(reward: RewardConfig) -> Iterator[str]:
    for name, value in (("search_cost", reward.search_cost), ("invalid_penalty", reward.invalid_penalty)):
        if not 0 <= value < math.inf:
            yield f"reward.{name}={value:g} is subtracted; it must be finite and not negative"
    bonus = reward.retrieval_bonus
    if bonus != 0 and reward.kind is not RewardKind.search_r1:
        yield (
            f"reward.retrieval_bonus={bonus:g} is only used with reward.kind=search_r1, not {reward.kind}; "
            "set that, or 0"
        )
    elif not (bonus >= 0 and FORMAT_CREDIT + bonus < _RIGHT_BUT_INVALID):
        yield (
            f"reward.retrieval_bonus={bonus:g} must be at least 0 and below "
            f"{_RIGHT_BUT_INVALID - FORMAT_CREDIT:g}, where a wrong answer would earn as much as a right one"
        )


def _judge(judge: JudgeConfig) -> Iterator[str]:
    yield from _url(judge.url)
    if not judge.model:
        yield "reward.judge.model is not set; name the model as the judge's endpoint does"
    if not 0 < judge.timeout_s < math.inf:
        yield f"reward.judge.timeout_s={judge.timeout_s:g} must be above 0"
    if not 1 <= judge.max_concurrency <= _MAX_CONCURRENCY:
        yield (
            f"reward.judge.max_concurrency={judge.max_concurrency} must lie between 1 and {_MAX_CONCURRENCY}"
        )
    missing = [
        name for name in ("{question}", "{golden_answers}", "{answer}") if name not in judge.prompt_template
    ]
    if missing:
        yield f"reward.judge.prompt_template lacks {', '.join(missing)}; a judge must see what it judges"
    try:
        secret(KEY_VARIABLE, required=False)
    except ConfigError as error:
        yield str(error)


def _url(url: str) -> Iterator[str]:
    if not is_http_address(url):
        yield (
            f"reward.judge.url={url!r} is no http:// or https:// address, which reward.answer_score=judge "
            "needs; for example http://127.0.0.1:8001/v1"
        )
        return
    parsed = httpx.URL(url)
    if parsed.userinfo or parsed.query or parsed.fragment:
        # The value is not shown: it may hold a key.
        yield (
            "reward.judge.url must be an address without a user, a query or a fragment; a key goes into the "
            f"environment variable {KEY_VARIABLE}"
        )
