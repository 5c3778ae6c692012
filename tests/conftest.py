"""What every test shares: a quiet, deterministic environment, the order of the run, and the tiny model.

``make test`` runs the tests in two processes (pytest-xdist), those of a file one after another. Results of
check scripts that tests of several files look at are made once, by the process that needs them first.
"""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

HAS_GPU = Path("/dev/nvidiactl").exists()
# Before anything imports torch: none of this can be changed afterwards. What the user has set stays.
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for a model hub is wrong
os.environ.setdefault("WANDB_MODE", "disabled")
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, min(2, len(os.sched_getaffinity(0)) // workers))))

from example import touch_shipped_files
from searchrl.environment import prepare_environment

prepare_environment("cuda" if HAS_GPU else "cpu")

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from integration.launch import Checks


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run unit tests first, then integration, then GPU tests; without a GPU, skip the last."""
    items.sort(key=_stage)  # stable: within a stage the order of the files stays
    if not HAS_GPU:
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def _stage(item: pytest.Item) -> int:
    return 2 if item.get_closest_marker("gpu") else 1 if item.get_closest_marker("integration") else 0


@pytest.fixture(scope="session")
def assets() -> Path:
    """The checkout's own ``assets`` folder: downloads and converted models survive from run to run."""
    return Path(__file__).parents[1] / "assets"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of ``random:tiny``: two layers, fp32, tied head, byte-level tokenizer, 8k context."""
    return _tiny("random:tiny", tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_model_untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of ``random:tiny-untied``: the same with a head of its own."""
    return _tiny("random:tiny-untied", tmp_path_factory)


@pytest.fixture(scope="session")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of ``random:tiny``: every byte, a few merges, ChatML."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    loaded = AutoTokenizer.from_pretrained(tiny_model)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    return loaded


@pytest.fixture(scope="session")
def update_checks(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_model_untied: Path
) -> dict[int, tuple[Path, Checks]]:
    """By number of ranks: the folder and the results of ``update_checks``."""
    return _on_one_and_two("update_checks", tmp_path_factory, tiny_model, tiny_model_untied)


@pytest.fixture(scope="session")
def lora_checks(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_model_untied: Path
) -> dict[int, tuple[Path, Checks]]:
    """By number of ranks: the folder and the results of ``lora_checks``."""
    return _on_one_and_two("lora_checks", tmp_path_factory, tiny_model, tiny_model_untied)


@pytest.fixture(scope="session")
def tp_checks(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_model_untied: Path) -> Checks:
    """The results of ``tp_checks``, where two ranks hold an engine; how it ends is its last check."""
    out = _common_folder(tmp_path_factory) / "tp_checks"
    return _once("tp_checks", out, tiny_model, tiny_model_untied, ranks=2, fails=True)


def _on_one_and_two(
    script: str, factory: pytest.TempPathFactory, *models: Path
) -> dict[int, tuple[Path, Checks]]:
    """What one rank leaves in its folder, two may look at: both are told of that folder."""
    folders = {ranks: _common_folder(factory) / f"{script}{ranks}" for ranks in (1, 2)}
    return {
        ranks: (out, _once(script, out, *models, folders[1], ranks=ranks)) for ranks, out in folders.items()
    }


def _common_folder(factory: pytest.TempPathFactory) -> Path:
    """Of all processes of this session."""
    own = factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def _once(script: str, out: Path, *arguments: Path, ranks: int, fails: bool = False) -> Checks:
    """Run the script, unless a process of this session has; its results."""
    from integration.launch import Checks, run_checks

    out.mkdir(exist_ok=True)
    kept = out / "checks.json"
    with (out / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            checks = run_checks(script, out, *arguments, ranks=ranks, timeout_s=900, fails=fails)
            kept.write_text(json.dumps(asdict(checks)), encoding="utf-8")
    return Checks(**json.loads(kept.read_text(encoding="utf-8")))


@pytest.fixture
def shipped_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, in which every shipped configuration finds its files; its keys are set."""
    touch_shipped_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("SERPER_API_KEY", "BRAVE_API_KEY"):
        monkeypatch.setenv(name, "k")
    return tmp_path


def _tiny(name: str, factory: pytest.TempPathFactory) -> Path:
    from searchrl.models import resolve_model

    # Built afresh in every session, so that no test can pass on a folder that older code made.
    folder = resolve_model(name, factory.mktemp("assets"))
    assert isinstance(folder, Path)
    return folder
