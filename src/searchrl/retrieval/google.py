"""Google through serper.dev: ``POST {"q", "num", "gl", "hl"}``, results under ``organic``."""

from __future__ import annotations

from searchrl.config import WebConfig
from searchrl.retrieval.web_engine import JsonApi, WebResult, secret

URL = "https://google.serper.dev/search"


class GoogleEngine:
    """An `Engine`. Raises `ConfigError` unless SERPER_API_KEY is set."""

    def __init__(self, web: WebConfig, *, url: str = URL) -> None:
        self._url = url
        self._place = {"gl": web.country, "hl": web.language}
        self._api = JsonApi(
            "google (serper.dev)",
            headers={"X-API-KEY": secret("SERPER_API_KEY")},
            proxy=web.proxy,
            key_words=("Not enough credits",),  # a 400, as for a bad query
        )

    async def ask(self, query: str, count: int, timeout_s: float) -> list[WebResult]:
        """See `Engine.ask`. An answer that only repeats the request, without ``organic``, found nothing."""
        body: dict[str, object] = {"q": query, "num": count, **self._place}
        answer = await self._api.call("POST", self._url, body=body, timeout_s=timeout_s)
        if "organic" not in answer and not isinstance(answer.get("searchParameters"), dict):
            raise self._api.bad('neither "organic" nor "searchParameters"')
        return self._api.results(answer.get("organic", []), link="link", title="title", text="snippet")

    async def aclose(self) -> None:
        """See `Engine.aclose`."""
        await self._api.aclose()
