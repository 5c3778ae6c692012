"""Outlasts an outage: while no search works at all, all of them wait, in place of failing one by one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from searchrl.retrieval.meter import RetrievalMeter
from searchrl.retrieval.types import FailureKind, RetrievalError, Retriever
from searchrl.trajectory import Document

_MAY_PASS = {
    FailureKind.TIMEOUT,
    FailureKind.UNAVAILABLE,
    FailureKind.OVERLOADED,
    FailureKind.BAD_RESPONSE,  # a balancer's page in place of the server that restarts behind it
}
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 5.0


class PatientRetriever:
    """Searches with ``inner``; a failure that may pass becomes a pause, if nothing else works either.

    A search that fails although none has succeeded since it began is asked again and again, alone, while all
    others wait. It ends the pause when it is answered, or after ``patience_s``: then the searches fail, and
    there is no other pause before one has worked. Where others work meanwhile, a failed search fails.
    """

    def __init__(
        self, inner: Retriever, *, patience_s: float, meter: RetrievalMeter, say: Callable[[str], None]
    ) -> None:
        """Wait for nothing yet.

        Args:
            inner: what searches, and tries again as it sees fit.
            patience_s: how long a pause may last; 0: there is none.
            meter: counts how long it lasted.
            say: tells the user.
        """
        self._inner = inner
        self._patience_s = patience_s
        self._meter = meter
        self._say = say
        self._worked = -1.0
        """Monotonic time of the last success."""
        self._has_given_up = False
        self._pause: asyncio.Task[bool] | None = None

    async def search(self, query: str, top_k: int) -> list[Document]:
        """See `Retriever.search`."""
        failed: float | None = None  # since when; what a search itself may take, deadline_s, does not count
        while True:
            if self._pause is not None and not self._pause.done():
                await asyncio.shield(self._pause)  # shielded: who waits may be aborted
            began = time.monotonic()
            try:
                documents = await self._inner.search(query, top_k)
            except RetrievalError as error:
                now = time.monotonic()
                failed = now if failed is None else failed
                hopeless = error.kind not in _MAY_PASS or self._has_given_up
                if hopeless or self._worked > began or now - failed >= self._patience_s:
                    raise
                if not await self._outlast(query, top_k, error):
                    raise
            else:
                self._works()
                return documents

    async def aclose(self) -> None:
        """See `Retriever.aclose`."""
        if self._pause is not None:
            self._pause.cancel()
        await self._inner.aclose()

    async def _outlast(self, query: str, top_k: int, error: RetrievalError) -> bool:
        """Wait until a search works; False if none did in time."""
        if self._pause is None or self._pause.done():
            self._pause = asyncio.create_task(self._ask_again(query, top_k, error))
        return await asyncio.shield(self._pause)

    async def _ask_again(self, query: str, top_k: int, error: RetrievalError) -> bool:
        start, pause_s, has_said = time.monotonic(), _FIRST_PAUSE_S, False
        with self._meter.pausing():
            while (left := self._patience_s - (time.monotonic() - start)) > 0:
                await asyncio.sleep(min(pause_s, left))
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                try:
                    await self._inner.search(query, top_k)
                except RetrievalError as again:
                    if again.kind in _MAY_PASS:
                        if not has_said:  # not at once: that would tell of every hiccup
                            has_said = True
                            self._say(
                                f"retriever: no search works, waiting up to retrieval.patience_s="
                                f"{self._patience_s:g} s: {error}"
                            )
                        continue
                if has_said:
                    self._say(f"retriever: searches work again after {time.monotonic() - start:.0f} s")
                self._works()
                return True
        self._has_given_up = True
        self._say(f"retriever: given up after {time.monotonic() - start:.0f} s: {error}")
        return False

    def _works(self) -> None:
        self._worked, self._has_given_up = time.monotonic(), False
