"""On a real GPU: a checkpoint gives back what was saved, and the optimizer goes on from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from integration.launch import run_checks

pytestmark = pytest.mark.gpu


def test_a_checkpoint_gives_back_what_was_saved(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")  # check scripts are for CPUs unless told otherwise
    for name, case in run_checks("shard_checks", tmp_path, tiny_model, "cuda").results.items():
        assert case["loaded"], name
        assert case.get("loaded elsewhere", True), name
        assert case["an update matters"], name
        assert case["error"] <= 1e-2, (name, case)  # backward passes on a GPU need not repeat their bits
