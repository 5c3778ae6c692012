"""With NVIDIA GPUs: they are counted as torch counts them, each gets a rank, and the doctor agrees."""

from __future__ import annotations

import re
import signal
import sys
from pathlib import Path

import pytest

from integration.launch import python, read_until, run, started
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


def test_a_preempted_run_saves_while_its_engine_is_awake_and_goes_on(folder: Path) -> None:
    """During a rollout the optimizer is on the host: the engine has to make room for the checkpoint."""
    settings = ["+experiment=smoke", "name=preempted", "device=cuda", f"groups_per_step={4 * visible_gpus()}"]
    command = python("searchrl.cli", ["train", *settings, "steps=50"])
    with started(command, cwd=folder, timeout_s=900) as process:
        printed = read_until(process, "step 1/50")
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate()
    assert process.returncode == 75, printed + rest
    (saved,) = re.findall(r"saved after step (\d+)", rest)
    resume = [f"steps={int(saved) + 1}", "resume=true"]
    ended = run(python("searchrl.cli", ["train", *settings, *resume]), cwd=folder, timeout_s=900)
    assert ended.returncode == 0, ended.stdout
    assert f"continuing after step {saved}" in ended.stdout
