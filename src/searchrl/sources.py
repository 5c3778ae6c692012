"""Opens the configured source of search results, and what it needs: an index, a server, a recording."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from searchrl.config import Config, ConfigError, IndexKind, RetrievalConfig, RetrievalKind
from searchrl.console import Console
from searchrl.distributed import World, barrier, gather_objects
from searchrl.errors import InputError
from searchrl.extensions import load_class
from searchrl.models import resolve_model
from searchrl.retrieval.cache import CachedRetriever, DiskCache, ReplayRetriever
from searchrl.retrieval.client import HttpRetriever
from searchrl.retrieval.custom import METHODS, open_custom
from searchrl.retrieval.embedded import EmbeddedServer
from searchrl.retrieval.meter import MeteredRetriever, RetrievalMeter
from searchrl.retrieval.none import NoRetriever
from searchrl.retrieval.outage import PatientRetriever
from searchrl.retrieval.types import FailureKind, RetrievalError, Retriever
from searchrl.retrieval.wire import TOKEN_VARIABLE

SHUFFLE_SEED = 1
"""Which unrelated passages ``retrieval.shuffle_documents`` returns: the same in every run."""


class SourceError(InputError, RuntimeError):
    """The configured source of search results does not answer, or not as this run needs it."""


_DOWN = (FailureKind.TIMEOUT, FailureKind.UNAVAILABLE)

_UNNAMED = "servers "
"""How the identity of servers begins that do not name their index: all that is known are their addresses."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Source:
    """Where a run's search results come from."""

    retriever: Retriever
    identity: str
    """A name for all that decides its answers; of servers that do not name their index it says no more."""


@contextmanager
def open_retriever(
    cfg: Config, world: World, console: Console, runner: asyncio.Runner, meter: RetrievalMeter
) -> Iterator[Source]:
    """The configured source, counted by ``meter`` and, with ``retrieval.cache``, recorded.

    Raises:
        SearchrlError: the source, the index or the recording cannot be used; the message says why.
    """
    with ExitStack() as stack:
        source, identity = stack.enter_context(_open_source(cfg, world, console, runner, meter))
        stack.callback(lambda: runner.run(source.aclose()))  # also when its recording cannot be opened
        retriever = source
        if cfg.retrieval.cache and cfg.retrieval.kind is not RetrievalKind.replay:
            cache = stack.enter_context(DiskCache(cfg.retrieval.cache, identity))
            cached = CachedRetriever(source, cache, meter)
            stack.callback(lambda: runner.run(cached.aclose()))
            retriever = cached
        patient = PatientRetriever(
            retriever, patience_s=cfg.retrieval.patience_s, meter=meter, say=console.warn
        )
        # Servers move; that is no reason not to continue a run.
        shown = "servers that do not name their index" if identity.startswith(_UNNAMED) else identity
        yield Source(retriever=MeteredRetriever(patient, meter), identity=shown)


@contextmanager
def _open_source(
    cfg: Config, world: World, console: Console, runner: asyncio.Runner, meter: RetrievalMeter
) -> Iterator[tuple[Retriever, str]]:
    """The retriever itself, and a name for all that decides its answers."""
    retrieval = cfg.retrieval
    match retrieval.kind:
        case RetrievalKind.none | RetrievalKind.oracle:  # an oracle is a tool, and asks no retriever
            yield NoRetriever(), "none"
        case RetrievalKind.replay:
            recording = ReplayRetriever(retrieval.cache)
            yield recording, recording.source
        case RetrievalKind.http:
            servers, patience = ", ".join(retrieval.urls), f"retrieval.deadline_s={retrieval.deadline_s:g}"
            console.say(f"retriever: {servers}, waited for up to {patience} s")
            client = _client(cfg, list(retrieval.urls), meter, token=os.environ.get(TOKEN_VARIABLE) or None)
            yield client, _index_identity(runner, client, retrieval.urls)
        case RetrievalKind.embedded:
            with ExitStack() as stack:
                console.say(f"retriever: {retrieval.index} index over {retrieval.corpus}")
                server = _node_server(cfg, world)
                url = stack.enter_context(server).url if server is not None else ""
                client = _client(cfg, [world.of_my_node(gather_objects(url))], meter)
                yield client, _index_identity(runner, client, [])
                barrier()  # the servers stay until every rank has had its last answer
        case RetrievalKind.google | RetrievalKind.brave | RetrievalKind.searxng | RetrievalKind.mcp:
            from searchrl.retrieval.web import open_web_retriever, source_identity

            web = open_web_retriever(
                retrieval.kind,
                retrieval.web,
                timeout_s=retrieval.timeout_s,
                deadline_s=retrieval.deadline_s,
                max_concurrency=retrieval.max_concurrency,
                meter=meter,
            )
            yield web, source_identity(retrieval.kind, retrieval.web)
        case RetrievalKind.custom:
            custom = open_custom(
                load_class(retrieval.import_path, retrieval.kwargs, section="retrieval", methods=METHODS),
                name=f"retrieval.import_path={retrieval.import_path}",
                deadline_s=retrieval.deadline_s,
                max_concurrency=retrieval.max_concurrency,
            )
            yield runner.run(custom), _custom_identity(retrieval)


def _custom_identity(retrieval: RetrievalConfig) -> str:
    """The class and its arguments; what its code does is its author's to know."""
    return f"{retrieval.import_path} {json.dumps(retrieval.kwargs, sort_keys=True, default=str)}"


def _index_identity(runner: asyncio.Runner, client: HttpRetriever, urls: Sequence[str]) -> str:
    """The index behind ``client``, or the servers where they do not name it; the same on every rank."""
    try:
        found = runner.run(client.fingerprint())
        identity = f"index {found}" if found else _UNNAMED + " ".join(sorted(urls))
        for rank, other in enumerate(gather_objects(identity)):
            if other != identity:
                raise SourceError(
                    f"this rank searches in {identity}, rank {rank} in {other}: the nodes' copies of the "
                    "corpus or of the index differ; make them equal, or share one server with retrieval=http"
                )
    except (RetrievalError, SourceError) as error:
        runner.run(client.aclose())
        is_down = isinstance(error, RetrievalError) and error.kind in _DOWN
        remedy = "; start it (`searchrl serve`), or correct retrieval.urls" if is_down and urls else ""
        raise SourceError(f"{error}{remedy}") from error
    return identity


def _client(
    cfg: Config, urls: list[str], meter: RetrievalMeter, *, token: str | None = None
) -> HttpRetriever:
    return HttpRetriever(
        urls,
        timeout_s=cfg.retrieval.timeout_s,
        deadline_s=cfg.retrieval.deadline_s,
        max_concurrency=cfg.retrieval.max_concurrency,
        token=token,
        meter=meter,
    )


def retrieval_index(cfg: Config) -> Path:
    """The embedded server's index: ``retrieval.index_path``, else one under ``assets``, built now if missing.

    Raises:
        ConfigError: retrieval is not embedded, so there is nothing to index; or the index is of another kind.
    """
    from searchrl.retrieval.build import build_index
    from searchrl.retrieval.encoder import EncoderFamily
    from searchrl.retrieval.manifest import read_manifest

    retrieval = cfg.retrieval
    if retrieval.kind is not RetrievalKind.embedded:
        raise ConfigError(
            f"retrieval.kind={retrieval.kind} has no index here; choose retrieval=bm25 or hybrid"
        )
    if retrieval.index_path:
        kind = read_manifest(retrieval.index_path).kind
        if kind != retrieval.index:
            raise ConfigError(
                f"retrieval.index_path={retrieval.index_path} is a {kind} index, but retrieval.index="
                f"{retrieval.index}; choose retrieval={kind}, or another folder"
            )
        return Path(retrieval.index_path)
    index = index_folder(cfg)
    build_index(
        retrieval.corpus,
        index,
        kind=retrieval.index,
        dense_index=retrieval.dense_index,
        encoder_path=_encoder(cfg),
        encoder_family=EncoderFamily(retrieval.encoder_family),
        devices=retrieval.devices,
    )
    return index


def index_folder(cfg: Config) -> Path:
    """Where the embedded server's index stands, or will once it is built."""
    if cfg.retrieval.index_path:
        return Path(cfg.retrieval.index_path)
    # Not beside the corpus: building a data set anew replaces its whole folder.
    return Path(cfg.assets) / "indexes" / f"{Path(cfg.retrieval.corpus).parent.name}-{index_name(cfg)}"


def source_settings(cfg: Config) -> list[str]:
    """The settings that decide what searches find; those of how they travel (timeouts) are left out."""
    retrieval = cfg.retrieval
    settings = [str(retrieval.kind)]
    match retrieval.kind:
        case RetrievalKind.embedded:
            settings += [retrieval.corpus, retrieval.index_path or index_name(cfg)]
        case RetrievalKind.http:
            settings += retrieval.urls
        case RetrievalKind.replay:
            settings += [retrieval.cache]
        case RetrievalKind.google | RetrievalKind.brave | RetrievalKind.searxng | RetrievalKind.mcp:
            from searchrl.retrieval.web import source_identity

            settings += [source_identity(retrieval.kind, retrieval.web)]
        case RetrievalKind.custom:
            settings += [_custom_identity(retrieval)]
        case RetrievalKind.oracle:
            settings += [retrieval.corpus]
        case RetrievalKind.none:
            pass
    return settings


def _node_server(cfg: Config, world: World) -> EmbeddedServer | None:
    """This node's server, not started yet, on the node's first rank; None on others. A collective."""
    index = retrieval_index(cfg) if world.is_main else None
    barrier()  # a missing index is built once; the other nodes find it, unless their disk is another
    if not world.is_local_main:
        return None
    # Nodes may share the run directory.
    log = "retriever.log" if world.is_main else f"retriever.rank{world.rank}.log"
    return EmbeddedServer(
        index or retrieval_index(cfg),
        cfg.retrieval.corpus,
        log_path=Path(cfg.run_dir) / log,
        encoder_path=_encoder(cfg),
        devices=cfg.retrieval.devices,
        shuffle_seed=SHUFFLE_SEED if cfg.retrieval.shuffle_documents else None,
    )


def _encoder(cfg: Config) -> Path | None:
    """The sentence encoder's folder, if the index has one."""
    if cfg.retrieval.index is IndexKind.bm25:
        return None
    return Path(resolve_model(cfg.retrieval.encoder, Path(cfg.assets)))


def index_name(cfg: Config) -> str:
    """Folder name of an index under ``assets``: its kind and, if it has vectors, how and by which encoder."""
    retrieval = cfg.retrieval
    if retrieval.index is IndexKind.bm25:
        return str(IndexKind.bm25)
    encoder = hashlib.sha256(f"{retrieval.encoder_family} {retrieval.encoder}".encode()).hexdigest()[:8]
    return f"{retrieval.index}-{retrieval.dense_index.replace('/', '_')}-{encoder}"
