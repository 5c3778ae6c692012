"""The ablation without retrieval."""

from __future__ import annotations

from searchrl.trajectory import Document


class NoRetriever:
    """The ablation ``retrieval=none``: every search succeeds and finds nothing."""

    async def search(self, query: str, top_k: int) -> list[Document]:
        """Return no documents."""
        del query, top_k
        return []

    async def aclose(self) -> None:
        """Nothing to release."""
