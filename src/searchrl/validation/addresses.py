"""Addresses that requests are sent to."""

from __future__ import annotations

import httpx


def is_http_address(url: str) -> bool:
    """True if ``url`` names a host and a port that a request can be sent to, over http or https."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        return False
    # What no host name can hold, httpx escapes.
    is_host = any(char.isalnum() for char in parsed.host) and "%" not in parsed.host
    return parsed.scheme in ("http", "https") and is_host and (parsed.port is None or 0 < parsed.port < 2**16)
