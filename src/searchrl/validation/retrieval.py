"""Checks of the source of search results."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from searchrl.config import ConfigError, IndexKind, RetrievalConfig, RetrievalKind
from searchrl.extensions import load_class
from searchrl.retrieval.custom import METHODS
from searchrl.retrieval.devices import DeviceError, gpu_numbers
from searchrl.retrieval.kinds import dense_index_problem
from searchrl.retrieval.wire import TOKEN_VARIABLE, is_token
from searchrl.validation.addresses import is_http_address


def retrieval_problems(retrieval: RetrievalConfig, training: bool) -> Iterator[str]:
    """Every problem of the source of search results, a sentence each."""
    if retrieval.shuffle_documents and retrieval.kind is not RetrievalKind.embedded:
        yield (
            f"retrieval.shuffle_documents=true shuffles the embedded corpus, which retrieval.kind="
            f"{retrieval.kind} does not have; choose retrieval=shuffled, or set it to false"
        )
    if retrieval.cache and retrieval.kind in (RetrievalKind.none, RetrievalKind.oracle):
        yield (
            f"retrieval.cache={retrieval.cache} has nothing to record with retrieval={retrieval.kind}; leave "
            "it empty"
        )
    if training and retrieval.kind is RetrievalKind.oracle:
        yield (
            "retrieval.kind=oracle returns the gold passages whatever is asked, so a policy would learn that "
            "queries do not matter; use it with `searchrl eval`, or choose retrieval=bm25"
        )
    if retrieval.kind is not RetrievalKind.custom and (retrieval.import_path or retrieval.kwargs):
        yield (
            "retrieval.import_path and retrieval.kwargs are only used with retrieval.kind=custom, not "
            f"{retrieval.kind}; choose retrieval=custom, or leave them out"
        )
    match retrieval.kind:
        case RetrievalKind.embedded:
            yield from _embedded(retrieval)
        case RetrievalKind.http:
            if not retrieval.urls:
                yield "retrieval.urls is empty; name at least one server, for example [http://127.0.0.1:8000]"
            for url in retrieval.urls:
                if not is_http_address(url):
                    yield f"retrieval.urls holds {url!r}, which is no http:// or https:// address"
            token = os.environ.get(TOKEN_VARIABLE)
            if token and not is_token(token):
                yield f"the environment variable {TOKEN_VARIABLE} must be printable ASCII without spaces"
        case RetrievalKind.google | RetrievalKind.brave | RetrievalKind.searxng | RetrievalKind.mcp:
            yield from _web(retrieval)
        case RetrievalKind.custom:
            yield from _custom(retrieval)
        case RetrievalKind.replay:
            if not retrieval.cache:
                yield "retrieval.cache is not set; name the recording that retrieval=replay answers from"
            elif not Path(retrieval.cache).is_file():
                yield (
                    f"retrieval.cache={retrieval.cache} does not exist; record one by running the same with "
                    "another retrieval and retrieval.cache=FILE"
                )
        case RetrievalKind.oracle:
            yield from _corpus(retrieval)
        case RetrievalKind.none:
            pass


def _custom(retrieval: RetrievalConfig) -> Iterator[str]:
    if not retrieval.import_path:
        yield "retrieval.kind=custom needs retrieval.import_path, of the form module:Class"
        return
    try:
        load_class(retrieval.import_path, retrieval.kwargs, section="retrieval", methods=METHODS)
    except ConfigError as error:
        yield str(error)


def _corpus(retrieval: RetrievalConfig) -> Iterator[str]:
    if not retrieval.corpus:
        yield "retrieval.corpus is not set; name a corpus (JSONL), or choose retrieval=none or http"
    elif not Path(retrieval.corpus).is_file():
        yield (
            f"retrieval.corpus={retrieval.corpus} does not exist; `searchrl data worldfacts` builds "
            "the quickstart's"
        )


def _embedded(retrieval: RetrievalConfig) -> Iterator[str]:
    yield from _corpus(retrieval)
    families = ("minilm", "e5", "bge")
    if retrieval.index is not IndexKind.bm25 and retrieval.encoder_family not in families:
        yield (
            f"retrieval.encoder_family={retrieval.encoder_family} is unknown; choose one of "
            + ", ".join(families)
        )
    if retrieval.index is not IndexKind.bm25 and (problem := dense_index_problem(retrieval.dense_index)):
        yield f"retrieval.dense_index={retrieval.dense_index}: {problem}"
    if retrieval.index_path and not (Path(retrieval.index_path) / "manifest.json").is_file():
        yield (
            f"retrieval.index_path={retrieval.index_path} holds no index (no manifest.json); make one with "
            "`searchrl index build`, or leave it empty to have one built under assets"
        )
    try:
        gpu_numbers(retrieval.devices)
    except DeviceError as error:
        yield f"retrieval.devices: {error}"


_KEYS = {RetrievalKind.google: "SERPER_API_KEY", RetrievalKind.brave: "BRAVE_API_KEY"}


def _web(retrieval: RetrievalConfig) -> Iterator[str]:
    key = _KEYS.get(retrieval.kind)
    if key is not None and not os.environ.get(key):
        yield f"retrieval.kind={retrieval.kind} needs a key in the environment variable {key}"
    url = retrieval.web.url
    if key is None and not is_http_address(url):
        example = "http://127.0.0.1:8080" + ("/mcp" if retrieval.kind is RetrievalKind.mcp else "")
        yield (
            f"retrieval.web.url={url!r} is no http:// or https:// address, which retrieval.kind="
            f"{retrieval.kind} needs; for example {example}"
        )
    if not retrieval.web.requests_per_second > 0:
        yield f"retrieval.web.requests_per_second={retrieval.web.requests_per_second:g} must be above 0"
    if retrieval.web.proxy and not is_http_address(retrieval.web.proxy):
        yield f"retrieval.web.proxy={retrieval.web.proxy!r} is no http:// or https:// address"
    if retrieval.kind is RetrievalKind.mcp and not retrieval.web.tool:
        yield "retrieval.web.tool is not set; name the search tool of the MCP server"
    if retrieval.web.max_requests < 0:
        yield f"retrieval.web.max_requests={retrieval.web.max_requests} must not be negative"
