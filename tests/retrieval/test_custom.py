"""A retriever of the user's own: opened as configured, bounded, and what it must not do stops the run."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from searchrl.config import Config, Device, RetrievalConfig, RetrievalKind
from searchrl.console import Console
from searchrl.distributed import World
from searchrl.errors import own_words
from searchrl.retrieval.custom import CustomRetriever, CustomSearchError, open_custom
from searchrl.retrieval.meter import RetrievalMeter
from searchrl.retrieval.types import FailureKind, RetrievalError
from searchrl.sources import open_retriever
from searchrl.trajectory import Document

SOURCE = '''
import asyncio
from pathlib import Path
from searchrl.retrieval.types import FailureKind, RetrievalError
from searchrl.trajectory import Document

class Echo:
    """Answers with its query, so many times."""

    def __init__(self, *, times=1, log=""):
        asyncio.get_running_loop()  # where a client opens its connections
        self.times, self.log = times, log

    async def search(self, query, top_k):
        if query == "down":
            raise RetrievalError("the engine is down", kind=FailureKind.UNAVAILABLE)
        return [Document(id=str(i), contents=f'"{query}"\\ntext', score=1.0) for i in range(self.times)]

    async def aclose(self):
        if self.log:
            Path(self.log).write_text("closed")
'''


@pytest.fixture
def cfg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    (tmp_path / "my_tool.py").write_text(SOURCE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_tool", raising=False)
    retrieval = RetrievalConfig(
        kind=RetrievalKind.custom,
        import_path="my_tool:Echo",
        kwargs={"times": 3, "log": str(tmp_path / "log")},
        patience_s=0.0,
    )
    return Config(device=Device.cpu, run_dir=str(tmp_path / "run"), retrieval=retrieval)


def opened(cfg: Config, queries: list[str]) -> tuple[list[list[Document]], str, RetrievalMeter]:
    """What the configured source finds, its identity and its meter."""
    meter = RetrievalMeter()
    world = World(rank=0, size=1, local_rank=0, device="cpu")
    with (
        asyncio.Runner() as runner,
        open_retriever(cfg, world, Console(enabled=False), runner, meter) as source,
    ):
        found = [runner.run(source.retriever.search(query, 2)) for query in queries]
    return found, source.identity, meter


def test_it_answers_is_counted_and_closed(cfg: Config, tmp_path: Path) -> None:
    (found,), identity, meter = opened(cfg, ["Oslo"])
    assert [(document.id, document.title) for document in found] == [("0", "Oslo"), ("1", "Oslo")]
    assert meter.take().metrics()["retrieval/status/ok"] == 1
    assert (tmp_path / "log").read_text() == "closed"
    cfg.retrieval.kwargs["times"] = 1
    (found,), other, _ = opened(cfg, ["Oslo"])
    assert len(found) == 1
    assert other != identity


def test_what_it_found_is_recorded_and_replayed(cfg: Config, tmp_path: Path) -> None:
    cfg.retrieval.cache = str(tmp_path / "cache.sqlite")
    found, identity, _ = opened(cfg, ["Oslo"])
    cfg.retrieval = RetrievalConfig(kind=RetrievalKind.replay, cache=cfg.retrieval.cache)
    assert opened(cfg, ["Oslo"])[:2] == (found, identity)


def test_a_failure_is_a_failed_search(cfg: Config) -> None:
    with pytest.raises(RetrievalError, match="the engine is down"):
        opened(cfg, ["down"])


def test_one_that_cannot_be_made_says_why(cfg: Config) -> None:
    Path("my_tool.py").write_text(SOURCE.replace("self.times, self.log", "self.times, log.name"))
    with pytest.raises(CustomSearchError) as caught:
        opened(cfg, [])
    assert str(caught.value).startswith(
        "retrieval.import_path=my_tool:Echo could not be made: AttributeError(\"'str' object has no attribute"
    )
    assert str(caught.value).endswith(f"({Path('my_tool.py').resolve()}:12)")


class Inner:
    """Does what its query says."""

    def __init__(self) -> None:
        self.running = self.most = 0

    async def search(self, query: str, top_k: int) -> list[Document]:
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(10.0 if query == "hang" else 0.01)
        self.running -= 1
        returned: dict[str, Any] = {
            "text": "Oslo",
            "none": None,
            "texts": ["Oslo"],
            "number": [Document(id="1", contents=5, score=1.0)],  # type: ignore[arg-type]
            "id": [Document(id=1, contents="", score=1.0)],  # type: ignore[arg-type]
            "nothing": [],
        }
        if query == "zero":
            raise ZeroDivisionError("1 / 0")
        if query == "late":
            raise TimeoutError
        found: list[Document] = returned.get(query, [])
        return found

    async def aclose(self) -> None: ...


def ask(query: str, *, deadline_s: float = 5.0) -> list[Document]:
    retriever = CustomRetriever(Inner(), name="tool", deadline_s=deadline_s, max_concurrency=2)
    return asyncio.run(retriever.search(query, 3))


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("text", "tool returned 'Oslo' when asked for 'text'; it must be a list of searchrl.trajectory.Doc"),
        ("none", "tool returned 'None' when asked for 'none'; it must be a list"),
        ("texts", "tool returned \"['Oslo']\" when asked for"),
        ("number", "tool returned \"[Document(id='1', contents=5, score=1.0)]\" when asked"),
        ("id", "tool returned \"[Document(id=1, contents='', score=1.0)]\" when asked"),
        ("zero", "tool raised ZeroDivisionError('1 / 0') ("),
    ],
)
def test_what_it_must_not_do_is_an_error_that_names_the_query(query: str, message: str) -> None:
    with pytest.raises(CustomSearchError) as caught:
        ask(query)
    assert str(caught.value).startswith(message)
    assert f"when asked for '{query}'; " in str(caught.value)


def test_nothing_found_is_a_result() -> None:
    assert ask("nothing") == []


@pytest.mark.parametrize("query", ["hang", "late"])
def test_a_timeout_is_a_failed_search(query: str) -> None:
    with pytest.raises(
        RetrievalError, match=r"tool did not answer in retrieval\.deadline_s=0\.2 s"
    ) as caught:
        ask(query, deadline_s=0.2)
    assert caught.value.kind is FailureKind.TIMEOUT


def test_so_many_run_at_once() -> None:
    async def several() -> int:
        inner = Inner()
        retriever = CustomRetriever(inner, name="tool", deadline_s=5.0, max_concurrency=2)
        await asyncio.gather(*(retriever.search("nothing", 1) for _ in range(5)))
        return inner.most

    assert asyncio.run(several()) == 2


def test_its_error_comes_out_of_the_groups_that_episodes_run_in() -> None:
    async def grouped(work: Coroutine[Any, Any, Any]) -> None:
        async with asyncio.TaskGroup() as outer:

            async def inner() -> None:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(work)

            outer.create_task(inner())

    async def play() -> None:
        make = open_custom(Inner, name="tool", deadline_s=5.0, max_concurrency=2)
        await grouped((await make).search("zero", 1))

    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(play())
    said, code = own_words(caught.value) or ("", 0)
    assert "zero" in said
    assert code == 1
    assert own_words(ExceptionGroup("", [ValueError("a"), ExceptionGroup("", [KeyError("b")])])) is None
