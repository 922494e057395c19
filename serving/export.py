"""Export of vectors to Parquet, FAISS and Qdrant.

An export is a folder that is whole or absent, with an `export.json` that says how to search it. The
score is the inner product of the vectors as they stand there, whatever the towers were trained by.

Legend: n items of the index, D dimensions of the stored vector.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import polars as pl

from recsys.errors import ConfigError, nearest
from recsys.files import atomic_folder, read_json, write_json
from recsys.serving.recall import recall_against_exact
from recsys.serving.recommender import Recommender
from recsys.towers.encode import encode_users

if TYPE_CHECKING:
    from recsys.ragged import Ragged

Format = Literal["parquet", "faiss", "qdrant"]
FORMAT, FORMAT_VERSION, ABOUT = "recsys-export", 1, "export.json"
ROWS_AT_ONCE = 16_384
"""Rows that stand in memory beside the bundle, and rows of a Parquet group."""
POINTS_AT_ONCE = 256
"""Points of one upload: some 300 KB at 64 dimensions; Qdrant takes up to 32 MB."""
NAMESPACE = uuid.UUID("8c0a4c1e-5d0f-5b7e-9a57-6d1c2a5e7f10")
"""Of the points' ids: an item keeps its id when a newer model is exported."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    Args:
        path: the folder.
        items: items in it.
        users: users in it.
        left_out: users of whom nothing is known, so that their vectors would mean nothing.
        recall: of a graph, against exact search; 1 where nothing is approximate.
    """

    path: Path
    items: int
    users: int = 0
    left_out: int = 0
    recall: float = 1.0


def export(
    recommender: Recommender,
    out: str | Path,
    format: str,
    *,
    users: bool = False,
    graph: bool = False,
    progress: Progress = lambda done, total: None,
) -> Exported:
    """Write the vectors of all items that may be answered, and of users, into a folder.

    Args:
        recommender: whose vectors.
        out: folder; an earlier export there is replaced, anything else is refused.
        format: "parquet" (items.parquet), "faiss" (items.faiss beside items.parquet) or "qdrant"
            (bodies of its REST calls, and upload.sh that sends them).
        users: user vectors as of the cut-off too, one a user.
        graph: FAISS as HNSW rather than exact.
        progress: told how many rows are done, and of how many.

    Raises:
        ConfigError: an unknown format, a folder that holds something else, FAISS is not installed.
    """
    if format not in get_args(Format):
        raise ConfigError(f"There is no export format {format!r}. {nearest(format, WRITERS)}")
    out = Path(out)
    if not _may_replace(out):
        raise ConfigError(
            f"{out} holds something that is no export, and would be replaced. Name another folder."
        )
    if graph and format != "faiss":
        raise ConfigError(f"A graph is built for FAISS only; {format} builds its own.")
    tables = [_items(recommender)]
    if users:
        tables.append(_users(recommender))
    total = sum(table.rows for table in tables)
    done = 0

    def counted(frames: Iterator[pl.DataFrame]) -> Iterator[pl.DataFrame]:
        nonlocal done
        for frame in frames:
            yield frame
            done += len(frame)
            progress(min(done, total), total)

    with atomic_folder(out) as folder:
        facts: dict[str, Any] = {}
        for table in tables:
            table.frames = counted(table.frames)
            facts |= WRITERS[format](folder, table, recommender, graph)
        counts = {table.name: table.rows - table.left_out for table in tables}
        left_out = sum(table.left_out for table in tables)
        _write_about(folder, recommender, {"kind": format, **counts, **facts}, left_out)
    progress(total, total)
    return Exported(
        out, counts["items"], counts.get("users", 0), left_out, facts.get("recall", 1.0)
    )


@dataclass
class _Table:
    """Frames of `row`, the id under the singular name, `vector`, and fields.

    `left_out` is known when the frames have run out.
    """

    name: str
    rows: int
    frames: Iterator[pl.DataFrame]
    schema: pl.Schema
    left_out: int = 0

    @property
    def id(self) -> str:
        return self.name.removesuffix("s")


def _items(recommender: Recommender) -> _Table:
    bundle = recommender.bundle
    rows = np.asarray(bundle.rows, np.int64)
    taken = {"row", "vector"} & set(bundle.catalog.columns)
    catalog = bundle.catalog.drop("item", strict=False).rename({n: f"field_{n}" for n in taken})

    def frame(part: np.ndarray) -> pl.DataFrame:
        own = pl.DataFrame(
            {
                "row": part,
                "item": bundle.items.decode(part),
                "vector": pl.Series(bundle.vectors[part]),
            },
            schema_overrides={"vector": _vector_type(bundle.vectors.shape[1])},
        )
        return own.hstack(catalog[part - 1])

    frames = (frame(part) for part in _parts(rows))
    return _Table("items", len(rows), frames, frame(rows[:0]).schema)


def _users(recommender: Recommender) -> _Table:
    bundle = recommender.bundle
    rows = np.arange(1, bundle.users.size)
    vector = _vector_type(bundle.model.vector_dimension)
    schema = pl.Schema([("row", pl.Int64()), ("user", pl.String()), ("vector", vector)])

    def frames() -> Iterator[pl.DataFrame]:
        for part in _parts(rows):
            known = part[~recommender.engine.nothing_known(recommender.queries(part))]
            table.left_out += len(part) - len(known)
            vectors = encode_users(
                bundle.model, recommender.queries(known), bundle.timeline, bundle.cutoff
            )
            yield pl.DataFrame(
                {
                    "row": known,
                    "user": bundle.users.decode(known),
                    "vector": pl.Series(vectors),
                },
                schema=schema,
            )

    table = _Table("users", len(rows), frames(), schema)
    return table


def _parts(rows: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), ROWS_AT_ONCE):
        yield rows[start : start + ROWS_AT_ONCE]


def _vector_type(dimension: int) -> pl.DataType:
    return pl.Array(pl.Float32, dimension)


# ------------------------------------------------------------------ Parquet


def _parquet(folder: Path, table: _Table, recommender: Recommender, graph: bool) -> dict[str, Any]:
    _sink(folder / f"{table.name}.parquet", table.frames, table.schema)
    return {}


def _sink(path: Path, frames: Iterable[pl.DataFrame], schema: pl.Schema) -> None:
    """Stream frames into one Parquet file; the whole never stands in memory."""
    from polars.io.plugins import register_io_source

    def source(
        columns: list[str] | None, predicate: Any, rows: int | None, batch: int | None
    ) -> Iterator[pl.DataFrame]:
        yield from frames  # a plain sink asks for everything

    lazy = register_io_source(source, schema=schema)
    lazy.sink_parquet(
        path, compression="zstd", compression_level=1, row_group_size=ROWS_AT_ONCE,
        statistics=False, maintain_order=True,
    )  # fmt: skip


# ------------------------------------------------------------------ FAISS


def _faiss(folder: Path, table: _Table, recommender: Recommender, graph: bool) -> dict[str, Any]:
    faiss = _import_faiss()
    dimension = recommender.bundle.vectors.shape[1]
    if table.name == "users":
        # Users ask and are not searched, so that a table is enough.
        return _parquet(folder, table, recommender, graph)
    inner = faiss.IndexFlatIP(dimension)
    if graph:
        rules = recommender.bundle.manifest["index"]["rules"]
        inner = faiss.IndexHNSWFlat(dimension, 2 * rules["m"], faiss.METRIC_INNER_PRODUCT)
        inner.hnsw.efConstruction, inner.hnsw.efSearch = rules["ef_construction"], rules["ef"]
    index = faiss.IndexIDMap2(inner)

    def filled() -> Iterator[pl.DataFrame]:
        for frame in table.frames:
            vectors = frame["vector"].to_numpy()
            index.add_with_ids(np.ascontiguousarray(vectors, np.float32), frame["row"].to_numpy())
            yield frame.drop("vector")

    schema = pl.Schema({n: t for n, t in table.schema.items() if n != "vector"})
    _sink(folder / f"{table.name}.parquet", filled(), schema)
    if index.ntotal != table.rows:  # a sink that gave up early would leave a short index
        raise RuntimeError(f"FAISS took {index.ntotal} of {table.rows} vectors.")
    faiss.write_index(index, str(folder / f"{table.name}.faiss"))
    recall = 1.0
    if graph:
        vectors = np.ascontiguousarray(recommender.bundle.vectors[recommender.bundle.rows])
        recall = recall_against_exact(_Searched(inner), vectors, k=10)
    return {"index": "HNSW" if graph else "Flat", "recall": recall}


def _import_faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ConfigError(
            f"FAISS is not there ({error}). Install it: pip install 'recsys[faiss]'; or export "
            "--format parquet."
        ) from error
    return faiss


class _Searched:
    """A FAISS index as an `Index`, without filters."""

    def __init__(self, index: Any) -> None:
        self.index, self.size, self.dimension = index, int(index.ntotal), int(index.d)

    def search(
        self,
        queries: np.ndarray,
        k: int,
        *,
        allowed: np.ndarray | None = None,
        exclude: Ragged | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        scores, rows = self.index.search(np.ascontiguousarray(queries), k)
        return rows, scores


# ------------------------------------------------------------------ Qdrant


def _qdrant(folder: Path, table: _Table, recommender: Recommender, graph: bool) -> dict[str, Any]:
    """Bodies of PUT /collections/NAME, …/index and …/points, one a line where there are many."""
    bundle = recommender.bundle
    # Unit vectors alone may be compared by Qdrant's cosine, which shortens what it is given.
    distance = "Cosine" if bundle.model.rules.score == "cosine" else "Dot"
    write_json(
        folder / f"{table.name}.collection.json",
        {"vectors": {"size": bundle.vectors.shape[1], "distance": distance}},
    )
    payload = [name for name in table.schema if name not in ("row", "vector")]
    fields = {n: kind for n in payload if (kind := _payload_type(table.schema[n])) is not None}
    indexes = pl.DataFrame(
        {"field_name": list(fields), "field_schema": list(fields.values())},
        schema={"field_name": pl.String, "field_schema": pl.String},
    )
    indexes.write_ndjson(folder / f"{table.name}.indexes.jsonl")
    with open(folder / f"{table.name}.points.jsonl", "wb") as file:
        for frame in table.frames:
            _points(frame, table.id, payload).write_ndjson(file)
    if not (script := folder / "upload.sh").exists():
        script.write_text(UPLOAD, encoding="utf-8")
        os.chmod(script, 0o755)
    return {"distance": distance}


def _points(frame: pl.DataFrame, id: str, payload: list[str]) -> pl.DataFrame:
    """One row an upload; what it says becomes one line of JSON."""
    # The one loop over rows: there is no SHA-1 over a column (2 µs an id).
    points = pl.Series("id", [str(uuid.uuid5(NAMESPACE, f"{id}:{name}")) for name in frame[id]])
    fields = [_said(pl.col(name), frame.schema[name]) for name in payload]
    return (
        # What the catalogue itself calls "id" stays what it is there.
        frame.select(points, "vector", pl.struct(fields).alias("payload"))
        .select(
            pl.struct("id", "vector", "payload").alias("points"),
            upload=pl.int_range(pl.len()) // POINTS_AT_ONCE,
        )
        .group_by("upload", maintain_order=True)
        .agg("points")
        .select("points")
    )


def _said(value: pl.Expr, kind: pl.DataType) -> pl.Expr:
    """A field as JSON is to say it: times in UTC, decimals as numbers."""
    if isinstance(kind, pl.List):
        inner = kind.inner
        if isinstance(inner, pl.Datetime) or inner.is_decimal():
            return value.list.eval(_said(pl.element(), inner))  # type: ignore[arg-type]
    if isinstance(kind, pl.Datetime):
        if kind.time_zone is not None:
            value = value.dt.convert_time_zone("UTC")
        return value.dt.to_string("%Y-%m-%dT%H:%M:%S%.6fZ")
    return value.cast(pl.Float64) if kind.is_decimal() else value


def _payload_type(kind: pl.DataType) -> str | None:
    """What Qdrant calls it in an index over the payload; None: nothing to filter by."""
    if isinstance(kind, pl.List):
        kind = kind.inner  # type: ignore[assignment]  # an instance in every schema of data
    if kind.is_integer():
        return "integer"
    if kind.is_float() or kind.is_decimal():
        return "float"
    if kind == pl.Boolean:
        return "bool"
    if isinstance(kind, pl.Datetime) or kind == pl.Date:
        return "datetime"
    if kind == pl.String or isinstance(kind, pl.Categorical | pl.Enum):
        return "keyword"
    return None


UPLOAD = """\
#!/bin/sh
# Sends this export to a Qdrant: QDRANT_URL=http://localhost:6333 [QDRANT_API_KEY=…] ./upload.sh
# An item that is there is replaced; ids are made of the external ids.
set -eu
cd "$(dirname "$0")"
: "${QDRANT_URL:?Say where Qdrant is, e.g. QDRANT_URL=http://localhost:6333}"
put() {  # path, body on stdin
    curl --fail-with-body --silent --show-error --output /dev/null --request PUT \\
        --header 'Content-Type: application/json' \\
        ${QDRANT_API_KEY:+--header "api-key: $QDRANT_API_KEY"} \\
        --data-binary @- "$QDRANT_URL/collections/$1"
}
for name in items users; do
    [ -f "$name.points.jsonl" ] || continue
    curl --fail --silent --output /dev/null \\
        ${QDRANT_API_KEY:+--header "api-key: $QDRANT_API_KEY"} \\
        "$QDRANT_URL/collections/$name" || put "$name" < "$name.collection.json"
    while IFS= read -r line; do printf '%s' "$line" | put "$name/index"; done \\
        < "$name.indexes.jsonl"
    while IFS= read -r line; do printf '%s' "$line" | put "$name/points"; done \\
        < "$name.points.jsonl"
done
"""


# ------------------------------------------------------------------ about

WRITERS: dict[str, Callable[[Path, _Table, Recommender, bool], dict[str, Any]]] = {
    "parquet": _parquet,
    "faiss": _faiss,
    "qdrant": _qdrant,
}


def _write_about(
    folder: Path, recommender: Recommender, facts: dict[str, Any], left_out: int
) -> None:
    bundle = recommender.bundle
    search = "Rank by the inner product, largest first; a user's vector is the query."
    write_json(
        folder / ABOUT,
        {
            **facts,
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "bundle": bundle.manifest["content"],
            "version": bundle.manifest["content"][:12],
            "cutoff": bundle.cutoff,
            "score": bundle.model.rules.score,
            "dimension": bundle.vectors.shape[1],
            "users_left_out": left_out,
            "search": search,
        },
    )


def _may_replace(path: Path) -> bool:
    """Whether an earlier export, an empty folder or nothing stands there."""
    if not path.exists():
        return True
    if not path.is_dir():
        return False
    if not (path / ABOUT).is_file():
        return not any(path.iterdir())
    about = read_json(path / ABOUT)
    return isinstance(about, dict) and about.get("format") == FORMAT
