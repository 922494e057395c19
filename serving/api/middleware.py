"""ASGI middleware of every request: its id, key, bounds, host check, count and log line."""

from __future__ import annotations

import logging
import secrets
from itertools import count
from time import monotonic
from typing import TYPE_CHECKING, Any

from starlette.responses import Response
from starlette.types import ASGIApp

from recsys.serving.api.auth import Hashed, Role, given
from recsys.serving.api.guard import Receive, Scope, Send, check_head, error_body, sane_id
from recsys.serving.api.schemas import MAX_ID, STATUS, Code, Refusal

if TYPE_CHECKING:
    from recsys.serving.api.handlers import Handlers

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


__all__ = ["RequestContext", "RequestMiddleware", "error_response"]
