"""What is refused of the learning algorithm's settings: every message, with the value and the remedy."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest

from searchrl.cli import load_config
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
        ["importance.level=geometric", "importance.mode=clip", "importance.normalize=true"],
        ["importance.lo=0", "importance.mode=mask"],
        ["loss.kind=custom", "loss.import_path=math:sqrt"],
    ],
)
def test_what_belongs_together_is_accepted(overrides: list[str]) -> None:
    load_config(["+experiment=smoke", *overrides])


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
