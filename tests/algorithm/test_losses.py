"""The clipped loss against a scalar float64 reference, hand-derived values, and autograd's limits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from searchrl.algorithm.losses import LossInputs, clip_loss, k3

LOW, HIGH = 0.2, 0.28


def make_inputs(
    log_ratio: list[float],
    advantages: list[float],
    weights: list[float] | None = None,
    ref_log_ratio: list[float] | None = None,
) -> LossInputs:
    """Inputs whose logπ_θ - logπ_old is ``log_ratio`` and logπ_ref - logπ_θ is ``ref_log_ratio``."""
    old = torch.full((len(log_ratio),), -1.5, dtype=torch.float64)
    logprobs = (old + torch.tensor(log_ratio, dtype=torch.float64)).requires_grad_()
    ref = None
    if ref_log_ratio is not None:
        ref = logprobs.detach() + torch.tensor(ref_log_ratio, dtype=torch.float64)
    return LossInputs(
        logprobs=logprobs,
        old_logprobs=old,
        sampling_logprobs=old,
        ref_logprobs=ref,
        advantages=torch.tensor(advantages, dtype=torch.float64),
        weights=torch.tensor(weights or [1.0] * len(log_ratio), dtype=torch.float64),
    )


def gradient(inputs: LossInputs, kl_coef: float = 0.0) -> Tensor:
    loss = clip_loss(inputs, eps_low=LOW, eps_high=HIGH, kl_coef=kl_coef).loss_sum
    (grad,) = torch.autograd.grad(loss, inputs.logprobs)
    return grad


# ratio, advantage -> loss, d loss / d logprob (= -ratio·A where unclipped, 0 where the bound is active)
CLIP_TABLE = [
    (1.0, 1.0, -1.0, -1.0),
    (1.0, -1.0, 1.0, 1.0),
    (1.2, 1.0, -1.2, -1.2),
    (1.5, 1.0, -1.28, 0.0),  # clip_high
    (1.5, -1.0, 1.5, 1.5),  # moving the wrong way is never clipped
    (0.5, 1.0, -0.5, -0.5),
    (0.5, -1.0, 0.8, 0.0),  # clip_low
    (0.9, -2.0, 1.8, 1.8),
    (3.0, 0.0, 0.0, 0.0),
]


@pytest.mark.parametrize(("ratio", "advantage", "loss", "slope"), CLIP_TABLE)
def test_clip_table(ratio: float, advantage: float, loss: float, slope: float) -> None:
    inputs = make_inputs([math.log(ratio)], [advantage])
    outputs = clip_loss(inputs, eps_low=LOW, eps_high=HIGH, kl_coef=0.0)
    assert outputs.loss_sum.item() == pytest.approx(loss, abs=1e-12)
    assert gradient(inputs).item() == pytest.approx(slope, abs=1e-12)


def test_metrics_are_sums() -> None:
    ratios = [ratio for ratio, *_ in CLIP_TABLE]
    inputs = make_inputs([math.log(r) for r in ratios], [advantage for _, advantage, *_ in CLIP_TABLE])
    metrics = clip_loss(inputs, eps_low=LOW, eps_high=HIGH, kl_coef=0.0).metrics
    assert all(not value.requires_grad and value.dtype == torch.float64 for value in metrics.values())
    values = {name: value.item() for name, value in metrics.items()}
    assert values == pytest.approx(
        {
            "tokens": 9,
            "policy_loss": sum(loss for _, _, loss, _ in CLIP_TABLE),
            "ratio": sum(ratios),
            "clip_low": 1,
            "clip_high": 1,
            "policy_k1": -sum(math.log(r) for r in ratios),
            "policy_k3": sum(r - 1 - math.log(r) for r in ratios),
        }
    )


def test_weights_scale_the_surrogate_but_not_the_kl() -> None:
    plain = make_inputs([0.1, -0.1], [1.0, -2.0], ref_log_ratio=[0.5, -0.5])
    weighted = make_inputs([0.1, -0.1], [1.0, -2.0], weights=[0.5, 2.0], ref_log_ratio=[0.5, -0.5])
    kl = 0.3 * sum(math.exp(r) - r - 1 for r in (0.5, -0.5))
    surrogate = [-math.exp(0.1), 2.0 * math.exp(-0.1)]
    for inputs, weights in ((plain, (1.0, 1.0)), (weighted, (0.5, 2.0))):
        outputs = clip_loss(inputs, eps_low=LOW, eps_high=HIGH, kl_coef=0.3)
        expected = sum(s * w for s, w in zip(surrogate, weights, strict=True)) + kl
        assert outputs.loss_sum.item() == pytest.approx(expected, rel=1e-12)
        assert outputs.metrics["ref_k1"].item() == pytest.approx(0.0, abs=1e-12)
        assert outputs.metrics["ref_k3"].item() == pytest.approx(kl / 0.3, rel=1e-12)


def test_kl_gradient() -> None:
    """With A = 0 only k3 is left: d k3 / d logπ_θ = -(e^r - 1), since dr / d logπ_θ = -1."""
    r = [0.5, -0.7, 0.0]
    grad = gradient(make_inputs([0.0] * 3, [0.0] * 3, ref_log_ratio=r), kl_coef=0.1)
    assert grad.tolist() == pytest.approx([-0.1 * (math.exp(x) - 1) for x in r], abs=1e-12)


def test_identical_policies_give_plain_policy_gradient() -> None:
    """On policy: ratio 1, no clipping, KL 0; the loss is -ΣA and its gradient REINFORCE's, -A."""
    advantages = [0.5, -1.5, 2.0]
    inputs = make_inputs([0.0] * 3, advantages, ref_log_ratio=[0.0] * 3)
    outputs = clip_loss(inputs, eps_low=LOW, eps_high=HIGH, kl_coef=0.001)
    assert outputs.loss_sum.item() == pytest.approx(-sum(advantages))
    assert gradient(inputs, kl_coef=0.001).tolist() == pytest.approx([-a for a in advantages])
    zero = ("clip_low", "clip_high", "policy_k1", "policy_k3", "ref_k1", "ref_k3")
    assert [outputs.metrics[name].item() for name in zero] == [0.0] * len(zero)
    assert outputs.metrics["ratio"].item() == 3.0


@pytest.mark.parametrize("extreme", [1e3, -1e3, 50.0, -50.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_extreme_ratios_stay_finite(extreme: float, advantage: float) -> None:
    inputs = make_inputs([extreme], [advantage], ref_log_ratio=[extreme])
    outputs = clip_loss(inputs, eps_low=LOW, eps_high=HIGH, kl_coef=0.1)
    assert torch.isfinite(outputs.loss_sum)
    assert torch.isfinite(gradient(inputs, kl_coef=0.1)).all()
    assert outputs.metrics["ratio"].item() == pytest.approx(math.exp(math.copysign(20, extreme)))


def test_sums_add_up_over_any_cut() -> None:
    torch.manual_seed(0)
    columns = torch.randn(5, 11, dtype=torch.float64)

    def run(part: slice) -> Tensor:
        piece = columns[:, part]
        inputs = LossInputs(
            logprobs=piece[0],
            old_logprobs=piece[1],
            sampling_logprobs=piece[1],
            ref_logprobs=piece[2],
            advantages=piece[3],
            weights=piece[4].abs(),
        )
        outputs = clip_loss(inputs, eps_low=LOW, eps_high=HIGH, kl_coef=0.01)
        return torch.stack([outputs.loss_sum, *outputs.metrics.values()])

    torch.testing.assert_close(run(slice(0, 4)) + run(slice(4, 4)) + run(slice(4, 11)), run(slice(0, 11)))


def test_no_tokens() -> None:
    inputs = make_inputs([], [])
    outputs = clip_loss(inputs, eps_low=LOW, eps_high=HIGH, kl_coef=0.0)
    assert outputs.loss_sum.item() == 0.0
    assert gradient(inputs).shape == (0,)


def test_kl_without_reference_is_an_error() -> None:
    with pytest.raises(ValueError, match="ref_logprobs is None"):
        clip_loss(make_inputs([0.0], [1.0]), eps_low=LOW, eps_high=HIGH, kl_coef=0.001)


def test_k3_keeps_small_differences_in_fp32() -> None:
    """k3 ≈ r²/2 near 0, where e^r - 1 - r computed naively in fp32 returns 0 or noise."""
    r = torch.tensor([1e-4, -1e-4, 1e-3])
    torch.testing.assert_close(k3(r), r.square() / 2, rtol=1e-2, atol=0.0)
