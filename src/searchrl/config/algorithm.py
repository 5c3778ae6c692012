"""Settings of the learning algorithm: advantages, filters, losses, importance weights. See NUMERICS.

Each part has an escape hatch: kind (or mode) ``custom`` calls ``import_path`` (``module:function``) with
``kwargs``; docs/algorithm.md gives the signatures and a complete example.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class AdvantageKind(StrEnum):
    """How rewards become advantages."""

    grpo = "grpo"
    """(r - mean of the group) / standard deviation of the group."""
    dr_grpo = "dr_grpo"
    """r - mean of the group."""
    rloo = "rloo"
    """r - mean of the group's others."""
    reinforce_pp = "reinforce_pp"
    """(r - mean of the batch) / standard deviation of the batch."""
    custom = "custom"


class LossKind(StrEnum):
    """Policy losses."""

    clip = "clip"
    """PPO's clipped surrogate, token by token."""
    gspo = "gspo"
    """The same with one ratio a trajectory, the geometric mean of its tokens'."""
    cispo = "cispo"
    """Clipped, detached ratio as a weight on the log-probability: no token loses its gradient."""
    reinforce = "reinforce"
    """The plain policy gradient, without ratio."""
    custom = "custom"


class Aggregation(StrEnum):
    """What token losses are averaged over. Always global: all ranks, the whole optimizer step."""

    token = "token"
    """All tokens weigh the same."""
    sequence = "sequence"
    """All trajectories weigh the same: the mean of their tokens' means."""
    constant = "constant"
    """Sum over tokens / (trajectories x ``loss.constant_length``), as Dr. GRPO."""


class KlEstimator(StrEnum):
    """Estimators of KL(policy, reference) from one sample, r = logπ_ref - logπ_θ."""

    k1 = "k1"
    """-r: unbiased, may be negative."""
    k2 = "k2"
    """r²/2."""
    k3 = "k3"
    """e^r - r - 1: never negative (``low_var_kl`` elsewhere)."""


class KlPlacement(StrEnum):
    """Where the KL penalty enters."""

    loss = "loss"
    reward = "reward"
    """Subtracted from the trajectory's reward, summed over its tokens, before advantages are computed."""


class OldPolicy(StrEnum):
    """Whose log-probabilities the loss calls π_old."""

    recompute = "recompute"
    """The trainer's at the start of the update. One forward pass, which is saved where the update is a single
    optimizer step and nothing has to be known before it: π_old is then the current policy, detached."""
    rollout = "rollout"
    """The engine's (bypass): no forward pass; the loss's ratio then holds the mismatch as well."""


class Level(StrEnum):
    """What one importance ratio is about."""

    token = "token"
    sequence = "sequence"
    """A trajectory's product of token ratios."""
    geometric = "geometric"
    """A trajectory's geometric mean of token ratios."""


class WeightMode(StrEnum):
    """How a ratio becomes a weight."""

    none = "none"
    """1: no weighting; rejection and veto still work."""
    truncate = "truncate"
    """At most ``hi``."""
    clip = "clip"
    """Between ``lo`` and ``hi``."""
    mask = "mask"
    """Unchanged within [``lo``, ``hi``]; outside, the token is dropped."""
    custom = "custom"


class RejectionLevel(StrEnum):
    """What is looked at, and dropped, when a ratio leaves the rejection's bounds."""

    none = "none"
    token = "token"
    sequence = "sequence"
    geometric = "geometric"


@dataclass(kw_only=True, slots=True)
class AdvantageConfig:
    """Advantages, computed over trajectories that are not void."""

    kind: AdvantageKind = AdvantageKind.grpo
    """``grpo``, ``dr_grpo``, ``rloo``, ``reinforce_pp`` or ``custom``."""
    import_path: str = ""
    """custom: ``module:function``, called as ``function(groups, **kwargs)``: rewards to advantages, a list a
    group."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """custom: further arguments."""


@dataclass(kw_only=True, slots=True)
class FilterConfig:
    """What leaves the loss's numerator and its denominator. How much each would drop is always logged."""

    zero_variance: bool = True
    """Groups whose rewards are all the same. False keeps them in the denominator (as veRL does), and for
    ``reinforce_pp``, whose baseline is the batch, as a signal."""
    overlong: bool = False
    """Trajectories cut by a token or context limit; their rewards stay in the group's baseline (DAPO)."""
    void_turns: bool = False
    """Trajectories with a turn that holds no complete action; their rewards stay in the baseline
    (SimpleTIR)."""


@dataclass(kw_only=True, slots=True)
class ResamplingConfig:
    """More questions than a step trains on, so that as many as it asks for have something to teach."""

    max_rounds: int = 1
    """Rounds of episodes until ``groups_per_step`` groups have rewards that vary (DAPO's dynamic sampling);
    each round draws as many questions as are still missing. 1: off. After the last, the step takes what there
    is."""
    oversample: float = 1.0
    """Groups started over groups needed; as soon as enough are complete the rest are aborted. Above 1 a step
    no longer waits for its slowest episodes, and favours short ones."""


@dataclass(kw_only=True, slots=True)
class LossConfig:
    """Policy loss, KL penalty, entropy bonus."""

    kind: LossKind = LossKind.clip
    """``clip``, ``gspo``, ``cispo``, ``reinforce`` or ``custom``."""
    eps_low: float = 0.2
    """How far the ratio may fall below 1."""
    eps_high: float = 0.28
    """How far the ratio may rise above 1."""
    dual_clip: float = 0.0
    """clip: for negative advantages the loss is at most this times |A| (arXiv 1912.09729); above 1, say 3; 0:
    off."""
    aggregation: Aggregation = Aggregation.token
    """What token losses are averaged over: ``token``, ``sequence`` or ``constant``."""
    constant_length: int = 0
    """constant: the length L; 0: the most that an episode can sample, turns x ``episode.max_turn_tokens``."""
    kl_coef: float = 0.0
    """Coefficient of the KL to the initial policy; 0 loads no reference model."""
    kl_estimator: KlEstimator = KlEstimator.k3
    """``k1``, ``k2`` or ``k3``. In the loss, k1's gradient has mean 0; use it in the reward."""
    kl_in: KlPlacement = KlPlacement.loss
    """``loss`` or ``reward``."""
    entropy_coef: float = 0.0
    """Bonus for the entropy of the policy at each sampled token, in nats."""
    llds_coef: float = 0.0
    """Penalty on falling likelihood of trajectories that are not worse than their baseline (LLDS, arXiv
    2512.04220), say 0.1. Needs several optimizer steps an update."""
    import_path: str = ""
    """custom: ``module:function``, called as ``function(inputs, **kwargs)``; see ``algorithm.losses``."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """custom: further arguments."""


@dataclass(kw_only=True, slots=True)
class UpdateConfig:
    """How often a rollout is trained on."""

    epochs: int = 1
    """Passes over the rollout."""
    minibatches: int = 1
    """Optimizer steps a pass: groups are split into so many parts."""
    old_policy: OldPolicy = OldPolicy.recompute
    """Whose log-probabilities are π_old: ``recompute`` or ``rollout``."""


@dataclass(kw_only=True, slots=True)
class RejectionConfig:
    """Drops what the trainer finds too unlike its own policy. Independent of the weights."""

    level: RejectionLevel = RejectionLevel.none
    """``none``, ``token`` (drops tokens), ``sequence`` or ``geometric`` (drop trajectories)."""
    lo: float | None = None
    """Lower bound of the ratio; unset: 1 / ``hi``."""
    hi: float | None = None
    """Upper bound; unset: 2, at the geometric level 1.01."""


@dataclass(kw_only=True, slots=True)
class ImportanceConfig:
    """Importance weights π_old / π_roll: correct what engine and trainer disagree on."""

    enabled: bool = True
    """False: weights are 1 and nothing is dropped; the mismatch is measured and logged all the same."""
    level: Level = Level.token
    """``token``, ``sequence`` or ``geometric``."""
    mode: WeightMode = WeightMode.truncate
    """``truncate`` (TIS), ``clip``, ``mask``, ``none`` or ``custom``."""
    lo: float | None = None
    """Lower bound (clip, mask); unset: 1 / ``hi``."""
    hi: float | None = None
    """Upper bound; unset: 2, at the geometric level 1.01."""
    rejection: RejectionConfig = field(default_factory=RejectionConfig)
    """Drops tokens or trajectories."""
    veto: float = 0.0
    """A trajectory with a token whose ratio is below this is dropped, say 1e-4; 0: off."""
    normalize: bool = False
    """Divide weights by their mean over the global batch: over kept tokens, or, above the token level, over
    kept trajectories."""
    dropped_in_denominator: bool = False
    """True: what mask, rejection and veto drop still counts where the loss is averaged. False: it leaves
    numerator and denominator, so that the rest keeps its scale."""
    import_path: str = ""
    """custom: ``module:function``, called as ``function(inputs, **kwargs)``; see ``algorithm.importance``."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """custom: further arguments."""
