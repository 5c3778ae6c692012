"""Importance correction: every combination against a loop in float64, presets by hand, loud failure."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from searchrl.algorithm.importance import (
    ImportanceInputs,
    NonFiniteError,
    bounds,
    check_finite,
    correct,
    needs_global,
)
from searchrl.algorithm.mismatch import measure
from searchrl.compose import load_config
from searchrl.config import ImportanceConfig, Level, RejectionConfig, RejectionLevel, WeightMode

LEVELS, MODES, REJECTIONS = list(Level), list(WeightMode), list(RejectionLevel)
BUILT_IN = [mode for mode in MODES if mode is not WeightMode.custom]


def make_inputs(log_ratios: Mapping[str, Sequence[float]], seed: int | None = None) -> ImportanceInputs:
    """Tokens with these log-ratios by trajectory; with a seed, all tokens in a random order."""
    tokens = [(place, value) for place, values in enumerate(log_ratios.values()) for value in values]
    if seed is not None:
        random.Random(seed).shuffle(tokens)
    sampling = -torch.linspace(0.5, 4.0, len(tokens))
    return ImportanceInputs(
        old_logprobs=(sampling + torch.tensor([value for _, value in tokens])).requires_grad_(),
        sampling_logprobs=sampling,
        trajectory_index=torch.tensor([place for place, _ in tokens], dtype=torch.long),
        trajectory_ids=list(log_ratios),
    )


def logs(ratios: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    return {name: [math.log(ratio) for ratio in values] for name, values in ratios.items()}


def at_most_three(inputs: ImportanceInputs) -> Tensor:
    """A custom function."""
    return inputs.ratio(Level.token).clamp(max=3.0)


# --- the reference: one trajectory after another, plain Python ------------------------------------------


FLAGS = ("keep", "truncated", "masked", "rejected", "vetoed")


class Expected(NamedTuple):
    """A token's fate."""

    weight: float
    keep: bool
    flags: tuple[bool, ...]


def bounded_exp(exponent: float) -> float:
    return math.exp(max(-20.0, min(20.0, exponent)))


def ratios_at(level: str, log_ratios: list[float]) -> list[float]:
    if level == "token":
        return [bounded_exp(value) for value in log_ratios]
    total, length = math.fsum(log_ratios), len(log_ratios)
    return [bounded_exp(total if level == "sequence" else total / length)] * length if length else []


def reference_trajectory(
    log_ratios: list[float], config: ImportanceConfig, lo: float, hi: float, reject: tuple[float, float]
) -> list[Expected]:
    vetoed = any(bounded_exp(value) < config.veto for value in log_ratios)
    raw = ratios_at(config.level, log_ratios)
    judged = ratios_at(config.rejection.level, log_ratios) if config.rejection.level != "none" else None
    tokens = []
    for number, ratio in enumerate(raw):
        weight, truncated, masked = 1.0, False, False
        if config.mode == "truncate":
            weight, truncated = min(ratio, hi), ratio > hi
        elif config.mode == "clip":
            weight, truncated = max(lo, min(ratio, hi)), not lo <= ratio <= hi
        elif config.mode == "mask":
            weight, masked = ratio, not lo <= ratio <= hi
        elif config.mode == "custom":
            weight = min(bounded_exp(log_ratios[number]), 3.0)
        rejected = judged is not None and not reject[0] <= judged[number] <= reject[1]
        keep = not (masked or rejected or vetoed)
        flags = (keep, truncated, masked, rejected, vetoed)
        tokens.append(Expected(weight if keep else 0.0, keep, flags))
    return tokens


def reference_mean(level: str, trajectories: list[list[Expected]]) -> float:
    """What normalisation divides by."""
    kept = [[token.weight for token in tokens if token.keep] for tokens in trajectories]
    if level == "token":
        values = [weight for weights in kept for weight in weights]
    else:
        values = [math.fsum(weights) / len(weights) for weights in kept if weights]
    return math.fsum(values) / len(values) if values else 1.0


# --- every combination ----------------------------------------------------------------------------------


def noise(seed: int, size: int, mean: float, std: float) -> list[float]:
    generator = random.Random(seed)
    return [generator.gauss(mean, std) for _ in range(size)]


BATCH = {
    "observations_only": [],  # all masked: no loss token
    "identical": [0.0] * 5,
    "one_token": [math.log(1.5)],
    "one_token_far_up": [1e3],
    "one_token_far_down": [-1e3],
    "up_25": [25.0, 0.1, -0.1],
    "down_25": [-25.0, 0.2],
    "cancels": [1e3, -1e3],
    "almost_identical": noise(1, 40, 0.0, 0.003),
    "quiet_but_long": noise(2, 60, 0.05, 0.02),  # mean ratio near 1, their product near e^3
    "vetoed_only": [-10.0, 5.0, 5.001],  # e^-10 < 1e-4; the product is inside the bounds
    "also_silent": [],
    "noisy": noise(3, 12, 0.0, 1.0),
    "one_outlier": [*noise(4, 9, 0.0, 0.01), 3.0],
    "low": noise(5, 7, -0.3, 0.2),
    "high": noise(6, 7, 0.3, 0.2),
}
TABLE = list(product(LEVELS, MODES, REJECTIONS, [0.0, 1e-4], [False, True], [False, True]))


def table_config(
    level: Level, mode: WeightMode, rejection: RejectionLevel, veto: float, normalize: bool, stay: bool
) -> ImportanceConfig:
    """The weights' bounds are given, the rejection's are defaults, so that mixing them up shows."""
    return ImportanceConfig(
        level=level,
        mode=mode,
        lo=0.25,
        hi=3.0,
        rejection=RejectionConfig(level=rejection),
        veto=veto,
        normalize=normalize,
        dropped_in_denominator=stay,
    )


@pytest.mark.parametrize(("level", "mode", "rejection"), list(product(LEVELS, MODES, REJECTIONS)))
@pytest.mark.parametrize("veto", [0.0, 1e-4])
def test_every_combination(level: Level, mode: WeightMode, rejection: RejectionLevel, veto: float) -> None:
    inputs = make_inputs(BATCH, seed=0)
    index = inputs.trajectory_index.tolist()
    places = [[at for at, owner in enumerate(index) if owner == number] for number in range(len(BATCH))]
    # What fp32 made of the log-probabilities, in float64.
    pairs = zip(inputs.old_logprobs.tolist(), inputs.sampling_logprobs.tolist(), strict=True)
    differences = [old - sampling for old, sampling in pairs]
    for normalize, stay in product([False, True], [False, True]):
        config = table_config(level, mode, rejection, veto, normalize, stay)
        reject = (1 / 1.01, 1.01) if rejection == "geometric" else (0.5, 2.0)
        expected = [
            reference_trajectory([differences[at] for at in own], config, 0.25, 3.0, reject) for own in places
        ]
        mean = reference_mean(level, expected) if normalize else 1.0
        correction = correct(inputs, config, at_most_three)
        totals = measure(inputs, correction)
        assert correction.weights.dtype == torch.float32
        assert not correction.weights.requires_grad
        final = (correction.weights / totals.normalizer(config)).tolist()
        found = list(zip(*(getattr(correction, name).tolist() for name in FLAGS), strict=True))
        for own, tokens in zip(places, expected, strict=True):
            assert [found[at] for at in own] == [token.flags for token in tokens]
            weights = [token.weight / mean for token in tokens]
            assert [final[at] for at in own] == pytest.approx(weights, rel=1e-6, abs=0.0)
        # The loss's denominators.
        kept = [[token for token in tokens if token.keep] for tokens in expected]
        assert totals.sums["kept"] == sum(len(tokens) for tokens in kept)
        assert totals.sums["kept_trajectories"] == sum(bool(tokens) for tokens in kept)
        assert totals.sums["tokens"] == len(index)
        assert totals.sums["trajectories"] == len(BATCH) - 2
        drops = mode == "mask" or rejection != "none" or veto > 0
        assert needs_global(config) is (normalize or (drops and not stay))


def test_the_table_reaches_everything() -> None:
    """A batch that drops all or nothing would compare little; each switch must show somewhere."""
    inputs = make_inputs(BATCH)
    for level, rejection in product(LEVELS, REJECTIONS):
        config = table_config(level, WeightMode.mask, rejection, 1e-4, False, False)
        found = correct(inputs, config)
        names = ["keep", "masked", "vetoed", *(["rejected"] if rejection != "none" else [])]
        for name in names:
            values = getattr(found, name)
            assert values.any(), (name, level, rejection)
            assert not values.all(), (name, level, rejection)


@pytest.mark.parametrize(("level", "mode"), list(product(LEVELS, BUILT_IN)))
def test_identical_policies_are_left_exactly_alone(level: Level, mode: WeightMode) -> None:
    """Bypass too: π_old is then the engine's log-probabilities."""
    inputs = make_inputs({"a": [0.0] * 7, "silent": [], "b": [0.0], "c": [0.0] * 3})
    for rejection, veto, normalize in product(REJECTIONS, [0.0, 1e-4], [False, True]):
        config = table_config(level, mode, rejection, veto, normalize, False)
        correction = correct(inputs, config)
        assert correction.weights.tolist() == [1.0] * 11
        assert correction.keep.all()
        assert measure(inputs, correction).normalizer(config) == 1.0


@pytest.mark.parametrize("ids", [[], ["a", "b"]])
def test_no_tokens(ids: list[str]) -> None:
    inputs = make_inputs({name: [] for name in ids})
    for settings in TABLE:
        config = table_config(*settings)
        correction = correct(inputs, config, at_most_three)
        assert correction.weights.shape == correction.keep.shape == (0,)
        assert measure(inputs, correction).normalizer(config) == 1.0


@pytest.mark.parametrize("mode", MODES)
def test_a_trajectory_is_corrected_on_its_own(mode: WeightMode) -> None:
    """So any cut of the batch gives the same."""
    for level, rejection in product(LEVELS, REJECTIONS):
        config = table_config(level, mode, rejection, 1e-4, False, False)
        inputs = make_inputs(BATCH)
        together = correct(inputs, config, at_most_three).weights
        for number, name in enumerate(BATCH):
            own = inputs.trajectory_index == number
            alone = ImportanceInputs(
                old_logprobs=inputs.old_logprobs[own],
                sampling_logprobs=inputs.sampling_logprobs[own],
                trajectory_index=torch.zeros(int(own.sum()), dtype=torch.long),
                trajectory_ids=[name],
            )
            assert correct(alone, config, at_most_three).weights.tolist() == together[own].tolist()


# --- by hand --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("level", "mode", "weights", "mean"),
    [
        # Ratios (4, 1) and (1/2), bounds [0.75, 3]. Means over kept tokens: (3 + 1 + 0.5) / 3.
        ("token", "none", [1, 1, 1], 1),
        ("token", "truncate", [3, 1, 0.5], 1.5),
        ("token", "clip", [3, 1, 0.75], 4.75 / 3),
        ("token", "mask", [0, 1, 0], 1),
        # Products 4 · 1 = 4 and 1/2. Means over the two trajectories, not the three tokens: (3 + 0.5) / 2.
        ("sequence", "none", [1, 1, 1], 1),
        ("sequence", "truncate", [3, 3, 0.5], 1.75),
        ("sequence", "clip", [3, 3, 0.75], 1.875),
        ("sequence", "mask", [0, 0, 0], 1),  # nothing is left: nothing to normalise
        # Geometric means sqrt(4 · 1) = 2 and 1/2.
        ("geometric", "none", [1, 1, 1], 1),
        ("geometric", "truncate", [2, 2, 0.5], 1.25),
        ("geometric", "clip", [2, 2, 0.75], 1.375),
        ("geometric", "mask", [2, 2, 0], 2),
    ],
)
def test_levels_and_modes(level: str, mode: str, weights: list[float], mean: float) -> None:
    config = ImportanceConfig(level=Level(level), mode=WeightMode(mode), lo=0.75, hi=3.0, normalize=True)
    inputs = make_inputs(logs({"a": [4.0, 1.0], "b": [0.5]}))
    correction = correct(inputs, config)
    assert correction.weights.tolist() == pytest.approx(weights)
    assert measure(inputs, correction).normalizer(config) == pytest.approx(mean)
    config.normalize = False
    assert measure(inputs, correction).normalizer(config) == 1.0


@pytest.mark.parametrize(
    ("level", "exponent"),
    [
        # Log-ratios 15 and 15: each is inside ±20, their sum 30 is clamped, their mean is 15.
        ("token", 15.0),
        ("sequence", 20.0),
        ("geometric", 15.0),
    ],
)
def test_clamped_after_summing(level: str, exponent: float) -> None:
    for sign in (1.0, -1.0):
        ratio = make_inputs({"a": [sign * 15.0, sign * 15.0]}).ratio(Level(level))
        assert ratio.tolist() == pytest.approx([math.exp(sign * exponent)] * 2, rel=1e-6)


def test_terms_are_not_clamped_before_summing() -> None:
    """30 - 29 = 1; with 30 clamped to 20 it would be -9."""
    assert make_inputs({"a": [30.0, -29.0]}).ratio(Level.sequence).tolist() == pytest.approx([math.e] * 2)


PRESET_BATCH = {
    "mild": [3.0, 0.6],  # product 1.8, geometric mean 1.34
    "close": [1.005],
    "high": [5.5, 0.4],  # product 2.2
    "cancelling": [2e-5, 5e4],  # product 1, geometric mean 1: only the veto sees it
    "low": [0.3, 0.4],  # product 0.12
}


@pytest.mark.parametrize(
    ("preset", "weights"),
    [
        # min(ratio, 2)
        ("tis", [2, 0.6, 1.005, 2, 0.4, 2e-5, 2, 0.3, 0.4]),
        # The product, where it is at most 2 and no ratio below 1e-4; there is no lower bound.
        ("mis", [1.8, 1.8, 1.005, 0, 0, 0, 0, 0.12, 0.12]),
        # The ratio, where it is in [0.5, 5].
        ("icepop", [3, 0.6, 1.005, 0, 0, 0, 0, 0, 0]),
        # 1, where the geometric mean is in [0.99, 1.01] and no ratio below 1e-4.
        ("geometric_rs", [0, 0, 1, 0, 0, 0, 0, 0, 0]),
        ("off", [1] * 9),
    ],
)
def test_presets(preset: str, weights: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "assets" / "worldfacts"
    folder.mkdir(parents=True)
    for name in ("corpus.jsonl", "train.jsonl", "test.jsonl"):
        (folder / name).touch()
    monkeypatch.chdir(tmp_path)
    config = load_config(["+experiment=smoke", f"importance={preset}"])[0].importance
    correction = correct(make_inputs(logs(PRESET_BATCH)), config)
    assert correction.weights.tolist() == pytest.approx(weights, rel=1e-5)
    assert correction.keep.tolist() == [weight > 0 for weight in weights]


def test_the_default_is_the_preset_tis() -> None:
    weights = correct(make_inputs(logs(PRESET_BATCH)), ImportanceConfig()).weights
    assert weights.tolist() == pytest.approx([2, 0.6, 1.005, 2, 0.4, 2e-5, 2, 0.3, 0.4], rel=1e-5)


def test_switched_off_ignores_every_other_setting() -> None:
    for settings in TABLE:
        config = table_config(*settings)
        config.enabled = False
        inputs = make_inputs(BATCH)
        correction = correct(inputs, config)
        assert correction.weights.tolist() == [1.0] * len(correction.weights)
        assert correction.keep.all()
        assert measure(inputs, correction).normalizer(config) == 1.0
        assert not needs_global(config)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, False),
        ({"normalize": True}, True),
        ({"mode": WeightMode.clip}, False),
        ({"mode": WeightMode.custom}, False),  # a weight of 0 drops nothing
        ({"mode": WeightMode.mask}, True),
        ({"mode": WeightMode.mask, "dropped_in_denominator": True}, False),
        ({"mode": WeightMode.mask, "dropped_in_denominator": True, "normalize": True}, True),
        ({"rejection": RejectionConfig(level=RejectionLevel.token)}, True),
        (
            {"rejection": RejectionConfig(level=RejectionLevel.geometric), "dropped_in_denominator": True},
            False,
        ),
        ({"veto": 1e-4}, True),
        ({"veto": 1e-4, "dropped_in_denominator": True}, False),
    ],
)
def test_needs_global(settings: dict[str, object], expected: bool) -> None:
    assert needs_global(ImportanceConfig(**settings)) is expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("level", "lo", "hi", "expected"),
    [
        ("token", None, None, (0.5, 2.0)),
        ("sequence", None, None, (0.5, 2.0)),
        ("geometric", None, None, (1 / 1.01, 1.01)),
        ("token", None, 4.0, (0.25, 4.0)),
        ("geometric", 0.99, None, (0.99, 1.01)),
        ("token", 0.0, 5.0, (0.0, 5.0)),
        ("token", None, math.inf, (0.0, math.inf)),
        ("token", 1.0, 1.0, (1.0, 1.0)),
    ],
)
def test_bounds(level: str, lo: float | None, hi: float | None, expected: tuple[float, float]) -> None:
    assert bounds(Level(level), lo, hi) == expected


# --- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lo", "hi"), [(None, 0.0), (None, 0.9), (-0.1, 2.0), (1.1, 2.0), (math.nan, 2.0), (None, math.nan)]
)
def test_bounds_must_hold_one(lo: float | None, hi: float | None) -> None:
    with pytest.raises(ValueError, match="0 <= lo <= 1 <= hi"):
        bounds(Level.token, lo, hi)
    rejection = RejectionConfig(level=RejectionLevel.sequence, lo=lo, hi=hi)
    for config in (ImportanceConfig(lo=lo, hi=hi), ImportanceConfig(rejection=rejection)):
        with pytest.raises(ValueError, match="0 <= lo <= 1 <= hi"):
            correct(make_inputs({"a": [0.0]}), config)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (None, "needs a function"),
        (lambda _: torch.ones(2), r"mine:weigh must return weights of shape \(3,\), got \(2,\)"),
        (lambda _: torch.ones(3, 1), r"mine:weigh must return weights of shape \(3,\), got \(3, 1\)"),
        (lambda _: torch.tensor([1.0, -1e-3, 1.0]), "mine:weigh returned weights that are negative, NaN or"),
        (lambda _: torch.tensor([1.0, math.nan, 1.0]), "mine:weigh returned weights that are negative"),
        (lambda _: torch.tensor([1.0, math.inf, 1.0]), "mine:weigh returned weights that are negative"),
        (lambda _: torch.full((3,), 1e300, dtype=torch.float64), "or infinite"),  # infinite in fp32
    ],
)
def test_custom_weights_are_checked(
    function: Callable[[ImportanceInputs], Tensor] | None, message: str
) -> None:
    config = ImportanceConfig(mode=WeightMode.custom, import_path="mine:weigh")
    with pytest.raises(ValueError, match=message):
        correct(make_inputs({"a": [0.0, 0.1], "b": [0.2]}), config, function)


def test_custom_weights_of_zero_are_kept() -> None:
    config = ImportanceConfig(mode=WeightMode.custom, normalize=True)
    inputs = make_inputs({"a": [0.0, 0.1]})
    correction = correct(inputs, config, lambda given: torch.zeros_like(given.old_logprobs))
    assert correction.keep.all()
    assert not correction.weights.requires_grad
    assert measure(inputs, correction).normalizer(config) == 1.0  # and not a division by zero


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("engine", [True, False])
@pytest.mark.parametrize("enabled", [True, False])
def test_non_finite_names_the_trajectories(bad: float, engine: bool, enabled: bool) -> None:
    good, broken = torch.zeros(4), torch.tensor([0.0, bad, 0.0, bad])
    inputs = ImportanceInputs(
        old_logprobs=good if engine else broken,
        sampling_logprobs=broken if engine else good,
        trajectory_index=torch.tensor([0, 0, 1, 2]),
        trajectory_ids=["7/0", "7/1", "7/2"],
    )
    with pytest.raises(NonFiniteError, match="2 of 4 tokens, in trajectories 7/0, 7/2") as error:
        correct(inputs, ImportanceConfig(enabled=enabled))
    assert ("engine" if engine else "trainer") in str(error.value)


def test_finite_values_pass() -> None:
    check_finite(torch.tensor([-1e30, 0.0]), "trainer", torch.tensor([0, 1]), ["a", "b"])
