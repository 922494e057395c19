"""What the service is held against: a route that does nothing, and one written by hand.

    python -m recsys.experiments.benchmarks.noop starlette --port 8200 --bytes 500
    python -m recsys.experiments.benchmarks.noop handwritten --port 8201 --bundle BUNDLE

`starlette` answers every request on one route with the same body. `handwritten` is what one would
write in an afternoon: FastAPI over an hnswlib index of a bundle's vectors. Both run on the server
that `recsys serve` runs on.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def starlette_app(body: bytes) -> Any:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    async def answer(_request: Request) -> Response:
        return Response(body, media_type="application/json")

    return Starlette(routes=[Route("/v1/items/{item}/similar", answer)])


def handwritten_app(folder: Path) -> Any:
    import hnswlib
    import numpy as np
    from fastapi import FastAPI, HTTPException
    from pydantic import BaseModel

    from recsys.serving import bundle as bundles

    bundle = bundles.load(folder)
    ids = bundle.items.decode(bundle.rows).to_list()
    row_of = {id: row for row, id in enumerate(ids)}
    vectors = np.asarray(bundle.vectors[bundle.rows])
    index = hnswlib.Index(space="cosine", dim=vectors.shape[1])
    index.init_index(max_elements=len(vectors), ef_construction=200, M=16)
    index.add_items(vectors)
    index.set_ef(100)

    class Item(BaseModel):
        item: str
        score: float

    class Similar(BaseModel):
        items: list[Item]

    app = FastAPI()

    @app.get("/v1/items/{item}/similar")
    def similar(item: str, k: int = 10) -> Similar:
        row = row_of.get(item)
        if row is None:
            raise HTTPException(404, f"there is no item {item}")
        found, distances = index.knn_query(vectors[row], k + 1)
        near = zip(found[0].tolist(), distances[0].tolist(), strict=True)
        kept = [Item(item=ids[one], score=1 - away) for one, away in near if one != row]
        return Similar(items=kept[:k])

    return app


def main() -> None:
    from recsys.serving.api.server import bind, run

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("starlette", "handwritten"))
    parser.add_argument("--port", type=int, default=8200)
    parser.add_argument("--bytes", type=int, default=500)
    parser.add_argument("--bundle", type=Path)
    asked = parser.parse_args()
    bound = bind("127.0.0.1", asked.port)
    body = (b'{"items":[' + b" " * asked.bytes)[: asked.bytes - 2] + b"]}"
    app = starlette_app(body) if asked.kind == "starlette" else handwritten_app(asked.bundle)
    run(app, bound)


if __name__ == "__main__":
    main()
