"""ASGI middleware of every request: bounds, id, key, host check, count, log line; and table rows.

`RequestMiddleware` is the outermost. `TableRows` stands inside it and answers GET similar from a
row of the table of neighbours: keys, rates, variants, log, metrics and impressions are those of the
handlers, and so is the form of the answer. It only spares the plainest and most frequent request
the router, the forms and the queue; whatever is unusual goes on.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from itertools import count
from time import monotonic
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote_to_bytes

import orjson
from starlette.responses import Response
from starlette.types import ASGIApp

from recsys.serving.api.auth import Hashed, Role, given
from recsys.serving.api.schemas import MAX_ID, MAX_K, STATUS, Code, Refusal

if TYPE_CHECKING:
    from recsys.serving.api.handlers import Handlers


Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = Sequence[tuple[bytes, bytes]]

MAX_URL = 8 << 10
MAX_HEADERS = 32 << 10
MAX_HEADER_COUNT = 100
MAX_PARAMETERS = 64

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,64}")
_UNSAFE = re.compile(rb'["\\]')
_BAD_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")


def error_body(code: Code, message: str, request_id: str) -> bytes:
    """The body of every error."""
    return orjson.dumps({"error": {"code": code, "message": message, "request_id": request_id}})


def sane_id(value: bytes) -> str | None:
    """A request id from outside, where it is short and visible ASCII without quotes."""
    if _REQUEST_ID.fullmatch(value) and not _UNSAFE.search(value):
        return value.decode("ascii")
    return None


def check_head(scope: Scope) -> None:
    """Bounds of URL and headers, and the encoding of the path.

    Raises:
        Refusal: one of them does not hold.
    """
    raw, query = scope.get("raw_path") or b"", scope["query_string"]
    if len(raw) + len(query) > MAX_URL:
        raise Refusal(
            Code.LONG_URL,
            f"The address is longer than {MAX_URL:,} bytes; post the question as JSON.",
        )
    headers = scope["headers"]
    if len(headers) > MAX_HEADER_COUNT or sum([len(n) + len(v) for n, v in headers]) > MAX_HEADERS:
        raise Refusal(
            Code.HEADERS,
            f"More than {MAX_HEADER_COUNT} headers, or more than {MAX_HEADERS:,} bytes of them.",
        )


def segment(raw: str) -> str:
    """An id from its piece of the path, where `/` in an id is written %2F.

    Raises:
        Refusal: no UTF-8 is written there, or it is too long.
    """
    octets = raw.encode("ascii", "replace")
    if _BAD_ESCAPE.search(octets):
        raise Refusal(Code.BAD_REQUEST, "The path has a % without two hexadecimal digits.")
    try:
        text = unquote_to_bytes(octets).decode("utf-8")
    except UnicodeDecodeError:
        raise Refusal(Code.BAD_REQUEST, "The path is not UTF-8.") from None
    if not 1 <= len(text) <= MAX_ID:
        raise Refusal(Code.INVALID, f"An id has 1 to {MAX_ID} characters; this has {len(text)}.")
    return text


def parameters(query: bytes) -> dict[str, list[str]]:
    """Values of each parameter of a query string.

    Raises:
        Refusal: no UTF-8, broken escapes, or too many.
    """
    if not query:
        return {}
    if _BAD_ESCAPE.search(query):
        raise Refusal(Code.BAD_REQUEST, "The query has a % without two hexadecimal digits.")
    try:
        pairs = parse_qsl(
            query.decode("ascii"), keep_blank_values=True, errors="strict",
            max_num_fields=MAX_PARAMETERS,
        )  # fmt: skip
    except UnicodeDecodeError:
        raise Refusal(Code.BAD_REQUEST, "The query is not UTF-8.") from None
    except ValueError:
        raise Refusal(
            Code.BAD_REQUEST, f"The query has more than {MAX_PARAMETERS} parameters."
        ) from None
    found: dict[str, list[str]] = {}
    for name, value in pairs:
        found.setdefault(name, []).append(value)
    return found


async def body(scope: Scope, receive: Receive, most: int, seconds: float) -> bytes:
    """The whole body, never more than `most` bytes of it, whether or not its length was said.

    Raises:
        Refusal: no JSON is announced, it is too large, or it came too slowly.
    """
    kind, encoding, length = b"", b"", None
    for name, value in scope["headers"]:
        if name == b"content-type":
            kind = value
        elif name == b"content-encoding":
            encoding = value
        elif name == b"content-length":
            length = value
    # A page of another origin cannot send this type unasked: nobody writes through a visitor.
    if kind.split(b";", 1)[0].strip().lower() != b"application/json":
        raise Refusal(Code.MEDIA, "Send the body as Content-Type: application/json.")
    if encoding.strip().lower() not in (b"", b"identity"):
        raise Refusal(Code.MEDIA, "Send the body as it is, without a Content-Encoding.")
    if length is not None and length.isdigit() and int(length[:20]) > most:
        raise _too_large(most)
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Refusal(Code.BAD_REQUEST, "The body did not end.", close=True)
                part = message.get("body", b"")
                size += len(part)
                if size > most:
                    raise _too_large(most)
                parts.append(part)
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        raise Refusal(
            Code.TIMEOUT, f"The body did not come within {seconds:g} s.", close=True
        ) from None


def _too_large(most: int) -> Refusal:
    return Refusal(
        Code.TOO_LARGE, f"The body is larger than {most:,} bytes; send it in parts.", close=True
    )


log = logging.getLogger("recsys.serve")
requests = logging.getLogger("recsys.serve.requests")


class RequestContext:
    """One request on its way, and what is counted and logged of it afterwards."""

    __slots__ = (
        "code", "fallback", "impressed", "key", "model", "receive", "request_id", "route",
        "scope", "start", "status", "variant", "wanted",
    )  # fmt: skip

    def __init__(self, scope: Scope, receive: Receive, request_id: str, start: float) -> None:
        self.scope, self.receive, self.request_id, self.start = scope, receive, request_id, start
        self.route, self.variant, self.model = "other", "", ""
        self.status, self.code, self.fallback = 500, "", False
        self.key: Hashed | None = None  # a valid one
        self.wanted: str | None = None  # a variant that the caller names
        self.impressed = True  # whether anyone is shown the answer

    @property
    def key_role(self) -> Role | None:
        """The role of the key that came with it."""
        return None if self.key is None else self.key.role


class RequestMiddleware:
    """Makes the context of each request, and counts and logs it when it is answered.

    Args:
        app: the application behind it.
        handlers: knows keys, rules and metrics.
    """

    def __init__(self, app: ASGIApp, handlers: Handlers) -> None:
        self.app, self.handlers = app, handlers
        self._keys, self._rules = handlers.keys, handlers.rules
        self._metrics = handlers.metrics
        self._prefix = f"{secrets.token_hex(4)}-"
        self._numbers = count(1)
        self._seen = 0

    def close(self) -> None:
        """Finish what waits and end the threads."""
        self.handlers.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        context = self._context(scope, receive)
        try:
            check_head(scope)
            self._check_host(scope)
        except Refusal as refusal:
            refusal.close = True
            await error_response(context, refusal)(scope, receive, send)
        else:
            # Routes are matched on the path as it was sent: `/` in an id is %2F, and stays so.
            path = scope["raw_path"].decode("ascii", "replace").partition("?")[0]
            await self.app({**scope, "path": path, "recsys.context": context}, receive, send)
        self._count(context, monotonic() - context.start)

    def _context(self, scope: Scope, receive: Receive) -> RequestContext:
        request_id = None
        context = RequestContext(scope, receive, "", monotonic())
        for name, value in scope["headers"]:
            if name == b"x-request-id":
                request_id = sane_id(value)
            elif name == b"x-variant":
                context.wanted = value.decode("latin-1")[:MAX_ID]
            elif name == b"x-exposure":
                context.impressed = value != b"none"
        context.request_id = request_id or f"{self._prefix}{next(self._numbers):x}"
        if self._keys.needed:
            context.key = self._keys.find(given(scope["headers"]))
        return context

    def _check_host(self, scope: Scope) -> None:
        if self._rules.hosts is None:
            return
        names = [host_name(value) for name, value in scope["headers"] if name == b"host"]
        if any(name not in self._rules.hosts for name in names):
            raise Refusal(
                Code.FORBIDDEN,
                "Without keys this service answers only to its own name; see --keys.",
            )

    def _count(self, context: RequestContext, seconds: float) -> None:
        self._metrics.of(context.route, context.status, context.variant).add(seconds)
        if context.code:
            self._metrics.refused(context.code)
        self._seen += 1
        failed, slow = context.status >= 500, seconds > self._rules.log_slow
        if self._seen != self._rules.log_every and not failed and not slow:
            return
        if self._seen == self._rules.log_every:
            self._seen = 0
        data: dict[str, Any] = {
            "request_id": context.request_id,
            "route": context.route,
            "method": context.scope["method"],
            "status": context.status,
            "ms": round(seconds * 1000, 3),
            "variant": context.variant,
            "model": context.model,
        }
        if context.code:
            data["code"] = context.code
        requests.log(logging.WARNING if failed else logging.INFO, "request", extra={"data": data})


def error_response(context: RequestContext, refusal: Refusal) -> Response:
    """The answer to a request that is refused; its code is counted."""
    context.code, context.status = refusal.code, STATUS[refusal.code]
    headers = {"x-request-id": context.request_id}
    if refusal.retry is not None:
        headers["retry-after"] = str(refusal.retry)
    if refusal.close:
        headers["connection"] = "close"
    if refusal.code == Code.NO_KEY:
        headers["www-authenticate"] = "Bearer"
    content = error_body(refusal.code, refusal.message, context.request_id)
    return Response(content, context.status, headers, "application/json")


def host_name(host: bytes) -> bytes:
    """The name in a Host header, without its port."""
    if host[:1] == b"[":
        return host[: host.find(b"]") + 1].lower()
    return host.split(b":", 1)[0].lower()


PREFIX, SUFFIX = "/v1/items/", "/similar"
K = 10


class TableRows:
    """Answers `GET /v1/items/ID/similar`, with `k` or nothing in the query string.

    Args:
        app: the application behind it.
        handlers: of the service.
    """

    def __init__(self, app: ASGIApp, handlers: Handlers) -> None:
        self.app, self.handlers = app, handlers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        content = None
        if scope["type"] == "http" and scope["method"] == "GET":
            path: str = scope["path"]
            if path.startswith(PREFIX) and path.endswith(SUFFIX):
                content = self._answer(scope, path[len(PREFIX) : -len(SUFFIX)])
        if content is None:
            await self.app(scope, receive, send)
            return
        headers = [
            (b"content-length", b"%d" % len(content)),
            (b"content-type", b"application/json"),
            (b"x-request-id", scope["recsys.context"].request_id.encode("ascii")),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    def _answer(self, scope: Scope, id: str) -> bytes | None:
        """The body of the answer; None: the handlers answer, or say what is wrong."""
        k, query = K, scope["query_string"]
        if query:
            if query[:2] != b"k=" or len(query) > 6 or not query[2:].isdigit():
                return None
            k = int(query[2:])
        if not 1 <= k <= MAX_K or not 0 < len(id) <= MAX_ID or "/" in id:
            return None
        handlers, context = self.handlers, scope["recsys.context"]
        try:
            return self._from_table(handlers, context, segment(id) if "%" in id else id, k)
        except Refusal:
            return None

    def _from_table(
        self, handlers: Handlers, context: RequestContext, id: str, k: int
    ) -> bytes | None:
        handlers.allow(context, "read")
        variant, engine = handlers.engine(context, None)
        answers = engine.from_table(id, k)
        if answers is None:
            return None
        handlers.limit(context)
        context.route, context.status, context.variant = "similar_of", 200, variant
        context.model = engine.model.version
        form = handlers.form(answers, context.request_id, None, variant, context.model, context)
        return orjson.dumps(form)
