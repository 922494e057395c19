"""The ASGI layer before everything else: hot paths are answered here, the rest is sent on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from time import monotonic

from recsys.serving.api.auth import given
from recsys.serving.api.awake import Awake
from recsys.serving.api.direct import Direct
from recsys.serving.api.guard import Receive, Scope, Send, check_head, error_body, sane_id
from recsys.serving.api.handlers import Handlers, RequestContext
from recsys.serving.api.hot import Hot, host_name
from recsys.serving.api.schemas import MAX_ID, STATUS, Code, Refusal

log = logging.getLogger("recsys.serve.requests")

Application = Callable[[Scope, Receive, Send], Awaitable[None]]
JSON = (b"content-type", b"application/json")


class Front:
    """The service as an ASGI application.

    Args:
        operations: what is behind the routes.
        rest: the ASGI application for what is not hot.
        posts: what answers a POST to each of these paths; gives an ASGI application.
    """

    def __init__(
        self,
        operations: Handlers,
        rest: Application,
        posts: Mapping[bytes, Callable[[RequestContext], Awaitable[Application]]],
    ) -> None:
        self.operations, self.rest, self.posts = operations, rest, posts
        self.hot = Hot(operations)
        self.direct = Direct(operations, self.hot)
        self.awake = Awake(operations.rules.awake, lambda: operations.answers.idle)
        self._keys, self._rules = operations.keys, operations.rules
        self._metrics = operations.metrics
        self._seen = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._lifespan(receive, send)
            return
        start = monotonic()
        if scope["method"] == "GET":
            path = scope["raw_path"]
            hot = self.hot.answer(path, scope["query_string"], scope["headers"])
            if hot is not None:
                headers = [
                    JSON,
                    (b"content-length", b"%d" % len(hot.content)),
                    (b"x-request-id", hot.request_id),
                ]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                await send({"type": "http.response.body", "body": hot.content})
                self.hot.done(hot, monotonic() - start)
                return
        await self._general(scope, receive, send, start)

    def refused(self, code: str) -> None:
        """Count what was refused before it was a request."""
        self._metrics.refused(code)

    def close(self) -> None:
        """Finish what waits, write down what was shown, end the threads."""
        self.operations.close()
        self.hot.close()

    async def _general(self, scope: Scope, receive: Receive, send: Send, start: float) -> None:
        request_id, wanted, exposed = None, None, True
        for name, value in scope["headers"]:
            if name == b"x-request-id":
                request_id = sane_id(value)
            elif name == b"x-variant":
                wanted = value.decode("latin-1")[:MAX_ID]
            elif name == b"x-exposure":
                exposed = value != b"none"
        call = RequestContext(
            scope, receive, request_id or self.hot.new_id().decode("ascii"), start
        )
        call.wanted, call.exposed = wanted, exposed
        if self._keys.needed:
            call.key = self._keys.find(given(scope["headers"]))
        try:
            check_head(scope)
            self._check_host(scope)
        except Refusal as refusal:
            await self._refuse(call, refusal, send)
        else:
            post = self.posts.get(scope["raw_path"]) if scope["method"] == "POST" else None
            if post is not None:
                await (await post(call))(scope, receive, send)
            else:
                # Routes are matched on the path as it was sent: `/` in an id is %2F, and stays so.
                path = scope["raw_path"].decode("ascii", "replace")
                await self.rest({**scope, "path": path, "recsys.call": call}, receive, send)
        self._count(call, monotonic() - start)

    def _check_host(self, scope: Scope) -> None:
        if self._rules.hosts is None:
            return
        names = [host_name(value) for name, value in scope["headers"] if name == b"host"]
        if any(name not in self._rules.hosts for name in names):
            raise Refusal(
                Code.FORBIDDEN,
                "Without keys this service answers only to its own name; see --keys.",
            )

    async def _refuse(self, call: RequestContext, refusal: Refusal, send: Send) -> None:
        content = error_body(refusal.code, refusal.message, call.request_id)
        call.status, call.code = STATUS[refusal.code], refusal.code
        headers = [
            JSON,
            (b"content-length", b"%d" % len(content)),
            (b"x-request-id", call.request_id.encode("ascii")),
            (b"connection", b"close"),
        ]
        await send({"type": "http.response.start", "status": call.status, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    def _count(self, call: RequestContext, seconds: float) -> None:
        self._metrics.of(call.route, call.status, call.variant).add(seconds)
        if call.code:
            self._metrics.refused(call.code)
        self._seen += 1
        failed, slow = call.status >= 500, seconds > self._rules.log_slow
        if self._seen != self._rules.log_every and not failed and not slow:
            return
        if self._seen == self._rules.log_every:
            self._seen = 0
        data = {
            "request_id": call.request_id,
            "route": call.route,
            "method": call.scope["method"],
            "status": call.status,
            "ms": round(seconds * 1000, 3),
            "variant": call.variant,
            "model": call.model,
        }
        if call.code:
            data["code"] = call.code
        log.log(logging.WARNING if failed else logging.INFO, "request", extra={"data": data})

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await send({"type": "lifespan.startup.complete"})
            elif message["type"] == "lifespan.shutdown":
                await asyncio.get_running_loop().run_in_executor(None, self.close)
                await send({"type": "lifespan.shutdown.complete"})
                return
            else:
                return
