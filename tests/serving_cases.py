"""A model with a graph, overlays made by hand, items of the shop: for tests of what answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from recsys.experiments.benchmarks import synthetic
from recsys.serving import bundle as bundles
from recsys.serving.engine.engine import Engine, EngineRules
from recsys.serving.engine.loaded_model import LoadedModel
from recsys.serving.engine.query import Answers, Query
from recsys.serving.index import GraphRules, HnswIndex
from recsys.serving.live.overlay import LiveView

FOREVER = np.iinfo(np.int64).max
EAGER = GraphRules(kind="hnsw", exact_breadth=0.5, exact_below=0.0, ef=40)
"""Asks the graph wherever the planner of `Stock` may, however few items there are."""
NEW = {
    "title": "Minimalist watering can", "description": "A watering can in zinc.",
    "category": ["Garden", "watering can"], "brand": "Brackenhay", "price": 31.9,
}  # fmt: skip
"""An item of the simulated shop that no model was made with."""


def small(path: Path, items: int = 1500, dimensions: int = 8, *, twins: bool = True) -> LoadedModel:
    """Items without content in clusters; category goes with the cluster, price with nothing."""
    synthetic.make(path, items=items, dimensions=dimensions, users=40, threads=1, neighbours=30)
    bundle = bundles.load(path)
    vectors = np.ascontiguousarray(bundle.vectors[bundle.rows])
    # Twins: equal scores, which must come in one order.
    if twins:
        vectors[1::50] = vectors[::50]
    stored = bundle.vectors.copy()
    stored[bundle.rows] = vectors
    index = HnswIndex(vectors, EAGER)
    return LoadedModel(replace(bundle, vectors=stored, index=index), None, version="one")


STILL = EngineRules(clock=None)
"""As of the cut-off, as a `Recommender` answers."""


@dataclass
class FakeOverlay:
    view: LiveView


def engine_of(served: LoadedModel) -> Engine:
    """An engine with nothing live."""
    return Engine(served, FakeOverlay(no_view(served)), rules=STILL)


def reply_to(engine: Engine, ask: Query) -> Answers:
    """The answer to one question that has one."""
    (reply,) = engine.answer([ask])
    assert isinstance(reply, Answers), reply
    return reply


def no_view(served: LoadedModel) -> LiveView:
    """An overlay in which nothing is live."""
    return view_of(served, {})


def view_of(
    served: LoadedModel,
    live: Mapping[str, np.ndarray],
    deleted: Iterable[str] = (),
    *,
    since: Mapping[str, int] | None = None,
    fields: Mapping[str, Mapping[str, object]] | None = None,
    events: Mapping[str, tuple[tuple[str, int, float], ...]] | None = None,
    generation: int = 1,
) -> LiveView:
    """An overlay with these items and vectors, which replace those of the same id.

    Args:
        served: the model.
        live: id → stored vector.
        deleted: ids.
        since, fields: of the live items, where it matters.
        events: user → what was posted.
        generation: of the view.
    """
    schema = {n: t for n, t in served.bundle.catalog.schema.items() if n != "item"}
    dimension = served.bundle.model.vector_dimension
    vectors = np.array(list(live.values()), np.float32).reshape(len(live), dimension)
    model = served.bundle.model
    hidden = frozenset(row for id in (*live, *deleted) if (row := served.row_of(id)))
    positions = np.array([served.position[row] for row in hidden], np.int64)
    told = [(fields or {}).get(id, {}) for id in live]
    return LiveView(
        ids=tuple(live),
        place={id: place for place, id in enumerate(live)},
        vectors=vectors,
        entries=vectors[:, : model.vector_dimension].copy(),
        fields=pl.DataFrame(
            {n: pl.Series(n, [one.get(n) for one in told], t) for n, t in schema.items()}
        ),
        window=np.tile(np.array([-FOREVER - 1, FOREVER]), (len(live), 1)),
        hidden=hidden,
        hidden_positions=np.sort(positions[positions >= 0]),
        events=events or {},
        generation=generation,
        since=np.array([(since or {}).get(id, 1) for id in live], np.int64),
    )


@pytest.fixture(scope="module")
def table(shop: Path) -> dict[str, dict[str, Any]]:
    """Id → what the shop's item table says."""
    frame = pl.read_parquet(shop / "items.parquet")
    rows = [{**row, "published": row["published"].isoformat()} for row in frame.to_dicts()]
    return {row.pop("item"): row for row in rows}
