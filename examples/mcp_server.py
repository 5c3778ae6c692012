"""A tool behind the Model Context Protocol: a search through a corpus by shared words.

From the folder that holds ``examples``, in two terminals::

    python -m examples.mcp_server assets/worldfacts/corpus.jsonl 8080
    searchrl train +experiment=smoke name=mcp retrieval=mcp \
        retrieval.web.url=http://127.0.0.1:8080/mcp retrieval.web.tool=lookup

Any MCP server over streamable HTTP will do whose tool takes a string ``query`` and returns text.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import uvicorn
from mcp.server.mcpserver import MCPServer


def words(text: str) -> set[str]:
    """The words of a text, in lower case."""
    return set(re.findall(r"\w+", text.lower()))


def make_server(corpus: Path, *, count: int = 3) -> MCPServer:
    """A server with one tool, ``lookup``, over JSON lines of ``{"id", "contents"}``."""
    texts = [json.loads(line)["contents"] for line in corpus.read_text(encoding="utf-8").splitlines()]
    rows: defaultdict[str, list[int]] = defaultdict(list)
    for row, text in enumerate(texts):
        for word in words(text):
            rows[word].append(row)
    server = MCPServer("passages")

    @server.tool()
    def lookup(query: str) -> list[str]:
        """The passages that share most words with the query, rare words first; none if none does."""
        shared: Counter[int] = Counter()
        for word in words(query) & rows.keys():
            for row in rows[word]:
                shared[row] += 1 / len(rows[word])
        return [texts[row] for row, _ in shared.most_common(count)]

    return server


if __name__ == "__main__":
    app = make_server(Path(sys.argv[1])).streamable_http_app()
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")
