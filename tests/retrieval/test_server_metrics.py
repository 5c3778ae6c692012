from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx
from starlette.types import ASGIApp

from retrieval.clients import post, samples
from searchrl import __version__
from searchrl.retrieval.app import Service, create_app
from searchrl.retrieval.corpus import Corpus
from searchrl.retrieval.loading import load_index


def test_metrics_count_what_was_done_and_applications_share_none(
    serve: Callable[[ASGIApp], str], bm25_directory: Path, corpus_path: Path
) -> None:
    corpus = Corpus(corpus_path)
    service = Service(index=load_index(bm25_directory, corpus), corpus=corpus, fingerprint="f")
    with httpx.Client(base_url=serve(create_app(service)), trust_env=False) as http:
        post(http, queries=["tea", "tea", "coffee"])
        post(http, query="tea")
        post(http, query="")
        text = http.get("/metrics")
        assert text.headers["content-type"].startswith("text/plain")
        found = samples(http)
    prefix = "searchrl_retrieval_"
    expected = {
        'requests_total{status="200"}': 2,
        'requests_total{status="422"}': 1,
        'queries_total{outcome="computed"}': 2,
        'queries_total{outcome="joined"}': 1,
        'queries_total{outcome="cached"}': 1,
        'queries_total{outcome="expired"}': 0,
        "batch_size_sum": 2,
        "batch_size_count": 1,
        "queue_seconds_count": 2,
        "compute_seconds_count": 1,
        "request_seconds_count": 3,
        "queue_depth": 0,
        "cache_entries": 2,
        "index_rows": 50,
        f'index_info{{fingerprint="f",version="{__version__}"}}': 1,
    }
    assert {name: found[prefix + name] for name in expected} == expected
    assert found["process_resident_memory_bytes"] > 1e6
    assert found["process_open_fds"] > 3
    with httpx.Client(base_url=serve(create_app(service)), trust_env=False) as other:
        assert samples(other)[prefix + "request_seconds_count"] == 0
