"""What search engines on the web are made of: results, keys, JSON over HTTP."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import httpx

from searchrl.config import ConfigError
from searchrl.retrieval.transport import send
from searchrl.retrieval.types import FailureKind, RetrievalError

_MAX_ANSWER_BYTES = 8 << 20
_MAX_CONNECTIONS = 100  # httpx's pool takes time quadratic in its connections


class WebResult(NamedTuple):
    """One result as the engine gave it; ``link`` is empty where there is none."""

    link: str
    title: str
    text: str


class Engine(Protocol):
    """A search engine on the web."""

    async def ask(self, query: str, count: int, timeout_s: float) -> list[WebResult]:
        """Send one request; return the engine's results, best first, about ``count`` if it can be told.

        Raises `Retriable` or `RetrievalError` if the request failed or its answer is not in form.
        """
        ...

    async def aclose(self) -> None:
        """Close the connections."""
        ...


def secret(variable: str, *, required: bool = True) -> str:
    """Return the key in the environment variable ``variable``, empty if there is none.

    Raises `ConfigError`, which names the variable but not its value, if the key is missing though required,
    or cannot be sent in a header.
    """
    key = os.environ.get(variable, "").strip()
    if required and not key:
        raise ConfigError(f"{variable} is not set; this kind of retrieval takes its key from the environment")
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"{variable} holds characters that no key has; was it copied with something else?")
    return key


def check_url(url: str, what: str) -> None:
    """Raise `ConfigError` unless ``url`` is an http(s) address; ``what`` says of what."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        parsed = httpx.URL()
    # The value is not shown: many such addresses carry a key.
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigError(f"retrieval.web.url is no http(s) address; give {what}")


class JsonApi:
    """An HTTP service that answers in JSON objects.

    ``where`` names it in messages. ``key_words`` are texts of refusals that speak of the key, not of the
    query.
    """

    def __init__(
        self, where: str, *, headers: dict[str, str], proxy: str, key_words: Sequence[str] = ()
    ) -> None:
        self._where = where
        self._key_words = (*key_words, "answered 402")
        self._http = httpx.AsyncClient(
            headers=headers,
            proxy=proxy or None,
            trust_env=False,
            timeout=None,  # `send` bounds the whole request
            limits=httpx.Limits(max_connections=_MAX_CONNECTIONS, max_keepalive_connections=_MAX_CONNECTIONS),
        )

    async def call(
        self,
        method: str,
        url: str,
        *,
        timeout_s: float,
        params: dict[str, str | int] | None = None,
        body: dict[str, object] | None = None,
    ) -> dict[str, object]:
        """Return the answer. Raises `Retriable` and `RetrievalError`."""
        request = self._http.build_request(method, url, params=params, json=body)
        try:
            response = await send(
                self._http, request, timeout_s=timeout_s, where=self._where, max_bytes=_MAX_ANSWER_BYTES
            )
        except RetrievalError as error:
            if any(word in str(error) for word in self._key_words):
                raise RetrievalError(str(error), kind=FailureKind.UNAUTHORIZED) from error
            raise
        try:
            answer = json.loads(response.content)
        except (ValueError, RecursionError) as error:
            raise self.bad(f"no JSON: {error}") from error
        if not isinstance(answer, dict):
            raise self.bad(f"JSON, but {type(answer).__name__}, not an object")
        return answer

    def bad(self, reason: str) -> RetrievalError:
        """Return the error for an answer that has not the service's form."""
        message = f"{self._where} answered out of form: {reason}"
        return RetrievalError(message, kind=FailureKind.BAD_RESPONSE)

    def results(
        self, items: object, *, link: str, title: str, text: str, tidy: Callable[[str], str] = str
    ) -> list[WebResult]:
        """Return the results in ``items`` by the names of their fields; ``tidy`` unpacks title and text.

        Raises `RetrievalError` (bad_response) unless ``items`` is a list of objects with a string ``link``.
        """
        if not isinstance(items, list):
            raise self.bad("the results are no list")
        results = []
        for item in items:
            if not isinstance(item, dict) or not isinstance(item.get(link), str) or not item[link]:
                raise self.bad(f'a result without a string "{link}"')
            # Some pages have no description, and engines say so by leaving it out or by null.
            heading, snippet = item.get(title) or "", item.get(text) or ""
            if not isinstance(heading, str) or not isinstance(snippet, str):
                raise self.bad(f'a result whose "{title}" or "{text}" is no string')
            results.append(WebResult(item[link], tidy(heading) or item[link], tidy(snippet)))
        return results

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()


def results_in(text: str) -> Iterator[WebResult]:
    """Yield the results in a text for language models, which tools write as they like.

    JSON: an object with ``title``, ``url`` or ``link``, and ``text``, ``content``, ``snippet`` or
    ``description``; a list of them, also under ``results``. Anything else is one result whose title is the
    first line.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict) and isinstance(value.get("results"), list):
        value = value["results"]
    items = value if isinstance(value, list) else [value]
    if items and not all(isinstance(item, dict) for item in items):
        title, _, rest = text.strip().partition("\n")
        yield WebResult("", title.strip().strip('"'), rest or title)
        return
    for item in items:
        link, title = (_first(item, "url", "link"), _first(item, "title", "name"))
        body = _first(item, "text", "content", "snippet", "description")
        yield WebResult(link, title or link, body)


def _first(item: dict[str, object], *names: str) -> str:
    return next((value for name in names if isinstance(value := item.get(name), str)), "")
