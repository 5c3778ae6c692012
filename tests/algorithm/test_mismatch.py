"""Metrics of the importance correction: by hand, and exact under any cut of the batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from searchrl.algorithm.importance import ImportanceInputs, correct
from searchrl.algorithm.mismatch import MAX_KEYS, SUM_KEYS, ImportanceTotals, measure
from searchrl.config import ImportanceConfig, Level, RejectionConfig, RejectionLevel, WeightMode

STRICT = ImportanceConfig(
    mode=WeightMode.mask,
    lo=0.4,
    hi=3.0,
    rejection=RejectionConfig(level=RejectionLevel.geometric, lo=0.75, hi=3.0),
    veto=1e-4,
)


def totals_of(
    log_ratios: Mapping[str, Sequence[float]], config: ImportanceConfig, sampling: float = -2.0
) -> ImportanceTotals:
    """Totals for logπ_old - logπ_roll by trajectory; every logπ_roll is ``sampling``."""
    values = [value for own in log_ratios.values() for value in own]
    index = [place for place, own in enumerate(log_ratios.values()) for _ in own]
    engine = torch.full((len(values),), sampling)
    inputs = ImportanceInputs(
        old_logprobs=(engine + torch.tensor(values)).requires_grad_(),
        sampling_logprobs=engine,
        trajectory_index=torch.tensor(index, dtype=torch.long),
        trajectory_ids=list(log_ratios),
    )
    return measure(inputs, correct(inputs, config))


def test_without_drops() -> None:
    """Two trajectories with ratios (4, 1) and (1/2), weights at most 2."""
    ln2 = math.log(2)
    found = totals_of({"a": [2 * ln2, 0.0], "silent": [], "b": [-ln2]}, ImportanceConfig()).finalize()
    # Geometric means: sqrt(4 · 1) = 2 and 1/2, untruncated.
    effective = (2.0 + 0.5) ** 2 / (4.0 + 0.25)
    assert found == pytest.approx(
        {
            "tis/ratio_mean": 5.5 / 3,
            "tis/ratio_min": 0.5,
            "tis/ratio_max": 4.0,
            "tis/k1": -ln2 / 3,  # -(2 ln 2 + 0 - ln 2) / 3
            "tis/k3": ((4 - 1 - 2 * ln2) + 0 + (0.5 - 1 + ln2)) / 3,
            "tis/chi2": (16 + 1 + 0.25) / 3 - 1,
            "tis/abs_logprob_diff_mean": ln2,  # (2 + 0 + 1) ln 2 / 3
            "tis/abs_logprob_diff_max": 2 * ln2,
            "tis/perplexity_engine": math.exp(2),
            "tis/perplexity_trainer": math.exp(2 - ln2 / 3),  # mean logπ_old = -2 + ln 2 / 3
            "tis/effective_sample_size": effective,
            "tis/ess_ratio": effective / 2,
            "tis/weight_mean": 3.5 / 3,
            "tis/weight_min": 0.5,
            "tis/weight_max": 2.0,
            "tis/trajectory_weight_mean": (1.5 + 0.5) / 2,  # means of tokens: (2 + 1) / 2 and 0.5
            "tis/truncated_fraction": 1 / 3,
            "tis/masked_fraction": 0.0,
            "tis/rejected_fraction": 0.0,
            "tis/vetoed_fraction": 0.0,
            "tis/kept_fraction": 1.0,
            "tis/kept_fraction_len_lt_128": 1.0,
        },
        rel=1e-6,
    )


def test_with_drops() -> None:
    """Ratios a: (4, 1.5), b: (1/2), c: (1e-5); mask [0.4, 3], geometric rejection [0.75, 3], veto 1e-4.

    a's first token is masked; its geometric mean sqrt(6) = 2.4 is fine. b is rejected. c is masked, rejected
    and vetoed. So 1 of 4 tokens is kept, with weight 1.5.
    """
    ratios = {"a": [4.0, 1.5], "b": [0.5], "c": [1e-5]}
    totals = totals_of({name: [math.log(r) for r in own] for name, own in ratios.items()}, STRICT)
    found = totals.finalize()
    expected = {
        "weight_mean": 1.5,
        "weight_min": 1.5,
        "weight_max": 1.5,
        "trajectory_weight_mean": 1.5,
        "truncated_fraction": 0.0,
        "masked_fraction": 2 / 4,
        "rejected_fraction": 2 / 4,
        "vetoed_fraction": 1 / 3,
        "kept_fraction": 1 / 4,
        "kept_fraction_len_lt_128": 1 / 4,
        "ratio_min": 1e-5,  # the mismatch is measured on everything
        "ratio_max": 4.0,
    }
    assert {name: found[f"tis/{name}"] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert [totals.sums[key] for key in ("tokens", "kept", "trajectories", "kept_trajectories")] == [
        4,
        1,
        3,
        1,
    ]


def test_truncated_fraction_follows_the_level() -> None:
    """Ratios (1.5, 1.5) and (1): no token is above 2, but the first trajectory's product 2.25 is."""
    batch = {"a": [math.log(1.5)] * 2, "b": [0.0]}
    for level, fraction in (("token", 0.0), ("sequence", 2 / 3)):
        found = totals_of(batch, ImportanceConfig(level=Level(level), hi=2.0)).finalize()
        assert found["tis/truncated_fraction"] == pytest.approx(fraction)


def test_clipping_from_below_counts_as_truncated() -> None:
    found = totals_of({"a": [-1.0, 0.0]}, ImportanceConfig(mode=WeightMode.clip)).finalize()
    assert found["tis/truncated_fraction"] == 0.5
    assert found["tis/weight_min"] == 0.5


def test_switched_off_still_measures() -> None:
    batch = {"a": [3.0, 0.0], "b": [-3.0]}
    on, off = (
        totals_of(batch, STRICT).finalize(),
        totals_of(batch, ImportanceConfig(enabled=False)).finalize(),
    )
    before = ("ratio_mean", "ratio_min", "ratio_max", "k1", "k3", "chi2", "ess_ratio", "perplexity_trainer")
    assert [on[f"tis/{name}"] for name in before] == [off[f"tis/{name}"] for name in before]
    assert (off["tis/weight_min"], off["tis/weight_max"], off["tis/kept_fraction"]) == (1.0, 1.0, 1.0)


def test_identical_engines() -> None:
    found = totals_of({"a": [0.0] * 2, "b": [0.0], "c": [0.0] * 2}, STRICT).finalize()
    ones = ("ratio_mean", "ratio_min", "ratio_max", "ess_ratio", "weight_mean", "weight_min", "weight_max")
    assert [found[f"tis/{name}"] for name in (*ones, "kept_fraction", "trajectory_weight_mean")] == [1.0] * 9
    zeros = ("k1", "k3", "chi2", "abs_logprob_diff_mean", "abs_logprob_diff_max")
    shares = ("truncated_fraction", "masked_fraction", "rejected_fraction", "vetoed_fraction")
    assert [found[f"tis/{name}"] for name in (*zeros, *shares)] == [0.0] * 9
    assert found["tis/effective_sample_size"] == 3.0
    assert found["tis/perplexity_engine"] == found["tis/perplexity_trainer"]


def test_length_buckets() -> None:
    """A bucket is chosen by the trajectory's loss tokens, kept or not; one without tokens is absent."""
    up = 5.0  # masked
    batch = {
        "127": [up] * 27 + [0.0] * 100,
        "128": [up] * 32 + [0.0] * 96,
        "511": [0.0] * 511,
        "2048": [up] * 1024 + [0.0] * 1024,
    }
    config = ImportanceConfig(mode=WeightMode.mask)
    found = totals_of(batch, config).finalize()
    buckets = {key: value for key, value in found.items() if key.startswith("tis/kept_fraction_")}
    assert buckets == {
        "tis/kept_fraction_len_lt_128": 100 / 127,
        "tis/kept_fraction_len_128_511": (96 + 511) / (128 + 511),
        "tis/kept_fraction_len_ge_2048": 0.5,
    }
    found = totals_of({"512": [up] * 512, "2047": [0.0] * 2047}, config).finalize()
    assert found["tis/kept_fraction_len_512_2047"] == 2047 / (512 + 2047)
    assert "tis/kept_fraction_len_128_511" not in found


def test_ess_sees_drift_that_truncation_hides() -> None:
    """Nine trajectories at ratio 1 and one at 100: the truncated weights look fine, the ESS does not."""
    batch = {str(number): [0.0] for number in range(9)} | {"far": [math.log(100)]}
    found = totals_of(batch, ImportanceConfig()).finalize()
    assert found["tis/weight_mean"] == pytest.approx(1.1)
    assert found["tis/effective_sample_size"] == pytest.approx(109**2 / 10009, rel=1e-5)


@pytest.mark.parametrize("extreme", [1e4, -1e4, 25.0, -25.0])
def test_extremes_stay_finite(extreme: float) -> None:
    found = totals_of({"a": [extreme]}, ImportanceConfig()).finalize()
    assert all(math.isfinite(value) for value in found.values())
    assert found["tis/ratio_max"] == pytest.approx(math.exp(math.copysign(20.0, extreme)))
    assert found["tis/abs_logprob_diff_max"] == pytest.approx(abs(extreme))
    assert found["tis/ess_ratio"] == 1.0
    if extreme == -1e4:
        assert found["tis/perplexity_trainer"] == math.exp(20.0)


def test_nothing_kept() -> None:
    """Weights have no mean then; the rest is still reported."""
    totals = totals_of({"a": [3.0, 3.0]}, STRICT)
    found = totals.finalize()
    assert totals.maxima["weight_max"] == totals.maxima["negative_weight_min"] == -math.inf
    assert found["tis/kept_fraction"] == 0.0
    assert not {"tis/weight_mean", "tis/weight_min", "tis/weight_max", "tis/trajectory_weight_mean"} & set(
        found
    )


@pytest.mark.parametrize("names", [[], ["silent"]])
def test_no_tokens(names: list[str]) -> None:
    totals = totals_of({name: [] for name in names}, STRICT)
    assert totals == ImportanceTotals.empty()
    assert totals.finalize() == {}
    assert tuple(totals.sums) == SUM_KEYS
    assert tuple(totals.maxima) == MAX_KEYS


CONFIGS = [
    STRICT,
    ImportanceConfig(enabled=False),
    ImportanceConfig(level=Level.sequence, mode=WeightMode.mask, normalize=True),
    ImportanceConfig(level=Level.geometric, mode=WeightMode.clip, veto=0.2, normalize=True),
]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.floats(-3, 3), max_size=5), min_size=1, max_size=6),
    st.sampled_from(CONFIGS),
    st.data(),
)
def test_totals_are_exact_under_any_cut(
    trajectories: list[list[float]], config: ImportanceConfig, data: st.DataObject
) -> None:
    """Merging micro-batches of whole trajectories equals one batch of all."""
    batch = {str(number): own for number, own in enumerate(trajectories)}
    part_of = {name: data.draw(st.integers(0, 2)) for name in batch}
    merged = ImportanceTotals.empty()
    for part in (2, 0, 1):
        mine = {name: own for name, own in batch.items() if part_of[name] == part}
        merged = merged.merge(totals_of(mine, config))
    whole = totals_of(batch, config)
    assert merged.sums == pytest.approx(whole.sums, rel=1e-12, abs=1e-12)
    assert merged.maxima == whole.maxima
    assert merged.finalize() == pytest.approx(whole.finalize(), rel=1e-9, abs=1e-9)
    assert merged.normalizer(config) == pytest.approx(whole.normalizer(config), rel=1e-12)
    means = [math.exp(sum(own) / len(own)) for own in trajectories if own]
    if means:
        effective = sum(means) ** 2 / sum(mean * mean for mean in means)
        assert whole.finalize()["tis/effective_sample_size"] == pytest.approx(effective, rel=1e-4)
