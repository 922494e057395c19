"""The service as a Starlette application: routes, middleware, lifespan, OpenAPI.

Bodies are read by `schemas.py` from their bytes, because JSON as Python reads it lets NaN, 1e400
and endless depth through.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from functools import partial
from importlib.resources import files
from typing import Any

import orjson
from polars.exceptions import PanicException
from prometheus_client.core import Metric
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from recsys.errors import RecsysError
from recsys.files import canonical_json, sha256_bytes
from recsys.serving.api.auth import KeyFile, Keys
from recsys.serving.api.contract import OPERATIONS, Operation, openapi
from recsys.serving.api.handlers import MISTAKE, Handlers, ImpressionSink, ServiceRules, refused
from recsys.serving.api.metrics import Metrics, counter, gauge, of_models
from recsys.serving.api.middleware import (
    RequestContext,
    RequestMiddleware,
    TableRows,
    error_response,
    log,
)
from recsys.serving.api.schemas import Code, Refusal
from recsys.serving.live.impression_log import ImpressionLog

Endpoint = Callable[[Request], Awaitable[Response]]


def make_app(
    models: Any,
    updates: Any = None,
    impressions: ImpressionSink | None = None,
    rules: ServiceRules | None = None,
    keys: Keys | None = None,
) -> RequestMiddleware:
    """The service over a model manager.

    Args:
        models: gives the engine of each request; see serving/models/manager.py.
        updates: takes items and events; None: the service is read-only.
        impressions: writes down what is shown; None: nothing does.
        rules: bounds.
        keys: who may do what; none: reading is free, writing is not.

    Returns:
        An ASGI application; its `handlers` are behind the routes, and `close` ends it.
    """
    handlers = Handlers(
        models, updates, impressions, rules or ServiceRules(), keys or Keys(), Metrics()
    )
    page = PageFiles(openapi)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.get_running_loop().run_in_executor(None, handlers.close)

    app = Starlette(
        routes=[
            *(
                Route(operation.path, _endpoint(handlers, operation), methods=[operation.method])
                for operation in OPERATIONS
            ),
            *(Route(path, partial(_page, page, path), methods=["GET"]) for path in page.paths),
        ],
        exception_handlers={HTTPException: _no_route},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    handlers.metrics.more = partial(_more_metrics, handlers)
    return RequestMiddleware(TableRows(app, handlers), handlers)


def _endpoint(handlers: Handlers, operation: Operation) -> Endpoint:
    """The endpoint of an operation: role and rate, then its handler; errors become answers."""
    handler = None if operation.path == "/metrics" else getattr(handlers, operation.name)

    async def endpoint(request: Request) -> Response:
        context: RequestContext = request.scope["recsys.context"]
        context.route = operation.name
        try:
            if handler is None:
                return await _metrics(handlers, context)
            if operation.role is not None:
                handlers.limit(context)
                handlers.allow(context, operation.role)
            content = await handler(context, **request.path_params)
        except Refusal as refusal:
            return error_response(context, refusal)
        except RecsysError as error:
            return error_response(context, refused(error))
        except (Exception, PanicException):  # Polars panics where a value is beyond Python's
            log.exception("request %s failed", context.request_id)
            return error_response(context, Refusal(Code.INTERNAL, MISTAKE))
        return answered(context, content, "application/json")

    return endpoint


def answered(context: RequestContext, content: bytes, kind: str, status: int = 200) -> Response:
    """An answer with the id of its request."""
    context.status = status
    return Response(content, status, {"x-request-id": context.request_id}, kind)


async def _no_route(request: Request, error: Exception) -> Response:
    """A path, or a method of a path, that is none."""
    assert isinstance(error, HTTPException)
    context: RequestContext = request.scope["recsys.context"]
    if error.status_code == 405:
        refusal = Refusal(Code.METHOD, f"{request.method} is none of this path's.")
        response = error_response(context, refusal)
        response.headers["allow"] = (error.headers or {}).get("Allow", "")
        return response
    return error_response(
        context, Refusal(Code.NOT_FOUND, "There is no such path; see /openapi.json.")
    )


async def _page(page: PageFiles, path: str, request: Request) -> Response:
    context: RequestContext = request.scope["recsys.context"]
    context.route = "page"
    status, content, kind, headers = page.get(path, request.headers.get("if-none-match"))
    response = answered(context, content, kind, status)
    response.headers.update(headers)
    return response


async def _metrics(handlers: Handlers, context: RequestContext) -> Response:
    handlers.allow(context, "read")
    # In a thread: the journal's counts wait for its lock, and the loop waits for nothing.
    loop = asyncio.get_running_loop()
    content = await loop.run_in_executor(None, handlers.metrics.text)
    return answered(context, content, "text/plain; version=1.0.0; charset=utf-8")


def _more_metrics(handlers: Handlers) -> Iterable[Metric]:
    """Counts of models, queues, journal, impressions and keys, read at a scrape."""
    yield from of_models(handlers.models.facts())
    for name, queue in (("answers", handlers.answers), ("writes", handlers.writes)):
        yield gauge(f"recsys_{name}_waiting", "Work that waits for a thread.", queue.depth)
        yield counter(
            f"recsys_{name}_given_up", "Work whose deadline passed before it began.", queue.dropped
        )
    dropped = int(getattr(handlers.impressions, "dropped", 0))
    yield counter("recsys_impressions_dropped", "Answers that were not written down.", dropped)
    if isinstance(written := handlers.impressions, ImpressionLog):
        yield gauge("recsys_impressions_waiting", "Rows that wait for the disk.", written.waiting)
        yield gauge("recsys_impressions_writing", "1: the thread that writes lives.", written.alive)
        yield counter(
            "recsys_impressions_failures", "Parts that were not written at once.", written.failures
        )
    if isinstance(handlers.keys, KeyFile):
        keys = handlers.keys.facts()
        yield gauge("recsys_keys_valid", "Keys that are valid.", keys["valid"])
        yield gauge("recsys_keys_broken", "1: their file cannot be read.", keys["broken"])
        yield counter("recsys_keys_reads", "Times that their file was read.", keys["reads"])
        yield counter("recsys_keys_failures", "Times that it could not be.", keys["failures"])
    facts = getattr(handlers.updates, "facts", None)
    if facts is not None:
        for name, value in facts().items():
            if isinstance(value, int | float):
                yield gauge(f"recsys_live_{name}", "What came since the model was made.", value)


if __name__ == "__main__":  # python -m recsys.serving.api.app > docs/openapi.json
    sys.stdout.write(canonical_json(openapi()) + "\n")


KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}
HEADERS = {
    "content-security-policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


class PageFiles:
    """What is served beside the API.

    Args:
        openapi: gives the description of the API.
    """

    def __init__(self, openapi: Callable[[], dict[str, Any]]) -> None:
        self._openapi = openapi
        self._files: dict[str, tuple[bytes, str, str]] = {}
        folder = files("recsys.serving.api").joinpath("page")
        if not folder.is_dir():
            return
        for file in sorted(folder.iterdir(), key=lambda one: one.name):
            kind = KINDS.get("." + file.name.rsplit(".", 1)[-1])
            if kind is not None:
                self._add(f"/page/{file.name}", file.read_bytes(), kind)
        if "/page/index.html" in self._files:
            self._files["/"] = self._files["/page/index.html"]

    def _add(self, path: str, content: bytes, kind: str) -> None:
        self._files[path] = content, kind, f'"{sha256_bytes(content)[:32]}"'

    @property
    def paths(self) -> list[str]:
        """All there is."""
        return [*self._files, "/openapi.json"]

    def get(self, path: str, known: str | None) -> tuple[int, bytes, str, dict[str, str]]:
        """Status, content, type and headers.

        Args:
            path: one of `paths`.
            known: If-None-Match of the request.
        """
        if path not in self._files:  # the description of the API is made when first asked for
            self._add(path, orjson.dumps(self._openapi()), "application/json")
        content, kind, tag = self._files[path]
        headers = HEADERS | {"etag": tag}
        if known is not None and tag in known:
            return 304, b"", kind, headers
        return 200, content, kind, headers
