"""The optimizer's stay on the host changes no bit of training, and weights leave ZeRO-3 bucket by bucket."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from integration.launch import Checks

pytestmark = pytest.mark.integration

BYTES = {  # of the host for each parameter: moments, fp32 master weights, and at stage 3 gradients
    "zero0": 8,
    "zero1": 12,
    "zero2": 12,
    "zero3": 8 + 4 + 2,
    "zero3/fp32": 8 + 4 + 4,
}


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def measured(request: pytest.FixtureRequest, update_checks: dict[int, tuple[Path, Checks]]) -> dict[str, Any]:
    _, checks = update_checks[request.param]
    offload: dict[str, Any] = checks.results["offload"]
    return offload


@pytest.mark.parametrize("case", BYTES)
def test_updates_go_on_bit_by_bit(measured: dict[str, Any], case: str) -> None:
    result = measured[case]
    assert result["an update matters"]
    assert result["weights after"]
    assert result["moments after"]
    assert result["noop"] == [True, True, False, False]


@pytest.mark.parametrize("case", BYTES)
def test_meanwhile_the_parameters_are_there(measured: dict[str, Any], case: str) -> None:
    assert measured[case]["scores meanwhile"]
    assert measured[case]["weights meanwhile"]


@pytest.mark.parametrize("case", BYTES)
def test_meanwhile_what_needs_the_optimizer_is_refused(measured: dict[str, Any], case: str) -> None:
    refused = measured[case]["refused"]
    assert len(refused) == 3
    assert all("call Actor.reload() first" in message for message in refused)


@pytest.mark.parametrize("case", BYTES)
def test_everything_but_the_parameters_leaves(measured: dict[str, Any], case: str) -> None:
    assert measured[case]["bytes per element"] == pytest.approx(BYTES[case], rel=0.01)


def test_weights_leave_in_buckets_and_stay_valid_while_they_are_held(measured: dict[str, Any]) -> None:
    buckets = measured["buckets"]
    assert buckets["same"]
    assert buckets["order"]
    assert buckets["most gathered"] <= buckets["largest"] < buckets["elements"] / 2
