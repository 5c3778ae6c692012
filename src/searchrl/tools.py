"""What an episode can call. To add a tool, implement ``Tool``."""

from __future__ import annotations

import time
from typing import Protocol

from searchrl.retrieval.types import RetrievalError, Retriever
from searchrl.trajectory import ToolCall, ToolResult


class ToolError(RuntimeError):
    """The tool could not answer for reasons that say nothing about the policy. Voids the trajectory."""


class Tool(Protocol):
    """Something that answers a call."""

    async def __call__(self, call: ToolCall) -> ToolResult:
        """Answer, or raise ``ToolError``; an empty result means that nothing was found."""
        ...


class SearchTool:
    """Searches with a retriever."""

    def __init__(self, retriever: Retriever, *, top_k: int) -> None:
        self._retriever = retriever
        self._top_k = top_k

    async def __call__(self, call: ToolCall) -> ToolResult:
        """The ``top_k`` best documents for the query."""
        start = time.perf_counter()
        try:
            documents = await self._retriever.search(call.query, self._top_k)
        except RetrievalError as error:
            raise ToolError(f"{error.status}: {error}") from error
        return ToolResult(documents=tuple(documents), seconds=time.perf_counter() - start)
