"""What stands in the environment before anything heavy is imported."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from integration.launch import environment
from searchrl.environment import LAUNCHER_VARIABLE, prepare_environment

CORES = len(os.sched_getaffinity(0))


def prepared(monkeypatch: pytest.MonkeyPatch, device: str, **given: str) -> dict[str, str]:
    environment = dict(given)
    monkeypatch.setattr(os, "environ", environment)
    prepare_environment(device)
    return environment


def test_threads_of_a_cpu_run_spin_briefly_and_then_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = prepared(monkeypatch, "cpu")
    assert environment["OMP_NUM_THREADS"] == str(CORES)
    assert (environment["OMP_WAIT_POLICY"], environment["GOMP_SPINCOUNT"]) == ("PASSIVE", "300000")
    assert environment["DS_ACCELERATOR"] == "cpu"


def test_a_gpu_run_gets_no_settings_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = prepared(monkeypatch, "cuda")
    assert not {"DS_ACCELERATOR", "GOMP_SPINCOUNT", "TORCHDYNAMO_DISABLE"} & environment.keys()
    assert environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


def test_ranks_share_the_cores_though_torchrun_says_one(monkeypatch: pytest.MonkeyPatch) -> None:
    torchrun = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    assert prepared(monkeypatch, "cpu", **torchrun)["OMP_NUM_THREADS"] == str(max(1, CORES // 2))


def test_ranks_of_our_own_launcher_keep_the_users_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = {"TORCHELASTIC_RUN_ID": "none", LAUNCHER_VARIABLE: "1", "LOCAL_WORLD_SIZE": "2"}
    assert prepared(monkeypatch, "cpu", **launched)["OMP_NUM_THREADS"] == str(max(1, CORES // 2))
    assert prepared(monkeypatch, "cpu", **launched, OMP_NUM_THREADS="3")["OMP_NUM_THREADS"] == "3"


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"OMP_NUM_THREADS": "3", "GOMP_SPINCOUNT": "0", "VLLM_LOGGING_LEVEL": "DEBUG"}
    assert given.items() <= prepared(monkeypatch, "cpu", **given).items()


def test_a_tiny_model_gets_one_thread_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for given, threads in (({}, "1"), ({"OMP_NUM_THREADS": "3"}, "3")):
        environment = dict(given)
        monkeypatch.setattr(os, "environ", environment)
        prepare_environment("cpu", is_tiny=True)
        assert environment["OMP_NUM_THREADS"] == threads


def test_bars_of_libraries_are_not_drawn() -> None:
    script = (
        "from searchrl.environment import prepare_environment\n"
        "prepare_environment('cpu')\n"
        "from tqdm import tqdm\n"
        "from tqdm.auto import trange\n"
        "assert list(tqdm(range(3), desc='Capturing CUDA graphs')) == list(trange(3)) == [0, 1, 2]\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, check=True)
    assert (ended.stdout, ended.stderr) == (b"", b"")
