"""Short forms of what tests ask a server over HTTP."""

from __future__ import annotations

import httpx


def post(http: httpx.Client, **body: object) -> httpx.Response:
    return http.post("/retrieve", json=body)


def samples(http: httpx.Client) -> dict[str, float]:
    """Every sample of ``/metrics``, by its name with its labels."""
    lines = http.get("/metrics").text.splitlines()
    return {name: float(value) for name, _, value in (x.rpartition(" ") for x in lines if x[0] != "#")}
