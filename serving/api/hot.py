"""Answers that are put together from bytes that are there already: similar items, live, ready.

What is unusual about such a request (an option, a bad escape, a missing key, a body) makes it not
hot: the general way answers it, or says what is wrong.
"""

from __future__ import annotations

import logging
import secrets
import weakref
from itertools import count
from typing import Any, NamedTuple

import orjson

from recsys.errors import QueryError
from recsys.serving.api.auth import Hashed, given
from recsys.serving.api.guard import Headers, sane_id, segment
from recsys.serving.api.handlers import Handlers, now, version
from recsys.serving.api.metrics import Requests
from recsys.serving.api.schemas import MAX_ID, MAX_K, Refusal
from recsys.serving.api.shown import Shown

log = logging.getLogger("recsys.serve")
requests = logging.getLogger("recsys.serve.requests")

MOST_HEADERS = 32
GENERAL = frozenset(
    {b"x-variant", b"x-exposure", b"content-length", b"transfer-encoding", b"upgrade", b"expect"}
)
"""Headers that make a request not hot."""


class HotAnswer(NamedTuple):
    """What to send with status 200, and where it is counted."""

    content: bytes
    request_id: bytes
    counted: Requests
    route: str


class _Known(NamedTuple):
    # Held weakly: an engine that was replaced is freed when its last request is done.
    engine: weakref.ref[Any]
    middle: bytes
    counted: Requests
    model: str


class Hot:
    """The hot paths of a service.

    Args:
        operations: what the general way would ask.
    """

    def __init__(self, operations: Handlers) -> None:
        self._host, self._keys, self._rules = operations.host, operations.keys, operations.rules
        self._metrics, self._rates = operations.metrics, operations.rates
        self._prefix = secrets.token_hex(4).encode() + b"-"
        self._ids = count(1)
        self._seen = 0
        self._known: dict[tuple[str, str], _Known] = {}
        self._live = self._metrics.of("live", 200, "")
        self._ready = self._metrics.of("ready", 200, "")
        self._shown = None if operations.exposures is None else Shown(operations.exposures)

    def answer(self, path: bytes, query: bytes, headers: Headers) -> HotAnswer | None:
        """The answer to a GET; None: ask the general way."""
        if path[-8:] == b"/similar" and path[:10] == b"/v1/items/":
            k = 10
            if query:
                if query[:2] != b"k=" or len(query) > 6 or not query[2:].isdigit():
                    return None
                k = int(query[2:])
            id = path[10:-8]
            if not 1 <= k <= MAX_K or not 0 < len(id) <= MAX_ID or b"/" in id:
                return None
            try:
                return self._similar(id, k, headers)
            except Exception:  # the general way may know better; at worst it says so
                log.exception("a hot answer failed")
                return None
        if path == b"/v1/live":
            content, counted = b'{"live":true}', self._live
        elif path == b"/v1/ready" and self._host.ready:
            content, counted = b'{"ready":true}', self._ready
        else:
            return None
        request_id = self.request_id(headers)
        return None if request_id is None else HotAnswer(content, request_id, counted, "health")

    def new_id(self) -> bytes:
        """An id for a request that brings none."""
        return self._prefix + b"%x" % next(self._ids)

    def request_id(self, headers: Headers) -> bytes | None:
        """The request's id, or a new one; None: its headers ask for the general way."""
        if len(headers) > MOST_HEADERS:
            return None
        request_id, hosts = None, self._rules.hosts
        for name, value in headers:
            if name == b"x-request-id":
                if sane_id(value) is None:
                    return None
                request_id = value
            elif name == b"host":
                if hosts is not None and host_name(value) not in hosts:
                    return None
            elif name in GENERAL:
                return None
        return request_id or self._prefix + b"%x" % next(self._ids)

    def head(self, headers: Headers) -> tuple[bytes, Hashed | None] | None:
        """The request's id and the key that it is sent with; None: ask the general way."""
        request_id, key = self.request_id(headers), None
        if self._keys.needed:
            key = self._keys.find(given(headers))
            if key is None:
                return None
        return None if request_id is None else (request_id, key)

    def _similar(self, id: bytes, k: int, headers: Headers) -> HotAnswer | None:
        head = self.head(headers)
        if head is None:
            return None
        request_id, key = head
        try:
            text = segment(id.decode("ascii")) if b"%" in id else id.decode("ascii")
            variant, engine = self._host.choose(None)
        except (Refusal, UnicodeDecodeError, QueryError):
            return None  # the general way says why
        items = engine.similar_fast(text, k)
        if items is None or (self._rates is not None and self._rates.take(key)):
            return None
        return self.wrapped(items, "similar", request_id, variant, engine)

    def wrapped(
        self, items: bytes, route: str, request_id: bytes, variant: str, engine: Any
    ) -> HotAnswer:
        """An answer around items that are JSON already, written down as shown; nobody is named as
        the one who saw it.
        """
        known = self._known.get((route, variant))
        if known is None or known.engine() is not engine:
            known = self._learn(route, variant, engine)
        if self._shown is not None:
            self._shown.add((request_id, now(), items, variant, known.model))
        content = b"".join((b'{"request_id":"', request_id, known.middle, items, b'],"next":null}'))
        return HotAnswer(content, request_id, known.counted, route)

    def _learn(self, route: str, variant: str, engine: Any) -> _Known:
        model = version(engine)
        said = orjson.dumps({"model": model, "variant": variant, "fallback": None})
        middle = b'",' + said[1:-1] + b',"items":['
        counted = self._metrics.of(route, 200, variant)
        known = _Known(weakref.ref(engine), middle, counted, model)
        self._known[route, variant] = known
        return known

    def done(self, answer: HotAnswer, seconds: float, method: str = "GET") -> None:
        """Count an answer that was sent, and log it now and then."""
        answer.counted.add(seconds)
        self._seen += 1
        if self._seen != self._rules.log_every and seconds <= self._rules.log_slow:
            return
        self._seen = 0
        data = {
            "request_id": answer.request_id.decode("ascii"),
            "route": answer.route,
            "method": method,
            "status": 200,
            "ms": round(seconds * 1000, 3),
        }
        requests.info("request", extra={"data": data})

    @property
    def dropped(self) -> int:
        """Answers that were not written down as shown."""
        return 0 if self._shown is None else self._shown.dropped

    def close(self) -> None:
        """Write down what was shown."""
        if self._shown is not None:
            self._shown.close()


def host_name(host: bytes) -> bytes:
    """The name in a Host header, without its port."""
    if host[:1] == b"[":
        return host[: host.find(b"]") + 1].lower()
    return host.split(b":", 1)[0].lower()
