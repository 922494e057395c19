"""What is wrong before it is a request, over a real socket; and what can only be refused."""

from __future__ import annotations

import asyncio
import json
import random
import re
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from malformed_cases import broken, malformed
from service_cases import FakeHost, FakeLiving, asked, raw, served

from recsys.experiments.serve import MAIN, Plan, service
from recsys.serving.api.app import make_app
from recsys.serving.api.auth import Keys
from recsys.serving.api.guard import sane_id
from recsys.serving.api.protocol import GuardedProtocol

LIVE = b"GET /v1/live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with served(make_app(FakeHost(), FakeLiving(), keys=Keys(open_writes=True))) as port:
        yield port


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0


def content(answer: bytes) -> Any:
    return json.loads(answer.split(b"\r\n\r\n", 1)[1])


def test_a_request_over_the_wire(port: int) -> None:
    answer = raw(port, LIVE)
    assert status(answer) == 200
    assert content(answer) == {"live": True}
    assert b"server:" not in answer.lower()


def test_what_is_no_http_has_our_error_body(port: int) -> None:
    answer = raw(port, b"FOO BAR\r\n\r\n")
    assert status(answer) == 400
    assert content(answer)["error"]["code"] == "bad_request"
    assert b"connection: close" in answer


def test_what_never_became_a_request_is_counted_and_not_logged(
    port: int, caplog: pytest.LogCaptureFixture
) -> None:
    def counted() -> float:
        text = raw(port, LIVE.replace(b"/v1/live", b"/metrics")).decode()
        (line,) = [one for one in text.splitlines() if 'errors_total{code="bad_request"}' in one]
        return float(line.split()[-1])

    before = counted()
    caplog.clear()
    for _ in range(5):
        raw(port, b"FOO BAR\r\n\r\n")
    assert counted() == before + 5
    assert not caplog.records


def test_a_head_without_end_is_cut_off(port: int) -> None:
    head = b"GET / HTTP/1.1\r\nX-Y: "
    answer = raw(port, head, *[b"a" * 8_000] * 40, pause=0.001)
    assert status(answer) in (431, 0)  # the answer may be lost where the rest was on its way
    small = raw(port, head + b"a" * 50_000, wait=2)
    assert status(small) == 431
    assert content(small)["error"]["code"] == "headers_too_large"


def test_a_chunked_body_stops_at_the_bound(port: int) -> None:
    head = (
        b"POST /v1/search HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n"
    )
    answer = raw(port, head, *[b"10000\r\n" + b" " * 65536 + b"\r\n"] * 18, wait=3)
    assert status(answer) in (413, 0)
    assert status(raw(port, LIVE)) == 200


def test_slow_heads_are_closed_and_others_are_served_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(GuardedProtocol, "head_seconds", 0.3)
    with served(make_app(FakeHost())) as port:
        slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(50)]
        for n, one in enumerate(slow):
            if n % 2:
                one.sendall(b"GET /v1/live HTTP/1.1\r\nHo")
        start = time.monotonic()
        assert status(raw(port, LIVE)) == 200
        assert time.monotonic() - start < 0.3
        for one in slow:
            one.settimeout(5)
            assert status(one.recv(4096)) == 408
            one.close()
        assert time.monotonic() - start < 3
        # Also after a request that was complete.
        keep = LIVE.replace(b"Connection: close\r\n", b"")
        again = raw(port, keep, b"GET /v1/live", pause=0.05, wait=2)
        assert again.count(b"HTTP/1.1 200") == again.count(b"HTTP/1.1 408") == 1
        # Heads that are never whole at the end of a piece are whole in time all the same.
        stream = keep * 8 + LIVE
        pieces = [stream[at : at + 30] for at in range(0, len(stream), 30)]
        assert raw(port, *pieces, pause=0.05).count(b"HTTP/1.1 200") == 9
        # A head in pieces that comes in time is one head.
        assert status(raw(port, LIVE[:20], LIVE[20:], pause=0.1)) == 200


def test_too_many_connections_cost_only_the_idle_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GuardedProtocol, "most_connections", 20)
    with served(make_app(FakeHost())) as port:
        idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
        time.sleep(0.1)
        for _ in range(30):
            assert status(raw(port, LIVE)) == 200
        for one in idle:
            one.close()


def test_a_reader_that_does_not_read_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GuardedProtocol, "write_seconds", 0.2)
    with served(make_app(FakeHost())) as port:
        lazy = socket.socket()
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.connect(("127.0.0.1", port))
        lazy.settimeout(0.5)
        request = b"GET /openapi.json HTTP/1.1\r\nHost: a\r\n\r\n"
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            for _ in range(100):
                with suppress(TimeoutError):
                    lazy.sendall(request * 100)
                time.sleep(0.02)
        lazy.close()
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


def test_hot_answers_are_the_same_from_the_protocol_and_from_the_application(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asks = [
        HOT % (1, 1) + LIVE,
        HOT.replace(b"1.1", b"1.0") % (1, 1),
        LIVE.replace(b"1.1", b"1.0"),
        b"GET /v1/ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        HOT.replace(b"Host", b"Content-Length: 2\r\nHost") % (1, 1) + b"{}" + LIVE,
        HOT.replace(b"Host", b"X-Variant: b\r\nHost") % (1, 1) + LIVE,
        b"HEAD /v1/live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        b"GET /v1/items/a%2Fb/similar?k=x HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    ]
    found = []
    for direct in (True, False):
        monkeypatch.setattr(GuardedProtocol, "direct", direct)
        app = make_app(FakeHost())
        app.hot._prefix = b"x-"
        with served(app) as port:
            found.append([re.sub(rb"date: [^\r]*\r\n", b"", raw(port, ask)) for ask in asks])
            metrics = raw(port, LIVE.replace(b"/v1/live", b"/metrics")).decode()
        counted = re.findall(r"(recsys_request_seconds_count.*)", metrics)
        found[-1].append(sorted(counted))  # type: ignore[arg-type]
    # The one thing that may differ is where `connection: close` stands.
    assert [sorted(one.split(b"\r\n")) for one in found[0][:-1]] == [
        sorted(one.split(b"\r\n")) for one in found[1][:-1]
    ]
    assert found[0][-1] == found[1][-1]


def test_an_idle_connection_is_closed_after_a_hot_answer_too() -> None:
    with served(make_app(FakeHost()), keep_alive=1) as port:
        start = time.monotonic()
        answer = raw(port, LIVE.replace(b"Connection: close\r\n", b""), wait=5)
        assert status(answer) == 200
        assert 0.9 < time.monotonic() - start < 3


KEPT = LIVE.replace(b"Connection: close\r\n", b"")
REFUSED = b"POST /v1/search HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n"


@pytest.mark.parametrize(
    ("first", "more"),
    [(KEPT, b"\r\n"), (SLOW % b"r1", b"\r\n"), (REFUSED, b"{")],
    ids=["hot", "general", "refused"],
)
def test_what_is_no_request_does_not_keep_a_connection(first: bytes, more: bytes) -> None:
    with served(make_app(FakeHost()), keep_alive=1) as port:
        start = time.monotonic()
        assert raw(port, first, more, pause=0.2, wait=5).startswith(b"HTTP/1.1 ")
        assert 1 < time.monotonic() - start < 4


def test_a_connection_is_kept_while_a_request_that_followed_another_is_answered() -> None:
    host = FakeHost()
    engine, item = host.engines["a"], host.engines["a"].item
    engine.item = lambda id: (time.sleep(1.3), item(id))[1]
    with served(make_app(host), keep_alive=1) as port:
        slow = KEPT.replace(b"live", b"items/i1")
        assert raw(port, KEPT + slow).count(b"HTTP/1.1 200") == 2


def test_what_follows_the_last_request_of_a_connection_is_not_done() -> None:
    living = FakeLiving()
    living.put_item("i1", {})
    app = make_app(FakeHost(), living, keys=Keys(open_writes=True))
    first = KEPT.replace(b"1.1", b"1.0").replace(b"\r\n\r\n", b"\r\nConnection: keep-alive\r\n\r\n")
    with served(app) as port:
        delete = b"DELETE /v1/items/i1 HTTP/1.1\r\nHost: localhost\r\n\r\n"
        assert raw(port, first + delete).count(b"HTTP/1.1 200") == 1
        time.sleep(0.1)
        assert "i1" in living.items
        assert raw(port, KEPT + delete, LIVE).count(b"HTTP/1.1 200") == 3
        assert not living.items


def test_a_connection_that_is_reset_leaves_no_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    lost: list[tuple[bool, bool]] = []
    connection_lost = GuardedProtocol.connection_lost

    def watched(self: GuardedProtocol, exc: Exception | None) -> None:
        connection_lost(self, exc)
        lost.append((exc is not None, self.timeout_keep_alive_task is None))

    monkeypatch.setattr(GuardedProtocol, "connection_lost", watched)
    with served(make_app(FakeHost())) as port:
        one = socket.create_connection(("127.0.0.1", port), 5)
        one.sendall(KEPT)
        assert one.recv(4096)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        one.close()
        end = time.monotonic() + 5
        while not lost and time.monotonic() < end:
            time.sleep(0.01)
    assert lost == [(True, True)]


def test_an_engine_that_fails_on_the_hot_path_is_asked_the_general_way() -> None:
    host = FakeHost()
    host.engines["a"].similar_fast = None  # type: ignore[method-assign]
    with served(make_app(host)) as port:
        assert status(raw(port, HOT.replace(b"Host", b"Connection: close\r\nHost") % (1, 1))) == 200
    assert host.engines["a"].sizes == [1]


def test_an_upgrade_is_answered_as_if_it_had_not_been_asked_for(port: int) -> None:
    answer = raw(
        port,
        b"GET /v1/live HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        wait=1,
    )
    assert status(answer) in (200, 400)


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
    app = make_app(FakeHost(), FakeLiving(), keys=Keys(open_writes=True))
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
        item = app.handlers.models.choose(None)[1].served.bundle.items.ids[0]
        refuse_all(app, 9_000, 1, item)
        with served(app) as port:
            break_all(port, 1_000, 1)
