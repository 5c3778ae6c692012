"""Settings of search results: where they come from and how they are ranked."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class RetrievalKind(StrEnum):
    """Where search results come from."""

    embedded = "embedded"
    http = "http"
    google = "google"
    brave = "brave"
    searxng = "searxng"
    mcp = "mcp"
    custom = "custom"
    replay = "replay"
    none = "none"
    oracle = "oracle"


class IndexKind(StrEnum):
    """How the embedded retriever ranks passages."""

    bm25 = "bm25"
    dense = "dense"
    hybrid = "hybrid"


@dataclass(kw_only=True, slots=True)
class WebConfig:
    """Search on the web. Keys come from the environment only: SERPER_API_KEY, BRAVE_API_KEY, MCP_TOKEN."""

    url: str = ""
    """searxng: base URL of the instance. mcp: the server's endpoint. Others know their own."""
    tool: str = "search"
    """mcp: name of the tool, which takes a string ``query``."""
    snippet_only: bool = True
    """Documents are the engine's snippets. False: pages are fetched, the text around the snippet is kept."""
    country: str = "us"
    """google, brave: whose results."""
    language: str = "en"
    """Of the results."""
    proxy: str = ""
    """URL of a proxy for engine and pages."""
    requests_per_second: float = 50.0
    """Bound on requests to the engine by one rank."""
    max_requests: int = 0
    """Requests by one rank after which searches fail: a bound on the cost; 0: none."""
    blocked_domains: tuple[str, ...] = ("huggingface.co", "github.com", "kaggle.com", "quizlet.com")
    """Results from these are dropped: pages that hold the benchmarks' answers."""


@dataclass(kw_only=True, slots=True)
class RetrievalConfig:
    """Search results: an embedded server, servers elsewhere, the web, one's own tool, or an ablation."""

    kind: RetrievalKind = RetrievalKind.embedded
    """``embedded``: the train command starts a server on loopback, one a node, and stops it at the end.
    ``custom``: a tool or retriever of one's own, ``import_path`` (docs/extending.md).
    ``oracle``: every search returns the question's ``metadata.gold_passages``; for `searchrl eval` only."""
    corpus: str = ""
    """embedded, oracle: passages, JSONL."""
    index: IndexKind = IndexKind.bm25
    """embedded: how passages are ranked."""
    dense_index: str = "flat"
    """embedded: how ``dense`` and ``hybrid`` hold vectors: a name that `searchrl index kinds` lists."""
    index_path: str = ""
    """embedded: folder of an index that `searchrl index` made; empty: built on first use under ``assets``."""
    encoder: str = "package:minilm"
    """embedded: sentence encoder of ``dense`` and ``hybrid``: a hub name, a folder or ``package:minilm``."""
    encoder_family: str = "minilm"
    """embedded: prefixes and pooling: ``minilm``, ``e5`` or ``bge``."""
    devices: tuple[str, ...] = ("cpu",)
    """embedded: where encoder and dense index compute, say [cuda:7]; vectors are sharded over several."""
    urls: tuple[str, ...] = ()
    """http: base URLs of servers that speak ``POST /retrieve``; SEARCHRL_RETRIEVAL_TOKEN is sent if set."""
    timeout_s: float = 30.0
    """Seconds for one request; several are tried before a search counts as failed."""
    deadline_s: float = 120.0
    """Seconds for a search in all, retries and waiting for a restarted server included."""
    patience_s: float = 600.0
    """Seconds that a run pauses while no search works, beyond ``deadline_s``, before searches fail; 0: none.
    As long as a server needs to come back, loading its index included."""
    max_concurrency: int = 256
    """Searches of one rank that are under way at once; more wait."""
    cache: str = ""
    """SQLite file that records every answer and answers what it has; empty: none. replay: the recording."""
    web: WebConfig = field(default_factory=WebConfig)
    """google, brave, searxng, mcp."""
    import_path: str = ""
    """custom: ``module:Class`` whose objects have ``async search(query, top_k) -> list[Document]`` and
    ``async aclose()``."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """custom: arguments that the object is made with."""
    shuffle_documents: bool = False
    """embedded: return real but unrelated passages (an ablation)."""
    max_failed_fraction: float = 0.1
    """A step in which more trajectories than this are void stops the run, after a checkpoint."""
