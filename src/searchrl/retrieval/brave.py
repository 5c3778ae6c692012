"""The Brave Search API: ``GET /res/v1/web/search``, results under ``web.results``."""

from __future__ import annotations

import html
import re

from searchrl.config import WebConfig
from searchrl.retrieval.web_engine import JsonApi, WebResult, secret

URL = "https://api.search.brave.com/res/v1/web/search"
_MAX_COUNT = 20
_MAX_WORDS = 50
_MAX_CHARS = 400


class BraveEngine:
    """An `Engine`. Raises `ConfigError` unless BRAVE_API_KEY is set."""

    def __init__(self, web: WebConfig, *, url: str = URL) -> None:
        self._url = url
        self._place = {"country": web.country.upper(), "search_lang": web.language}
        self._api = JsonApi(
            "brave",
            headers={"X-Subscription-Token": secret("BRAVE_API_KEY")},
            proxy=web.proxy,
            key_words=("SUBSCRIPTION_TOKEN_INVALID",),  # a 422, as for a bad query
        )

    async def ask(self, query: str, count: int, timeout_s: float) -> list[WebResult]:
        """See `Engine.ask`. The answer leaves out ``web`` when it found nothing.

        The service refuses queries of more than 50 words or 400 characters; only the first are sent.
        """
        params: dict[str, str | int] = {
            "q": " ".join(query.split()[:_MAX_WORDS])[:_MAX_CHARS],
            "count": min(count, _MAX_COUNT),
            "result_filter": "web",
            "text_decorations": "false",
            **self._place,
        }
        answer = await self._api.call("GET", self._url, params=params, timeout_s=timeout_s)
        if answer.get("type") != "search":
            raise self._api.bad('its "type" is not "search"')
        web = answer.get("web") or {"results": []}
        if not isinstance(web, dict):
            raise self._api.bad('its "web" is no object')
        return self._api.results(
            web.get("results"), link="url", title="title", text="description", tidy=_plain
        )

    async def aclose(self) -> None:
        """See `Engine.aclose`."""
        await self._api.aclose()


def _plain(text: str) -> str:
    """Descriptions are HTML: entities, and ``<strong>`` around what matched."""
    return html.unescape(re.sub(r"</?strong>", "", text))
