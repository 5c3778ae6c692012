"""A SearXNG instance of one's own: ``GET /search?q=…&format=json``, results under ``results``."""

from __future__ import annotations

from searchrl.config import WebConfig
from searchrl.retrieval.transport import Retriable
from searchrl.retrieval.types import FailureKind, RetrievalError
from searchrl.retrieval.web_engine import JsonApi, WebResult, check_url


class SearxngEngine:
    """An `Engine`. Raises `ConfigError` unless ``web.url`` is the instance's http(s) address.

    The instance must allow the format: ``search.formats`` of its settings.yml has to name ``json``.
    """

    def __init__(self, web: WebConfig) -> None:
        check_url(web.url, "the SearXNG instance's, such as http://127.0.0.1:8888")
        self._url = web.url.rstrip("/").removesuffix("/search") + "/search"
        self._language = web.language
        self._api = JsonApi("searxng", headers={}, proxy=web.proxy)

    async def ask(self, query: str, count: int, timeout_s: float) -> list[WebResult]:
        """See `Engine.ask`. How many results come is the instance's choice, about 20.

        SearXNG asks other engines and answers 200 even if none of them answered it; it lists those under
        ``unresponsive_engines``. No results while some did not answer is a failure (`Retriable`), not an
        empty answer: what they would have found is unknown. (Its forebear searx says nothing of engines that
        it has suspended: an empty answer of searx proves nothing. Use SearXNG.)
        """
        del count
        params: dict[str, str | int] = {"q": query, "format": "json", "language": self._language}
        try:
            answer = await self._api.call("GET", self._url, params=params, timeout_s=timeout_s)
        except RetrievalError as error:
            if error.kind is not FailureKind.UNAUTHORIZED:
                raise
            message = f"{error}; is json among search.formats in the instance's settings.yml?"
            raise RetrievalError(message, kind=error.kind) from error
        results = self._api.results(answer.get("results"), link="url", title="title", text="content")
        unresponsive = answer.get("unresponsive_engines") or []
        if not results and unresponsive:
            message = f"searxng found nothing, but engines did not answer it: {str(unresponsive)[:200]}"
            raise Retriable(message, FailureKind.UNAVAILABLE)
        return results

    async def aclose(self) -> None:
        """See `Engine.aclose`."""
        await self._api.aclose()
