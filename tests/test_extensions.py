"""Functions named by import path: found in the folder one works in, and every way to name them wrongly."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from searchrl.config import ConfigError
from searchrl.extensions import load_class, load_function

SOURCE = """
CONSTANT = 3

def scaled(inputs, *, factor=1.0):
    return inputs * factor

class Good:
    def __init__(self, *, size=1):
        self.size = size

    async def search(self, query, top_k):
        return [query] * top_k * self.size

class Heir(Good):
    pass

class Blocking:
    def search(self, query, top_k): ...

class Narrow:
    async def search(self, query): ...

def make(): ...
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("my_extension", "my_broken_extension"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    Path("my_extension.py").write_text(SOURCE, encoding="utf-8")
    Path("my_broken_extension.py").write_text("import no_such_library\n", encoding="utf-8")


def test_a_function_in_the_current_folder_gets_its_arguments() -> None:
    function = load_function("my_extension:scaled", {"factor": 2.5}, section="loss", positional=1)
    assert function(4) == 10.0


@pytest.mark.parametrize(
    ("import_path", "kwargs", "message"),
    [
        ("my_extension", {}, "is not of the form module:function, for example"),
        ("my_extension:", {}, "is not of the form module:function"),
        (":scaled", {}, "is not of the form module:function"),
        (
            "my_extention:scaled",
            {},
            "cannot be imported: ModuleNotFoundError(\"No module named 'my_extention'",
        ),
        ("my_broken_extension:f", {}, "cannot be imported: ModuleNotFoundError(\"No module named 'no_such"),
        ("my_extension:scale", {}, "my_extension has no scale; did you mean 'scaled'?"),
        ("my_extension:CONSTANT", {}, "is 3, which cannot be called"),
        (
            "my_extension:scaled",
            {"factr": 1},
            "cannot be called with 1 argument and loss.kwargs={'factr': 1}: got an unexpected keyword",
        ),
    ],
)
def test_a_wrong_name_is_explained(import_path: str, kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_function(import_path, kwargs, section="loss", positional=1)
    assert str(caught.value).startswith(f"loss.import_path={import_path}")
    assert message in str(caught.value)


def test_too_few_parameters_are_noticed_before_the_run() -> None:
    with pytest.raises(ConfigError, match="cannot be called with 2 arguments"):
        load_function("my_extension:scaled", {}, section="reward", positional=2)


METHODS = {"search": ("query", "top_k")}


@pytest.mark.parametrize("name", ["Good", "Heir"])
def test_a_class_is_made_with_its_arguments(name: str) -> None:
    make = load_class(f"my_extension:{name}", {"size": 2}, section="retrieval", methods=METHODS)
    assert asyncio.run(make().search("q", 1)) == ["q", "q"]


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("make", {}, "is <function make at"),
        ("Goood", {}, "my_extension has no Goood; did you mean 'Good'?"),
        ("Good", {"sise": 1}, "cannot be called with 0 arguments and retrieval.kwargs={'sise': 1}"),
        ("Blocking", {}, "needs a method `async def search(self, query, top_k)`"),
        ("Narrow", {}, "needs a method `async def search(self, query, top_k)`: too many positional"),
    ],
)
def test_a_class_that_cannot_do_is_explained(name: str, kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_class(f"my_extension:{name}", kwargs, section="retrieval", methods=METHODS)
    assert str(caught.value).startswith(f"retrieval.import_path=my_extension:{name}")
    assert message in str(caught.value)
