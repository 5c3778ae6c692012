"""On a real GPU: the plan sees its memory, and a step that memory ran out in is made with less."""

from __future__ import annotations

from pathlib import Path

import pytest

from integration.launch import run_checks
from searchrl.plan.machine import gpu_memory

pytestmark = pytest.mark.gpu


def test_the_plan_sees_the_memory_of_the_gpu() -> None:
    import torch

    smallest = min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
    assert gpu_memory() == pytest.approx(smallest, rel=0.05)


def test_a_step_that_memory_ran_out_in_is_made_with_less(tiny_model: Path, tmp_path: Path) -> None:
    found = run_checks("oom_checks", tmp_path, tiny_model, "cuda", device="cuda").results
    for name, case in found.items():
        assert case["retries"] >= 1, name
        assert case["weights"] <= 1e-5, (name, case)
        assert case["metrics"] <= 1e-4, (name, case)
