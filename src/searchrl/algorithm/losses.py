"""Policy losses as pure functions over the loss tokens of one micro-batch, flattened to [N].

Every function returns a *sum* over tokens. What to divide by is global (all ranks, the whole optimizer step),
so it is the caller's: that is what makes the gradient independent of how the batch was cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LOG_RATIO_BOUND = 20.0
"""Log-ratios are clamped to ± this before exp: e^20 is far beyond any clip range and still finite in fp32."""


@dataclass(kw_only=True, slots=True)
class LossInputs:
    """All a policy loss reads: fp32 [N], N loss tokens of one micro-batch; only ``logprobs`` has gradient."""

    logprobs: Tensor
    """[N] logπ_θ: the current policy."""
    old_logprobs: Tensor
    """[N] logπ_old: the trainer's at the start of the update, detached."""
    sampling_logprobs: Tensor
    """[N] logπ_roll: the engine's, as sampled."""
    ref_logprobs: Tensor | None
    """[N] logπ_ref: the reference policy's, or None when no KL term needs it."""
    advantages: Tensor
    """[N] each token's trajectory's advantage."""
    weights: Tensor
    """[N] importance weights π_old / π_roll, detached (see ``importance``)."""


@dataclass(kw_only=True, slots=True)
class LossOutputs:
    """What a policy loss returns."""

    loss_sum: Tensor
    """Scalar with gradient: the sum over the N tokens, not their mean."""
    metrics: dict[str, Tensor]
    """Detached float64 scalars, sums over tokens: add over micro-batches and ranks, divide by ``tokens``."""


def clip_loss(inputs: LossInputs, *, eps_low: float, eps_high: float, kl_coef: float) -> LossOutputs:
    """PPO's clipped surrogate with an asymmetric range, plus a KL penalty to the reference (GRPO, eq. 3).

    Per token, with ratio = exp(logπ_θ - logπ_old) and r = logπ_ref - logπ_θ::

        -min(ratio·A, clip(ratio, 1 - eps_low, 1 + eps_high)·A) · w  +  kl_coef · (e^r - r - 1)

    The KL term (k3, arXiv 2402.03300 eq. 4) is not weighted by w. Log-ratios are clamped to ±20 before exp;
    beyond that the token has no gradient through them.

    Metrics (sums over tokens): ``tokens``; ``policy_loss`` (without KL); ``ratio``; ``clip_low`` and
    ``clip_high`` (tokens where that bound is active); ``policy_k1`` and ``policy_k3`` (KL of π_old to π_θ:
    how far the update moved); with a reference also ``ref_k1`` and ``ref_k3`` (KL of π_θ to π_ref).

    Args:
        inputs: the micro-batch's tokens.
        eps_low: how far the ratio may fall below 1, in [0, 1].
        eps_high: how far the ratio may rise above 1.
        kl_coef: the KL penalty's coefficient; 0 turns it off.

    Raises:
        ValueError: ``kl_coef`` is not 0 but there are no reference log-probabilities.
    """
    if kl_coef != 0.0 and inputs.ref_logprobs is None:
        raise ValueError(f"kl_coef is {kl_coef} but ref_logprobs is None; load one or set kl_coef to 0")
    advantages = inputs.advantages
    log_ratio = (inputs.logprobs - inputs.old_logprobs).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    ratio = log_ratio.exp()
    clipped_ratio = ratio.clamp(1.0 - eps_low, 1.0 + eps_high)
    policy_loss = -torch.minimum(ratio * advantages, clipped_ratio * advantages) * inputs.weights
    loss_sum = policy_loss.sum()
    terms = {
        "tokens": torch.ones_like(ratio),
        "policy_loss": policy_loss,
        "ratio": ratio,
        "clip_low": (ratio < 1.0 - eps_low) & (advantages < 0),
        "clip_high": (ratio > 1.0 + eps_high) & (advantages > 0),
        "policy_k1": -log_ratio,
        "policy_k3": k3(log_ratio),
    }
    if inputs.ref_logprobs is not None:
        ref_log_ratio = inputs.ref_logprobs - inputs.logprobs
        ref_k3 = k3(ref_log_ratio)
        terms |= {"ref_k1": -ref_log_ratio, "ref_k3": ref_k3}
        if kl_coef != 0.0:
            loss_sum = loss_sum + kl_coef * ref_k3.sum()
    metrics = {name: term.detach().sum(dtype=torch.float64) for name, term in terms.items()}
    return LossOutputs(loss_sum=loss_sum, metrics=metrics)


def k3(log_ratio: Tensor) -> Tensor:
    """Schulman's k3 = e^r - r - 1 ≥ 0 elementwise, with r clamped to ±20.

    With x sampled from q and r = log p(x) - log q(x), its mean is KL(q ‖ p), at a lower variance than k1 =
    -r.
    """
    bounded = log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    # expm1 keeps the digits that e^r - 1 loses where r is near 0, which is where almost all tokens are.
    return torch.expm1(bounded) - bounded
