"""Checks of the learning algorithm: import paths, advantages, losses, importance weights, adapters."""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib.util import find_spec

from searchrl.config import (
    AdvantageKind,
    Aggregation,
    Attention,
    Config,
    ConfigError,
    Device,
    DType,
    ImportanceConfig,
    LossConfig,
    LossKind,
    ModelConfig,
    OldPolicy,
    RejectionLevel,
    RewardKind,
    UpdateConfig,
    WeightMode,
)
from searchrl.extensions import load_function


def algorithm_problems(cfg: Config) -> Iterator[str]:
    """Every problem of the learning algorithm, a sentence each."""
    yield from _custom(cfg)
    yield from _loss(cfg.loss, cfg.update)
    yield from _update(cfg)
    yield from _overlap(cfg)
    yield from _importance(cfg.importance)
    yield from _resampling(cfg)
    yield from _model(cfg.model, cfg.device)


def _custom(cfg: Config) -> Iterator[str]:
    """Import paths: named where they are used and nowhere else, and really there."""
    sections = (
        ("reward", "kind", cfg.reward.kind, (RewardKind.custom, RewardKind.custom_group), cfg.reward, 2),
        ("advantage", "kind", cfg.advantage.kind, (AdvantageKind.custom,), cfg.advantage, 1),
        ("loss", "kind", cfg.loss.kind, (LossKind.custom,), cfg.loss, 1),
        ("importance", "mode", cfg.importance.mode, (WeightMode.custom,), cfg.importance, 1),
    )
    for section, choice, chosen, customs, config, positional in sections:
        if chosen in customs and not config.import_path:
            yield f"{section}.{choice}={chosen} needs {section}.import_path, of the form module:function"
        elif chosen in customs:
            try:
                load_function(config.import_path, config.kwargs, section=section, positional=positional)
            except ConfigError as error:
                yield str(error)
        elif config.import_path or config.kwargs:
            yield (
                f"{section}.import_path and {section}.kwargs are only used with {section}.{choice}="
                f"{' or '.join(customs)}; set that, or leave them out"
            )


def _loss(loss: LossConfig, update: UpdateConfig) -> Iterator[str]:
    unbounded = loss.kind is LossKind.cispo  # no lower bound is how its authors use it
    if not (0 <= loss.eps_low < 1 or (unbounded and loss.eps_low >= 1)) or loss.eps_high < 0:
        yield (
            f"loss.eps_low={loss.eps_low:g}, loss.eps_high={loss.eps_high:g}: the clip range needs "
            "0 <= eps_low < 1 and eps_high >= 0"
        )
    if loss.dual_clip != 0 and not loss.dual_clip > 1:
        yield f"loss.dual_clip={loss.dual_clip:g} must be above 1, or 0 to turn it off"
    if loss.dual_clip != 0 and loss.kind is not LossKind.clip:
        yield f"loss.dual_clip={loss.dual_clip:g} only works with loss.kind=clip, not {loss.kind}; set 0"
    if loss.constant_length < 0:
        yield f"loss.constant_length={loss.constant_length} must not be negative"
    elif loss.constant_length and loss.aggregation is not Aggregation.constant:
        yield (
            f"loss.constant_length={loss.constant_length} is only used with loss.aggregation=constant, not "
            f"{loss.aggregation}; set that, or 0"
        )
    coefficients = {
        "kl_coef": loss.kl_coef,
        "entropy_coef": loss.entropy_coef,
        "llds_coef": loss.llds_coef,
    }
    for name, value in coefficients.items():
        if not 0 <= value < math.inf:
            yield f"loss.{name}={value:g} must not be negative"
    if loss.llds_coef > 0 and update.epochs * update.minibatches == 1:
        yield (
            f"loss.llds_coef={loss.llds_coef:g} penalises what falls below the start of the update, where a "
            "single optimizer step never is; set update.minibatches or update.epochs above 1"
        )
    if loss.llds_coef > 0 and update.old_policy is OldPolicy.rollout:
        yield (
            f"loss.llds_coef={loss.llds_coef:g} would penalise where the engine differs from the trainer; "
            "use update.old_policy=recompute"
        )


def _update(cfg: Config) -> Iterator[str]:
    for name, value in (("epochs", cfg.update.epochs), ("minibatches", cfg.update.minibatches)):
        if value < 1:
            yield f"update.{name}={value} must be at least 1"
    if cfg.update.minibatches > cfg.groups_per_step >= 1:
        yield (
            f"update.minibatches={cfg.update.minibatches} exceeds groups_per_step={cfg.groups_per_step}, "
            "but an optimizer step needs at least a whole group; lower it"
        )
    if cfg.update.old_policy is OldPolicy.rollout and cfg.importance.enabled:
        yield (
            "update.old_policy=rollout takes the engine's policy as π_old, so every importance weight "
            "π_old / π_roll is 1; add importance=off, or use update.old_policy=recompute"
        )


def _overlap(cfg: Config) -> Iterator[str]:
    """Samples of an older policy need π / π_roll in the loss: as a weight, or as the loss's own ratio."""
    is_weighted = cfg.importance.enabled and cfg.importance.mode is not WeightMode.none
    has_ratio = cfg.update.old_policy is OldPolicy.rollout and cfg.loss.kind is not LossKind.reinforce
    if cfg.overlap and not (is_weighted or has_ratio):
        yield (
            "overlap=true trains on samples of an older policy, whose tokens importance.enabled="
            f"{str(cfg.importance.enabled).lower()}, importance.mode={cfg.importance.mode} and loss.kind="
            f"{cfg.loss.kind} do not weigh by π / π_roll; choose importance=tis, or "
            "update.old_policy=rollout with a loss that has a ratio, or overlap=false"
        )
    if cfg.overlap and cfg.engine.tensor_parallel > 1 and cfg.device is Device.cuda:
        yield (
            f"overlap=true with engine.tensor_parallel={cfg.engine.tensor_parallel}: on every GPU two "
            "threads would wait for other GPUs, each in an order of its own, which can block both for ever; "
            "choose one of them"
        )


def _importance(importance: ImportanceConfig) -> Iterator[str]:
    yield from _bounds("importance", importance.lo, importance.hi)
    yield from _bounds("importance.rejection", importance.rejection.lo, importance.rejection.hi)
    rejection = importance.rejection
    if rejection.level is RejectionLevel.none and (rejection.lo, rejection.hi) != (None, None):
        yield "importance.rejection has bounds but no level; set importance.rejection.level, or remove them"
    if not 0 <= importance.veto < 1:
        yield f"importance.veto={importance.veto:g} must be at least 0 (off) and below 1"


def _bounds(section: str, lo: float | None, hi: float | None) -> Iterator[str]:
    """A ratio of 1, engine and trainer agreeing, must always be inside."""
    if hi is not None and not hi >= 1:
        yield f"{section}.hi={hi:g} must be at least 1, the ratio where engine and trainer agree"
    if lo is not None and not 0 <= lo <= 1:
        yield f"{section}.lo={lo:g} must lie between 0 and 1"


def _resampling(cfg: Config) -> Iterator[str]:
    if cfg.resampling.max_rounds < 1:
        yield f"resampling.max_rounds={cfg.resampling.max_rounds} must be at least 1"
    if not 1 <= cfg.resampling.oversample <= 8:
        yield (
            f"resampling.oversample={cfg.resampling.oversample:g} must lie between 1 (off) and 8: so many "
            "times the groups that a step needs are started"
        )


def _model(model: ModelConfig, device: Device) -> Iterator[str]:
    lora = model.lora
    if lora.rank < 0:
        yield f"model.lora.rank={lora.rank} must not be negative"
    if not lora.alpha > 0:
        yield f"model.lora.alpha={lora.alpha:g} must be above 0"
    if lora.targets and lora.rank == 0:
        yield "model.lora.targets names modules, but model.lora.rank=0 trains no adapters; set a rank, say 16"
    if model.attention is Attention.flash_attention_2:
        if device is Device.cpu or model.dtype is DType.float32:
            yield (
                f"model.attention=flash_attention_2 needs a GPU and model.dtype=bfloat16, not {device} "
                f"and {model.dtype}; use sdpa"
            )
        elif find_spec("flash_attn") is None:
            yield "model.attention=flash_attention_2 needs the flash-attn package; install it, or use sdpa"
