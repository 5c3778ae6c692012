"""An engine over two GPUs, in bf16: the checks of ``tests/integration``, with NCCL and CUDA graphs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from integration.launch import Checks, run_checks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


@pytest.fixture(scope="module")
def checks(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Checks:
    out = tmp_path_factory.mktemp("tp")
    return run_checks(
        "tp_checks", out, tiny_model, "-", "cuda", ranks=2, timeout_s=600, fails=True, device="cuda"
    )


def test_engine_and_trainer_agree_after_a_sync_and_a_fault_is_noticed(checks: Checks) -> None:
    sync = checks.results["sync"]
    assert sync["start"]["sync/probe_max_abs_diff"] <= 0.5
    assert sync["after the sync"]["sync/probe_max_abs_diff"] <= 0.5
    assert "differ by" in sync["corrupted tensor"]["broken"]["error"]
    assert sync["corrupted tensor"]["repaired"]["sync/probe_max_abs_diff"] <= 0.5


def test_ranks_play_together_and_stay_together(checks: Checks) -> None:
    results = checks.results
    first, second = results["greedy"]
    assert [len(one["token_ids"]) for one in first] == results["limits"]
    assert second == []
    assert [half["at rest"] for half in results["early end"]] == [True, True]
    assert all("sampled different tokens" in rank["outcome"] for rank in results["other seeds"])


def test_failures_end_both_ranks(checks: Checks) -> None:
    for rank in checks.results["bad episode"]:
        assert "no such page" in rank["outcome"]
    assert checks.ended - checks.results["failing at"] < 120
