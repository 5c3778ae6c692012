"""Policy losses and penalties: hand-derived values, a loop over tokens in plain Python, and full logits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from searchrl.algorithm.losses import (
    LossInputs,
    LossOutputs,
    cispo_loss,
    clip_loss,
    gspo_loss,
    k3,
    kl_penalty,
    llds_penalty,
    policy_loss,
    reinforce_loss,
)
from searchrl.config import KlEstimator, LossConfig, LossKind

LOW, HIGH, DUAL = 0.2, 0.28, 1.5
CONFIGS = {
    "clip": LossConfig(kind=LossKind.clip, eps_low=LOW, eps_high=HIGH),
    "dual clip": LossConfig(kind=LossKind.clip, eps_low=LOW, eps_high=HIGH, dual_clip=DUAL),
    "gspo": LossConfig(kind=LossKind.gspo, eps_low=LOW, eps_high=HIGH),
    "cispo": LossConfig(kind=LossKind.cispo, eps_low=LOW, eps_high=HIGH),
    "reinforce": LossConfig(kind=LossKind.reinforce),
}
MOVED = {"ratio", "policy_k1", "policy_k3"}
METRICS = {
    "clip": MOVED | {"clip_low", "clip_high"},
    "dual clip": MOVED | {"clip_low", "clip_high", "dual_clip"},
    "gspo": MOVED | {"clip_low", "clip_high"},
    "cispo": MOVED | {"clip_low", "clip_high"},
    "reinforce": MOVED,
}
each_loss = pytest.mark.parametrize("name", CONFIGS)


def make(
    log_ratio: Sequence[float],
    advantages: Sequence[float],
    trajectories: Sequence[int] | None = None,
    turns: Sequence[int] | None = None,
) -> LossInputs:
    """Inputs in float64 with this logπ_θ - logπ_old; by default each token is a trajectory."""
    old = torch.full((len(log_ratio),), -1.5, dtype=torch.float64)
    index = torch.tensor(
        trajectories if trajectories is not None else range(len(log_ratio)), dtype=torch.long
    )
    return LossInputs(
        logprobs=(old + torch.tensor(log_ratio, dtype=torch.float64)).requires_grad_(),
        old_logprobs=old,
        advantages=torch.tensor(advantages, dtype=torch.float64),
        trajectory_index=index,
        turn_index=index if turns is None else torch.tensor(turns, dtype=torch.long),
    )


def make_batch(scale: float = 0.6) -> LossInputs:
    """Trajectories of 1, 4, 2, 1 and 5 tokens (index 3 has none), advantages of both signs and 0."""
    torch.manual_seed(233)  # a batch where every loss has tokens on either side of each of its bounds
    index = torch.tensor([0] + [1] * 4 + [2] * 2 + [4] + [5] * 5)
    old = -3.0 * torch.rand(13, dtype=torch.float64)
    return LossInputs(
        logprobs=(old + scale * torch.randn(13, dtype=torch.float64)).requires_grad_(),
        old_logprobs=old,
        advantages=torch.tensor([1.2, -0.7, 0.0, 9.0, 0.9, -1.6], dtype=torch.float64)[index],
        trajectory_index=index,
        turn_index=torch.tensor([0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 6, 6, 7]),
    )


def gradient(values: Tensor, inputs: LossInputs) -> list[float]:
    """Of the sum of ``values`` by logπ_θ."""
    (grad,) = torch.autograd.grad(values.sum(), inputs.logprobs)
    result: list[float] = grad.tolist()
    return result


def numbers(outputs: LossOutputs) -> dict[str, list[float]]:
    return {name: metric.tolist() for name, metric in outputs.metrics.items()}


# --- by hand --------------------------------------------------------------------------------------------

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
    (4.0, -2.0, 8.0, 8.0),  # the dual clip of 3 makes this 6, without gradient
]


@pytest.mark.parametrize("dual_clip", [0.0, 3.0])
def test_clip(dual_clip: float) -> None:
    ratio, advantages, losses, slopes = map(list, zip(*CLIP_TABLE, strict=True))
    inputs = make([math.log(value) for value in ratio], advantages)
    outputs = clip_loss(inputs, eps_low=LOW, eps_high=HIGH, dual_clip=dual_clip)
    expected = {
        "ratio": ratio,
        "clip_low": [0.0] * 6 + [1.0] + [0.0] * 3,
        "clip_high": [0.0] * 3 + [1.0] + [0.0] * 6,
        "policy_k1": [-math.log(value) for value in ratio],
        "policy_k3": [value - 1 - math.log(value) for value in ratio],
    }
    if dual_clip:
        losses[-1], slopes[-1] = 6.0, 0.0
        expected["dual_clip"] = [0.0] * 9 + [1.0]
    assert outputs.token_losses.tolist() == pytest.approx(losses, abs=1e-12)
    assert gradient(outputs.token_losses, inputs) == pytest.approx(slopes, abs=1e-12)
    assert numbers(outputs) == {name: pytest.approx(row, abs=1e-12) for name, row in expected.items()}


def test_dual_clip_at_exactly_its_bound() -> None:
    """There both sides agree on the loss, c·|A|; the bound is not active yet: the gradient is -ratio·A."""
    inputs = make([1.25], [-2.0])
    bound = (inputs.logprobs - inputs.old_logprobs).exp().item()
    outputs = clip_loss(inputs, eps_low=LOW, eps_high=HIGH, dual_clip=bound)
    assert outputs.token_losses.tolist() == [bound * 2.0]
    assert gradient(outputs.token_losses, inputs) == [bound * 2.0]
    assert outputs.metrics["dual_clip"].tolist() == [0.0]
    outputs = clip_loss(inputs, eps_low=LOW, eps_high=HIGH, dual_clip=math.nextafter(bound, 0.0))
    assert gradient(outputs.token_losses, inputs) == [0.0]
    assert outputs.metrics["dual_clip"].tolist() == [1.0]


@pytest.mark.parametrize("dual_clip", [1.0, 0.5, -3.0, math.nan])
def test_dual_clip_must_be_above_1(dual_clip: float) -> None:
    with pytest.raises(ValueError, match="dual_clip must be 0"):
        clip_loss(make([0.0], [1.0]), eps_low=LOW, eps_high=HIGH, dual_clip=dual_clip)


def test_gspo() -> None:
    """Four trajectories; s is the square root of a product of two ratios, and ds / dlogπ_t = s / length.

    0: ratios 1.21, 1, so s = 1.1; A = 2: each token's loss is -2.2. Both tokens' losses pull on each token
    with -2·1.1/2, together -2.2.
    1: ratios 4, 1, so s = 2 > 1.28; A = 1: -1.28 without gradient, also for the token that did not move.
    2: one token, ratio 0.5 < 0.8; A = -1: 0.8 without gradient.
    3: ratios 4, 1/4, so s = 1: far-off tokens cancel; A = -3: loss 3, gradient 2·3·1/2 = 3.
    """
    inputs = make(
        [math.log(ratio) for ratio in (1.21, 1.0, 4.0, 1.0, 0.5, 4.0, 0.25)],
        [2.0, 2.0, 1.0, 1.0, -1.0, -3.0, -3.0],
        [0, 0, 1, 1, 2, 3, 3],
    )
    outputs = gspo_loss(inputs, eps_low=LOW, eps_high=HIGH)
    losses, slopes = [-2.2, -2.2, -1.28, -1.28, 0.8, 3.0, 3.0], [-2.2, -2.2, 0.0, 0.0, 0.0, 3.0, 3.0]
    assert outputs.token_losses.tolist() == pytest.approx(losses, abs=1e-12)
    assert gradient(outputs.token_losses, inputs) == pytest.approx(slopes, abs=1e-12)
    metrics = numbers(outputs)
    assert metrics["ratio"] == pytest.approx([1.1, 1.1, 2.0, 2.0, 0.5, 1.0, 1.0])
    assert metrics["clip_high"] == [0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert metrics["clip_low"] == [0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    # How far the policy moved stays a token's matter: trajectory 3 moved although its s is 1.
    assert metrics["policy_k1"][5:] == pytest.approx([-math.log(4), math.log(4)])


def test_cispo() -> None:
    """The weight is the ratio within [0.8, 1.28]; d loss / d logπ_θ = -weight·A, and logπ_old is -1.5."""
    ratio, advantages = [1.1, 0.5, 1.5, 0.5, 1.5], [2.0, 1.0, -1.0, -1.0, 1.0]
    weights = [1.1, 0.8, 1.28, 0.8, 1.28]
    slopes = [-weight * advantage for weight, advantage in zip(weights, advantages, strict=True)]
    inputs = make([math.log(value) for value in ratio], advantages)
    outputs = cispo_loss(inputs, eps_low=LOW, eps_high=HIGH)
    losses = [slope * (math.log(value) - 1.5) for slope, value in zip(slopes, ratio, strict=True)]
    assert outputs.token_losses.tolist() == pytest.approx(losses)
    assert gradient(outputs.token_losses, inputs) == pytest.approx(slopes)
    metrics = numbers(outputs)
    assert metrics["ratio"] == pytest.approx(ratio)
    assert metrics["clip_low"] == [0.0, 1.0, 0.0, 1.0, 0.0]
    assert metrics["clip_high"] == [0.0, 0.0, 1.0, 0.0, 1.0]


def test_reinforce() -> None:
    inputs = make([0.5, -5.0], [2.0, -1.0])
    outputs = reinforce_loss(inputs)
    assert outputs.token_losses.tolist() == [2.0, -6.5]  # -2·(-1.5 + 0.5), 1·(-1.5 - 5)
    assert gradient(outputs.token_losses, inputs) == [-2.0, 1.0]
    assert numbers(outputs)["ratio"] == pytest.approx([math.exp(0.5), math.exp(-5.0)])


# --- against the definitions ----------------------------------------------------------------------------


def reference(name: str, probs: list[Tensor], inputs: LossInputs) -> list[Tensor]:
    """Each token's loss from its probability, one by one; no logarithm where the papers have none."""
    old = [math.exp(value) for value in inputs.old_logprobs.tolist()]
    trajectories = inputs.trajectory_index.tolist()
    losses = []
    for t, advantage in enumerate(inputs.advantages.tolist()):
        ratio = probs[t] / old[t]
        if name == "gspo":
            members = [i for i, other in enumerate(trajectories) if other == trajectories[t]]
            product = torch.ones((), dtype=torch.float64)
            for i in members:
                product = product * probs[i] / old[i]
            ratio = product ** (1 / len(members))
        clipped = min(max(ratio.item(), 1 - LOW), 1 + HIGH)
        if name == "reinforce":
            losses.append(-advantage * probs[t].log())
        elif name == "cispo":
            losses.append(-clipped * advantage * probs[t].log())
        else:
            bound = torch.tensor(clipped * advantage, dtype=torch.float64)
            surrogate = ratio * advantage
            loss = -(surrogate if surrogate <= bound else bound)
            if name == "dual clip" and advantage < 0 and loss > DUAL * abs(advantage):
                loss = torch.tensor(DUAL * abs(advantage), dtype=torch.float64)
            losses.append(loss)
    return losses


def slopes(name: str, inputs: LossInputs, upstream: list[float]) -> list[float]:
    """By hand, the derivative of Σ upstream·loss by logπ_θ: the loss's slope, 0 where a bound is active."""
    log_ratio = (inputs.logprobs.detach() - inputs.old_logprobs).tolist()
    trajectories = inputs.trajectory_index.tolist()
    result = []
    for t, (own, advantage) in enumerate(zip(log_ratio, inputs.advantages.tolist(), strict=True)):
        members = [i for i, other in enumerate(trajectories) if other == trajectories[t]]
        pull, ratio = upstream[t], math.exp(own)
        if name == "gspo":  # every member's loss pulls with s/length
            ratio = math.exp(sum(log_ratio[i] for i in members) / len(members))
            pull = sum(upstream[i] for i in members) / len(members)
        clipped = min(max(ratio, 1 - LOW), 1 + HIGH)
        if name == "reinforce":
            result.append(-pull * advantage)
        elif name == "cispo":
            result.append(-pull * clipped * advantage)
        else:
            active = ratio > 1 + HIGH if advantage > 0 else ratio < 1 - LOW
            active |= name == "dual clip" and advantage < 0 and ratio > DUAL
            result.append(0.0 if active else -pull * ratio * advantage)
    return result


@each_loss
def test_equals_the_definition(name: str) -> None:
    inputs = make_batch()
    outputs = policy_loss(inputs, CONFIGS[name])
    probs = [value.exp() for value in inputs.logprobs.unbind()]
    torch.testing.assert_close(outputs.token_losses, torch.stack(reference(name, probs, inputs)))
    assert all(0 < outputs.metrics[key].sum() < 13 for key in METRICS[name] - MOVED)
    log_ratio = (inputs.logprobs - inputs.old_logprobs).tolist()
    assert outputs.metrics["policy_k1"].tolist() == pytest.approx([-r for r in log_ratio])
    assert outputs.metrics["policy_k3"].tolist() == pytest.approx([math.exp(r) - 1 - r for r in log_ratio])


@each_loss
def test_gradient_through_full_logits(name: str) -> None:
    """The loss by the logits in three ways: our function, autograd of the definition, and written out.

    The last: d logπ(y) / d logit_v = [v = y] - π(v), so token t's row is slope_t·([v = y] - π).
    """
    inputs = make_batch()
    count, vocab = 13, 6
    upstream = torch.rand(count, dtype=torch.float64) + 0.5
    targets = torch.randint(vocab, (count,))
    rest = ((1 - inputs.logprobs.detach().exp()) / (vocab - 1)).clamp(min=1e-3).log()
    logits = rest.unsqueeze(1).repeat(1, vocab)
    logits[torch.arange(count), targets] = inputs.logprobs.detach()
    logits += torch.randn(count, 1, dtype=torch.float64)
    logits.requires_grad_()

    inputs.logprobs = torch.log_softmax(logits, -1).gather(1, targets.unsqueeze(1)).squeeze(1)
    losses = policy_loss(inputs, CONFIGS[name]).token_losses
    (ours,) = torch.autograd.grad((losses * upstream).sum(), logits)

    exps = logits.exp()
    probs = [exps[t, targets[t]] / exps[t].sum() for t in range(count)]
    defined = torch.stack(reference(name, probs, inputs))
    (automatic,) = torch.autograd.grad((defined * upstream).sum(), logits)

    one_hot = torch.nn.functional.one_hot(targets, vocab)
    slope = torch.tensor(slopes(name, inputs, upstream.tolist()), dtype=torch.float64)
    written_out = slope.unsqueeze(1) * (one_hot - torch.softmax(logits.detach(), -1))
    torch.testing.assert_close(ours, automatic, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours, written_out, rtol=1e-9, atol=1e-12)


@each_loss
def test_identical_policies_give_the_plain_policy_gradient(name: str) -> None:
    """At ratio 1 no bound is active, and the gradient of every loss's sum is REINFORCE's: -A·∇logπ."""
    inputs = make_batch(scale=0.0)
    outputs = policy_loss(inputs, CONFIGS[name])
    assert gradient(outputs.token_losses, inputs) == pytest.approx((-inputs.advantages).tolist(), abs=1e-15)
    assert outputs.metrics["ratio"].tolist() == [1.0] * 13
    assert not any(outputs.metrics[key].any() for key in METRICS[name] - {"ratio"})


@each_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_ratios_stay_finite(name: str, dtype: torch.dtype) -> None:
    extreme = [1e3, -1e3, 50.0, -50.0]
    inputs = make(extreme * 2, [1.0] * 4 + [-1.0] * 4)
    inputs.logprobs = inputs.logprobs.detach().to(dtype).requires_grad_()
    inputs.old_logprobs, inputs.advantages = inputs.old_logprobs.to(dtype), inputs.advantages.to(dtype)
    outputs = policy_loss(inputs, CONFIGS[name])
    values = torch.stack([outputs.token_losses, llds_penalty(inputs), *outputs.metrics.values()])
    assert torch.isfinite(values).all()
    assert values.dtype == dtype
    assert all(map(math.isfinite, gradient(outputs.token_losses + llds_penalty(inputs), inputs)))
    expected = [math.exp(math.copysign(20, value)) for value in extreme] * 2
    assert outputs.metrics["ratio"].tolist() == pytest.approx(expected, rel=1e-5)


@each_loss
def test_a_batch_can_be_cut_between_trajectories(name: str) -> None:
    """Each part counts trajectories and turns from 0 again, and may be empty; its metrics are the same."""
    whole = make_batch()
    expected = policy_loss(whole, CONFIGS[name])
    assert set(expected.metrics) == METRICS[name]
    parts = []
    for part in (slice(0, 5), slice(5, 5), slice(5, 13)):
        first = [index[part][:1].sum() for index in (whole.trajectory_index, whole.turn_index)]
        piece = LossInputs(
            logprobs=whole.logprobs.detach()[part].requires_grad_(),
            old_logprobs=whole.old_logprobs[part],
            advantages=whole.advantages[part],
            trajectory_index=whole.trajectory_index[part] - first[0],
            turn_index=whole.turn_index[part] - first[1],
        )
        outputs = policy_loss(piece, CONFIGS[name])
        parts.append({"loss": outputs.token_losses, "llds": llds_penalty(piece), **outputs.metrics})
        gradients = gradient(parts[-1]["loss"] + parts[-1]["llds"], piece)
        assert len(gradients) == piece.logprobs.numel(), "a rank without tokens has a gradient too"
    for key, value in {
        "loss": expected.token_losses,
        "llds": llds_penalty(whole),
        **expected.metrics,
    }.items():
        assert not (key in METRICS[name] and value.requires_grad)
        torch.testing.assert_close(torch.cat([part[key] for part in parts]), value)


# --- custom ---------------------------------------------------------------------------------------------


def test_custom_is_called_with_the_inputs() -> None:
    def squared(inputs: LossInputs) -> LossOutputs:
        return LossOutputs(token_losses=inputs.logprobs.square() * inputs.advantages, metrics={})

    config = LossConfig(kind=LossKind.custom)
    inputs = make([0.0, 0.5], [1.0, -2.0])
    outputs = policy_loss(inputs, config, squared)
    assert outputs.token_losses.tolist() == [2.25, -2.0]
    assert policy_loss(make([], []), config, squared).token_losses.requires_grad
    with pytest.raises(ValueError, match=r"loss\.import_path"):
        policy_loss(inputs, config)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("sum", r"token_losses \[2\], one number per token, got \[\]"),
        ("metric", r"mean_ratio \[2\], one number per token, got \[1\]"),
        ("detached", "without gradient"),
    ],
)
def test_custom_must_return_one_number_per_token(case: str, message: str) -> None:
    def broken(inputs: LossInputs) -> LossOutputs:
        losses = inputs.logprobs.sum() if case == "sum" else -inputs.logprobs
        metrics = {"mean_ratio": torch.ones(1)} if case == "metric" else {}
        return LossOutputs(token_losses=losses.detach() if case == "detached" else losses, metrics=metrics)

    with pytest.raises(ValueError, match=message):
        policy_loss(make([0.0, 0.5], [1.0, -2.0]), LossConfig(kind=LossKind.custom), broken)


# --- penalties ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("estimator", "values", "slopes"),
    [
        # For r = 1/2, -3/4, 0, 3; dr / dlogπ_θ = -1.
        ("k1", [-0.5, 0.75, 0.0, -3.0], [1.0, 1.0, 1.0, 1.0]),
        ("k2", [0.125, 0.28125, 0.0, 4.5], [-0.5, 0.75, 0.0, -3.0]),
        (
            "k3",
            [math.exp(0.5) - 1.5, math.exp(-0.75) - 0.25, 0.0, math.exp(3) - 4],
            [1 - math.exp(0.5), 1 - math.exp(-0.75), 0.0, 1 - math.exp(3)],
        ),
    ],
)
def test_kl_penalty(estimator: str, values: list[float], slopes: list[float]) -> None:
    log_ratio = torch.tensor([0.5, -0.75, 0.0, 3.0], dtype=torch.float64)
    logprobs = torch.full((4,), -2.0, dtype=torch.float64, requires_grad=True)
    penalty = kl_penalty(logprobs, logprobs.detach() + log_ratio, KlEstimator(estimator))
    (grad,) = torch.autograd.grad(penalty.sum(), logprobs)
    assert penalty.tolist() == pytest.approx(values, rel=1e-12)
    assert grad.tolist() == pytest.approx(slopes, rel=1e-12)
    empty = kl_penalty(logprobs[:0], logprobs[:0].detach(), KlEstimator(estimator))
    assert empty.shape == (0,)
    assert empty.requires_grad


@pytest.mark.parametrize("estimator", KlEstimator)
def test_kl_penalty_stays_finite(estimator: KlEstimator) -> None:
    logprobs = torch.tensor([-1e3, 0.0], requires_grad=True)
    penalty = kl_penalty(logprobs, torch.tensor([0.0, -1e3]), estimator)
    (grad,) = torch.autograd.grad(penalty.sum(), logprobs)
    assert torch.isfinite(penalty).all()
    assert torch.isfinite(grad).all()


def test_k3_is_the_kl_in_expectation() -> None:
    """Summed over a whole distribution q, weighted by it: Σ q·k3 = Σ q·log(q/p) + Σ p - Σ q = KL(q ‖ p)."""
    torch.manual_seed(0)
    q, p = torch.log_softmax(torch.randn(2, 7, dtype=torch.float64), -1)
    exact = (q.exp() * (q - p)).sum()
    for estimator in (KlEstimator.k1, KlEstimator.k3):
        torch.testing.assert_close((q.exp() * kl_penalty(q, p, estimator)).sum(), exact)


def test_k3_keeps_small_differences_in_fp32() -> None:
    """k3 ≈ r²/2 near 0, where e^r - 1 - r computed naively in fp32 returns 0 or noise."""
    r = torch.tensor([1e-4, -1e-4, 1e-3])
    torch.testing.assert_close(k3(r), r.square() / 2, rtol=1e-2, atol=0.0)


# advantage, turn, logπ_old - logπ_θ -> penalty, d penalty / d logπ_θ
LLDS_TABLE = [
    # The turn fell by 0.3 in all: its falling tokens pay, the rising one does not.
    (1.0, 0, 0.5, 0.5, -1.0),
    (1.0, 0, -0.4, 0.0, 0.0),
    (1.0, 0, 0.2, 0.2, -1.0),
    # The same trajectory's next turn rose by 0.3: nobody pays, although one token fell.
    (1.0, 1, 0.2, 0.0, 0.0),
    (1.0, 1, -0.5, 0.0, 0.0),
    # A trajectory at its baseline is preserved; a token that did not move has no gradient.
    (0.0, 2, 0.7, 0.7, -1.0),
    (0.0, 2, 0.0, 0.0, 0.0),
    # What was worse than its baseline may fall.
    (-1.0, 3, 0.9, 0.0, 0.0),
    # Nothing moved: no penalty, as at the first step of an update.
    (1.0, 4, 0.0, 0.0, 0.0),
]


def test_llds() -> None:
    advantages, turns, falls, penalties, expected = map(list, zip(*LLDS_TABLE, strict=True))
    inputs = make([-fall for fall in falls], advantages, [0] * 5 + [1] * 2 + [2, 3], turns)
    penalty = llds_penalty(inputs)
    assert penalty.tolist() == pytest.approx(penalties, abs=1e-12)
    assert gradient(penalty, inputs) == pytest.approx(expected, abs=1e-12)


def test_llds_equals_the_definition() -> None:
    inputs = make_batch()
    falls = (inputs.old_logprobs - inputs.logprobs).tolist()
    turns, advantages = inputs.turn_index.tolist(), inputs.advantages.tolist()
    expected = []
    for t, fall in enumerate(falls):
        total = math.fsum(other for other, turn in zip(falls, turns, strict=True) if turn == turns[t])
        expected.append(fall if advantages[t] >= 0 and total > 0 and fall > 0 else 0.0)
    assert 0 < sum(value > 0 for value in expected) < sum(fall > 0 for fall in falls)
    penalty = llds_penalty(inputs)
    assert penalty.tolist() == pytest.approx(expected)
    assert gradient(penalty, inputs) == [-float(value > 0) for value in expected]
