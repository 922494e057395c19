"""Quick questions answered where they come in: as the general way would, and only when alone."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from polars.exceptions import PanicException
from service_cases import FakeEngine, FakeExposures, FakeHost, served

from recsys.errors import QueryError
from recsys.serving.api.app import ServiceRules, make_app
from recsys.serving.api.auth import Keys, make_key
from recsys.serving.api.direct import MOST_BYTES, Direct
from recsys.serving.api.limits import Rate
from recsys.serving.api.protocol import GuardedProtocol
from recsys.serving.api.server import ServerRules, bind, listeners, make_server

HISTORY = {"history": ["i1", "i2"], "k": 3}
VECTOR = {"vector": [0.5, 0.0, 0.0, 1.0], "k": 2}


def post(path: str, body: Any, *headers: bytes, kind: bytes = b"application/json") -> bytes:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [
        b"POST %b HTTP/1.1" % path.encode(), b"Host: localhost", b"Content-Type: %b" % kind,
        b"Content-Length: %d" % len(content), *headers,
    ]  # fmt: skip
    return b"\r\n".join(lines) + b"\r\n\r\n" + content


class Line:
    """One connection that is kept; answers are read one by one."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), 5)
        self.left = b""

    def send(self, *parts: bytes, pause: float = 0.0) -> None:
        for part in parts:
            self.socket.sendall(part)
            time.sleep(pause)

    def read(self) -> tuple[int, bytes, bytes]:
        """Status, head and body of the next answer."""
        while b"\r\n\r\n" not in self.left:
            self._more()
        head, _, rest = self.left.partition(b"\r\n\r\n")
        length = int(re.findall(rb"(?i)content-length: (\d+)", head)[0])
        while len(rest) < length:
            self._more()
            rest = self.left.partition(b"\r\n\r\n")[2]
        self.left = rest[length:]
        return int(head.split(b" ", 2)[1]), head, rest[:length]

    def _more(self) -> None:
        chunk = self.socket.recv(65536)
        assert chunk, f"closed after {self.left!r}"
        self.left += chunk

    def ask(self, *parts: bytes, pause: float = 0.0) -> tuple[int, bytes, bytes]:
        self.send(*parts, pause=pause)
        return self.read()


@contextmanager
def line(app: Any) -> Iterator[Line]:
    """A connection that has asked once, so that it is the last one to have asked."""
    with served(app) as port:
        one = Line(port)
        try:
            assert one.ask(post("/v1/recommendations", HISTORY))[0] == 200
            yield one
        finally:
            one.socket.close()


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each question that was held: whether it was answered directly."""
    seen: list[bool] = []
    answer = Direct.answer

    def watched(self: Direct, *given: Any) -> Any:
        found = answer(self, *given)
        seen.append(found is not None)
        return found

    monkeypatch.setattr(Direct, "answer", watched)
    return seen


ASKS = {
    "history": (post("/v1/recommendations", HISTORY), True),
    "vector": (post("/v1/vectors", VECTOR), True),
    "user": (post("/v1/recommendations", {"user": "b7"}), True),
    "fallback": (post("/v1/recommendations", {"user": "nobody"}), True),
    "fields": (post("/v1/recommendations", HISTORY | {"fields": ["title"]}), True),
    "request id": (post("/v1/vectors", VECTOR, b"X-Request-ID: mine"), True),
    "no query": (post("/v1/vectors?", VECTOR), True),
    "close": (post("/v1/vectors", VECTOR, b"Connection: close"), True),
    "old": (post("/v1/vectors", VECTOR).replace(b"HTTP/1.1", b"HTTP/1.0"), True),
    "bad id": (post("/v1/vectors", VECTOR, b'X-Request-ID: a"b'), False),
    "filter": (post("/v1/recommendations", HISTORY | {"filter": {"deny": ["i1"]}}), False),
    "explain": (post("/v1/vectors", VECTOR | {"explain": True}), False),
    "many": (post("/v1/vectors", VECTOR | {"k": 101}), False),
    "no JSON": (post("/v1/vectors", b"{"), False),
    "unknown key": (post("/v1/vectors", VECTOR | {"x": 1}), False),
}


@pytest.mark.parametrize("name", list(ASKS))
def test_an_answer_is_the_same_directly_and_the_general_way(
    name: str, direct: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent, quick = ASKS[name]
    found = []
    for way in (True, False):
        monkeypatch.setattr(GuardedProtocol, "direct", way)
        exposures = FakeExposures()
        app = make_app(FakeHost(), exposures=exposures)
        app.hot._prefix = b"x-"
        with line(app) as one:
            status, head, body = one.ask(sent)
            lines = [h for h in head.split(b"\r\n") if not h.lower().startswith(b"date")]
            if b"x-request-id: x-" in head:  # how many were given before differs
                lines = [h for h in lines if not h.startswith(b"x-request-id")]
                body = re.sub(rb'"request_id":"x-\w+"', b'"request_id":"x"', body)
            metrics = app.operations.metrics.text().decode()
            counts = re.findall(r"(recsys_(?:request_seconds_count|fallbacks|refused).*)", metrics)
            rows = [row[1:] for row in exposures.rows]
        found.append((status, sorted(lines), body, sorted(counts), rows))
    assert found[0] == found[1]
    assert direct == [quick]


@pytest.mark.parametrize(
    "sent",
    [
        post("/v1/vectors", VECTOR, b"X-Variant: b"),
        post("/v1/vectors", VECTOR, b"X-Exposure: none"),
        post("/v1/vectors", VECTOR, b"Expect: 100-continue"),
        post("/v1/vectors?x=1", VECTOR),
        post("/v1/vectors", VECTOR, kind=b"text/plain"),
        post("/v1/search", {"text": "lamp"}),
        post("/v1/vectors", b" " * MOST_BYTES + json.dumps(VECTOR).encode()),
        post("/v1/vectors", VECTOR).replace(b"Content-Length: 40", b"Transfer-Encoding: chunked"),
    ],
    ids=["variant", "exposure", "expect", "query", "type", "search", "large", "chunked"],
)
def test_an_unusual_head_is_not_held(sent: bytes, direct: list[bool]) -> None:
    with line(make_app(FakeHost())) as one:
        one.send(sent)
        time.sleep(0.1)
    assert not direct


def test_a_body_that_comes_later_is_waited_for_the_general_way(direct: list[bool]) -> None:
    sent = post("/v1/recommendations", HISTORY)
    with line(make_app(FakeHost())) as one:
        for cut in (len(sent) - 30, len(sent) - 1):
            status, _, body = one.ask(sent[:cut], sent[cut:], pause=0.05)
            assert status == 200 and len(json.loads(body)["items"]) == 3
        assert not direct
        assert one.ask(sent)[0] == 200
    assert direct == [True]


def test_questions_in_one_piece_are_answered_in_order(direct: list[bool]) -> None:
    names = [b"r%d" % n for n in range(6)]
    sent = [
        post("/v1/search" if n == 2 else "/v1/vectors", {"text": "slow"} if n == 2 else VECTOR,
             b"X-Request-ID: %b" % name)
        for n, name in enumerate(names)
    ]  # fmt: skip
    with line(make_app(FakeHost())) as one:
        one.send(b"".join(sent))
        got = [re.findall(rb"x-request-id: (\w+)", one.read()[1])[0] for _ in names]
    assert got == names
    assert direct == [True]  # one in a piece of data; others are served between two


def test_where_two_ask_their_questions_are_taken_together(direct: list[bool]) -> None:
    host = FakeHost()
    with served(make_app(host)) as port:
        lines = [Line(port), Line(port)]
        for _ in range(5):
            for one in lines:
                one.send(post("/v1/vectors", VECTOR))
            assert [one.read()[0] for one in lines] == [200, 200]
        for one in lines:
            one.socket.close()
    assert not direct


def test_a_question_that_breaks_the_engine_is_our_mistake(direct: list[bool]) -> None:
    host = FakeHost()
    with line(make_app(host)) as one:
        host.engines["a"]._one = lambda ask: 1 / 0
        status, _, body = one.ask(post("/v1/vectors", VECTOR))
        assert status == 500 and json.loads(body)["error"]["code"] == "internal"
        host.engines["a"]._one = lambda ask: QueryError("Not by this model.")
        status, _, body = one.ask(post("/v1/vectors", VECTOR))
        assert status == 400 and json.loads(body)["error"]["message"] == "Not by this model."
    assert direct == [False, False]


def test_keys_and_host_names_hold_for_direct_questions(direct: list[bool]) -> None:
    key, known = make_key("read")
    app = make_app(
        FakeHost(), keys=Keys((known,)), rules=ServiceRules(hosts=frozenset({b"localhost"}))
    )
    with served(app) as port:
        one = Line(port)
        for said, status in ((key, 200), (key, 200), ("x" * 32, 401)):
            sent = post("/v1/vectors", VECTOR, b"X-API-Key: " + said.encode())
            assert one.ask(sent)[0] == status
        assert one.ask(post("/v1/vectors", VECTOR))[0] == 401
        assert one.ask(sent.replace(b"localhost", b"elsewhere"))[0] == 403
        one.socket.close()
    assert direct == [True, False, False, False]


def test_rates_hold_for_direct_questions(direct: list[bool]) -> None:
    rules = ServiceRules(rates={None: Rate(0.001, 3)})
    with line(make_app(FakeHost(), rules=rules)) as one:
        found = [one.ask(post("/v1/vectors", VECTOR))[0] for _ in range(4)]
    assert found == [200, 200, 429, 429]  # the line has asked once before
    assert direct == [True, True, False, False]


def test_what_is_left_to_the_general_way_costs_one_token(direct: list[bool]) -> None:
    host = FakeHost()
    with line(make_app(host, rules=ServiceRules(rates={None: Rate(0.001, 3)}))) as one:
        host.engines["a"]._one = lambda ask: QueryError("Not by this model.")
        assert [one.ask(post("/v1/vectors", VECTOR))[0] for _ in range(3)] == [400, 400, 429]
    assert direct == [False] * 3


def test_an_answer_that_took_long_is_not_made_again(direct: list[bool]) -> None:
    host = FakeHost()
    engine = host.engines["a"]
    with line(make_app(host, rules=ServiceRules(deadline=0.02))) as one:
        before, answer = len(engine.asks), engine._one
        engine._one = lambda ask: (time.sleep(0.05), answer(ask))[1]
        assert one.ask(post("/v1/vectors", VECTOR))[0] == 200
        assert len(engine.asks) == before + 1
    assert direct == [True]


def test_the_end_waits_for_a_question_whose_body_is_on_its_way(direct: list[bool]) -> None:
    sent = post("/v1/vectors", VECTOR)
    with served(make_app(FakeHost())) as port:
        one = Line(port)
        assert [one.ask(sent)[0] for _ in range(2)] == [200, 200]
        one.send(sent[:-5])
        time.sleep(0.1)
        rest = threading.Timer(0.2, one.send, [sent[-5:]])
        rest.start()
    rest.join()
    status, head, _ = one.read()
    one.socket.close()
    assert status == 200 and b"connection: close" in head
    assert direct == [True]


def test_plain_answers_are_written_around_their_items(
    direct: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = post("/v1/vectors", VECTOR, b"X-Request-ID: mine")
    named = post("/v1/recommendations", HISTORY | {"user": "a7"})
    found = []
    for said in (b'{"id":"i0","score":1.000000},{"id":"i1","score":0.100000}', None):
        monkeypatch.setattr(FakeEngine, "answer_fast", lambda _self, _ask, said=said: said)
        host, exposures = FakeHost(), FakeExposures()
        rules = ServiceRules(rates={None: Rate(0.001, 3)})
        app = make_app(host, exposures=exposures, rules=rules)
        with line(app) as one:
            asked = host.engines["a"].sizes
            before = len(asked)
            status, head, body = one.ask(sent)
            assert status == 200 and b"x-request-id: mine" in head
            assert len(asked) == before + (said is None)
            # What is written down as shown names a user, which needs the engine's own answer.
            assert one.ask(named)[0] == 200
            assert len(asked) == before + (said is None) + 1
            assert one.ask(sent)[0] == 429  # each has paid
        text = app.operations.metrics.text().decode()
        counts = re.findall(r'(recsys_request_seconds_count\{.*"vectors".*)', text)
        rows = [row for row in exposures.rows if row[0] == "mine"]
        found.append((json.loads(body), counts, rows))
    assert found[0] == found[1]
    assert len(found[0][1]) == 2 and len(found[0][2]) == 1


def test_many_who_come_at_once_are_let_in_within_a_few_turns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    callers, turns = 100, 0
    let_in: list[int] = []
    made = GuardedProtocol.connection_made

    def watched(self: GuardedProtocol, transport: Any) -> None:
        let_in.append(turns)
        made(self, transport)

    monkeypatch.setattr(GuardedProtocol, "connection_made", watched)
    bound = bind("127.0.0.1", 0)
    bound.listen(callers)
    lines = [Line(bound.getsockname()[1]) for _ in range(callers)]  # they wait to be let in

    def counted() -> None:
        loop = asyncio.get_running_loop()

        def turn() -> None:
            nonlocal turns
            turns += 1
            loop.call_soon(turn)

        turn()

    server = make_server(make_app(FakeHost()), ServerRules(), counted)
    thread = threading.Thread(target=server.run, args=(listeners(bound),), daemon=True)
    thread.start()
    try:
        for one in lines:
            assert one.ask(b"GET /v1/live HTTP/1.1\r\nHost: localhost\r\n\r\n")[0] == 200
            one.socket.close()
    finally:
        server.should_exit = True
        thread.join(20)
    assert len(let_in) == callers
    assert let_in[-1] - let_in[0] <= 10


def test_what_breaks_the_direct_way_is_said_by_the_general_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Panic(PanicException):  # no Exception
        def __str__(self) -> str:
            return "a date beyond all years"

    answer = FakeEngine.answer

    def breaks(self: FakeEngine, asks: Any) -> Any:
        if asks[0].vector is not None:
            raise Panic
        return answer(self, asks)

    monkeypatch.setattr(FakeEngine, "answer", breaks)
    with line(make_app(FakeHost())) as one:
        status, _, body = one.ask(post("/v1/vectors", VECTOR))
    assert status == 500 and json.loads(body)["error"]["code"] == "internal"
