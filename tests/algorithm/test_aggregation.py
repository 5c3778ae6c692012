"""Weights and denominators against the means that they stand for, and against any cut of the batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from searchrl.algorithm.aggregation import denominator, token_weights
from searchrl.config import Aggregation

LENGTH = 10
Trajectories = list[list[tuple[float, bool]]]
"""Loss and whether it counts, by trajectory and token."""


def by_definition(trajectories: Trajectories, aggregation: Aggregation) -> float:
    """The aggregated loss in plain Python; 0 where nothing counts."""
    kept = [[loss for loss, counts in tokens if counts] for tokens in trajectories]
    kept = [losses for losses in kept if losses]
    if not kept:
        return 0.0
    match aggregation:
        case Aggregation.token:
            return sum(sum(losses) for losses in kept) / sum(len(losses) for losses in kept)
        case Aggregation.sequence:
            return sum(sum(losses) / len(losses) for losses in kept) / len(kept)
        case Aggregation.constant:
            return sum(sum(losses) for losses in kept) / (len(kept) * LENGTH)


def parts_of(trajectories: Trajectories, aggregation: Aggregation) -> tuple[float, float]:
    """(weighted sum, denominator) of one micro-batch."""
    flat = [(loss, counts, number) for number, tokens in enumerate(trajectories) for loss, counts in tokens]
    losses = torch.tensor([loss for loss, _, _ in flat], dtype=torch.float64)
    counted = torch.tensor([counts for _, counts, _ in flat], dtype=torch.bool)
    index = torch.tensor([number for _, _, number in flat], dtype=torch.long)
    weights = token_weights(aggregation, counted, index, LENGTH)
    assert not weights[~counted].any()
    return float((losses * weights).sum()), denominator(aggregation, counted, index)


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        # Losses 1 2 3 | 5 | 7 (dropped), 9 (dropped): by hand.
        (Aggregation.token, (1 + 2 + 3 + 5) / 4),
        (Aggregation.sequence, (2 + 5) / 2),
        (Aggregation.constant, 11 / (2 * LENGTH)),
    ],
)
def test_by_hand(aggregation: Aggregation, expected: float) -> None:
    batch = [[(1.0, True), (2.0, True), (3.0, True)], [(5.0, True)], [(7.0, False), (9.0, False)]]
    total, divisor = parts_of(batch, aggregation)
    assert total / divisor == pytest.approx(expected)


tokens = st.lists(st.tuples(st.floats(-10, 10, width=32), st.booleans()), min_size=0, max_size=5)


@given(trajectories=st.lists(tokens, max_size=6), cut=st.integers(0, 6), data=st.data())
def test_any_cut_gives_the_same_loss(trajectories: Trajectories, cut: int, data: st.DataObject) -> None:
    aggregation = data.draw(st.sampled_from(Aggregation))
    parts = [parts_of(trajectories[:cut], aggregation), parts_of(trajectories[cut:], aggregation)]
    total, divisor = (sum(values) for values in zip(*parts, strict=True))
    if divisor == 0:
        assert total == 0
    else:
        assert total / divisor == pytest.approx(by_definition(trajectories, aggregation), abs=1e-5)
