"""What an episode can call. A tool of one's own comes in as a retriever, ``retrieval.kind=custom``."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Protocol

from searchrl.retrieval.types import RetrievalError, Retriever
from searchrl.trajectory import Document, Example, ToolCall, ToolResult


class ToolError(RuntimeError):
    """The tool could not answer for reasons that say nothing about the policy. Voids the trajectory."""


class Tool(Protocol):
    """Something that answers a call."""

    async def __call__(self, call: ToolCall, example: Example) -> ToolResult:
        """Answer, or raise ``ToolError``; an empty result means that nothing was found.

        Args:
            call: what the policy asked for.
            example: the question of the episode; nothing of it that the policy may not see belongs into an
                answer, unless the tool is an oracle.
        """
        ...


class SearchTool:
    """Searches with a retriever."""

    def __init__(self, retriever: Retriever, *, top_k: int) -> None:
        self._retriever = retriever
        self._top_k = top_k

    async def __call__(self, call: ToolCall, example: Example) -> ToolResult:
        """The ``top_k`` best documents for the query."""
        del example
        start = time.perf_counter()
        try:
            documents = await self._retriever.search(call.query, self._top_k)
        except RetrievalError as error:
            raise ToolError(f"{error.status}: {error}") from error
        return ToolResult(documents=tuple(documents), seconds=time.perf_counter() - start)


class OracleTool:
    """The ablation ``retrieval=oracle``: every search finds all gold passages, whatever the query.

    What is still answered wrongly was not read well; the rest of a policy's errors lie in its searching.
    """

    def __init__(self, passages: Mapping[str, Document]) -> None:
        self._passages = passages

    async def __call__(self, call: ToolCall, example: Example) -> ToolResult:
        """The passages that the question names as gold, in its order."""
        del call
        documents = tuple(self._passages[id_] for id_ in example.gold_passages)
        return ToolResult(documents=documents, seconds=0.0)
