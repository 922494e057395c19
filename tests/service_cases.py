"""What the tests of the service share: a host and a journal that need no towers, and a client.

Fixtures are taken in by `from service_cases import app as app`, with those that they need.
"""

from __future__ import annotations

import asyncio
import json
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest

from recsys.errors import QueryError
from recsys.serving.api.app import make_app
from recsys.serving.api.auth import Keys
from recsys.serving.engine.query import Answers, CursorError, Query, UnknownItem
from recsys.serving.live.journal import Event

ITEM = {"id": "i0", "score": 1.0}
"""What a `FakeEngine` finds first."""
OPEN = Keys(open_writes=True)


class FakeEngine:
    """Answers i0, i1, … to everything; ids that begin with "no" are unknown.

    Text "boom" breaks the engine, "wrong" is a question that it cannot answer, "slow" takes .3 s.
    """

    def __init__(self, version: str = "abc123abc123") -> None:
        self.model = SimpleNamespace(version=version)
        self.sizes: list[int] = []
        self.asks: list[Query] = []
        self.put: dict[str, Any] = {}

    def answer(self, asks: Sequence[Query]) -> list[Answers | QueryError]:
        self.sizes.append(len(asks))
        self.asks.extend(asks)
        return [self._one(ask) for ask in asks]

    def from_table(self, id: str, k: int) -> Answers | None:
        if id.startswith("no") or k > 50:
            return None
        answers = self._one(Query("similar", items=(id,), k=k))
        assert isinstance(answers, Answers)
        return answers

    def _one(self, ask: Query) -> Answers | QueryError:
        if ask.text == "boom":
            raise ZeroDivisionError("boom")
        if ask.text == "wrong":
            return QueryError("There is no column 'x' in the catalogue.")
        if ask.text == "slow":
            time.sleep(0.3)
        if ask.cursor is not None:
            return CursorError("This cursor is of another model.", gone=ask.cursor == "old")
        ids = [f"i{j}" for j in range(min(ask.k, 50))]
        fallback = "user 'nobody' is unknown" if ask.user == "nobody" else None
        return Answers(
            ids,
            np.linspace(1, 0.1, len(ids)).astype(np.float32),
            fields=None if ask.fields is None else [{"title": id} for id in ids],
            fallback=fallback,
            next="more" if ask.paged else None,
            explanations=[{"text": 0.25}] * len(ids) if ask.explain else None,
        )

    def item(self, id: str) -> dict[str, Any]:
        if id.startswith("no"):
            raise UnknownItem(f"There is no item {id!r}.")
        return {"id": id, "fields": {"price": np.float32(np.nan)}}

    def user(self, id: str) -> dict[str, Any]:
        return {"id": id, "known": not id.startswith("no"), "history": []}

    def facts(self) -> dict[str, Any]:
        return {"dimension": 4, "items": 100, "recall": np.float64(0.99)}


class FakeHost:
    """Two variants, "a" and "b"; units that begin with "b" get the second."""

    def __init__(self, engines: Mapping[str, Any] | None = None) -> None:
        self.engines = dict(engines or {"a": FakeEngine(), "b": FakeEngine("def456def456")})
        self.ready = True

    def choose(self, unit: str | None, variant: str | None = None) -> tuple[str, Any]:
        if not self.ready:
            raise QueryError("No model is loaded yet.")
        if variant is None:
            variant = "b" if unit is not None and unit.startswith("b") else "a"
        if variant not in self.engines:
            raise QueryError(f"There is no variant {variant!r}.")
        return variant, self.engines[variant]

    def facts(self) -> list[dict[str, Any]]:
        return [
            {
                "name": name,
                "share": 0.5,
                "version": one.model.version,
                "swaps": 1,
                "failures": 0,
                "loaded_at": 0.5,
                "last_error": None,
            }
            for name, one in self.engines.items()
        ]


class FakeUpdates:
    """A journal in memory; item "full" finds the disk full, column "x" is unknown."""

    def __init__(self) -> None:
        self.items: dict[str, Mapping[str, Any]] = {}
        self.posted: list[Event] = []

    def put_item(self, id: str, item: Mapping[str, Any]) -> None:
        if id == "full":
            raise OSError(28, "No space left on device")
        if "x" in item:
            raise QueryError("There is no column 'x'. Known: title, category.")
        self.items[id] = item

    def delete_item(self, id: str) -> bool:
        return self.items.pop(id, None) is not None

    def post_events(self, events: Sequence[Event]) -> list[Event]:
        had = {event.id for event in self.posted} - {None}
        new = [event for event in events if event.id not in had]
        self.posted.extend(new)
        return new


class FakeImpressions:
    def __init__(self) -> None:
        self.rows: list[tuple[Any, ...]] = []
        self.posted: list[Event] = []
        self.dropped = 3

    def shown(
        self, request: str, user: str | None, time: int, items: Sequence[str], variant: str,
        model: str, propensity: Sequence[float] | None = None, *, first: int = 1,
    ) -> None:  # fmt: skip
        self.rows.append((request, user, tuple(items), variant, model))

    def events(self, events: Sequence[Event]) -> None:
        self.posted.extend(events)


@pytest.fixture
def host() -> FakeHost:
    return FakeHost()


@pytest.fixture
def updates() -> FakeUpdates:
    return FakeUpdates()


@pytest.fixture
def impressions() -> FakeImpressions:
    return FakeImpressions()


@pytest.fixture
def app(host: FakeHost, updates: FakeUpdates, impressions: FakeImpressions) -> Any:
    app = make_app(host, updates, impressions, keys=OPEN)
    yield app
    app.close()


@dataclass(frozen=True)
class Got:
    """An answer: status, headers by name, body."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        return str(self.json()["error"]["code"])


async def asked(
    app: Any, method: str, target: str, body: Any = None, headers: Mapping[str, str] | None = None,
    *, parts: Sequence[bytes] | None = None,
) -> Got:  # fmt: skip
    """One request to an ASGI application, as a server would hand it over.

    Args:
        body: bytes as they are, anything else as JSON.
        parts: a body that comes in pieces without a length.
    """
    path, _, query = target.partition("?")
    given = {"host": "localhost", **(headers or {})}
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
    if body is not None:
        given = {"content-type": "application/json", "content-length": str(len(body)), **given}
    elif parts is not None:
        given = {"content-type": "application/json", "transfer-encoding": "chunked", **given}
    pieces = list(parts or [body or b""])
    sent: list[MutableMapping[str, Any]] = []

    async def receive() -> MutableMapping[str, Any]:
        if not pieces:
            await asyncio.sleep(3600)
        part = pieces.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(pieces)}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method,
        "scheme": "http", "path": unquote(path), "raw_path": path.encode("ascii"),
        "query_string": query.encode("ascii"), "root_path": "", "state": {},
        "headers": [(n.lower().encode(), v.encode("latin-1")) for n, v in given.items()],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
    }  # fmt: skip
    await app(scope, receive, send)
    assert [m["type"] for m in sent] == ["http.response.start", "http.response.body"]
    out = {name.decode(): value.decode("latin-1") for name, value in sent[0]["headers"]}
    return Got(sent[0]["status"], out, sent[1]["body"])


def ask(app: Any, method: str, target: str, body: Any = None, **more: Any) -> Got:
    """As `asked`, in a loop of its own."""
    return asyncio.run(asked(app, method, target, body, **more))


@contextmanager
def served(app: Any, **rules: Any) -> Iterator[int]:
    """The application behind a real server in a thread; gives its port."""
    import uvloop

    from recsys.serving.api.server import ServerRules, bind, serve

    with bind("127.0.0.1", 0) as bound:
        port = int(bound.getsockname()[1])
    stops: queue.Queue[Callable[[], None]] = queue.Queue()
    work = serve(app, "127.0.0.1", port, ServerRules(**rules), stops.put)
    thread = threading.Thread(target=uvloop.run, args=(work,), daemon=True)
    thread.start()
    stop = stops.get(timeout=20)
    try:
        yield port
    finally:
        stop()
        thread.join(20)
        assert not thread.is_alive()


def raw(port: int, *parts: bytes, pause: float = 0.0, wait: float = 5.0) -> bytes:
    """Send bytes as they are; everything that comes back until the server closes or `wait` is over.

    What the server cannot send because it was reset is nothing.
    """
    found = b""
    with socket.create_connection(("127.0.0.1", port), wait) as connection:
        try:
            for part in parts:
                connection.sendall(part)
                time.sleep(pause)
            while chunk := connection.recv(65536):
                found += chunk
        except (TimeoutError, ConnectionResetError, BrokenPipeError):
            pass
    return found
