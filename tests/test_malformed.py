"""Requests over a real socket, and many malformed ones."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from malformed_cases import broken, malformed
from service_cases import FakeHost, FakeUpdates, asked, raw, served

from recsys.experiments.serve import MAIN, Plan, service
from recsys.serving.api.app import make_app
from recsys.serving.api.auth import Keys
from recsys.serving.api.middleware import sane_id

LIVE = b"GET /v1/live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with served(make_app(FakeHost(), FakeUpdates(), keys=Keys(open_writes=True))) as port:
        yield port


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0


def content(answer: bytes) -> Any:
    return json.loads(answer.split(b"\r\n\r\n", 1)[1])


def test_a_request_over_the_wire(port: int) -> None:
    answer = raw(port, LIVE)
    assert status(answer) == 200
    assert content(answer) == {"live": True}


def test_a_chunked_body_stops_at_the_bound(port: int) -> None:
    head = (
        b"POST /v1/search HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n"
    )
    answer = raw(port, head, *[b"10000\r\n" + b" " * 65536 + b"\r\n"] * 18, wait=3)
    assert status(answer) in (413, 0)
    assert status(raw(port, LIVE)) == 200


HOT = b"GET /v1/items/i%d/similar?k=1 HTTP/1.1\r\nHost: localhost\r\nX-Request-ID: r%d\r\n\r\n"
SLOW = (
    b"GET /v1/users/u/recommendations?k=1 HTTP/1.1\r\nHost: localhost\r\nX-Request-ID: %b\r\n\r\n"
)


def ids(answer: bytes) -> list[bytes]:
    return [line[14:] for line in answer.split(b"\r\n") if line.startswith(b"x-request-id: r")]


def test_pipelined_requests_are_answered_in_order_hot_or_not(port: int) -> None:
    hot = [HOT % (n, n) for n in range(20)]
    assert ids(raw(port, b"".join(hot) + LIVE)) == [b"r%d" % n for n in range(20)]
    mixed = HOT % (1, 1) + SLOW % b"r2" + HOT % (3, 3) + HOT % (4, 4) + SLOW % b"r5" + HOT % (6, 6)
    assert ids(raw(port, mixed, LIVE)) == [b"r%d" % n for n in range(1, 7)]


KEPT = LIVE.replace(b"Connection: close\r\n", b"")


def test_a_sane_request_id_is_short_and_visible() -> None:
    assert sane_id(b"a-Z_0.9:/") == "a-Z_0.9:/"
    for bad in (b"", b"x" * 65, b"a b", b"a\n", b'"', b"\\", b"\x7f", "é".encode()):
        assert sane_id(bad) is None


# --- many of them ---------------------------------------------------------------------------------


def refuse_all(app: Any, count: int, seed: int, item: str = "i1") -> dict[int, int]:
    """Send malformed requests in process; how often each status came."""
    rng = random.Random(seed)
    seen: dict[int, int] = {}

    async def run() -> None:
        for _ in range(count):
            method, target, body, headers = malformed(rng)
            got = await asked(app, method, target, body, headers)
            case = f"{method} {target[:200]} {repr(body)[:300]} {headers}"
            assert 400 <= got.status < 500, f"{got.status} for {case}"
            assert got.json()["error"]["code"], case
            seen[got.status] = seen.get(got.status, 0) + 1
        # It serves on.
        assert (await asked(app, "GET", f"/v1/items/{item}/similar")).status == 200

    asyncio.run(run())
    return seen


def break_all(port: int, count: int, seed: int) -> None:
    """Send what is no request over sockets."""
    rng = random.Random(seed)
    for _ in range(count):
        sent = broken(rng)
        found = status(raw(port, sent, wait=0.3))
        # Nothing, where the server still waits for the end of it.
        assert found == 0 or 400 <= found < 500, f"{found} for {sent[:200]!r}"
    assert status(raw(port, LIVE)) == 200


def test_malformed_requests_are_refused() -> None:
    app = make_app(FakeHost(), FakeUpdates(), keys=Keys(open_writes=True))
    seen = refuse_all(app, 500, 0)
    assert set(seen) >= {400, 404, 405, 414, 415}


def test_broken_requests_are_refused(port: int) -> None:
    break_all(port, 100, 0)


@pytest.mark.slow
def test_ten_thousand_malformed_requests_are_refused_by_the_service_itself(
    tiny: Any, tmp_path: Path
) -> None:
    plan = Plan(
        {MAIN: str(tiny.bundle)}, Keys(open_writes=True), journal=tmp_path / "journal", deadline=30
    )
    with service(plan) as app:
        item = app.handlers.models.choose(None)[1].model.bundle.items.ids[0]
        refuse_all(app, 9_000, 1, item)
        with served(app) as port:
            break_all(port, 1_000, 1)
