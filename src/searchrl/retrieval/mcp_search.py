"""A search tool of an MCP server over streamable HTTP: takes ``{"query": str}``, returns text blocks."""

from __future__ import annotations

import logging
from typing import Any

import anyio
import httpx

from searchrl.config import WebConfig
from searchrl.retrieval.transport import Retriable, check_status
from searchrl.retrieval.types import FailureKind, RetrievalError
from searchrl.retrieval.web_engine import WebResult, check_url, results_in, secret


class McpEngine:
    """An `Engine`. Sends MCP_TOKEN as a bearer token if it is set; raises `ConfigError` on a bad address.

    Each search is a session of its own over shared connections: a broken connection ends a session with all
    its calls, and servers of the present protocol need no handshake.
    """

    def __init__(self, web: WebConfig) -> None:
        check_url(web.url, "the MCP server's endpoint, such as http://127.0.0.1:8000/mcp")
        import httpx2  # the client that the mcp package takes

        logging.getLogger("mcp").setLevel(logging.CRITICAL)  # it logs what it raises, addresses included
        self._url = web.url
        self._tool = web.tool
        self._mode = "auto"
        token = secret("MCP_TOKEN", required=False)
        self._http = httpx2.AsyncClient(
            headers={"Authorization": f"Bearer {token}"} if token else {},
            proxy=web.proxy or None,
            trust_env=False,
            timeout=None,
            limits=httpx2.Limits(max_connections=None),  # each session of the old protocol holds two
            event_hooks={"response": [_check]},
        )

    async def ask(self, query: str, count: int, timeout_s: float) -> list[WebResult]:
        """See `Engine.ask`. All that the tool returns is a result; an error of its own may be retried."""
        del count
        from mcp import Client
        from mcp.client.streamable_http import streamable_http_client
        from mcp_types.version import MODERN_PROTOCOL_VERSIONS

        transport = streamable_http_client(self._url, http_client=self._http)
        try:
            with anyio.fail_after(timeout_s):  # unlike asyncio's, it bounds the end of the session too
                async with Client(transport, mode=self._mode, cache=None) as client:
                    modern = client.protocol_version in MODERN_PROTOCOL_VERSIONS
                    self._mode = client.protocol_version if modern else "legacy"  # found out once
                    answer = await client.call_tool(self._tool, {"query": query})
        except TimeoutError as error:
            message = f"the MCP server did not answer in {timeout_s:.3g} s"
            raise Retriable(message, FailureKind.TIMEOUT) from error
        except Exception as error:
            self._mode = "auto"  # the next server at this address may speak another protocol
            raise _failure(error) from error
        texts = [block.text for block in answer.content if block.type == "text"]
        if answer.is_error:
            message = f"the MCP tool {self._tool!r} failed: {' '.join(texts)[:200]}"
            raise Retriable(message, FailureKind.UNAVAILABLE)
        if answer.content and not texts:
            message = f"the MCP tool {self._tool!r} returned no text, but {answer.content[0].type}"
            raise RetrievalError(message, kind=FailureKind.BAD_RESPONSE)
        return [result for text in texts for result in results_in(text)]

    async def aclose(self) -> None:
        """See `Engine.aclose`."""
        await self._http.aclose()


async def _check(response: Any) -> None:
    """Raise what an HTTP status says before the library makes an unspecific error of it."""
    # The other 4xx are how an old server answers a question of the new protocol.
    if response.status_code in (401, 402, 403, 429) or response.status_code >= 500:
        headers = {k: v for k, v in response.headers.items() if k in ("retry-after", "date")}
        check_status(httpx.Response(response.status_code, headers=headers), "the MCP server")


def _failure(error: Exception) -> Exception:
    """Return what a session's error, often one in several groups, says about the search."""
    import httpx2
    from mcp import MCPError
    from mcp_types import CONNECTION_CLOSED, INTERNAL_ERROR
    from pydantic import ValidationError

    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, httpx2.TransportError):
        return Retriable(f"the MCP server cannot be reached: {error!r}", FailureKind.UNAVAILABLE)
    if isinstance(error, MCPError) and error.code in (CONNECTION_CLOSED, INTERNAL_ERROR):
        return Retriable(f"the MCP server failed: {error.message}", FailureKind.UNAVAILABLE)
    if isinstance(error, MCPError | ValidationError):
        return RetrievalError(f"the MCP server answered: {error}", kind=FailureKind.BAD_RESPONSE)
    return error
