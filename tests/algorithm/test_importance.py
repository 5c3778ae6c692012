"""Truncated importance sampling: hand-derived tables, exactness under any cut, loud failure."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from searchrl.algorithm.importance import (
    MAX_KEYS,
    SUM_KEYS,
    ImportanceTotals,
    NonFiniteError,
    truncated_importance_weights,
)


def run(
    log_ratio: list[float], index: list[int], ids: list[str], hi: float = 2.0
) -> tuple[list[float], ImportanceTotals]:
    """Weights and totals for logπ_old - logπ_roll = ``log_ratio``."""
    sampling = torch.full((len(log_ratio),), -2.0)
    old = (sampling + torch.tensor(log_ratio)).requires_grad_()
    weights, totals = truncated_importance_weights(
        old, sampling, torch.tensor(index, dtype=torch.long), ids, hi=hi
    )
    assert not weights.requires_grad
    return weights.tolist(), totals


def test_table() -> None:
    """Two trajectories: log-ratios (ln 4, 0) and (ln 1/2); hi = 2."""
    weights, totals = run([math.log(4), 0.0, -math.log(2)], [0, 0, 1], ["a", "b"])
    assert weights == pytest.approx([2.0, 1.0, 0.5])
    # Geometric means: sqrt(4 · 1) = 2 and 1/2, untruncated.
    ess = (2.0 + 0.5) ** 2 / (4.0 + 0.25)
    assert totals.finalize() == pytest.approx(
        {
            "tis/weight_mean": 3.5 / 3,
            "tis/ratio_mean": 5.5 / 3,
            "tis/ratio_min": 0.5,
            "tis/ratio_max": 4.0,
            "tis/truncated_fraction": 1 / 3,
            "tis/k1": -(math.log(4) - math.log(2)) / 3,
            "tis/k3": ((4 - 1 - math.log(4)) + (0.5 - 1 + math.log(2))) / 3,
            "tis/abs_logprob_diff_mean": (math.log(4) + math.log(2)) / 3,
            "tis/abs_logprob_diff_max": math.log(4),
            "tis/effective_sample_size": ess,
            "tis/ess_ratio": ess / 2,
        },
        rel=1e-6,
    )


def test_identical_engines() -> None:
    weights, totals = run([0.0] * 5, [0, 0, 1, 2, 2], ["a", "b", "c"])
    assert weights == [1.0] * 5
    metrics = totals.finalize()
    ones = ("weight_mean", "ratio_mean", "ratio_min", "ratio_max", "ess_ratio")
    assert [metrics[f"tis/{name}"] for name in ones] == [1.0] * 5
    zeros = ("truncated_fraction", "k1", "k3", "abs_logprob_diff_mean", "abs_logprob_diff_max")
    assert [metrics[f"tis/{name}"] for name in zeros] == [0.0] * 5
    assert metrics["tis/effective_sample_size"] == 3.0


def test_single_token() -> None:
    weights, totals = run([math.log(3)], [0], ["a"])
    assert weights == pytest.approx([2.0])
    assert totals.finalize()["tis/ess_ratio"] == 1.0


def test_ess_sees_drift_that_truncation_hides() -> None:
    """Nine trajectories at ratio 1 and one at 100: the truncated weights look fine, the ESS does not."""
    _, totals = run([0.0] * 9 + [math.log(100)], list(range(10)), [str(i) for i in range(10)])
    metrics = totals.finalize()
    assert metrics["tis/weight_mean"] == pytest.approx(1.1)
    assert metrics["tis/effective_sample_size"] == pytest.approx(109**2 / 10009, rel=1e-5)


def test_trajectories_without_loss_tokens_do_not_count() -> None:
    _, totals = run([0.0, 0.0], [0, 2], ["a", "silent", "c"])
    assert totals.sums["trajectories"] == 2
    assert totals.finalize()["tis/ess_ratio"] == 1.0


@pytest.mark.parametrize("extreme", [1e4, -1e4])
def test_extreme_ratios_are_clamped(extreme: float) -> None:
    weights, totals = run([extreme], [0], ["a"])
    assert weights == pytest.approx([2.0 if extreme > 0 else math.exp(-20)])
    assert all(math.isfinite(value) for value in totals.finalize().values())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("engine", [True, False])
def test_non_finite_names_the_trajectories(bad: float, engine: bool) -> None:
    good, broken = torch.zeros(4), torch.tensor([0.0, bad, 0.0, bad])
    old, sampling = (good, broken) if engine else (broken, good)
    with pytest.raises(NonFiniteError, match="2 of 4 tokens, in trajectories 7/0, 7/2") as error:
        truncated_importance_weights(old, sampling, torch.tensor([0, 0, 1, 2]), ["7/0", "7/1", "7/2"])
    assert ("engine" if engine else "trainer") in str(error.value)


def test_bound_must_be_positive() -> None:
    with pytest.raises(ValueError, match="positive"):
        run([0.0], [0], ["a"], hi=0.0)


def test_no_tokens() -> None:
    weights, totals = run([], [], [])
    assert weights == []
    assert totals == ImportanceTotals.empty()
    assert totals.finalize() == {}
    assert tuple(totals.sums) == SUM_KEYS
    assert tuple(totals.maxima) == MAX_KEYS


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.floats(-3, 3), min_size=1, max_size=5), min_size=1, max_size=6), st.data())
def test_totals_are_exact_under_any_cut(trajectories: list[list[float]], data: st.DataObject) -> None:
    """Merging micro-batches of whole trajectories equals one batch of all."""
    ids = [str(number) for number in range(len(trajectories))]

    def totals(part: list[int]) -> ImportanceTotals:
        values = [value for number in part for value in trajectories[number]]
        index = [place for place, number in enumerate(part) for _ in trajectories[number]]
        return run(values, index, [ids[number] for number in part])[1]

    cut = data.draw(st.integers(0, len(ids)))
    numbers = list(range(len(ids)))
    merged = totals(numbers[cut:]).merge(ImportanceTotals.empty()).merge(totals(numbers[:cut]))
    whole = totals(numbers)
    assert merged.finalize() == pytest.approx(whole.finalize(), rel=1e-9, abs=1e-12)
    reference = [math.exp(sum(values) / len(values)) for values in trajectories]
    ess = sum(reference) ** 2 / sum(w * w for w in reference)
    assert whole.finalize()["tis/effective_sample_size"] == pytest.approx(ess, rel=1e-4)
