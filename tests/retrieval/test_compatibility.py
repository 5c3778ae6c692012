"""Their clients against our server, our client against their servers.

Each client below is a description, in our words, of what the project sends over HTTP and how it unpacks the
answer; each server answers in the shapes that the project's server gives.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from searchrl.retrieval.app import Service, create_app
from searchrl.retrieval.client import HttpRetriever
from searchrl.retrieval.types import FailureKind, RetrievalError
from searchrl.trajectory import Document

Serve = Callable[[ASGIApp], str]


# ---- Their clients, our server ----


def search_r1(http: httpx.Client, queries: list[str], topk: int = 3) -> list[str]:
    """Search-R1, ``search_r1/llm_agent/generation.py``: ``batch_search`` and ``_passages2string``.

    One POST for all episodes of the batch that search in this round, with scores; no look at the status; the
    first line of ``contents`` is the title.
    """
    answer = http.post("/retrieve", json={"queries": queries, "topk": topk, "return_scores": True}).json()
    texts = []
    for result in answer["result"]:
        text = ""
        for number, item in enumerate(result, start=1):
            title, *lines = item["document"]["contents"].split("\n")
            body = "\n".join(lines)
            text += f"Doc {number}(Title: {title}) {body}\n"
        texts.append(text)
    return texts


def test_search_r1(http: httpx.Client) -> None:
    assert search_r1(http, ["noble gas", "capital of Spain"], topk=1) == [
        'Doc 1(Title: "Helium") Helium is a noble gas that was first seen in sunlight.\n',
        'Doc 1(Title: "Madrid") Madrid is the capital of Spain and its largest city.\n',
    ]


def test_search_r1_in_a_round_without_searches(http: httpx.Client) -> None:
    assert search_r1(http, []) == []


def test_search_r1_with_the_whole_batch_of_its_recipe(http: httpx.Client) -> None:
    queries = [f"noble gas {number % 700}" for number in range(512 * 5)]
    texts = search_r1(http, queries)
    assert len(texts) == len(queries)
    assert all(text.startswith('Doc 1(Title: "Helium")') for text in texts)


def slime(http: httpx.Client, query: str, top_k: int) -> list[dict[str, Any]]:
    """slime, ``examples/search-r1/local_search_server.py``: ``local_search``.

    One query a POST, without scores; any status but success and any content type but JSON is an error (and
    there an empty result); a document without ``contents`` becomes a placeholder.
    """
    answer = http.post("/retrieve", json={"queries": [query], "topk": top_k, "return_scores": False})
    answer.raise_for_status()
    assert answer.headers["content-type"] == "application/json"  # aiohttp's json() insists
    items = answer.json().get("result", [[]])[0]
    placeholder = '"No title."\nNo snippet available.'
    return [{"document": {"contents": item.get("contents", "") or placeholder}} for item in items]


def test_slime(http: httpx.Client, contents: list[str]) -> None:
    assert slime(http, "noble gas", 1) == [{"document": {"contents": contents[31]}}]
    assert len(slime(http, "capital", 3)) == 3
    assert slime(http, "xyzzy", 3) == []


def call_search_api(http: httpx.Client, queries: list[str], topk: int) -> tuple[Any, str | None]:
    """SkyRL (``skyrl_gym/tools/search.py``) and verl (``tools/utils/search_r1_like_utils.py``).

    With scores, over a kept connection (SkyRL). Statuses 500, 502, 503 and 504 are tried again up to ten
    times after 1, 2, 3 … seconds, other 4xx are final in verl. Gives (answer, None) or (None, error).
    """
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    payload = {"queries": queries, "topk": topk, "return_scores": True}
    answer = http.post("/retrieve", json=payload, headers=headers)
    if answer.status_code in (500, 502, 503, 504):
        return None, f"Server Error ({answer.status_code})"
    if answer.is_error:
        return None, f"HTTP Error: {answer.status_code}"
    return answer.json(), None


def verl(http: httpx.Client, queries: list[str], topk: int = 3) -> tuple[str, int]:
    """``perform_single_search_batch``: the text of all queries and how many documents they have."""
    answer, error = call_search_api(http, queries, topk)
    if error:
        return json.dumps({"result": f"Search error: {error}"}), 0
    texts, total = [], 0
    for result in answer.get("result", []):
        text = ""
        for number, item in enumerate(result, start=1):
            title, *lines = item["document"]["contents"].split("\n")
            body = "\n".join(lines)
            text += f"Doc {number} (Title: {title})\n{body}\n\n"
        texts.append(text.strip())
        total += len(result)
    return json.dumps({"result": "\n---\n".join(texts)}, ensure_ascii=False), total


def test_verl(http: httpx.Client) -> None:
    text, total = verl(http, ["noble gas", "東京"], topk=1)
    assert total == 2
    assert json.loads(text)["result"] == (
        'Doc 1 (Title: "Helium")\nHelium is a noble gas that was first seen in sunlight.\n---\n'
        'Doc 1 (Title: "Café Zürich")\nEin Café mit Weltruf — naïve “quotes”, 東京 and emoji 🦊.'
    )
    assert verl(http, ["noble gas", ""]) == ('{"result": "Search error: HTTP Error: 422"}', 0)


def skyrl(http: httpx.Client, query: str, topk: int = 3) -> str:
    """``SearchToolGroup.search``: a single stripped query; documents are shown with their titles."""
    answer, error = call_search_api(http, [query.strip()], topk)
    if error:
        return json.dumps({"result": f"Search error: {error}"})
    if not answer.get("result"):
        return json.dumps({"result": "No search results found."})
    texts = [
        "".join(
            f"Doc {number}: {item['document']['contents'].strip()}\n"
            for number, item in enumerate(result, start=1)
        )
        for result in answer["result"]
    ]
    return json.dumps({"result": "\n---\n".join(texts)})


def test_skyrl(http: httpx.Client, contents: list[str]) -> None:
    assert json.loads(skyrl(http, " noble gas\n", topk=1)) == {"result": f"Doc 1: {contents[31]}\n"}


def test_a_full_queue_is_a_status_that_verl_and_skyrl_try_again(serve: Serve, service: Service) -> None:
    class Slow:
        size = service.index.size

        def search(self, queries: Any, top_k: int) -> Any:
            released.wait()
            return service.index.search(queries, top_k)

    released = threading.Event()
    url = serve(create_app(Service(index=Slow(), corpus=service.corpus, fingerprint="f"), max_queue=1))

    async def scenario() -> None:
        async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
            waiting = []
            for query in ("a computed one", "a waiting one"):
                waiting.append(asyncio.create_task(client.post("/retrieve", json={"query": query})))
                await asyncio.sleep(0.2)
            with httpx.Client(base_url=url, trust_env=False) as other:
                refused = await asyncio.to_thread(call_search_api, other, ["one more"], 3)
            assert refused == (None, "Server Error (503)")
            released.set()
            assert [(await task).status_code for task in waiting] == [200, 200]

    asyncio.run(scenario())


# ---- Our client, their servers ----

TITLED = '"Helium"\nHelium is a noble gas.'


def their(answer: Callable[[dict[str, Any]], Response]) -> Starlette:
    """A server with ``POST /retrieve`` and nothing else: theirs have no health endpoint."""

    async def retrieve(request: Request) -> Response:
        return answer(await request.json())

    return Starlette(routes=[Route("/retrieve", retrieve, methods=["POST"])])


def dense(body: dict[str, Any]) -> Response:
    """Search-R1's, verl's and SkyRL's ``retrieval_server.py`` over a dense index: corpus rows."""
    document = {"id": "31", "contents": TITLED}
    item = {"document": document, "score": 0.81} if body["return_scores"] else document
    return JSONResponse({"result": [[item] for _ in body["queries"]]})


def bm25(body: dict[str, Any]) -> Response:
    """The same server over BM25 (Pyserini): documents have a title and a text, and no id."""
    document = {"title": "Helium", "text": "Helium is a noble gas.", "contents": TITLED}
    item = {"document": document, "score": 7.5} if body["return_scores"] else document
    return JSONResponse({"result": [[item] for _ in body["queries"]]})


def web(body: dict[str, Any]) -> Response:
    """Search-R1's ``serp_search_server.py`` and ``google_search_server.py``: neither id nor score."""
    return JSONResponse({"result": [[{"document": {"contents": TITLED}}] for _ in body["queries"]]})


def plain(body: dict[str, Any]) -> Response:
    """Servers that give no scores even if asked for them, as slime's client expects."""
    return JSONResponse({"result": [[{"id": "31", "contents": TITLED}] for _ in body["queries"]]})


def nothing(body: dict[str, Any]) -> Response:
    """BM25 without a hit."""
    return JSONResponse({"result": [[] for _ in body["queries"]]})


async def searched(url: str, queries: list[str], deadline_s: float = 10.0) -> list[list[Document]]:
    retriever = HttpRetriever([f"{url}/retrieve"], timeout_s=5.0, deadline_s=deadline_s)
    try:
        return await asyncio.gather(*(retriever.search(query, 3) for query in queries))
    finally:
        await retriever.aclose()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (dense, [Document(id="31", contents=TITLED, score=0.81)]),
        (bm25, [Document(id="", contents=TITLED, score=7.5)]),
        (web, [Document(id="", contents=TITLED, score=0.0)]),
        (plain, [Document(id="31", contents=TITLED, score=0.0)]),
        (nothing, []),
    ],
)
def test_what_their_servers_answer_is_understood(
    serve: Serve, answer: Callable[[dict[str, Any]], Response], expected: list[Document]
) -> None:
    found = asyncio.run(searched(serve(their(answer)), ["noble gas", "helium", "gas"]))
    assert found == [expected] * 3


def fastapi_validation(_: dict[str, Any]) -> Response:
    """Pydantic's complaint about a request."""
    problem = {"type": "int_parsing", "loc": ["body", "topk"], "msg": "Input should be a valid integer"}
    return JSONResponse({"detail": [problem | {"input": "x"}]}, status_code=422)


def fastapi_crash(_: dict[str, Any]) -> Response:
    """An exception in their handler, such as for topk -1 or a lone surrogate."""
    return PlainTextResponse("Internal Server Error", status_code=500)


def fastapi_no_such_path(_: dict[str, Any]) -> Response:
    return JSONResponse({"detail": "Not Found"}, status_code=404)


def two_lists(body: dict[str, Any]) -> Response:
    """Search-R1's server asked for one query without scores: it unpacks (results, scores) from results."""
    return JSONResponse({"result": [[{"id": "31", "contents": TITLED}]] * (len(body["queries"]) + 1)})


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (fastapi_validation, FailureKind.REJECTED),
        (fastapi_crash, FailureKind.UNAVAILABLE),
        (fastapi_no_such_path, FailureKind.BAD_RESPONSE),
        (two_lists, FailureKind.BAD_RESPONSE),
    ],
)
def test_how_their_servers_fail_is_a_typed_error(
    serve: Serve, answer: Callable[[dict[str, Any]], Response], kind: FailureKind
) -> None:
    url = serve(their(answer))
    with pytest.raises(RetrievalError) as caught:
        asyncio.run(searched(url, ["noble gas"], deadline_s=1.0))
    assert caught.value.kind is kind
