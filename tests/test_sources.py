"""The configured source of search results opens, is counted and recorded, and replays; or says why not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from searchrl.config import Config, ConfigError, Device, IndexKind, RetrievalConfig, RetrievalKind
from searchrl.console import Console
from searchrl.distributed import World
from searchrl.retrieval.embedded import EmbeddedServer
from searchrl.retrieval.meter import RetrievalMeter
from searchrl.retrieval.recording import CacheError
from searchrl.retrieval.types import FailureKind, RetrievalError
from searchrl.retrieval.wire import TOKEN_VARIABLE
from searchrl.sources import SourceError, index_name, open_retriever, retrieval_index, source_settings
from searchrl.trajectory import Document


@pytest.fixture
def cfg(tmp_path: Path) -> Config:
    """Three passages under BM25."""
    corpus = tmp_path / "towns" / "corpus.jsonl"
    corpus.parent.mkdir()
    texts = ['"Accra"\nAccra is the capital of Ghana.', '"Lima"\nLima is in Peru.', '"Oslo"\nOslo is cold.']
    corpus.write_text("".join(json.dumps({"id": str(i), "contents": t}) + "\n" for i, t in enumerate(texts)))
    return Config(
        device=Device.cpu,
        assets=str(tmp_path / "assets"),
        run_dir=str(tmp_path / "run"),
        retrieval=RetrievalConfig(corpus=str(corpus), index=IndexKind.bm25),
    )


class Searcher:
    """An open source: asks and says what was counted."""

    def __init__(self, cfg: Config, runner: asyncio.Runner) -> None:
        self.meter = RetrievalMeter()
        self._runner = runner
        self._open = open_retriever(
            cfg, World(rank=0, size=1, local_rank=0, device="cpu"), Console(enabled=False), runner, self.meter
        )
        self._retriever = self._open.__enter__()

    def __call__(self, query: str, top_k: int = 1) -> list[Document]:
        return self._runner.run(self._retriever.search(query, top_k))

    def close(self) -> None:
        self._open.__exit__(None, None, None)


@contextmanager
def opened(cfg: Config) -> Iterator[Searcher]:
    with asyncio.Runner() as runner:
        searcher = Searcher(cfg, runner)
        try:
            yield searcher
        finally:
            searcher.close()


@pytest.mark.integration
def test_what_an_embedded_run_recorded_is_replayed_without_it(cfg: Config, tmp_path: Path) -> None:
    cfg.retrieval.cache = str(tmp_path / "cache.sqlite")
    with opened(cfg) as search:
        found = search("capital of Ghana")
        assert [document.title for document in found] == ["Accra"]
        assert search("capital of Ghana") == found
        assert search("nothing of the kind") == []
        metrics = search.meter.take().metrics()
    assert metrics["retrieval/cache_hit"] == pytest.approx(1 / 3)
    assert metrics["retrieval/requests"] >= 2
    assert metrics["retrieval/status/ok"] == 2
    assert metrics["retrieval/status/empty"] == 1

    cfg.retrieval = RetrievalConfig(kind=RetrievalKind.replay, cache=cfg.retrieval.cache)
    with opened(cfg) as search:
        assert search("capital of Ghana") == found
        assert search("nothing of the kind") == []
        with pytest.raises(RetrievalError, match="capital of Peru") as missed:
            search("capital of Peru")
        assert missed.value.kind is FailureKind.NOT_RECORDED
        assert search.meter.take().failed == 1


@pytest.mark.integration
def test_a_recording_of_another_source_is_refused(cfg: Config, tmp_path: Path) -> None:
    cfg.retrieval.cache = str(tmp_path / "cache.sqlite")
    with opened(cfg) as search:
        search("capital of Ghana")
    cfg.retrieval.shuffle_documents = True
    with pytest.raises(CacheError, match="shuffled"), opened(cfg):
        pass


@pytest.mark.integration
def test_servers_elsewhere_get_the_token_from_the_environment(
    cfg: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = retrieval_index(cfg)
    with EmbeddedServer(index, cfg.retrieval.corpus, log_path=tmp_path / "log") as server:
        cfg.retrieval = RetrievalConfig(kind=RetrievalKind.http, urls=(server.url,))
        monkeypatch.setenv(TOKEN_VARIABLE, "secret")
        with opened(cfg) as search:
            assert search("Peru")[0].title == "Lima"


def test_a_server_that_does_not_answer_is_told_before_anything_loads(cfg: Config) -> None:
    cfg.retrieval = RetrievalConfig(kind=RetrievalKind.http, urls=("http://127.0.0.1:9",), deadline_s=0.3)
    with pytest.raises(SourceError, match=r"http://127.0.0.1:9/health cannot be reached"), opened(cfg):
        pass


def test_without_retrieval_nothing_is_found(cfg: Config) -> None:
    cfg.retrieval = RetrievalConfig(kind=RetrievalKind.none)
    with opened(cfg) as search:
        assert search("capital of Ghana") == []
        assert search.meter.take().metrics()["retrieval/status/empty"] == 1


def test_an_index_is_built_once_or_taken_from_where_the_user_has_it(cfg: Config, tmp_path: Path) -> None:
    built = retrieval_index(cfg)
    assert built == tmp_path / "assets" / "indexes" / "towns-bm25"
    before = (built / "manifest.json").stat().st_mtime_ns
    assert retrieval_index(cfg) == built
    assert (built / "manifest.json").stat().st_mtime_ns == before
    built.rename(tmp_path / "mine")
    cfg.retrieval.index_path = str(tmp_path / "mine")
    assert retrieval_index(cfg) == tmp_path / "mine"
    cfg.retrieval.index = IndexKind.hybrid
    with pytest.raises(ConfigError, match=r"mine is a bm25 index, but retrieval\.index=hybrid; choose"):
        retrieval_index(cfg)
    cfg.retrieval = RetrievalConfig(kind=RetrievalKind.none)
    with pytest.raises(ConfigError, match=r"retrieval\.kind=none has no index here"):
        retrieval_index(cfg)


def test_every_setting_that_decides_vectors_is_in_the_index_name(cfg: Config) -> None:
    names = set()
    variants: list[dict[str, Any]] = [
        {"index": IndexKind.bm25},
        {"index": IndexKind.dense},
        {"index": IndexKind.hybrid},
        {"index": IndexKind.dense, "dense_index": "sq8"},
        {"index": IndexKind.dense, "encoder": "other"},
        {"index": IndexKind.dense, "encoder_family": "e5"},
    ]
    for changes in variants:
        cfg.retrieval = RetrievalConfig(corpus="c/corpus.jsonl", **changes)
        names.add(index_name(cfg))
    assert len(names) == 6


def test_how_searches_travel_is_no_part_of_what_they_find(cfg: Config) -> None:
    def settings(**changes: Any) -> list[str]:
        cfg.retrieval = RetrievalConfig(**changes)
        return source_settings(cfg)

    assert settings(corpus="a/c.jsonl") == settings(corpus="a/c.jsonl", timeout_s=1.0, deadline_s=2.0)
    different = [
        settings(corpus="a/c.jsonl"),
        settings(corpus="b/c.jsonl"),
        settings(corpus="a/c.jsonl", index_path="i"),
        settings(kind=RetrievalKind.http, urls=("http://a",)),
        settings(kind=RetrievalKind.replay, cache="a"),
        settings(kind=RetrievalKind.google),
        settings(kind=RetrievalKind.none),
    ]
    assert len({tuple(item) for item in different}) == len(different)
