"""ASGI middleware that answers GET similar from a row of the table of neighbours.

It stands inside `RequestMiddleware` and asks the same handlers: keys, rates, hosts, variants, log,
metrics and impressions are theirs, and so is the form of the answer. It only spares the plainest
and most frequent request the router, the forms and the queue. Whatever is unusual goes on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import orjson
from starlette.types import ASGIApp

from recsys.serving.api.guard import Receive, Scope, Send, segment
from recsys.serving.api.middleware import RequestContext
from recsys.serving.api.schemas import MAX_ID, MAX_K, Refusal

if TYPE_CHECKING:
    from recsys.serving.api.handlers import Handlers

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


__all__ = ["TableRows"]
