"""The configured source of search results opens, is counted and recorded, and replays; or says why not."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from integration.launch import environment
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


NODE = """
import asyncio, re, sys
from pathlib import Path
import httpx
import torch.distributed as dist
from searchrl.config import Config, Device, IndexKind, RetrievalConfig
from searchrl.console import Console
from searchrl.distributed import init_world
from searchrl.retrieval.meter import RetrievalMeter
from searchrl.sources import open_retriever

folder, corpus, assets = map(Path, sys.argv[1:])
cfg = Config(
    device=Device.cpu,
    assets=str(assets),
    run_dir=str(folder / "run"),
    retrieval=RetrievalConfig(corpus=str(corpus), index=IndexKind.bm25),
)
world = init_world("cpu")
dist.init_process_group("gloo")
with asyncio.Runner() as runner:
    with open_retriever(cfg, world, Console(enabled=False), runner, RetrievalMeter()) as source:
        (found,) = runner.run(source.retriever.search("capital of Ghana", 1))
        dist.barrier()
        log = folder / "run" / ("retriever.rank1.log" if world.rank else "retriever.log")
        port = re.search(r"serving on port (\\d+)", log.read_text())[1]
        asked = re.search(r'queries_total{outcome="computed"} (\\S+)', httpx.get(f"http://127.0.0.1:{port}/metrics").text)
        print(found.title, port, asked[1])
dist.destroy_process_group()
"""
"""A rank that searches once; as `setup.open_environment` does it."""


class Searcher:
    """An open source: asks and says what was counted."""

    def __init__(self, cfg: Config, runner: asyncio.Runner) -> None:
        self.meter = RetrievalMeter()
        self._runner = runner
        self._open = open_retriever(
            cfg, World(rank=0, size=1, local_rank=0, device="cpu"), Console(enabled=False), runner, self.meter
        )
        source = self._open.__enter__()
        self._retriever, self.identity = source.retriever, source.identity

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


def two_nodes(folder: Path, corpora: Sequence[Path], assets: Sequence[Path]) -> list[tuple[int, str]]:
    """Exit code and output of two ranks that are each the first of a node; gloo over loopback joins them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank, (corpus, own) in enumerate(zip(corpora, assets, strict=True)):
        variables = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-c", NODE, folder, corpus, own],
                env=environment() | variables,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    return [(rank.returncode, output) for rank, output in zip(ranks, outputs, strict=True)]


@pytest.mark.integration
def test_every_node_has_a_server_of_its_own_over_an_index_built_once(cfg: Config, tmp_path: Path) -> None:
    corpus, assets = Path(cfg.retrieval.corpus), tmp_path / "assets"
    ended = two_nodes(tmp_path, [corpus] * 2, [assets] * 2)
    assert [code for code, _ in ended] == [0, 0], ended
    found, ports, asked = zip(*(output.split() for _, output in ended), strict=True)
    assert found == ("Accra", "Accra")
    assert len(set(ports)) == 2
    assert asked == ("1.0", "1.0")  # by the rank of its own node, and nobody else
    for port in ports:  # both have been stopped
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", int(port)), timeout=1)


@pytest.mark.integration
def test_nodes_that_search_in_different_indexes_are_refused(cfg: Config, tmp_path: Path) -> None:
    corpus = Path(cfg.retrieval.corpus)
    other = tmp_path / "other" / "corpus.jsonl"
    other.parent.mkdir()
    other.write_text(corpus.read_text().replace("Oslo", "Rome"))
    ended = two_nodes(tmp_path, [corpus, other], [tmp_path / "a", tmp_path / "b"])
    assert [code != 0 and "the nodes' copies of the corpus" in output for code, output in ended] == [True] * 2


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
        settings(kind=RetrievalKind.custom, import_path="a:B"),
        settings(kind=RetrievalKind.custom, import_path="a:B", kwargs={"c": 1}),
    ]
    assert len({tuple(item) for item in different}) == len(different)
