"""What the Python API refuses, and what importing it costs. What it does: tests/integration/test_api.py."""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import searchrl
from example import ROOT, touch_models
from searchrl import api
from searchrl.compose import load_config
from searchrl.config import ConfigError
from searchrl.overrides import command_line_overrides
from searchrl.play import argument_parser

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
    package = ROOT / "src" / "searchrl"
    modules = {path.stem for path in package.iterdir()}
    assert not modules.intersection(searchrl.__all__), "a module would hide the function of its name"


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

    with pytest.raises(ConfigError, match=r"searchrl\.\w+ has an event loop and signal handlers of its own"):
        asyncio.run(inside())
    with ThreadPoolExecutor(1) as threads, pytest.raises(ConfigError, match=r"or from another thread"):
        threads.submit(CALLS[name], {}).result()
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


# --- docs/python.md and docs/play.md --------------------------------------------------------------------

PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
PLAY = re.findall(r"^    searchrl play (.*)$", (ROOT / "docs" / "play.md").read_text("utf-8"), re.MULTILINE)


def calls(code: str) -> list[ast.Call]:
    """Calls of the API."""
    nodes = (node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call))
    return [node for node in nodes if isinstance(node.func, ast.Name) and node.func.id in searchrl.__all__]


@pytest.mark.usefixtures("shipped_files")
@pytest.mark.parametrize("call", [call for code in BLOCKS for call in calls(code)], ids=ast.unparse)
def test_a_call_of_the_page_fits_its_function_and_composes(call: ast.Call) -> None:
    function = getattr(searchrl, ast.unparse(call.func))
    keywords = {str(word.arg): word.value for word in call.keywords}
    bound = inspect.signature(function).bind(*call.args, **keywords).arguments
    given = {name: ast.literal_eval(bound[name]) for name in ("experiment", "overrides") if name in bound}
    words = command_line_overrides(given.get("overrides", ()))
    load_config([f"+experiment={given['experiment']}", *words], training=function is searchrl.train)


def test_the_page_has_calls_of_every_kind() -> None:
    assert {ast.unparse(call.func) for code in BLOCKS for call in calls(code)} == {
        "train",
        "evaluate",
        "rollout",
    }


@pytest.mark.parametrize("command", PLAY)
def test_a_command_of_the_page_on_play_composes(command: str, shipped_files: Path) -> None:
    given = argument_parser().parse_intermixed_args(shlex.split(command))
    touch_models(given.overrides, shipped_files)
    load_config(given.overrides, training=False)


def test_the_page_on_play_has_commands() -> None:
    assert len(PLAY) == 3
