"""The file that `cache` keeps answers in: one SQLite database, several processes, untouched when in doubt."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Self
from urllib.parse import quote

from searchrl.errors import SearchrlError
from searchrl.trajectory import Document

_APPLICATION_ID = 0x53524C43  # "SRLC" in SQLite's header: a cache of ours, not some other database
_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE source (name TEXT NOT NULL);
CREATE TABLE answers (
    query BLOB NOT NULL,
    top_k INTEGER NOT NULL,
    documents TEXT NOT NULL,
    recorded REAL NOT NULL,
    PRIMARY KEY (query, top_k)
) WITHOUT ROWID;
"""
_BUSY_TIMEOUT_S = 60.0


class CacheError(SearchrlError, RuntimeError):
    """The file cannot serve as the cache: damaged, another source's, not writable. It is left as it is."""


class Record(NamedTuple):
    """One answer as it is stored; ``recorded`` is a `time.time`."""

    query: bytes
    top_k: int
    documents: str
    recorded: float

    @classmethod
    def of(cls, query: str, top_k: int, documents: Sequence[Document]) -> Self:
        """Make a record of an answer that has just come. Scores survive to the last bit."""
        text = json.dumps([[d.id, d.contents, d.score] for d in documents])
        return cls(_bytes(query), top_k, text, time.time())

    def answer(self) -> list[Document]:
        """Return the documents; raise ValueError or TypeError if the text is not a record's."""
        rows = json.loads(self.documents)
        return [Document(id=id_, contents=contents, score=score) for id_, contents, score in rows]


class Recording:
    """A connection to one file, for one thread at a time. Every method raises `CacheError`."""

    def __init__(self, path: Path, connection: sqlite3.Connection, source: str) -> None:
        self._path = path
        self._connection = connection
        self.source = source
        """What the answers were recorded from."""

    @classmethod
    def open(cls, path: Path, source: str) -> Self:
        """Open for reading and writing, in any thread; make the file if it is missing or empty."""
        with _translated(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(
                path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
            with _closed_on_error(connection):
                recorded = _prepare(connection, path, source)
                if recorded != source:
                    raise CacheError(
                        f"the cache {path} holds answers of {recorded!r}, this run asks {source!r}: "
                        "name another file in retrieval.cache"
                    )
        return cls(path, connection, source)

    @classmethod
    def open_read_only(cls, path: Path) -> Self:
        """Open a file that exists, of any source, in any thread."""
        if not path.is_file():
            raise CacheError(f"there is no recording {path}; make one with retrieval.cache={path}")
        with _translated(path):
            connection = _connect_read_only(path)
            with _closed_on_error(connection):
                return cls(path, connection, _source(connection, path))

    def read(self, query: str, top_k: int) -> list[Document] | None:
        """Return the answer to exactly this search, None if there is none."""
        with _translated(self._path):
            row = self._connection.execute(
                "SELECT * FROM answers WHERE query = ? AND top_k = ?", (_bytes(query), top_k)
            ).fetchone()
        try:
            return None if row is None else Record(*row).answer()
        except (ValueError, TypeError) as error:
            raise _damaged(self._path, error) from error

    def depths(self, query: str) -> list[int]:
        """Return each k with which ``query`` is recorded."""
        with _translated(self._path):
            rows = self._connection.execute(
                "SELECT top_k FROM answers WHERE query = ? ORDER BY top_k", (_bytes(query),)
            ).fetchall()
        return [top_k for (top_k,) in rows]

    def write(self, records: Sequence[Record]) -> None:
        """Add ``records`` in one transaction; of two with the same key the older one stands."""
        with _translated(self._path), _transaction(self._connection):
            self._connection.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?)", records)

    def close(self) -> None:
        """Close the connection; the last one of all processes tidies up the journal."""
        self._connection.close()


def _prepare(connection: sqlite3.Connection, path: Path, source: str) -> str:
    """Create the tables in an empty file; return the source of what is there then."""
    if not _is_empty(connection):
        _source(connection, path)  # before anything is changed in another program's file
    _use_wal(connection)
    with _transaction(connection):  # of several processes that find no file, one makes the tables
        if _is_empty(connection):
            for statement in _SCHEMA.split(";"):
                connection.execute(statement)
            connection.execute("INSERT INTO source VALUES (?)", (source,))
            connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
        return _source(connection, path)


def _use_wal(connection: sqlite3.Connection) -> None:
    """Choose the journal in which readers and the writer of the moment do not wait for one another."""
    deadline = time.monotonic() + _BUSY_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            # Processes that make the same file at once: SQLite's own waiting does not cover this statement.
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _is_empty(connection: sqlite3.Connection) -> bool:
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    return bool(tables == 0)


def _source(connection: sqlite3.Connection, path: Path) -> str:
    """The source of an open cache, after a look at its version."""
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if application != _APPLICATION_ID:
        raise CacheError(f"{path} is a database of another program; name another file in retrieval.cache")
    if version != _SCHEMA_VERSION:
        raise CacheError(
            f"the cache {path} has format {version}, this version of searchrl reads {_SCHEMA_VERSION}; "
            "name another file in retrieval.cache"
        )
    rows = connection.execute("SELECT name FROM source").fetchall()
    if len(rows) != 1 or not isinstance(rows[0][0], str):
        raise _damaged(path, "it names no source")
    return str(rows[0][0])


def _connect_read_only(path: Path) -> sqlite3.Connection:
    """Open without writing to the file; on a read-only disk, where WAL cannot lock, as unchanging."""

    def connect(uri: str) -> sqlite3.Connection:
        return sqlite3.connect(
            uri, uri=True, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
        )

    uri = f"file:{quote(str(path.absolute()))}?mode=ro"
    connection = connect(uri)
    try:
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.OperationalError:
        connection.close()
        if path.with_name(path.name + "-wal").exists():
            raise
        connection = connect(f"{uri}&immutable=1")
    return connection


def _bytes(query: str) -> bytes:
    return query.encode(errors="surrogatepass")


@contextmanager
def _closed_on_error(connection: sqlite3.Connection) -> Iterator[None]:
    try:
        yield
    except BaseException:  # Ctrl-C too must leave no connection open
        connection.close()
        raise


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """A write transaction, waited for; rolled back if the block fails."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:  # nor a transaction
        with contextlib.suppress(sqlite3.Error):  # some errors have rolled it back already
            connection.execute("ROLLBACK")
        raise


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into `CacheError`."""
    try:
        yield
    except (sqlite3.OperationalError, sqlite3.ProgrammingError) as error:
        # Locked, read-only, disk full, closed: the file may be sound.
        raise CacheError(f"the cache {path} cannot be used: {error}") from error
    except sqlite3.DatabaseError as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, reason: object) -> CacheError:
    return CacheError(
        f"{path} is damaged or no cache of searchrl ({reason}); nothing in it was changed: "
        "move it away, or name another file in retrieval.cache"
    )
