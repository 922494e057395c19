"""HTTP framing over a real socket: bodies, trailers, smuggling, bounds of a head, slow heads."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from service_cases import FakeHost, FakeUpdates, raw, served
from test_malformed import LIVE, content, status

from recsys.serving.api.app import make_app
from recsys.serving.api.auth import Keys, make_key

POST = b"POST /v1/recommendations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
BODY = b'{"history": ["i00003"]}'


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with served(make_app(FakeHost(), FakeUpdates(), keys=Keys(open_writes=True)), head=1.0) as port:
        yield port


def alive(port: int) -> None:
    assert status(raw(port, LIVE)) == 200


def chunked(*trailers: bytes) -> bytes:
    size = b"%x\r\n" % len(BODY)
    end = b"".join(one + b"\r\n" for one in trailers) + b"\r\n"
    return POST + b"Transfer-Encoding: chunked\r\n\r\n" + size + BODY + b"\r\n0\r\n" + end


@pytest.mark.parametrize("offer", [b"h2c", b"websocket"])
def test_a_post_that_offers_an_upgrade_keeps_its_body(port: int, offer: bytes) -> None:
    more = (
        b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: %b\r\nHTTP2-Settings: AAMAAABk\r\n"
        % offer
    )
    answer = raw(port, POST + more + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY, wait=1)
    assert status(answer) == 200 and content(answer)["items"]


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_curl_with_http2_is_answered(port: int, method: str) -> None:
    if shutil.which("curl") is None:
        pytest.skip("there is no curl on this machine (apt install curl)")
    path, body = ("recommendations", BODY) if method == "POST" else ("items/i1", b'{"title": "x"}')
    answer = subprocess.run(
        ["curl", "-s", "-m", "10", "--http2", "-X", method, "-H", "Content-Type: application/json",
         "-d", body.decode(), f"http://127.0.0.1:{port}/v1/{path}"],
        capture_output=True, check=True,
    ).stdout  # fmt: skip
    assert b'"items"' in answer or b'"written":1' in answer


def test_a_key_in_a_trailer_does_not_authenticate() -> None:
    key, hashed = make_key("read")
    with served(make_app(FakeHost(), keys=Keys((hashed,)))) as port:
        header = b"X-API-Key: %b\r\n" % key.encode()
        length = b"Content-Length: %d\r\n\r\n" % len(BODY)
        assert status(raw(port, POST + header + length + BODY, wait=1)) == 200
        answer = raw(port, chunked(header.strip()), wait=1)
        assert status(answer) == 401 and content(answer)["error"]["code"] == "no_key"


def test_trailers_are_no_headers_and_have_bounds(port: int) -> None:
    answer = raw(port, chunked(b"X-Request-ID: from-the-trailer"), wait=1)
    assert status(answer) == 200 and b"from-the-trailer" not in answer
    start, sent = time.monotonic(), 0
    with socket.create_connection(("127.0.0.1", port), 5) as endless:
        endless.sendall(chunked()[:-2])
        with suppress(ConnectionResetError, BrokenPipeError, TimeoutError):
            while sent < 1 << 26:
                endless.sendall(b"X-T: " + b"t" * 1000 + b"\r\n")
                sent += 1007
    assert sent < 1 << 26, "nobody closed it"
    alive(port)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: 2\r\nContent-Length: 4\r\n",
        b"Content-Length: -1\r\n",
        b"Content-Length: 2, 4\r\n",
        b"Transfer-Encoding: xchunked\r\n",
        b"Content-Length : 2\r\n",
    ],
)
def test_a_body_of_two_lengths_is_refused(port: int, head: bytes) -> None:
    assert status(raw(port, POST + head + b"\r\n{}{}", wait=1)) == 400
    alive(port)


def test_a_request_cannot_be_smuggled_behind_a_chunked_body(port: int) -> None:
    hidden = b"GET /v1/live HTTP/1.1\r\nHost: localhost\r\n\r\n"
    both = b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    answer = raw(port, POST + both + hidden, wait=1)
    assert answer.count(b"HTTP/1.1 ") == 1  # the connection is closed: nothing follows


def test_what_is_no_http_is_refused(port: int) -> None:
    assert status(raw(port, b"FOO BAR\r\n\r\n", wait=1)) == 400
    alive(port)


def test_a_head_without_end_is_cut_off(port: int) -> None:
    head = b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Y: "
    assert status(raw(port, head, *[b"a" * 8_000] * 40, pause=0.001, wait=2)) in (431, 400, 0)
    alive(port)


def test_slow_heads_are_closed_and_others_are_served_meanwhile(port: int) -> None:
    slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(50)]
    for one in slow:
        one.sendall(b"GET /v1/live HTTP/1.1\r\nHo")
    start = time.monotonic()
    alive(port)
    assert time.monotonic() - start < 0.5
    for one in slow:
        one.settimeout(5)
        with suppress(ConnectionResetError):
            one.recv(4096)
        one.close()
    assert time.monotonic() - start < 4
    # A head in pieces that comes in time is one head.
    assert status(raw(port, LIVE[:20], LIVE[20:], pause=0.1)) == 200


def test_a_client_that_closes_its_half_or_never_reads_costs_nobody_else(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), 5) as half:
        half.sendall(LIVE)
        half.shutdown(socket.SHUT_WR)
        with suppress(TimeoutError, ConnectionResetError):
            half.recv(4096)
    lazy = socket.socket()
    lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    lazy.connect(("127.0.0.1", port))
    lazy.settimeout(0.2)
    request = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with suppress(TimeoutError, ConnectionResetError, BrokenPipeError):
        for _ in range(20):
            lazy.sendall(request * 100)
    alive(port)
    lazy.close()
    alive(port)


def test_pipelined_requests_are_answered_in_order(port: int) -> None:
    def similar(number: int) -> bytes:
        head = b"GET /v1/items/i%d/similar?k=1 HTTP/1.1\r\nHost: localhost\r\n" % number
        return head + b"X-Request-ID: r%d\r\n\r\n" % number

    answer = raw(port, b"".join(similar(n) for n in range(1, 8)) + LIVE, wait=2)
    found = [line[14:] for line in answer.split(b"\r\n") if line.startswith(b"x-request-id: r")]
    assert found == [b"r%d" % n for n in range(1, 8)]


def test_running_requests_are_finished_at_the_end() -> None:
    host: Any = FakeHost()
    item = host.engines["a"].item
    host.engines["a"].item = lambda id: (time.sleep(0.5), item(id))[1]
    with served(make_app(host)) as port:
        connection = socket.create_connection(("127.0.0.1", port), 5)
        connection.sendall(LIVE.replace(b"/v1/live", b"/v1/items/i1"))
        time.sleep(0.2)
    connection.settimeout(5)
    assert status(connection.recv(65536)) == 200
    connection.close()
