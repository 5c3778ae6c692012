"""What the Python API refuses, and what importing it costs. What it does: tests/integration/test_api.py."""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

import searchrl
from example import ROOT
from searchrl import api
from searchrl.config import ConfigError

CALLS: dict[str, Callable[..., object]] = {
    "train": lambda overrides: searchrl.train("quickstart", overrides),
    "evaluate": lambda overrides: searchrl.evaluate(None, "quickstart", overrides),
    "rollout": lambda overrides: searchrl.rollout(["Who?"], None, "quickstart", overrides),
}


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("import searchrl", "searchrl.api hydra torch transformers rich numpy"),
        ("from searchrl import train, evaluate, rollout, open_policy", "hydra torch transformers numpy"),
    ],
)
def test_importing_it_is_light(code: str, heavy: str) -> None:
    program = f"import sys\n{code}\nprint(*(name for name in {heavy.split()} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_every_name_is_there_and_documented() -> None:
    for name in searchrl.__all__:
        exported = getattr(searchrl, name)
        assert exported is getattr(api, name)
        assert inspect.getdoc(exported)
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = searchrl.trian
    assert not (ROOT / "src" / "searchrl" / "rollout.py").exists(), "a module would hide the function"


@pytest.mark.usefixtures("shipped_files")
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"optimiser.lr": 1}, "did you mean 'optimizer.lr'"),
        ({"processes": 2}, "works in one process, but this run would have 2"),
        ({"device_memory_gib": 0.25}, "GiB"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_loads(
    name: str, overrides: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        CALLS[name](overrides)


@pytest.mark.usefixtures("shipped_files")
@pytest.mark.parametrize("name", CALLS)
def test_it_is_not_called_where_it_cannot_work(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def inside() -> None:
        CALLS[name]({})

    with pytest.raises(ConfigError, match=r"searchrl\.\w+ runs an event loop of its own"):
        asyncio.run(inside())
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match=r"searchrl\.\w+ cannot begin while a policy is open"):
        CALLS[name]({})


@pytest.mark.usefixtures("shipped_files")
def test_torch_before_the_first_call_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert torch is not None
    monkeypatch.delenv("OMP_WAIT_POLICY")
    with (
        pytest.warns(RuntimeWarning, match="torch was imported before searchrl") as told,
        pytest.raises(ConfigError),
    ):
        searchrl.train("quickstart", {"device_memory_gib": 0.25})
    assert told[0].filename == __file__


@pytest.mark.parametrize(("samples", "temperature"), [(0, 0.0), (1, -0.1)])
def test_a_rollout_needs_a_sample_and_a_temperature(samples: int, temperature: float) -> None:
    run: Any = None  # nothing of it is looked at
    with pytest.raises(ConfigError, match=f"samples={samples}, temperature={temperature:g}: there must be"):
        api.Policy(run).rollout(["Who?"], samples=samples, temperature=temperature)
