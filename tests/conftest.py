"""What every test shares: a quiet, deterministic environment, the order of the run, and the tiny model.

``make test`` runs two tests at a time (pytest-xdist), a file's one after another, and those that look at the
same check script too: its results are made once, by whoever needs them first.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

HAS_GPU = Path("/dev/nvidiactl").exists()
CHECKS = ("lora_checks", "update_checks", "tp_checks")
"""Check scripts that tests of several files look at, named like their fixtures."""

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


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run unit tests first, then integration, then GPU tests; without a GPU, skip the last."""
    items.sort(key=_stage)  # stable: within a stage the order of the files stays
    for item in items:
        item.add_marker(pytest.mark.xdist_group(_group(item)))
        if not HAS_GPU and item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def _stage(item: pytest.Item) -> int:
    return 2 if item.get_closest_marker("gpu") else 1 if item.get_closest_marker("integration") else 0


def _group(item: pytest.Item) -> str:
    """Tests of a group run in one process."""
    asked = item.fixturenames if isinstance(item, pytest.Function) else []
    return next((name for name in CHECKS if name in asked), str(item.path))


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
    from integration.launch import run_checks

    out = tmp_path_factory.mktemp("tp_checks")
    return run_checks("tp_checks", out, tiny_model, tiny_model_untied, ranks=2, timeout_s=900, fails=True)


def _on_one_and_two(
    script: str, factory: pytest.TempPathFactory, *models: Path
) -> dict[int, tuple[Path, Checks]]:
    """What one rank leaves in its folder, two may look at: both are told of that folder."""
    from integration.launch import run_checks

    folders = {ranks: factory.mktemp(f"{script}{ranks}") for ranks in (1, 2)}
    return {
        ranks: (out, run_checks(script, out, *models, folders[1], ranks=ranks, timeout_s=900))
        for ranks, out in folders.items()
    }


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
