"""The service as one ASGI application: hot paths in front, FastAPI's routes behind, one OpenAPI.

FastAPI routes and documents. Bodies are read by `wire.py` from their bytes, because JSON as
Python reads it lets NaN, 1e400 and endless depth through.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Any

from fastapi import FastAPI, Request, Response
from polars.exceptions import PanicException
from prometheus_client.core import Metric
from starlette.exceptions import HTTPException

from recsys.errors import RecsysError
from recsys.serving.api.auth import KeyFile, Keys
from recsys.serving.api.contract import OPERATIONS, Operation, describe
from recsys.serving.api.front import Front
from recsys.serving.api.guard import error_body
from recsys.serving.api.handlers import (
    MISTAKE,
    Handlers,
    ImpressionSink,
    RequestContext,
    ServiceRules,
    log,
    refused,
)
from recsys.serving.api.metrics import Metrics, counter, gauge, of_host
from recsys.serving.api.page_files import PageFiles
from recsys.serving.api.schemas import STATUS, Code, Refusal
from recsys.serving.live.impression_log import ImpressionLog

__all__ = ["Keys", "ServiceRules", "make_app"]


def make_app(
    host: Any,
    living: Any = None,
    exposures: ImpressionSink | None = None,
    rules: ServiceRules | None = None,
    keys: Keys | None = None,
) -> Front:
    """The service over a host.

    Args:
        host: gives the engine of each request; see serving/models/manager.py.
        living: takes items and events; None: the service is read-only.
        exposures: writes down what is shown; None: nothing does.
        rules: bounds.
        keys: who may do what; none: reading is free, writing is not.
    """
    metrics = Metrics()
    operations = Handlers(host, living, exposures, rules or ServiceRules(), keys or Keys(), metrics)
    api = FastAPI(
        title="recsys", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    describe(api)
    for operation in OPERATIONS:
        run = partial(_routed, operations, operation)
        if operation.path == "/metrics":
            run = partial(_metrics, operations)
        api.add_api_route(
            operation.path, _endpoint(run), methods=[operation.method], **operation.documented()
        )
    page = PageFiles(api.openapi)
    for path in page.paths:
        api.add_route(path, partial(_page, page, path), methods=["GET"])
    api.add_exception_handler(HTTPException, _no_route)
    # Questions are posted to fixed paths: no router is needed to tell them apart, and FastAPI's
    # way to an endpoint costs more than the wait for a place in a batch.
    posts = {
        operation.path.encode(): partial(_run, operations, operation)
        for operation in OPERATIONS
        if operation.method == "POST"
    }
    front = Front(operations, api, posts)
    metrics.more = partial(_more_metrics, operations, front)
    return front


def _endpoint(
    run: Callable[[Request], Awaitable[Response]],
) -> Callable[[Request], Awaitable[Response]]:
    # FastAPI reads the parameters of an endpoint; a partial would show it more than the request.
    async def endpoint(request: Request) -> Response:
        return await run(request)

    return endpoint


async def _routed(operations: Handlers, operation: Operation, request: Request) -> Response:
    return await _run(operations, operation, request.scope["recsys.call"], **request.path_params)


async def _run(
    operations: Handlers, operation: Operation, call: RequestContext, **ids: str
) -> Response:
    call.route = operation.name
    try:
        if operation.role is not None:
            operations.limit(call)
            operations.allow(call, operation.role)
        content = await getattr(operations, operation.name)(call, **ids)
    except Refusal as refusal:
        return _error(call, refusal)
    except RecsysError as error:
        return _error(call, refused(error))
    except (Exception, PanicException):  # Polars panics where a value is beyond Python's
        log.exception("request %s failed", call.request_id)
        return _error(call, Refusal(Code.INTERNAL, MISTAKE))
    return _reply(call, 200, content)


def _reply(
    call: RequestContext,
    status: int,
    content: bytes,
    kind: str = "application/json",
    **headers: str,
) -> Response:
    call.status = status
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    return Response(content, status, {"x-request-id": call.request_id} | given, kind)


def _error(call: RequestContext, refusal: Refusal) -> Response:
    call.code = refusal.code
    headers = {}
    if refusal.retry is not None:
        headers["retry_after"] = str(refusal.retry)
    if refusal.close:
        headers["connection"] = "close"
    if refusal.code == Code.NO_KEY:
        headers["www_authenticate"] = "Bearer"
    content = error_body(refusal.code, refusal.message, call.request_id)
    return _reply(call, STATUS[refusal.code], content, **headers)


async def _no_route(request: Request, error: Exception) -> Response:
    """A path, or a method of a path, that is none."""
    assert isinstance(error, HTTPException)
    call: RequestContext = request.scope["recsys.call"]
    if error.status_code == 405:
        response = _error(call, Refusal(Code.METHOD, f"{request.method} is none of this path's."))
        response.headers["allow"] = (error.headers or {}).get("Allow", "")
        return response
    return _error(call, Refusal(Code.NOT_FOUND, "There is no such path; see /openapi.json."))


async def _page(page: PageFiles, path: str, request: Request) -> Response:
    call: RequestContext = request.scope["recsys.call"]
    call.route = "page"
    status, content, kind, headers = page.get(path, request.headers.get("if-none-match"))
    call.status = status
    return Response(content, status, {"x-request-id": call.request_id} | headers, kind)


async def _metrics(operations: Handlers, request: Request) -> Response:
    call: RequestContext = request.scope["recsys.call"]
    call.route = "metrics"
    try:
        operations.allow(call, "read")
    except Refusal as refusal:
        return _error(call, refusal)
    # In a thread: the journal's counts wait for its lock, and the loop waits for nothing.
    loop = asyncio.get_running_loop()
    content = await loop.run_in_executor(None, operations.metrics.text)
    return _reply(call, 200, content, "text/plain; version=1.0.0; charset=utf-8")


def _more_metrics(operations: Handlers, front: Front) -> Iterable[Metric]:
    """What others count, read at the moment of a scrape."""
    yield from of_host(operations.host.facts())
    for name, queue in (("answers", operations.answers), ("writes", operations.writes)):
        yield gauge(f"recsys_{name}_waiting", "Work that waits for a thread.", queue.depth)
        yield counter(
            f"recsys_{name}_given_up", "Work whose deadline passed before it began.", queue.dropped
        )
    dropped = front.hot.dropped + int(getattr(operations.exposures, "dropped", 0))
    yield counter("recsys_exposures_dropped", "Shown answers that were not written down.", dropped)
    if isinstance(written := operations.exposures, ImpressionLog):
        yield gauge("recsys_exposures_waiting", "Rows that wait for the disk.", written.waiting)
        yield gauge("recsys_exposures_writing", "1: the thread that writes lives.", written.alive)
        yield counter(
            "recsys_exposures_failures", "Parts that were not written at once.", written.failures
        )
    if isinstance(operations.keys, KeyFile):
        keys = operations.keys.facts()
        yield gauge("recsys_keys_valid", "Keys that are valid.", keys["valid"])
        yield gauge("recsys_keys_broken", "1: their file cannot be read.", keys["broken"])
        yield counter("recsys_keys_reads", "Times that their file was read.", keys["reads"])
        yield counter("recsys_keys_failures", "Times that it could not be.", keys["failures"])
    facts = getattr(operations.living, "facts", None)
    if facts is not None:
        for name, value in facts().items():
            if isinstance(value, int | float):
                yield gauge(f"recsys_live_{name}", "What came since the model was made.", value)
