"""Compare kinds of dense index on the same vectors: what they find, what they cost."""

from __future__ import annotations

import json
import multiprocessing
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt

from searchrl.retrieval.build import dense_record
from searchrl.retrieval.convert import flat_vectors
from searchrl.retrieval.corpus import Corpus
from searchrl.retrieval.dense import FaissVectors, VectorIndex
from searchrl.retrieval.dense_build import write_dense
from searchrl.retrieval.encoder import TextKind
from searchrl.retrieval.flatfile import faiss
from searchrl.retrieval.kinds import DenseKind, resolve_kind
from searchrl.retrieval.loading import load_encoder, open_vectors
from searchrl.retrieval.manifest import BuildError

_QUERY_SEED = 0
_QUERY_CHARACTERS = 256
_BATCH = 64
_MEASURE_S = 10.0
"""Longest time for one figure of speed; afterwards it is taken from the queries so far."""

_P = ParamSpec("_P")
_R = TypeVar("_R")


@dataclass(kw_only=True, slots=True, frozen=True)
class Measurement:
    """One kind, measured with one thread. Speeds are those of the index alone, without the encoder."""

    kind: str
    recall: float
    """Share of the flat index's results that it finds."""
    disk: int
    """Bytes of its files."""
    resident: int
    """Bytes of memory of its own (RssAnon)."""
    mapped: int
    """Bytes of its files that searches brought into the page cache (RssFile)."""
    build_s: float
    single_qps: float
    """Queries a second, one at a time."""
    batch_qps: float
    """Queries a second, 64 at a time."""
    cpu_ms: float
    """CPU milliseconds a query, 64 at a time."""


def evaluate_kinds(
    directory: Path,
    kinds: Sequence[str],
    *,
    queries: Sequence[str],
    encoder_path: Path | None = None,
    top_k: int = 3,
    on_result: Callable[[Measurement], None] = lambda measurement: None,
) -> list[Measurement]:
    """Build and measure each of ``kinds`` from the exact vectors of the index in ``directory``.

    Each is built and searched in a process of its own, in a temporary folder beside the index. Raises
    `IndexMismatchError` if the index has no exact vectors or another encoder, `BuildError` for an unknown
    kind.
    """
    directory = directory.absolute()
    manifest, flat = flat_vectors(directory)
    assert manifest.encoder is not None
    assert manifest.dim is not None
    resolved = [resolve_kind(name, rows=manifest.rows, dim=manifest.dim) for name in kinds]
    encoder = load_encoder(directory, manifest.encoder, encoder_path, "cpu")
    vectors = encoder.encode(queries, TextKind.QUERY)
    truth = [[hit.row for hit in hits] for hits in FaissVectors(flat).search(vectors, top_k)]
    results = []
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.parent) as folder:
        for number, kind in enumerate(resolved):
            place = Path(folder, str(number))
            place.mkdir()
            build_s = _apart(_build, flat, kind, place)
            result = _apart(_measure, kind, place, vectors, truth, top_k, build_s)
            results.append(result)
            on_result(result)
    return results


def sample_queries(corpus: Corpus, number: int) -> list[str]:
    """First sentences of ``number`` passages, the same every time: queries for want of questions."""
    rows = np.random.default_rng(_QUERY_SEED).permutation(len(corpus))[:number]
    texts = (corpus[int(row)].contents.partition("\n") for row in rows)
    bodies = (text or title for title, _, text in texts)
    return [re.split(r"(?<=[.!?])\s", body, maxsplit=1)[0][:_QUERY_CHARACTERS] for body in bodies]


def read_queries(path: Path) -> list[str]:
    """The ``question`` of each line of a JSONL file; raises `BuildError` naming a line that has none."""
    queries = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                question = json.loads(line)["question"]
            except (ValueError, RecursionError, KeyError, TypeError) as error:
                raise BuildError(f'{path}, line {number}: needs a JSON object with a "question"') from error
            queries.append(str(question))
    if not queries:
        raise BuildError(f"{path} has no questions")
    return queries


def _apart(function: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
    """Run ``function`` in a process of its own, whose memory is nobody else's."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args, **kwargs).result()


def _build(flat: Path, kind: DenseKind, folder: Path) -> float:
    started = time.monotonic()
    write_dense(flat, kind, folder, progress=False)
    return time.monotonic() - started


def _measure(
    kind: DenseKind,
    folder: Path,
    vectors: npt.NDArray[np.float32],
    truth: list[list[int]],
    top_k: int,
    build_s: float,
) -> Measurement:
    faiss().omp_set_num_threads(1)
    before = _memory()
    index = open_vectors(folder, dense_record(kind), ["cpu"])
    found = index.search(vectors, top_k)
    after = _memory()
    same = sum(len({hit.row for hit in hits} & set(rows)) for hits, rows in zip(found, truth, strict=True))
    single_qps, _ = _speed(index, vectors, 1, top_k)
    batch_qps, cpu_ms = _speed(
        index, np.resize(vectors, (max(_BATCH, len(vectors)), index.dim)), _BATCH, top_k
    )
    return Measurement(
        kind=kind.name,
        recall=same / sum(map(len, truth)),
        disk=sum(file.stat().st_size for file in folder.iterdir()),
        resident=max(0, after["RssAnon"] - before["RssAnon"]),
        mapped=max(0, after["RssFile"] - before["RssFile"]),
        build_s=build_s,
        single_qps=single_qps,
        batch_qps=batch_qps,
        cpu_ms=cpu_ms,
    )


def _speed(
    index: VectorIndex, vectors: npt.NDArray[np.float32], batch: int, top_k: int
) -> tuple[float, float]:
    """Return queries a second, and CPU milliseconds a query."""
    done, started, cpu = 0, time.monotonic(), time.process_time()
    for start in range(0, len(vectors) - batch + 1, batch):
        index.search(vectors[start : start + batch], top_k)
        done += batch
        if time.monotonic() - started > _MEASURE_S:
            break
    return done / (time.monotonic() - started), (time.process_time() - cpu) / done * 1000


def _memory() -> dict[str, int]:
    """Bytes of this process's memory, by kind."""
    fields = re.findall(r"^(Rss\w+):\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return {name: int(value) * 1024 for name, value in fields}
