"""Pages of the web: what may be called, what is read of it, what is kept; against servers on loopback."""

from __future__ import annotations

import asyncio
import gzip
import ipaddress
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from searchrl.config import WebConfig
from searchrl.retrieval import pages
from searchrl.retrieval.google import GoogleEngine
from searchrl.retrieval.meter import RetrievalMeter
from searchrl.retrieval.pages import (
    PageError,
    PageReader,
    clean,
    decode,
    excerpt,
    host_of,
    is_public,
    paragraphs,
)
from searchrl.retrieval.transport import RetryPolicy
from searchrl.retrieval.web import WebRetriever
from searchrl.trajectory import Document

Serve = Callable[[ASGIApp], str]

ABOUT = "The Nile is a river that flows north"
PARAGRAPH = f"<p>{ABOUT} into the sea.</p>"
HTML = f"<html><head><title>No</title></head><body><nav>Menu</nav>{PARAGRAPH}</body></html>"


def html(
    body: str | bytes = HTML, content_type: str = "text/html; charset=utf-8", **headers: str
) -> Response:
    return Response(body, headers={"content-type": content_type, **headers})


async def endless() -> AsyncIterator[bytes]:
    yield PARAGRAPH.encode()
    while True:
        yield b"<p>" + b"x" * 65_000
        await asyncio.sleep(0)


async def dribble() -> AsyncIterator[bytes]:
    while True:
        yield b"<p>x"
        await asyncio.sleep(0.05)


PAGES: dict[str, Callable[[Request], Response]] = {
    "/good": lambda _: html(),
    "/xhtml": lambda _: html(f'<?xml version="1.0"?>{HTML}', "application/xhtml+xml"),
    "/moved": lambda _: RedirectResponse("/good"),
    "/loop": lambda _: RedirectResponse("/loop"),
    "/inside": lambda _: RedirectResponse("http://169.254.169.254/latest/meta-data"),
    "/file": lambda _: RedirectResponse("file:///etc/passwd"),
    "/to-hub": lambda request: RedirectResponse(f"http://hub.localhost:{request.url.port}/good"),
    "/missing": lambda _: Response("gone", 404, media_type="text/html"),
    "/pdf": lambda _: html("%PDF-1.7", "application/pdf"),
    "/untyped": lambda _: Response(HTML.encode()),
    "/packed": lambda _: html(gzip.compress(HTML.encode()), **{"content-encoding": "gzip"}),
    "/endless": lambda _: StreamingResponse(endless(), media_type="text/html"),
    "/dribble": lambda _: StreamingResponse(dribble(), media_type="text/html"),
    "/latin": lambda _: html("<p>Caf\xe9 Z\xfcrich</p>".encode("latin-1"), "text/html; charset=ISO-8859-1"),
    "/meta": lambda _: html('<meta charset="cp1251"><p>Нил</p>'.encode("cp1251"), "text/html"),
    "/broken": lambda _: html(b"<p>Nile \xff\xfe r\xc3iver</p>"),
    "/empty": lambda _: html(""),
    "/consent": lambda _: html("<p>We value your privacy. Accept all cookies?</p>"),
}


@pytest.fixture(scope="module")
def hits() -> Counter[str]:
    return Counter()


@pytest.fixture(scope="module")
def site(serve: Serve, hits: Counter[str]) -> str:
    """The address of a web site with all of `PAGES`; its host name is ``localhost``."""

    async def page(request: Request) -> Response:
        hits[request.headers["host"].partition(":")[0] + request.url.path] += 1
        return PAGES[request.url.path](request)

    app = Starlette(routes=[Route(path, page) for path in PAGES])
    return serve(app).replace("127.0.0.1", "localhost")


def read(
    url: str,
    about: str = ABOUT,
    *,
    blocked: Callable[[str], bool] = lambda _: False,
    reader: Callable[[], PageReader] = lambda: PageReader(allowed=lambda address: address.is_loopback),
    seconds: float = 10.0,
) -> str:
    async def scenario() -> str:
        pages = reader()
        try:
            return await pages.read(url, about, blocked=blocked, deadline=time.monotonic() + seconds)
        finally:
            await pages.aclose()

    return asyncio.run(scenario())


@pytest.mark.parametrize(
    ("path", "about", "text"),
    [
        ("/good", ABOUT, f"{ABOUT} into the sea."),
        ("/xhtml", ABOUT, f"{ABOUT} into the sea."),
        ("/moved", ABOUT, f"{ABOUT} into the sea."),
        ("/latin", "Café Zürich", "Café Zürich"),
        ("/meta", "Нил", "Нил"),
        ("/broken", "Nile river", "Nile r iver"),
    ],
)
def test_what_is_read(site: str, path: str, about: str, text: str) -> None:
    assert read(site + path, about) == text


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/loop", "more than 5 redirects"),
        ("/inside", "private network"),
        ("/file", "no http"),
        ("/missing", "answered 404"),
        ("/pdf", "application/pdf"),
        ("/untyped", "of no type"),
        ("/packed", "encoded as gzip"),
        ("/empty", "no text"),
        ("/consent", "does not hold"),
    ],
)
def test_what_is_no_page_is_an_error(site: str, path: str, reason: str) -> None:
    with pytest.raises(PageError, match=reason):
        read(site + path)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "x",
        "ftp://localhost/",
        "http://",
        "http://[::1/",
        "http://\0/",
        "http://a..b/",
        "http://" + "a" * 70 + "/",
        "http://x\ud800/",
    ],
)
def test_what_is_no_address_is_an_error(url: str) -> None:
    with pytest.raises(PageError):
        read(url)


def test_a_redirect_loop_ends_after_six_requests(site: str, hits: Counter[str]) -> None:
    hits.clear()
    with pytest.raises(PageError):
        read(site + "/loop")
    assert hits == {"localhost/loop": 6}


def test_an_endless_page_is_read_to_the_limit(site: str) -> None:
    start = time.monotonic()
    assert read(site + "/endless").startswith(ABOUT)
    assert time.monotonic() - start < 10.0


def test_a_slow_page_is_given_up(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    start = time.monotonic()
    with pytest.raises(PageError, match="not read in time"):
        read(site + "/dribble", seconds=0.3)
    monkeypatch.setattr(pages, "PAGE_TIMEOUT_S", 0.3)
    with pytest.raises(PageError, match="not read in time"):
        read(site + "/dribble")
    assert time.monotonic() - start < 10.0


def test_no_private_address_is_called_however_it_is_written(site: str, hits: Counter[str]) -> None:
    port = site.rpartition(":")[2]
    hosts = ["localhost", "x.localhost", "127.0.0.1", "127.1", "2130706433", "0x7f.0.0.1", "[::1]", "0.0.0.0"]
    hosts += ["[::ffff:127.0.0.1]", "169.254.169.254", "10.0.0.1", "[fd00::1]"]

    async def scenario(proxy: str) -> None:
        reader = PageReader(proxy=proxy)
        for host in hosts:
            with pytest.raises(PageError, match="private network"):
                await reader.read(f"http://{host}:{port}/good", ABOUT, blocked=lambda _: False)
        await reader.aclose()

    hits.clear()
    asyncio.run(scenario(""))
    asyncio.run(scenario(site))  # the proxy may be on loopback, the pages it is asked for may not
    assert not hits


def test_through_a_proxy_names_are_left_to_it(site: str, hits: Counter[str]) -> None:
    hits.clear()
    text = read("http://nile.test/good", reader=lambda: PageReader(proxy=site))
    assert text == f"{ABOUT} into the sea."
    assert hits == {"nile.test/good": 1}
    with pytest.raises(PageError, match="private network"):
        read("http://nile.test/inside", reader=lambda: PageReader(proxy=site))


def test_a_redirect_to_a_blocked_domain_is_not_followed(site: str, hits: Counter[str]) -> None:
    hits.clear()
    with pytest.raises(PageError, match="blocked domain"):
        read(site + "/to-hub", blocked=lambda url: host_of(url) == "hub.localhost")
    assert hits == {"localhost/to-hub": 1}
    assert read(site + "/to-hub").startswith(ABOUT)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        ("127.0.0.1", False),
        ("0.0.0.0", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("fe80::1", False),
        ("fd00::1", False),
        ("ff02::1", False),
        ("::ffff:10.0.0.1", False),
        ("::ffff:93.184.216.34", True),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::5db8:d822", True),
        ("2002:7f00:1::1", False),
    ],
)
def test_which_addresses_are_public(address: str, public: bool) -> None:
    assert is_public(ipaddress.ip_address(address)) is public


def test_documents_come_from_pages_where_they_can_be_read(
    serve: Serve, site: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERPER_API_KEY", "key")
    paths = ("/good", "/missing", "/to-hub", "/consent")
    organic = [{"link": site + path, "title": path[1:], "snippet": ABOUT + " …"} for path in paths]

    async def handler(_: Request) -> Response:
        return JSONResponse({"searchParameters": {}, "organic": organic})

    async def scenario() -> list[Document]:
        web = WebConfig(snippet_only=False, blocked_domains=("hub.localhost",))
        retriever = WebRetriever(
            GoogleEngine(web, url=url),
            web,
            policy=RetryPolicy(),
            max_concurrency=4,
            meter=meter,
            pages=PageReader(allowed=lambda address: address.is_loopback),
        )
        try:
            return await retriever.search("nile", 4)
        finally:
            await retriever.aclose()

    url = serve(Starlette(routes=[Route("/", handler, methods=["POST"])])) + "/"
    meter = RetrievalMeter()
    texts = [document.text for document in asyncio.run(scenario())]
    assert texts == [f"{ABOUT} into the sea.", *[ABOUT + " …"] * 3]
    assert +meter.counts == {"requests": 1, "pages_read": 1, "pages_failed": 3}


def test_paragraphs_follow_the_blocks_of_a_page_and_not_the_lines_of_its_source() -> None:
    page = """<title>T</title><script>var x = "<p>no</p>"</script><style>p {}</style><header>Head</header>
        <p>one <b>two</b>\nthree&nbsp;&amp; f<i>our</i><p>five<br>six<ul><li>seven<li>eight</ul>tail
        <!-- no --><nav>menu<nav>more</nav></nav><form>no</form><template>no</template><x-card>nine</x-card>
        <table><tr><td>a<td>b</table>c\0d\x01e &#xD800;f"""
    assert paragraphs(page) == [
        "Head", "one two three & four", "five", "six", "seven", "eight", "tail", "nine", "a", "b", "c d e f",
    ]  # fmt: skip
    assert paragraphs("") == paragraphs(" ") == paragraphs("<!---->") == []


@pytest.mark.parametrize(
    "source",
    [
        "<div>" * 200_000,
        "<b>" * 300_000,
        "<p>x" * 250_000,
        "<div " * 200_000,
        "<" * 1_000_000,
        "<!" * 500_000,
        "<!--" * 250_000,
        "<![CDATA[" * 110_000,
        "<?" * 500_000,
        "</" * 500_000,
        "&" * 1_000_000,
        "a b " * 250_000,
        "x<br>" * 200_000,
    ],
    ids=lambda source: source[:8],
)
def test_a_hostile_page_takes_no_longer_than_others(source: str) -> None:
    start = time.process_time()
    found = paragraphs(source)
    if found:
        assert len(excerpt(found, "")) <= pages.MAX_EXCERPT_CHARS
    assert time.process_time() - start < 4.0


@given(
    st.text(), st.sampled_from(["", "utf-8", "utf-16", "idna", "rot13", "nonsense", "unicode_escape", "\0"])
)
def test_no_page_breaks_the_reader(text: str, charset: str) -> None:
    found = paragraphs(decode(text.encode(errors="replace"), charset))
    for paragraph in found:
        paragraph.encode()
        assert paragraph == clean(paragraph) != ""


def test_the_excerpt_is_the_best_paragraph_and_its_neighbours() -> None:
    filler = [f"Filler {i} " + "x" * 90 for i in range(50)]
    texts = [*filler[:20], "The Nile flows north.", "The Nile is long.", *filler[20:]]
    kept = excerpt(texts, "Nile flows … north", limit=400)
    assert kept.split("\n") == [*filler[18:20], "The Nile flows north.", "The Nile is long.", filler[20]]
    assert excerpt(texts, "Nile flows north", limit=21) == "The Nile flows north."
    assert excerpt(["First.", "Second."], "") == "First.\nSecond."
    # One long paragraph is cut where its words are.
    long = " ".join(f"w{i}" for i in range(5000))
    assert "w4000 w4001" in excerpt([long], "w4000 w4001")


@given(st.lists(st.text(alphabet="ab ", max_size=700), max_size=12), st.text(alphabet="ab ", max_size=20))
def test_an_excerpt_is_a_bounded_part_of_the_page_in_its_order(texts: list[str], about: str) -> None:
    cleaned = [text for raw in texts if (text := clean(raw))]
    try:
        kept = excerpt(cleaned, about, limit=600)
    except PageError:
        return
    assert len(kept) <= 600
    assert " ".join(kept.split()) in " ".join(" ".join(cleaned).split())


def test_the_host_of_a_link() -> None:
    links = {
        "https://A.org.:8080/x": "a.org", "http://u:p@b.org": "b.org", "//c.org/x": "c.org",
        "": "", "mailto:x@y": "", "http://[": "", "http:///x": "",
    }  # fmt: skip
    assert {link: host_of(link) for link in links} == links
