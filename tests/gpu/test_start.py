"""With NVIDIA GPUs: they are counted as torch counts them, each gets a rank, and the doctor agrees."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from integration.launch import python, run
from searchrl.launcher import visible_gpus

pytestmark = [pytest.mark.gpu, pytest.mark.integration]


@pytest.fixture(scope="module")
def folder(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with the worldfacts set."""
    at = tmp_path_factory.mktemp("start")
    data = ["data", "worldfacts", "--out", "assets/worldfacts", "--wheels", assets / "wheels"]
    ended = run(python("searchrl.cli", data), cwd=at, timeout_s=600)
    assert ended.returncode == 0, ended.stdout
    return at


@pytest.mark.parametrize("listed", [None, "0", "", "-1", "0,99"])
def test_gpus_are_counted_as_torch_counts_them(
    listed: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if listed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    asked = run(
        [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"], cwd=tmp_path, timeout_s=120
    )
    assert visible_gpus() == int(asked.stdout.split()[-1])


def test_the_doctor_finds_a_ready_machine(folder: Path) -> None:
    ended = run(python("searchrl.cli", ["doctor"]), cwd=folder, timeout_s=900)
    assert ended.returncode == 0, ended.stdout
    assert re.search(rf"NCCL adds 256 MiB over {visible_gpus()} rank", ended.stdout)


def test_every_gpu_gets_a_rank(folder: Path) -> None:
    gpus = visible_gpus()
    settings = ["+experiment=smoke", "device=cuda", "steps=1", f"groups_per_step={4 * gpus}"]
    ended = run(python("searchrl.cli", ["train", *settings]), cwd=folder, timeout_s=900)
    assert ended.returncode == 0, ended.stdout
    ranks = folder.glob("runs/smoke/trajectories/step-000001.rank*.jsonl")
    assert len(list(ranks)) == gpus
