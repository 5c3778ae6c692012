"""The two protocols of the package, what they return, and the one error that a retriever raises."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple, Protocol

from searchrl.trajectory import Document
from searchrl.trajectory import SearchStatus as SearchStatus  # it belongs to results and failures alike


class FailureKind(StrEnum):
    """Why a search brought no answer."""

    TIMEOUT = "timeout"
    """No answer in time, after all retries."""
    UNAVAILABLE = "unavailable"
    """No connection, a broken one, or a server error."""
    BAD_RESPONSE = "bad_response"
    """An answer arrived that is not in the wire format."""
    REJECTED = "rejected"
    """The server refused this query (4xx). The only kind that says something about the query."""
    OVERLOADED = "overloaded"
    """Too many requests: the queue was full (503), a rate limit hit (429), or the run's own bound reached."""
    UNAUTHORIZED = "unauthorized"
    """A key or token is missing or wrong (401, 403). Another attempt cannot help."""
    WRONG_INDEX = "wrong_index"
    """The server answers from another index than the one this run began with."""
    NOT_RECORDED = "not_recorded"
    """``retrieval=replay``: the recorded cache has no answer to this query."""

    @property
    def status(self) -> SearchStatus:
        """What a search that failed so counts as."""
        match self:
            case FailureKind.TIMEOUT:
                return SearchStatus.TIMEOUT
            case FailureKind.OVERLOADED:
                return SearchStatus.RATE_LIMITED
            case _:
                return SearchStatus.ERROR


class RetrievalError(RuntimeError):
    """A search that failed. Never confused with a search that found nothing, which is an empty list."""

    def __init__(self, message: str, *, kind: FailureKind) -> None:
        super().__init__(message)
        self.kind = kind

    @property
    def status(self) -> SearchStatus:
        """How the search ended."""
        return self.kind.status


class Retriever(Protocol):
    """What an episode searches with."""

    async def search(self, query: str, top_k: int) -> list[Document]:
        """Return at most ``top_k`` documents, best first; raise `RetrievalError` if the search failed."""
        ...

    async def aclose(self) -> None:
        """Release connections. Searches still waiting fail with `RetrievalError`."""
        ...


class Hit(NamedTuple):
    """One found row of the corpus; higher scores are better."""

    row: int
    score: float


class Index(Protocol):
    """A synchronous index over corpus rows; used by one thread at a time."""

    @property
    def size(self) -> int:
        """Number of corpus rows in the index."""
        ...

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Hit]]:
        """Return for each query at most ``top_k`` hits, by falling score, equal scores by rising row."""
        ...
