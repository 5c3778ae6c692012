"""What is refused of the learning algorithm's settings: every message, with the value and the remedy."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest

from searchrl.compose import load_config
from searchrl.config import Config, ConfigError
from searchrl.validation import validate


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with files where the shipped configurations look for data."""
    data = tmp_path / "assets" / "worldfacts"
    data.mkdir(parents=True)
    for name in ("corpus.jsonl", "train.jsonl", "test.jsonl"):
        (data / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@cache
def smoke() -> Config:
    return load_config(["+experiment=smoke"])[0]


JUDGE = "http://127.0.0.1:8001/v1"
JUDGED = ("reward=judge", f"reward.judge={{url: '{JUDGE}', model: m}}")

REFUSED = [
    (["loss.eps_low=1"], "loss.eps_low=1, loss.eps_high=0.28: the clip range needs 0 <= eps_low < 1 and"),
    (["loss.eps_low=-0.1"], "loss.eps_low=-0.1, loss.eps_high=0.28: the clip range needs"),
    (["loss.eps_high=-1"], "loss.eps_low=0.2, loss.eps_high=-1: the clip range needs"),
    (["loss.dual_clip=1"], "loss.dual_clip=1 must be above 1, or 0 to turn it off"),
    (
        ["loss=gspo", "loss.dual_clip=3"],
        "loss.dual_clip=3 only works with loss.kind=clip, not gspo; set 0",
    ),
    (["loss.constant_length=-1"], "loss.constant_length=-1 must not be negative"),
    (
        ["loss.constant_length=100"],
        "loss.constant_length=100 is only used with loss.aggregation=constant, not token; set that, or 0",
    ),
    (["loss.kl_coef=-1"], "loss.kl_coef=-1 must not be negative"),
    (["loss.entropy_coef=-0.5"], "loss.entropy_coef=-0.5 must not be negative"),
    (["loss.llds_coef=-0.5"], "loss.llds_coef=-0.5 must not be negative"),
    (
        ["loss.llds_coef=0.1"],
        "loss.llds_coef=0.1 penalises what falls below the start of the update, where a single optimizer "
        "step never is; set update.minibatches or update.epochs above 1",
    ),
    (
        ["loss=llds", "importance=off", "update.old_policy=rollout"],
        "loss.llds_coef=0.1 would penalise where the engine differs from the trainer; use "
        "update.old_policy=recompute",
    ),
    (["update.epochs=0"], "update.epochs=0 must be at least 1"),
    (["update.minibatches=0"], "update.minibatches=0 must be at least 1"),
    (
        ["update.minibatches=5"],
        "update.minibatches=5 exceeds groups_per_step=4, but an optimizer step needs at least a whole group; "
        "lower it",
    ),
    (
        ["update.old_policy=rollout"],
        "update.old_policy=rollout takes the engine's policy as π_old, so every importance weight π_old / "
        "π_roll is 1; add importance=off, or use update.old_policy=recompute",
    ),
    (
        ["overlap=true", "importance=off"],
        "overlap=true trains on samples of an older policy, whose tokens importance.enabled=false, "
        "importance.mode=truncate and loss.kind=clip do not weigh by π / π_roll; choose importance=tis, or "
        "update.old_policy=rollout with a loss that has a ratio, or overlap=false",
    ),
    (
        ["overlap=true", "importance=geometric_rs"],
        "overlap=true trains on samples of an older policy, whose tokens importance.enabled=true, "
        "importance.mode=none and loss.kind=clip do not weigh",
    ),
    (
        ["overlap=true", "importance=off", "update.old_policy=rollout", "loss=reinforce"],
        "overlap=true trains on samples of an older policy, whose tokens importance.enabled=false, "
        "importance.mode=truncate and loss.kind=reinforce do not weigh",
    ),
    (
        ["overlap=true", "device=cuda", "processes=2", "engine.tensor_parallel=2"],
        "overlap=true with engine.tensor_parallel=2: on every GPU two threads would wait for other",
    ),
    (
        ["importance.hi=0.9"],
        "importance.hi=0.9 must be at least 1, the ratio where engine and trainer agree",
    ),
    (["importance.lo=-1"], "importance.lo=-1 must lie between 0 and 1"),
    (["importance.lo=1.5"], "importance.lo=1.5 must lie between 0 and 1"),
    (
        ["importance.rejection.level=token", "importance.rejection.hi=-2"],
        "importance.rejection.hi=-2 must be at least 1",
    ),
    (
        ["importance.rejection.hi=2"],
        "importance.rejection has bounds but no level; set importance.rejection.level, or remove them",
    ),
    (["importance.veto=1"], "importance.veto=1 must be at least 0 (off) and below 1"),
    (["importance.veto=-1"], "importance.veto=-1 must be at least 0 (off) and below 1"),
    (["resampling.max_rounds=0"], "resampling.max_rounds=0 must be at least 1"),
    (["resampling.oversample=0.5"], "resampling.oversample=0.5 must lie between 1 (off) and 8"),
    (["resampling.oversample=9"], "resampling.oversample=9 must lie between 1 (off) and 8"),
    (["model.lora.rank=-1"], "model.lora.rank=-1 must not be negative"),
    (["model.lora.alpha=0"], "model.lora.alpha=0 must be above 0"),
    (
        ["model.lora.targets=[q_proj]"],
        "model.lora.targets names modules, but model.lora.rank=0 trains no adapters; set a rank, say 16",
    ),
    (
        ["model.attention=flash_attention_2"],
        "model.attention=flash_attention_2 needs a GPU and model.dtype=bfloat16, not cpu and float32; use "
        "sdpa",
    ),
    (
        ["model.attention=flash_attention_2", "device=cuda", "model.dtype=bfloat16"],
        "model.attention=flash_attention_2 needs the flash-attn package; install it, or use sdpa",
    ),
    (["loss.kind=custom"], "loss.kind=custom needs loss.import_path, of the form module:function"),
    (["reward.kind=custom"], "reward.kind=custom needs reward.import_path, of the form module:function"),
    (["advantage.kind=custom"], "advantage.kind=custom needs advantage.import_path, of the form"),
    (["importance.mode=custom"], "importance.mode=custom needs importance.import_path, of the form"),
    (
        ["loss.import_path=a:b"],
        "loss.import_path and loss.kwargs are only used with loss.kind=custom; set that, or leave them out",
    ),
    (
        ["reward.import_path=a:b"],
        "reward.import_path and reward.kwargs are only used with reward.kind=custom or custom_group; set",
    ),
    (["reward.kind=custom_group"], "reward.kind=custom_group needs reward.import_path, of the form module:f"),
    (
        ["reward.kind=custom_group", "reward.import_path=math:sqrt"],
        "reward.import_path=math:sqrt cannot be called with 2 arguments",
    ),
    (
        ["reward.search_cost=-0.1"],
        "reward.search_cost=-0.1 is subtracted; it must be finite and not negative",
    ),
    (["reward.invalid_penalty=-1"], "reward.invalid_penalty=-1 is subtracted; it must be finite and not"),
    (["reward.invalid_penalty=inf"], "reward.invalid_penalty=inf must be a finite number"),
    (
        ["reward.retrieval_bonus=0.1"],
        "reward.retrieval_bonus=0.1 is only used with reward.kind=search_r1, not em_plus_format; set that",
    ),
    (
        ["reward=search_r1", "reward.retrieval_bonus=-0.1"],
        "reward.retrieval_bonus=-0.1 must be at least 0 and below 0.6, where a wrong answer would earn",
    ),
    (["reward=search_r1", "reward.retrieval_bonus=0.6"], "reward.retrieval_bonus=0.6 must be at least 0 and"),
    (
        ["reward=f1", "reward.kind=custom", "reward.import_path=math:pow"],
        "reward.answer_score=f1 is for presets, but reward.kind=custom scores answers itself; leave it out",
    ),
    (
        ["reward.judge.model=m"],
        "reward.judge is only used with reward.answer_score=judge, not exact_match; set that, or leave",
    ),
    (
        ["reward=judge", "reward.judge.model=m"],
        "reward.judge.url='' is no http:// or https:// address, which reward.answer_score=judge needs; for",
    ),
    (
        ["reward=judge", "reward.judge={url: 'ftp://x/v1', model: m}"],
        "reward.judge.url='ftp://x/v1' is no http:// or https:// address",
    ),
    (
        ["reward=judge", "reward.judge={url: 'http://u:secret@x/v1', model: m}"],
        "reward.judge.url is an address with a password or a key in it; configurations are written to disk",
    ),
    (
        ["reward=judge", "reward.judge={url: 'http://u@x/v1', model: m}"],
        "reward.judge.url must be an address without a user, a query or a fragment; a key goes into the "
        "environment variable JUDGE_API_KEY",
    ),
    (["reward=judge", f"reward.judge.url={JUDGE}"], "reward.judge.model is not set; name the model as the"),
    ([*JUDGED, "reward.judge.timeout_s=0"], "reward.judge.timeout_s=0 must be above 0"),
    (
        [*JUDGED, "reward.judge.max_concurrency=0"],
        "reward.judge.max_concurrency=0 must lie between 1 and 100",
    ),
    (
        [*JUDGED, "reward.judge.prompt_template='Is it {answer}?'"],
        "reward.judge.prompt_template lacks {question}, {golden_answers}; a judge must see what it judges",
    ),
    (
        [*JUDGED, "resampling.oversample=1.5"],
        "resampling.oversample=1.5 needs rewards while episodes run, but reward.answer_score=judge judges",
    ),
    (
        ["loss.kind=custom", "loss.import_path=math"],
        "loss.import_path=math is not of the form module:function",
    ),
    (
        ["loss.kind=custom", "loss.import_path=math:hypotenuse"],
        "loss.import_path=math:hypotenuse: math has no hypotenuse",
    ),
]


@pytest.mark.parametrize(
    ("overrides", "message"), REFUSED, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_each_bad_value_has_its_message(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(["+experiment=smoke", *overrides])
    first, *problems = str(caught.value).splitlines()
    assert first == "the configuration cannot run:"
    assert len(problems) == 1
    assert problems[0].startswith(f"  - {message}")


@pytest.mark.parametrize(
    "overrides",
    [
        ["loss=cispo", "loss.eps_low=1.5"],
        ["loss=llds"],
        ["loss=llds", "loss.kind=gspo", "update.minibatches=4", "update.epochs=2"],
        ["advantage=dr_grpo", "loss.constant_length=512"],
        ["advantage=reinforce_pp"],
        ["importance=off", "update.old_policy=rollout"],
        ["overlap=true"],
        ["overlap=true", "importance=mis", "loss=reinforce"],
        ["overlap=true", "importance=off", "update.old_policy=rollout", "loss=gspo"],
        ["importance.level=geometric", "importance.mode=clip", "importance.normalize=true"],
        ["importance.lo=0", "importance.mode=mask"],
        ["loss.kind=custom", "loss.import_path=math:sqrt"],
        ["reward=search_r1", "reward.retrieval_bonus=0.1", "reward.answer_score=f1"],
        ["reward.search_cost=0.05", "reward.invalid_penalty=0.1"],
        ["reward.kind=custom_group", "reward.import_path=math:pow", "reward.search_cost=0.1"],
        [*JUDGED, "reward.kind=em_plus_format", "reward.judge.cache=verdicts.sqlite"],
    ],
)
def test_what_belongs_together_is_accepted(overrides: list[str]) -> None:
    load_config(["+experiment=smoke", *overrides])


def test_a_key_that_cannot_be_sent_is_found_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", "k\u00e9y")
    with pytest.raises(ConfigError) as caught:
        load_config(["+experiment=smoke", *JUDGED])
    assert "JUDGE_API_KEY holds characters that no key has" in str(caught.value)
    assert "k\u00e9y" not in str(caught.value)


def test_all_problems_are_reported_at_once() -> None:
    cfg = deepcopy(smoke())
    cfg.loss.kl_coef, cfg.update.epochs, cfg.importance.veto = -1.0, 0, 2.0
    with pytest.raises(ConfigError) as caught:
        validate(cfg)
    assert len(str(caught.value).splitlines()) == 4


def test_a_custom_functions_own_arguments_are_no_unknown_keys() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(["+experiment=smoke", "+reward.kwargs.cost=1", "rewrd.kind=em"])
    assert "unknown key 'rewrd.kind'; did you mean 'reward.kind'?" in str(caught.value)
    assert "unknown key 'reward" not in str(caught.value)
