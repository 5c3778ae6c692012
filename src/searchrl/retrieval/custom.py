"""A tool or retriever of the user's own, held to what a run expects of every retriever."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable
from typing import Any

from searchrl.errors import SearchrlError
from searchrl.retrieval.types import FailureKind, RetrievalError, Retriever
from searchrl.trajectory import Document

METHODS = {"search": ("query", "top_k"), "aclose": ()}
"""The methods of `Retriever`, which a class of the user's own must have."""


class CustomSearchError(SearchrlError, RuntimeError):
    """The user's own class raised what it should not, or returned what is no list of documents."""


class CustomRetriever:
    """Searches with an object of the user's own.

    It gets ``deadline_s`` for a query and ``max_concurrency`` queries at once. ``RetrievalError`` and
    ``TimeoutError`` void a trajectory, as with any retriever. Whatever else it raises stops the run: a void
    trajectory is never trained on, so a policy could hide from the loss behind an error that it can provoke.
    """

    def __init__(self, inner: Retriever, *, name: str, deadline_s: float, max_concurrency: int) -> None:
        self._inner = inner
        self._name = name
        self._deadline_s = deadline_s
        self._slots = asyncio.Semaphore(max_concurrency)

    async def search(self, query: str, top_k: int) -> list[Document]:
        """See `Retriever.search`. Raises `CustomSearchError` if the object does not keep to it."""
        try:
            async with self._slots, asyncio.timeout(self._deadline_s):
                found: Any = await self._inner.search(query, top_k)
        except RetrievalError:
            raise
        except TimeoutError as error:
            message = f"{self._name} did not answer in retrieval.deadline_s={self._deadline_s:g} s"
            raise RetrievalError(message, kind=FailureKind.TIMEOUT) from error
        except Exception as error:
            raise CustomSearchError(
                f"{self._name} raised {_told(error)} when asked for {query[:200]!r}; tell the policy of its "
                "mistakes in a document, and raise searchrl.retrieval.types.RetrievalError for what says "
                "nothing about it"
            ) from error
        if not isinstance(found, list) or not all(map(_is_document, found)):
            raise CustomSearchError(
                f"{self._name} returned {str(found)[:200]!r} when asked for {query[:200]!r}; it must be a "
                "list of searchrl.trajectory.Document, whose id and contents are text"
            )
        return found[:top_k]

    async def aclose(self) -> None:
        """See `Retriever.aclose`."""
        await self._inner.aclose()


async def open_custom(
    make: Callable[[], Retriever], *, name: str, deadline_s: float, max_concurrency: int
) -> CustomRetriever:
    """Make the object inside the event loop, where it may open connections, and wrap it.

    Raises:
        CustomSearchError: making it failed.
    """
    try:
        inner = make()
    except Exception as error:
        raise CustomSearchError(f"{name} could not be made: {_told(error)}") from error
    return CustomRetriever(inner, name=name, deadline_s=deadline_s, max_concurrency=max_concurrency)


def _told(error: Exception) -> str:
    """The error and the line that raised it."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{error!r} ({place.filename}:{place.lineno})"


def _is_document(found: object) -> bool:
    if not isinstance(found, Document):
        return False
    texts: tuple[object, ...] = (found.id, found.contents)  # whatever the types say
    return all(isinstance(text, str) for text in texts)
