from __future__ import annotations

import asyncio
import contextlib
import gzip
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx
import pytest

from searchrl.retrieval.meter import RetrievalMeter
from searchrl.retrieval.transport import (
    MAX_RETRY_AFTER_S,
    BreakerState,
    CircuitBreaker,
    ConcurrencyLimit,
    Retriable,
    RetryBudget,
    RetryPolicy,
    check_status,
    send,
    with_retries,
)
from searchrl.retrieval.types import FailureKind, RetrievalError


def test_a_breaker_opens_lets_one_trial_pass_and_closes() -> None:
    breaker = CircuitBreaker(threshold=2, first_pause_s=0.2, max_pause_s=0.4)

    def allowed() -> list[bool]:
        return [breaker.allow() for _ in range(3)]

    states = [breaker.state]
    breaker.failed()
    breaker.succeeded()
    breaker.failed()
    states.append(breaker.state)  # two failures, but not in a row
    breaker.failed()
    states.append(breaker.state)
    assert states == [BreakerState.CLOSED, BreakerState.CLOSED, BreakerState.OPEN]
    assert allowed() == [False, False, False]
    time.sleep(0.21)
    states = [breaker.state]
    assert allowed() == [True, False, False]
    breaker.failed()
    states.append(breaker.state)  # one failed trial is enough
    assert states == [BreakerState.HALF_OPEN, BreakerState.OPEN]
    breaker.heal()
    assert allowed() == [True, False, False]
    breaker.abandoned()
    assert allowed() == [True, False, False]
    breaker.succeeded()
    assert allowed() == [True, True, True]


def test_a_breaker_hears_how_requests_end() -> None:
    breaker = CircuitBreaker(threshold=1, first_pause_s=0.0)

    def end(error: BaseException | None) -> bool:
        """End one request so; return whether the breaker is closed then."""
        assert breaker.allow()
        with contextlib.suppress(BaseException), breaker.watch():
            if error is not None:
                raise error
        return breaker.state is BreakerState.CLOSED

    assert end(Retriable("busy", FailureKind.OVERLOADED))
    assert not end(Retriable("gone", FailureKind.UNAVAILABLE))
    assert not end(asyncio.CancelledError())  # its trial is free again
    assert not end(Retriable("busy", FailureKind.OVERLOADED))
    assert end(RetrievalError("no", kind=FailureKind.REJECTED))
    assert not end(Retriable("slow", FailureKind.TIMEOUT))
    assert end(None)


class Service:
    """Fails as often as it is told to, then answers."""

    def __init__(self, *failures: Retriable) -> None:
        self.failures = list(failures)
        self.times: list[float] = []

    async def attempt(self, timeout_s: float) -> str:
        self.times.append(time.monotonic())
        if self.failures:
            raise self.failures.pop(0)
        return f"answer within {timeout_s:.0f}"

    def ask(
        self,
        *,
        deadline_s: float = 100.0,
        budget: RetryBudget | None = None,
        meter: RetrievalMeter | None = None,
        breaker: CircuitBreaker | None = None,
    ) -> str:
        return asyncio.run(
            with_retries(
                self.attempt,
                policy=RetryPolicy(timeout_s=3.0, deadline_s=deadline_s, first_pause_s=0.01),
                deadline=time.monotonic() + deadline_s,
                budget=budget or RetryBudget(),
                meter=meter or RetrievalMeter(),
                breaker=breaker,
            )
        )


def gone(retry_after_s: float = 0.0) -> Retriable:
    return Retriable("gone", FailureKind.UNAVAILABLE, retry_after_s)


def test_retries_are_counted_and_pauses_grow() -> None:
    service, meter = Service(*[gone() for _ in range(4)]), RetrievalMeter()
    assert service.ask(meter=meter) == "answer within 3"
    assert meter.counts == {"requests": 5, "retries": 4}
    pauses = [b - a for a, b in zip(service.times, service.times[1:], strict=False)]
    for pause, longest in zip(pauses, [0.01, 0.02, 0.04, 0.08], strict=True):
        assert pause > longest / 2


def test_a_pause_that_the_server_asked_for_is_kept_and_costs_no_budget() -> None:
    service, broke = Service(gone(0.3)), RetryBudget(ratio=0.0, reserve=0.0, per_second=0.0)
    assert service.ask(budget=broke) == "answer within 3"
    assert service.times[1] - service.times[0] >= 0.3


def test_the_deadline_ends_retries_before_a_pause_that_would_pass_it() -> None:
    started = time.monotonic()
    with pytest.raises(RetrievalError, match=r"gone \(attempt 1, the last: the deadline of 5 s") as caught:
        Service(gone(9.0)).ask(deadline_s=5.0)
    assert time.monotonic() - started < 4.0
    assert caught.value.kind is FailureKind.UNAVAILABLE
    assert Service().ask(deadline_s=2.0) == "answer within 2"


def test_a_used_up_budget_makes_failures_surface_at_once() -> None:
    budget, meter = RetryBudget(ratio=0.2, reserve=2.0, per_second=0.0), RetrievalMeter()
    for _ in range(50):
        with pytest.raises(RetrievalError, match="too many have failed lately"):
            Service(*[gone() for _ in range(99)]).ask(budget=budget, meter=meter)
    assert meter.counts["requests"] - meter.counts["retries"] == 50
    assert 10 <= meter.counts["retries"] <= 12  # a fifth, and the reserve


def test_a_budget_recovers_with_time() -> None:
    budget = RetryBudget(reserve=1.0, per_second=20.0)
    assert [budget.withdraw(), budget.withdraw()] == [True, False]
    time.sleep(0.06)
    assert budget.withdraw()


def test_an_open_breaker_makes_requests_wait_and_gives_up_at_the_deadline() -> None:
    breaker = CircuitBreaker(threshold=2, first_pause_s=0.2)
    service = Service(gone(), gone())
    assert service.ask(breaker=breaker) == "answer within 3"
    assert service.times[2] - service.times[1] >= 0.1
    assert breaker.state is BreakerState.CLOSED

    for_ever = CircuitBreaker(threshold=1, first_pause_s=100.0, max_pause_s=100.0)
    for_ever.failed()
    with pytest.raises(RetrievalError, match="did not recover in time") as caught:
        Service().ask(breaker=for_ever, deadline_s=0.1)
    assert caught.value.kind is FailureKind.UNAVAILABLE


def test_the_concurrency_limit_bounds_and_times_out_in_any_loop() -> None:
    limit = ConcurrencyLimit(2)
    under_way = most = 0

    async def search(seconds: float, deadline_s: float) -> None:
        nonlocal under_way, most
        async with limit.slot(time.monotonic() + deadline_s):
            under_way += 1
            most = max(most, under_way)
            await asyncio.sleep(seconds)
            under_way -= 1

    async def scenario() -> list[BaseException | None]:
        await asyncio.gather(*(search(0.01, 9.0) for _ in range(10)))
        late = [search(0.3, 9.0), search(0.3, 9.0), search(0.0, 0.1)]
        return await asyncio.gather(*late, return_exceptions=True)

    for _ in range(2):
        first, second, late = asyncio.run(scenario())
        assert (first, second) == (None, None)
        assert isinstance(late, RetrievalError)
        assert late.kind is FailureKind.TIMEOUT
        assert "2 searches were under way" in str(late)
    assert most == 2
    with pytest.raises(ValueError, match="at least 1"):
        ConcurrencyLimit(0)


def answer(status: int, **headers: str) -> httpx.Response:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.Response(status, headers=names, content=b"reason")


@pytest.mark.parametrize(
    ("status", "retriable", "kind"),
    [
        (429, True, FailureKind.OVERLOADED),
        (503, True, FailureKind.OVERLOADED),
        (408, True, FailureKind.TIMEOUT),
        (504, True, FailureKind.TIMEOUT),
        (500, True, FailureKind.UNAVAILABLE),
        (502, True, FailureKind.UNAVAILABLE),
        (401, False, FailureKind.UNAUTHORIZED),
        (403, False, FailureKind.UNAUTHORIZED),
        (400, False, FailureKind.REJECTED),
        (413, False, FailureKind.REJECTED),
        (414, False, FailureKind.REJECTED),
        (422, False, FailureKind.REJECTED),
        (204, False, FailureKind.BAD_RESPONSE),
        (302, False, FailureKind.BAD_RESPONSE),
        (404, False, FailureKind.BAD_RESPONSE),
    ],
)
def test_statuses(status: int, retriable: bool, kind: FailureKind) -> None:
    with pytest.raises((Retriable, RetrievalError), match=f"the engine answered {status}: reason") as caught:
        check_status(answer(status), "the engine")
    assert isinstance(caught.value, Retriable) == retriable
    assert isinstance(caught.value, Retriable | RetrievalError)
    assert caught.value.kind is kind
    check_status(answer(200), "the engine")


def in_seconds(seconds: float) -> str:
    return format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)


def test_retry_after() -> None:
    cases: list[tuple[dict[str, str], float]] = [
        ({"retry_after": "7"}, 7.0),
        ({"retry_after": "1.5"}, 1.5),
        ({"retry_after": "0"}, 0.0),
        ({"retry_after": "0.001"}, 0.1),
        ({"retry_after": "999999999"}, MAX_RETRY_AFTER_S),
        ({"retry_after": "-3"}, 0.0),
        ({"retry_after": "soon"}, 0.0),
        ({"retry_after": in_seconds(20)}, 20.0),
        ({"retry_after": in_seconds(-20)}, 0.0),
        ({"retry_after": in_seconds(9999)}, MAX_RETRY_AFTER_S),
        # The server's clock is an hour ahead, and it wants ten seconds.
        ({"retry_after": in_seconds(3610), "date": in_seconds(3600)}, 10.0),
        ({}, 0.0),
    ]
    for headers, expected in cases:
        with pytest.raises(Retriable) as caught:
            check_status(answer(503, **headers), "the engine")
        assert caught.value.retry_after_s == pytest.approx(expected, abs=2.0 if expected > 9 else 0.0)


KEYS = [("Authorization", "Bearer k3y"), ("X-API-KEY", "k3y"), ("X-Subscription-Token", "k3y")]


@pytest.mark.parametrize(("name", "value"), KEYS)
def test_a_key_that_is_echoed_is_not_shown(name: str, value: str) -> None:
    request = httpx.Request("GET", "http://x", headers={name: value})
    echo = httpx.Response(401, content=b"no such key: k3y", request=request)
    with pytest.raises(RetrievalError, match="no such key: …") as caught:
        check_status(echo, "the engine")
    assert "k3y" not in str(caught.value)


def test_a_key_that_is_no_header_value_is_not_shown() -> None:
    async def scenario() -> None:
        async with httpx.AsyncClient(trust_env=False) as http:
            request = http.build_request("GET", "http://127.0.0.1:1", headers={"X-API-KEY": "k3y\n"})
            await send(http, request, timeout_s=1.0, where="the engine")

    def told(error: BaseException | None) -> str:
        return "" if error is None or error.__suppress_context__ else f"{error!r} {told(error.__context__)}"

    with pytest.raises((RetrievalError, Retriable)) as caught:
        asyncio.run(scenario())
    assert "k3y" not in str(caught.value) + told(caught.value)


def test_a_compressed_answer_is_read() -> None:
    packed = gzip.compress(b"x" * 1000)

    async def reply(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = f"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: {len(packed)}\r\n\r\n"
        writer.write(head.encode() + packed)
        await writer.drain()
        writer.close()

    async def scenario(max_bytes: int) -> bytes:
        server = await asyncio.start_server(reply, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with httpx.AsyncClient(trust_env=False) as http, server:
            request = http.build_request("GET", url)
            return (await send(http, request, timeout_s=5.0, where="x", max_bytes=max_bytes)).content

    assert asyncio.run(scenario(1000)) == b"x" * 1000
    with pytest.raises(RetrievalError, match="more than 999 bytes"):  # of what it unpacks to
        asyncio.run(scenario(999))
