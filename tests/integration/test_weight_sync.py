"""After a sync engine and trainer agree, and every way of not agreeing that we know is noticed."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from integration.launch import Checks, run_checks

pytestmark = pytest.mark.integration

BOUND = 1e-3  # nats, in fp32
FAULTS = ("corrupted tensor", "skipped tensor", "not a number", "stale cache")


@pytest.fixture(scope="module")
def both(
    tiny_model: Path, tiny_model_untied: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Checks, Checks]:
    """A tied model under ZeRO-2, an untied one under ZeRO-3, side by side."""
    with ThreadPoolExecutor() as pool:
        tied, untied = (
            pool.submit(run_checks, "weight_sync_checks", tmp_path_factory.mktemp("sync"), model, stage)
            for model, stage in ((tiny_model, 2), (tiny_model_untied, 3))
        )
        return tied.result(), untied.result()


@pytest.fixture(scope="module")
def tied(both: tuple[Checks, Checks]) -> Checks:
    return both[0]


@pytest.fixture(scope="module")
def untied(both: tuple[Checks, Checks]) -> Checks:
    return both[1]


@pytest.fixture(scope="module", params=["tied", "untied"])
def checks(request: pytest.FixtureRequest) -> Checks:
    value = request.getfixturevalue(request.param)
    assert isinstance(value, Checks)
    return value


def reported(outcome: dict[str, Any]) -> float:
    """The difference that a ``SyncError`` names; it names the bound as well."""
    match = re.search(r"differ by (\S+) nats .* sync\.probe_max_abs_diff allows 0\.001\.", outcome["error"])
    assert match, outcome
    return float(match.group(1))


def test_engine_and_trainer_start_alike(checks: Checks) -> None:
    assert checks.results["start"]["sync/probe_max_abs_diff"] <= BOUND


def test_an_update_that_is_not_synced_is_noticed(checks: Checks) -> None:
    # The update moves log-probabilities far more than the bound, or the tests below would show nothing.
    assert reported(checks.results["before the sync"]) > 100 * BOUND


def test_a_sync_makes_them_agree_and_stamps_the_version(checks: Checks) -> None:
    after = checks.results["after the sync"]
    assert after["sync/probe_max_abs_diff"] <= BOUND
    assert after["version"] == 1


def test_a_tied_head_travels_once(tied: Checks, untied: Checks) -> None:
    head = untied.results["start"]["sync/megabytes"] - tied.results["start"]["sync/megabytes"]
    assert head > 0.1


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed_and_the_next_sync_repairs_it(checks: Checks, fault: str) -> None:
    assert reported(checks.results[fault]["broken"]) > 5 * BOUND
    assert checks.results[fault]["repaired"]["sync/probe_max_abs_diff"] <= BOUND


def test_a_stale_tied_head_is_noticed(tied: Checks) -> None:
    assert reported(tied.results["stale head"]["broken"]) > 5 * BOUND
    assert tied.results["stale head"]["repaired"]["sync/probe_max_abs_diff"] <= BOUND


def test_a_skipped_head_is_noticed(untied: Checks) -> None:
    assert reported(untied.results["skipped head"]["broken"]) > 5 * BOUND


def test_two_ranks_that_hold_an_engine_get_and_prove_the_same_weights(tp_checks: Checks) -> None:
    sync = tp_checks.results["sync"]
    assert sync["start"]["sync/probe_max_abs_diff"] <= BOUND
    assert reported(sync["before the sync"]) > 100 * BOUND
    assert sync["after the sync"]["sync/probe_max_abs_diff"] <= BOUND
    for fault in ("corrupted tensor", "stale head"):
        assert reported(sync[fault]["broken"]) > 5 * BOUND
        assert sync[fault]["repaired"]["sync/probe_max_abs_diff"] <= BOUND


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("one bit", "model.layers.1.mlp.down_proj.weight"),
        ("one bit of a part of a fused matrix", "model.layers.0.self_attn.k_proj.weight"),
        ("one bit of a norm", "model.norm.weight"),
        ("one bit of the embedding", "model.embed_tokens.weight"),
        ("skipped", "model.layers.1.mlp.up_proj.weight"),
    ],
)
def test_a_checksum_names_the_tensor(checks: Checks, fault: str, named: str) -> None:
    seen = checks.results["checksum"][fault]
    assert f"(sync.checksum=true): {named}. The engine would" in seen["broken"]["error"]
    assert seen["repaired"]["sync/probe_max_abs_diff"] <= BOUND


def test_the_probe_alone_lets_single_bits_pass(checks: Checks) -> None:
    assert [
        seen["sync/probe_max_abs_diff"] <= BOUND for seen in checks.results["checksum"]["probe alone"]
    ] == [True] * 4


def test_a_checksum_names_a_stale_tied_head(tied: Checks, untied: Checks) -> None:
    error = tied.results["checksum"]["stale head"]["error"]
    assert "(sync.checksum=true): the packed copy of lm_head.weight. The engine would" in error
    assert "sync/seconds" in untied.results["checksum"]["stale head"], (
        "an untied head needs no second packing"
    )


def test_a_checksum_passes_what_is_whole(checks: Checks) -> None:
    assert checks.results["checksum"]["no fault"]["sync/probe_max_abs_diff"] <= BOUND


def test_nothing_is_printed(checks: Checks) -> None:
    assert checks.printed == ""
