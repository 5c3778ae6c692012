"""Policy losses as pure functions over the N loss tokens of one micro-batch.

Each returns one term per token, neither weighted nor averaged: masks, importance weights, coefficients and
denominators are the caller's, and denominators are global (all ranks, the whole optimizer step). That is what
makes the gradient independent of how the batch was cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from searchrl.config import KlEstimator, LossConfig, LossKind

LOG_RATIO_BOUND = 20.0
"""Log-ratios are clamped to ± this before exp: e^20 is far beyond any clip range and still finite in fp32."""


@dataclass(kw_only=True, slots=True)
class LossInputs:
    """All a policy loss reads: [N] each, fp32 unless said otherwise. Only ``logprobs`` has a gradient.

    All tokens of a trajectory are in the same micro-batch.
    """

    logprobs: Tensor
    """[N] logπ_θ: the current policy."""
    old_logprobs: Tensor
    """[N] logπ_old: the policy that the ratio is relative to."""
    advantages: Tensor
    """[N] each token's trajectory's advantage."""
    trajectory_index: Tensor
    """long [N], non-decreasing from 0: which trajectory of the micro-batch. One without loss tokens leaves a
    gap."""
    turn_index: Tensor
    """long [N], non-decreasing from 0: which turn of the micro-batch; a turn belongs to one trajectory."""


@dataclass(kw_only=True, slots=True)
class LossOutputs:
    """What a policy loss returns."""

    token_losses: Tensor
    """[N] with gradient."""
    metrics: dict[str, Tensor]
    """[N] each, detached, to be averaged like the loss. Every loss has ``ratio`` (token's or trajectory's, as
    the loss uses it), ``policy_k1`` and ``policy_k3`` (KL of π_old to π_θ a token: how far the update moved).
    Those that clip add ``clip_low`` and ``clip_high`` (1 where that bound is active), ``clip_loss`` with a
    dual clip also ``dual_clip``. Keys do not depend on the data."""


CustomLoss = Callable[[LossInputs], LossOutputs]
"""A user's policy loss. It must also work, with a gradient and the same metrics, for N = 0."""


def policy_loss(inputs: LossInputs, config: LossConfig, custom: CustomLoss | None = None) -> LossOutputs:
    """The configured policy loss of every token.

    Args:
        inputs: the micro-batch's tokens; N may be 0.
        config: kind and clip range; aggregation, KL, entropy and LLDS are not looked at.
        custom: the function behind ``custom``.

    Raises:
        ValueError: ``custom`` is missing or what it returns is not one number per token.
    """
    low, high = config.eps_low, config.eps_high
    match config.kind:
        case LossKind.clip:
            return clip_loss(inputs, eps_low=low, eps_high=high, dual_clip=config.dual_clip)
        case LossKind.gspo:
            return gspo_loss(inputs, eps_low=low, eps_high=high)
        case LossKind.cispo:
            return cispo_loss(inputs, eps_low=low, eps_high=high)
        case LossKind.reinforce:
            return reinforce_loss(inputs)
        case LossKind.custom:
            if custom is None:
                raise ValueError("loss.kind=custom needs a function; set loss.import_path")
            return _checked(custom(inputs), inputs)


def clip_loss(inputs: LossInputs, *, eps_low: float, eps_high: float, dual_clip: float = 0.0) -> LossOutputs:
    """PPO's clipped surrogate (arXiv 1707.06347, eq. 7), its range asymmetric as in DAPO (arXiv 2503.14476).

    With ratio = exp(logπ_θ - logπ_old)::

        -min(ratio·A, clip(ratio, 1 - eps_low, 1 + eps_high)·A)

    and, with a dual clip (arXiv 1912.09729), at most dual_clip·|A| where A < 0. A token has no gradient
    beyond an active bound, nor where its log-ratio leaves ±20.

    Args:
        inputs: the micro-batch's tokens.
        eps_low: how far the ratio may fall below 1, in [0, 1].
        eps_high: how far the ratio may rise above 1.
        dual_clip: above 1, or 0 for off.

    Raises:
        ValueError: ``dual_clip`` is neither.
    """
    if dual_clip != 0.0 and not dual_clip > 1.0:
        raise ValueError(f"dual_clip must be 0 (off) or above 1, got {dual_clip}")
    ratio = _bounded_exp(inputs.logprobs - inputs.old_logprobs)
    outputs = _clipped_surrogate(inputs, ratio, eps_low, eps_high)
    if dual_clip != 0.0:
        active = (inputs.advantages < 0) & (ratio > dual_clip)
        bound = -dual_clip * inputs.advantages
        outputs.token_losses = torch.where(active, bound, outputs.token_losses)
        outputs.metrics["dual_clip"] = active.to(ratio.dtype)
    return outputs


def gspo_loss(inputs: LossInputs, *, eps_low: float, eps_high: float) -> LossOutputs:
    """GSPO (arXiv 2507.18071, eq. 5 and 7): one ratio s a trajectory, the geometric mean of its tokens'.

    With s = exp(mean over the trajectory's tokens of logπ_θ - logπ_old), the mean clamped to ±20, every token
    of it carries ``-min(s·A, clip(s, 1 - eps_low, 1 + eps_high)·A)``, whose gradient reaches all of them.
    With ``sequence`` aggregation this is the paper's objective. The paper's range is far narrower than PPO's:
    3e-4 and 4e-4.

    Args:
        inputs: the micro-batch's tokens.
        eps_low: how far s may fall below 1, in [0, 1].
        eps_high: how far s may rise above 1.
    """
    log_ratio = inputs.logprobs - inputs.old_logprobs
    lengths = _group_sum(torch.ones_like(log_ratio), inputs.trajectory_index)
    mean = _group_sum(log_ratio, inputs.trajectory_index) / lengths
    return _clipped_surrogate(inputs, _bounded_exp(mean), eps_low, eps_high)


def cispo_loss(inputs: LossInputs, *, eps_low: float, eps_high: float) -> LossOutputs:
    """CISPO (arXiv 2506.13585): the clipped ratio is a constant weight, so no token loses its gradient.

    ``-sg[clip(ratio, 1 - eps_low, 1 + eps_high)] · A · logπ_θ``. A bound is active whatever the sign of A.

    Args:
        inputs: the micro-batch's tokens.
        eps_low: how far the weight may fall below 1, in [0, 1].
        eps_high: how far the weight may rise above 1.
    """
    ratio = _bounded_exp(inputs.logprobs.detach() - inputs.old_logprobs)
    weight = ratio.clamp(1.0 - eps_low, 1.0 + eps_high)
    return _outputs(
        inputs,
        -weight * inputs.advantages * inputs.logprobs,
        ratio=ratio,
        clip_low=ratio < 1.0 - eps_low,
        clip_high=ratio > 1.0 + eps_high,
    )


def reinforce_loss(inputs: LossInputs) -> LossOutputs:
    """The plain policy gradient: ``-A · logπ_θ``. The ratio is measured, not used."""
    ratio = _bounded_exp(inputs.logprobs.detach() - inputs.old_logprobs)
    return _outputs(inputs, -inputs.advantages * inputs.logprobs, ratio=ratio)


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: KlEstimator) -> Tensor:
    """An estimate of KL(π_θ ‖ π_ref) at every sampled token [N], in nats; r = logπ_ref - logπ_θ.

    k1 = -r, k2 = r²/2, k3 = e^r - r - 1 with r clamped to ±20 (Schulman, "Approximating KL Divergence").
    """
    log_ratio = ref_logprobs - logprobs
    match estimator:
        case KlEstimator.k1:
            return -log_ratio
        case KlEstimator.k2:
            return log_ratio.square() / 2
        case KlEstimator.k3:
            return k3(log_ratio)


def llds_penalty(inputs: LossInputs) -> Tensor:
    """LLDS (arXiv 2512.04220): how far likelihood fell where the advantage is not negative; [N], at least 0.

    A turn takes part if its trajectory's advantage is >= 0 and its own log-likelihood fell, summed over its
    tokens (the paper's gate at the level of actions). In it every token that fell pays by how much::

        gate · max(0, logπ_old - logπ_θ),  gate = [Σ_turn (logπ_old - logπ_θ) > 0], detached
    """
    fall = inputs.old_logprobs - inputs.logprobs
    gate = (_group_sum(fall.detach(), inputs.turn_index) > 0) & (inputs.advantages >= 0)
    # relu, not clamp: a token that did not move has gradient 0.
    return gate.to(fall.dtype) * torch.relu(fall)


def k3(log_ratio: Tensor) -> Tensor:
    """Schulman's k3 = e^r - r - 1 ≥ 0 elementwise, with r clamped to ±20.

    With x sampled from q and r = log p(x) - log q(x), its mean is KL(q ‖ p), at a lower variance than k1 =
    -r.
    """
    bounded = log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    # expm1 keeps the digits that e^r - 1 loses where r is near 0, which is where almost all tokens are.
    return torch.expm1(bounded) - bounded


def _bounded_exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()


def _group_sum(values: Tensor, index: Tensor) -> Tensor:
    """[N]: at each token the sum of ``values`` [N] over all tokens of the same ``index`` [N]."""
    groups = values.new_zeros(torch.bincount(index).shape)
    return groups.index_add(0, index, values)[index]


def _clipped_surrogate(inputs: LossInputs, ratio: Tensor, eps_low: float, eps_high: float) -> LossOutputs:
    """-min(ratio·A, clip(ratio)·A) for the token's or the trajectory's ratio, [N]."""
    advantages = inputs.advantages
    low, high = 1.0 - eps_low, 1.0 + eps_high
    return _outputs(
        inputs,
        -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages),
        ratio=ratio,
        clip_low=(ratio < low) & (advantages < 0),
        clip_high=(ratio > high) & (advantages > 0),
    )


def _outputs(inputs: LossInputs, token_losses: Tensor, **metrics: Tensor) -> LossOutputs:
    """The losses with their own metrics and those that every loss has."""
    log_ratio = inputs.logprobs.detach() - inputs.old_logprobs
    metrics |= {"policy_k1": -log_ratio, "policy_k3": k3(log_ratio)}
    detached = {name: metric.detach().to(log_ratio.dtype) for name, metric in metrics.items()}
    return LossOutputs(token_losses=token_losses, metrics=detached)


def _checked(outputs: LossOutputs, inputs: LossInputs) -> LossOutputs:
    """A custom function's outputs, if there is one number per token and a gradient to follow."""
    expected = inputs.logprobs.shape
    for name, values in {"token_losses": outputs.token_losses, **outputs.metrics}.items():
        if values.shape != expected:
            raise ValueError(
                f"a custom loss must return {name} {list(expected)}, one number per token, "
                f"got {list(values.shape)}"
            )
    if inputs.logprobs.requires_grad and not outputs.token_losses.requires_grad:
        raise ValueError("a custom loss returned token_losses without gradient; compute them from logprobs")
    return outputs
