"""Adapters train as the book says, at every ZeRO stage and on any ranks; the engine and exports have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from integration.launch import Checks

pytestmark = pytest.mark.integration

RANKS = (1, 2)
STAGES = ("zero0", "zero2", "zero3")


@pytest.fixture(scope="module")
def checks(lora_checks: dict[int, tuple[Path, Checks]]) -> dict[int, Checks]:
    """By number of ranks."""
    return {ranks: checks for ranks, (_, checks) in lora_checks.items()}


@pytest.fixture(scope="module", params=[(ranks, stage) for ranks in RANKS for stage in STAGES])
def result(request: pytest.FixtureRequest, checks: dict[int, Checks]) -> dict[str, Any]:
    ranks, stage = request.param
    values = checks[ranks].results[stage]
    assert isinstance(values, dict)
    return values


def test_the_gradient_is_that_of_plain_autograd(result: dict[str, Any]) -> None:
    assert result["gradient"] <= 1e-5


def test_steps_move_the_policy_and_nothing_that_is_frozen(result: dict[str, Any]) -> None:
    assert result["logprobs moved"] > 1
    assert result["base moved"] == 0


def test_the_reference_stays_exactly_where_the_policy_began(result: dict[str, Any]) -> None:
    assert result["reference moved"] == 0


def test_weights_leave_the_actor_merged(result: dict[str, Any]) -> None:
    assert result["merge"] <= 1e-7
    assert result["merge matters"] > 0.01


def test_exports_compute_what_the_policy_does(result: dict[str, Any]) -> None:
    whole, base_with_adapter = result["exported"]
    assert whole <= 1e-5
    assert base_with_adapter <= 1e-5


def test_a_resumed_run_takes_exactly_the_same_step(result: dict[str, Any]) -> None:
    assert result["resumed"] == 0


def test_a_checkpoint_holds_the_adapters_alone(result: dict[str, Any]) -> None:
    # two layers of seven linear modules of two matrices; nothing else
    assert result["saved"] == [28, True]


def test_a_checkpoint_without_one_of_them_is_refused(result: dict[str, Any]) -> None:
    message, name = result["refusal"]
    assert f"missing or of another size: weight of {name}, exp_avg of {name}" in message


def test_adapters_begin_alike_at_every_stage_and_on_any_ranks(
    lora_checks: dict[int, tuple[Path, Checks]],
) -> None:
    starts = [start for out, _ in lora_checks.values() for start in torch.load(out / "adapters.pt").values()]
    assert len(starts) == len(RANKS) * len(STAGES)
    for start in starts:
        assert start.keys() == starts[0].keys()
        assert all(torch.equal(start[name], starts[0][name]) for name in start)
        assert all(start[name].any() == (".lora_A." in name) for name in start)


@pytest.mark.parametrize("ranks", RANKS)
def test_bf16_trains_too(checks: dict[int, Checks], ranks: int) -> None:
    result = checks[ranks].results["bf16"]
    assert result["gain"] > 1  # Σ advantage × how much likelier the tokens became
    assert result["reference moved"] == 0
    assert result["dtypes"] == ["torch.bfloat16"]


def test_the_engine_gets_the_adapters(checks: dict[int, Checks]) -> None:
    engine = checks[1].results["engine"]
    assert engine["start"] <= 1e-3
    assert "engine and trainer differ by" in engine["unmerged"]
    assert engine["merged"] <= 1e-3


@pytest.mark.parametrize("model", ["tied", "untied"])
@pytest.mark.parametrize(("ranks", "trained"), [(1, "whole"), (2, "lora")])
def test_recomputed_activations_give_the_same_gradient(
    checks: dict[int, Checks], model: str, ranks: int, trained: str
) -> None:
    result = checks[ranks].results[f"{model}/{trained}"]
    assert result["error"] <= 1e-5
    recomputed, kept = result["runs"]
    assert recomputed == 2 * kept > 0


def test_without_adapters_the_actor_is_no_reference(checks: dict[int, Checks]) -> None:
    assert "load a Reference" in checks[1].results["tied/whole"]["reference"]


@pytest.mark.parametrize("ranks", RANKS)
def test_nothing_is_printed(checks: dict[int, Checks], ranks: int) -> None:
    assert checks[ranks].printed == ""
