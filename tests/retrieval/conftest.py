"""A hand-written corpus, a tiny random encoder, and real HTTP servers on loopback."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn
from starlette.types import ASGIApp

from builders import make_encoder
from searchrl.retrieval.app import Service, create_app

PASSAGES = """
Paris|Paris is the capital of France and lies on the Seine.
France|France is a country in western Europe. Its currency is the euro.
Berlin|Berlin is the capital of Germany and lies on the Spree.
Germany|Germany is a country in central Europe with sixteen states.
Rome|Rome is the capital of Italy and lies on the Tiber.
Italy|Italy is a country shaped like a boot in southern Europe.
Madrid|Madrid is the capital of Spain and its largest city.
Spain|Spain is a country on the Iberian Peninsula.
Lisbon|Lisbon is the capital of Portugal at the mouth of the Tagus.
Portugal|Portugal is the westernmost country of mainland Europe.
Vienna|Vienna is the capital of Austria and lies on the Danube.
Austria|Austria is a landlocked country in the Alps.
Bern|Bern is the federal city of Switzerland on the Aare.
Switzerland|Switzerland is a confederation with four national languages.
Oslo|Oslo is the capital of Norway at the head of a fjord.
Norway|Norway is a kingdom known for fjords and salmon.
Tokyo|Tokyo is the capital of Japan and was once called Edo.
Japan|Japan is an island country whose currency is the yen.
Cairo|Cairo is the capital of Egypt near the pyramids of Giza.
Egypt|Egypt is a country through which the Nile flows north.
Nile|The Nile is a river that flows into the Mediterranean Sea.
Danube|The Danube is a river that passes through ten countries.
Seine|The Seine is a river in northern France.
Everest|Mount Everest is the highest mountain above sea level.
Mont Blanc|Mont Blanc is the highest mountain of the Alps.
Mercury|Mercury is the planet closest to the Sun.
Venus|Venus is the hottest planet of the Solar System.
Mars|Mars is a planet with two small moons, Phobos and Deimos.
Jupiter|Jupiter is the largest planet of the Solar System.
Saturn|Saturn is a planet with bright rings of ice.
Hydrogen|Hydrogen is the chemical element with atomic number one.
Helium|Helium is a noble gas that was first seen in sunlight.
Gold|Gold is a metal whose chemical symbol is Au.
Iron|Iron is a metal that rusts in moist air.
Curie|Marie Curie discovered polonium and radium.
Darwin|Charles Darwin wrote On the Origin of Species.
Newton|Isaac Newton described gravity and split light with a prism.
Einstein|Albert Einstein published the theory of relativity.
Bach|Johann Sebastian Bach composed the Brandenburg Concertos.
Mozart|Wolfgang Amadeus Mozart was born in Salzburg.
Beethoven|Ludwig van Beethoven composed nine symphonies.
Shakespeare|William Shakespeare wrote Hamlet and Macbeth.
Dante|Dante Alighieri wrote the Divine Comedy in Italian.
Homer|Homer is said to have composed the Iliad.
Chess|Chess is a board game for two players with a king and a queen.
Football|Football is played by two teams of eleven players.
Tea|Tea is a drink made by pouring hot water over leaves.
Coffee|Coffee is a drink brewed from roasted beans.
Bread|Bread is baked from flour, water and yeast.
Café Zürich|Ein Café mit Weltruf — naïve “quotes”, 東京 and emoji 🦊.
""".strip()


@pytest.fixture(scope="session")
def contents() -> list[str]:
    """What each passage holds: its title in quotes, a newline, its text."""
    rows = (line.split("|") for line in PASSAGES.splitlines())
    return [f'"{title}"\n{text}' for title, text in rows]


@pytest.fixture(scope="session")
def corpus_path(tmp_path_factory: pytest.TempPathFactory, contents: list[str]) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    records = ({"id": f"d{i}", "contents": text} for i, text in enumerate(contents))
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def encoder_path(tmp_path_factory: pytest.TempPathFactory, contents: list[str]) -> Path:
    return make_encoder(tmp_path_factory.mktemp("encoder"), contents, seed=0)


@pytest.fixture(scope="session")
def bm25_directory(tmp_path_factory: pytest.TempPathFactory, corpus_path: Path) -> Path:
    from searchrl.config import IndexKind
    from searchrl.retrieval.build import build_index

    directory = tmp_path_factory.mktemp("index") / "bm25"
    build_index(corpus_path, directory, kind=IndexKind.bm25)
    return directory


@pytest.fixture(scope="module")
def serve() -> Iterator[Callable[[ASGIApp], str]]:
    """Return a function that serves an application on a free loopback port and returns its URL."""
    with ExitStack() as stack:
        yield lambda app: stack.enter_context(running(app))


@contextmanager
def running(app: ASGIApp) -> Iterator[str]:
    config = uvicorn.Config(app, port=0, log_level="error", access_log=False, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="session")
def clustered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flat index of 4,000 vectors of 64 numbers around 200 centres, as texts on 200 subjects would be."""
    import numpy as np

    from searchrl.retrieval.dense_build import write_flat

    rng = np.random.default_rng(0)
    centres = rng.normal(size=(200, 64))
    vectors = centres[rng.integers(200, size=4000)] + 0.8 * rng.normal(size=(4000, 64))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    path = tmp_path_factory.mktemp("clustered") / "flat.faiss"
    write_flat(path, vectors.astype(np.float32))
    return path


@pytest.fixture(scope="module")
def service(bm25_directory: Path, corpus_path: Path) -> Service:
    """The hand-written corpus under BM25."""
    from searchrl.retrieval.corpus import Corpus
    from searchrl.retrieval.loading import load_index

    corpus = Corpus(corpus_path)
    return Service(index=load_index(bm25_directory, corpus), corpus=corpus, fingerprint="f")


@pytest.fixture(scope="module")
def http(serve: Callable[[ASGIApp], str], service: Service) -> Iterator[httpx.Client]:
    """A client of a server of it."""
    with httpx.Client(base_url=serve(create_app(service)), trust_env=False, timeout=30) as client:
        yield client
