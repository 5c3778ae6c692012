"""Reads a page of the web, safely and within bounds, and keeps the text around a search result's snippet.

The addresses come from strangers: a page is fetched only from a public address, which is looked up and
checked here and then connected to as such, so that no second look-up can turn it into another (DNS
rebinding). Every redirect is checked anew. Through a proxy the names are the proxy's to look up; then only
what is written as an address, or as ``localhost``, can be checked here.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import ipaddress
import re
import socket
import textwrap
import time
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

import httpx

PAGE_TIMEOUT_S = 5.0
MAX_PAGE_BYTES = 1 << 20
"""What is longer is read so far; the beginning of a page is its better part."""
MAX_EXCERPT_CHARS = 2000
MAX_REDIRECTS = 5
_MAX_PAGES_AT_ONCE = 64
_MAX_PIECE_CHARS = 500
_INLINE = re.compile(
    "a|abbr|b|bdi|bdo|big|cite|code|del|em|font|i|img|ins|kbd|label|mark|q|s|samp|small|span|strike|strong|sub|"
    "sup|time|tt|u|var|wbr"
)
"""Tags within a paragraph; all others end one."""
_FURNITURE = re.compile(
    "aside|button|footer|form|head|nav|noscript|script|select|style|svg|template|textarea|title"
)
_META_CHARSET = re.compile(rb"<meta[^>]{0,200}charset\s*=\s*[\"']?\s*([\w.:-]+)", re.IGNORECASE)
# Python's, not the web's; the first two take quadratic time.
_ODD_CODECS = ("idna", "punycode", "raw-unicode-escape", "unicode-escape")
_WORD = re.compile(r"\w+")
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufeff\ufffd]")

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


class PageError(Exception):
    """The page cannot be read; the result's snippet has to do."""


def is_public(address: IpAddress) -> bool:
    """Whether ``address`` belongs to the public internet, and so to no service of our own network."""
    if isinstance(address, ipaddress.IPv6Address):
        if address in _NAT64:
            address = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        else:
            address = address.ipv4_mapped or address.sixtofour or address
    return address.is_global and not address.is_multicast


_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def host_of(url: str) -> str:
    """Return the host name in ``url``, lower-case and without a final dot; empty if there is none."""
    try:
        return (urlsplit(url).hostname or "").rstrip(".")
    except ValueError:
        return ""


def clean(text: str) -> str:
    """Return ``text`` as one line: no control characters, no lone surrogates, single spaces."""
    return " ".join(_UNPRINTABLE.sub(" ", text).split())


class PageReader:
    """Fetches pages without cookies or keys.

    ``allowed`` decides which addresses may be called. A page takes at most 5 s, five redirects and 1 MB, and
    must be HTML.
    """

    def __init__(self, *, proxy: str = "", allowed: Callable[[IpAddress], bool] = is_public) -> None:
        self._proxied = bool(proxy)
        self._allowed = allowed
        self._slots = asyncio.Semaphore(_MAX_PAGES_AT_ONCE)
        self._http = httpx.AsyncClient(
            # A packed answer could unpack to any size.
            headers={"User-Agent": "searchrl", "Accept": "text/html", "Accept-Encoding": "identity"},
            proxy=proxy or None,
            trust_env=False,
            timeout=PAGE_TIMEOUT_S,
            # Requests go to addresses, not names: a kept TLS connection might belong to another host there.
            limits=httpx.Limits(max_connections=_MAX_PAGES_AT_ONCE, max_keepalive_connections=0),
        )

    async def read(
        self, url: str, about: str, *, blocked: Callable[[str], bool], deadline: float = float("inf")
    ) -> str:
        """Return the paragraphs of the page at ``url`` that are nearest to the words of ``about``.

        ``blocked`` says which URLs must not be read, redirects included; ``deadline`` is a `time.monotonic`.
        Raises `PageError` if there is no such text.
        """
        try:
            async with asyncio.timeout(max(deadline - time.monotonic(), 0.0)), self._slots:
                async with asyncio.timeout(PAGE_TIMEOUT_S):
                    body, charset = await self._get(url, blocked)
                    return await asyncio.to_thread(_excerpt_of_page, body, charset, about)
        except TimeoutError as error:
            raise PageError(f"{url} was not read in time") from error
        # ValueError: host names that are none.
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
            raise PageError(f"{url} cannot be read: {type(error).__name__}: {error}") from error

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def _get(self, url: str, blocked: Callable[[str], bool]) -> tuple[bytes, str]:
        """Return the beginning of the page that ``url`` leads to, and the encoding its header names."""
        for _ in range(MAX_REDIRECTS + 1):
            if blocked(url):
                raise PageError(f"{url} is on a blocked domain")
            response = await self._http.send(await self._request(httpx.URL(url)), stream=True)
            try:
                if response.has_redirect_location:
                    url = str(httpx.URL(url).join(response.headers["location"]))
                    continue
                return await _body(response, url), response.charset_encoding or ""
            finally:
                await response.aclose()
        raise PageError(f"{url} is the end of more than {MAX_REDIRECTS} redirects")

    async def _request(self, url: httpx.URL) -> httpx.Request:
        """Return the request for ``url``, addressed to the checked address of its host."""
        if url.scheme not in ("http", "https") or not url.host:
            raise PageError(f"{url} is no http(s) URL")
        name = url.raw_host.decode()
        addresses = await self._look_up(name)
        if not all(self._allowed(address) for address in addresses):
            raise PageError(f"{url} leads into a private network")
        if self._proxied:
            return self._http.build_request("GET", url)
        return self._http.build_request(
            "GET",
            url.copy_with(host=str(addresses[0])),
            headers={"Host": url.netloc.decode()},
            extensions={"sni_hostname": name},  # what the certificate must be for
        )

    async def _look_up(self, name: str) -> list[IpAddress]:
        """Return the addresses of ``name``; through a proxy none, unless it is one in any notation."""
        if name == "localhost" or name.endswith(".localhost"):
            return [ipaddress.IPv4Address("127.0.0.1")]
        flags = socket.AI_NUMERICHOST if self._proxied else 0
        try:
            found = await asyncio.get_running_loop().getaddrinfo(
                name, None, type=socket.SOCK_STREAM, flags=flags
            )
        except socket.gaierror:
            if self._proxied:
                return []
            raise
        return [ipaddress.ip_address(address[0]) for *_, address in found]


async def _body(response: httpx.Response, url: str) -> bytes:
    """Read the page's first megabyte; raise `PageError` if it is not a page."""
    kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    encoding = response.headers.get("content-encoding", "identity").lower()
    if response.status_code != 200:
        raise PageError(f"{url} answered {response.status_code}")
    if kind not in ("text/html", "application/xhtml+xml") or encoding != "identity":
        raise PageError(f"{url} is {kind or 'of no type'}, encoded as {encoding}: not plain HTML")
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) >= MAX_PAGE_BYTES:
            break
    return bytes(body[:MAX_PAGE_BYTES])


def _excerpt_of_page(body: bytes, charset: str, about: str) -> str:
    return excerpt(paragraphs(decode(body, charset)), about)


def decode(body: bytes, charset: str) -> str:
    """Return the text of a page in the encoding of its header, else its meta tag, else UTF-8."""
    declared = _META_CHARSET.search(body[:4096])
    label = charset or (declared[1].decode() if declared else "utf-8")
    # The last character may be cut in two, and many pages hold a few broken ones. An encoding that is unknown
    # or not of text counts as undeclared.
    with contextlib.suppress(LookupError, ValueError):
        if codecs.lookup(label).name not in _ODD_CODECS:
            return body.decode(label, errors="replace")
    return body.decode(errors="replace")


def paragraphs(html: str) -> list[str]:
    """Return the paragraphs of a page in order, white space collapsed, without menus, scripts and forms."""
    # lxml, since html.parser and what is built on it takes minutes over hostile pages, holding the GIL, and
    # a thread cannot be stopped. libxml2 reads a megabyte in a tenth of a second, without the GIL.
    from lxml import etree

    parser = etree.HTMLParser(encoding="utf-8", remove_comments=True, remove_pis=True, no_network=True)
    # An empty document would be an error; a second <body> is none.
    root = etree.fromstring(f"<body>{html}".encode(errors="replace"), parser)
    parts: list[str] = []
    walker = etree.iterwalk(root, events=("start", "end"))
    for event, element in walker:
        if not _INLINE.fullmatch(element.tag):  # the line breaks of the source mean nothing
            parts.append("\0")
        if event == "end":
            parts.append(element.tail or "")
        elif _FURNITURE.fullmatch(element.tag):
            walker.skip_subtree()
        else:
            parts.append(element.text or "")
    return [text for piece in "".join(parts).split("\0") if (text := clean(piece))]


def excerpt(texts: Sequence[str], about: str, *, limit: int = MAX_EXCERPT_CHARS) -> str:
    """Return the part of a page that is about ``about``: the best paragraph, then its neighbours in turn.

    The best one has the most of its distinct words. At most ``limit`` characters, one paragraph a line.
    Raises `PageError` if the part has not a third of the words: a page of consent or error, not the one that
    the search engine saw.
    """
    wanted = _words(about)
    pieces: list[str] = []
    for text in texts:
        pieces += [text] if len(text) <= _MAX_PIECE_CHARS else textwrap.wrap(text, _MAX_PIECE_CHARS)
    if not pieces:
        raise PageError("the page has no text")
    best = max(range(len(pieces)), key=lambda i: (len(wanted & _words(pieces[i])), -i))
    first = last = best
    size = len(pieces[best])
    while True:
        after = len(pieces[last + 1]) + 1 if last + 1 < len(pieces) else limit
        before = len(pieces[first - 1]) + 1 if first else limit
        # Below the paragraph first, then above, so that it stays near the middle.
        if size + after <= limit and (last - best <= best - first or size + before > limit):
            last, size = last + 1, size + after
        elif size + before <= limit:
            first, size = first - 1, size + before
        else:
            break
    text = "\n".join(pieces[first : last + 1])
    if 3 * len(wanted & _words(text)) < len(wanted):
        raise PageError("the page does not hold what the search engine saw in it")
    return text


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text.lower()))
