"""What every test shares: a quiet, deterministic environment, the order of the run, and the tiny model.

The longest checks, scripts of their own, start before the first test and run beside the others: unit tests
keep one core busy.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

HAS_GPU = Path("/dev/nvidiactl").exists()
BACKGROUND = {"lora_checks": (1, 2), "update_checks": (1, 2), "tp_checks": (2,)}
"""Check scripts that run beside the tests, named like their fixtures, and on how many ranks."""

# Before anything imports torch: none of this can be changed afterwards. What the user has set stays.
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for a model hub is wrong
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("OMP_NUM_THREADS", str(min(2, len(os.sched_getaffinity(0)))))

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
    if item.get_closest_marker("gpu") is not None:
        return 3
    if item.get_closest_marker("integration") is None:
        return 0
    return 2 if _background_checks([item]) else 1


def _background_checks(items: Sequence[pytest.Item]) -> list[str]:
    """Those of them that these tests look at."""
    asked = {name for item in items if isinstance(item, pytest.Function) for name in item.fixturenames}
    return [name for name in BACKGROUND if name in asked]


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


@pytest.fixture(scope="session", autouse=True)
def background(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[tuple[str, int], Future[tuple[Path, Checks]]]]:
    """Check scripts that this session's tests look at, one after another, on one rank and on two."""
    from integration.launch import run_checks

    def check(script: str, ranks: int) -> tuple[Path, Checks]:
        out = folders[script, ranks] = tmp_path_factory.mktemp(f"{script}{ranks}")
        # What one rank left, two may look at.
        given = [*models, folders[script, 1]] if (script, 1) in folders else models
        return out, run_checks(script, out, *given, ranks=ranks, timeout_s=900, fails=script == "tp_checks")

    scripts, folders = _background_checks(request.session.items), dict[tuple[str, int], Path]()
    models = [request.getfixturevalue(name) for name in ("tiny_model", "tiny_model_untied") if scripts]
    pool = ThreadPoolExecutor(1)
    # Those on one rank first: beside the unit tests, some of which look at the clock, only one core is free.
    order = [(script, ranks) for ranks in (1, 2) for script in scripts if ranks in BACKGROUND[script]]
    yield {key: pool.submit(check, *key) for key in order}
    pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session")
def update_checks(
    background: dict[tuple[str, int], Future[tuple[Path, Checks]]],
) -> dict[int, tuple[Path, Checks]]:
    """By number of ranks: the folder and the results of ``update_checks``."""
    return {ranks: background["update_checks", ranks].result() for ranks in (1, 2)}


@pytest.fixture(scope="session")
def lora_checks(
    background: dict[tuple[str, int], Future[tuple[Path, Checks]]],
) -> dict[int, tuple[Path, Checks]]:
    """By number of ranks: the folder and the results of ``lora_checks``."""
    return {ranks: background["lora_checks", ranks].result() for ranks in (1, 2)}


@pytest.fixture(scope="session")
def tp_checks(background: dict[tuple[str, int], Future[tuple[Path, Checks]]]) -> Checks:
    """The results of ``tp_checks``, where two ranks hold an engine."""
    return background["tp_checks", 2].result()[1]


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
