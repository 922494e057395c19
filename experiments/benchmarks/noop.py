"""Servers that do nothing, to hold the service against: Starlette and FastAPI on the same uvicorn.

    python -m recsys.experiments.benchmarks.noop starlette --port 8200 --bytes 500

They answer every request on one route with the same body. Flags are those of `recsys serve`.
"""

from __future__ import annotations

import argparse
from typing import Any


def starlette_app(body: bytes) -> Any:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    async def answer(_request: Request) -> Response:
        return Response(body, media_type="application/json")

    return Starlette(routes=[Route("/v1/items/{item}/similar", answer)])


def fastapi_app(body: bytes) -> Any:
    from fastapi import FastAPI, Response

    app = FastAPI()

    @app.get("/v1/items/{item}/similar")
    async def answer(item: str) -> Response:
        return Response(body, media_type="application/json")

    return app


def main() -> None:
    import uvicorn

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("starlette", "fastapi"))
    parser.add_argument("--port", type=int, default=8200)
    parser.add_argument("--bytes", type=int, default=500)
    asked = parser.parse_args()
    body = (b'{"items":[' + b" " * asked.bytes)[: asked.bytes - 2] + b"]}"
    app = starlette_app(body) if asked.kind == "starlette" else fastapi_app(body)
    uvicorn.run(
        app, host="127.0.0.1", port=asked.port, loop="uvloop", http="httptools",
        log_level="warning", access_log=False, server_header=False,
    )  # fmt: skip


if __name__ == "__main__":
    main()
