"""EB-NeRD as published: behaviors.parquet, history.parquet, articles.parquet (recsys.eb.dk)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from recsys.features.readers.assemble import assemble, sides
from recsys.features.readers.events import Rows, event_rows
from recsys.features.readers.files import Part, Paths, expand, open_parts
from recsys.features.readers.impressions import read_requests
from recsys.features.readers.items import catalog_frame
from recsys.features.readers.source import DataSource, with_defaults
from recsys.tables import CatalogSchema, Log, Schema

COLUMNS = {
    "user": "user_id",
    "time": "impression_time",
    "shown": "article_ids_inview",
    "clicked": "article_ids_clicked",
}
DWELL = "next_read_time"
"""Seconds on the article that was clicked."""
TEXT = ("title", "subtitle", "body")
CATEGORIES = ("category_str", "topics", "article_type")


def read(source: DataSource) -> Log:
    """Read EB-NeRD.

    `log` (or train, valid, test) is a behaviors file or a folder that holds one; beside it in such
    a folder history.parquet, and articles.parquet there or one folder up, are read too. Clicks
    of the history are positives at their own times; of files that are split, only the
    history of the training side is read, since the later ones repeat its clicks.
    """
    schema = with_defaults(source.columns, **COLUMNS)
    if schema.short_dwell is not None:
        schema = with_defaults(schema, dwell=DWELL)
    named = sides(source)
    parts = [p for paths, side in named for p in open_parts(_inside(paths, "behaviors"), side=side)]
    requests = read_requests(parts, schema)
    history = _history(schema, *named[0])
    frames, positives = [requests.clicks], requests.positives
    notes, files = dict(requests.notes), list(requests.files)
    if history is not None:
        frames.insert(0, history.frame)
        positives += history.positives
        notes["clicks_from_history"] = history.positives
        files += history.files
    catalog = _articles(source, named[0][0])
    if catalog is not None:
        files += [part.path for part in catalog[2]]
    return assemble(
        source,
        schema,
        pl.concat(frames, how="diagonal_relaxed"),
        impressions=requests.impressions,
        positives=positives,
        files=files,
        notes=notes,
        catalog=None if catalog is None else catalog[:2],
    )


def _inside(paths: Paths, name: str) -> Paths:
    """A folder stands for the file in it."""
    if isinstance(paths, (str, Path)):
        file = Path(paths).expanduser() / f"{name}.parquet"
        return file if file.is_file() else paths
    return paths


def _history(schema: Schema, paths: Paths, side: int | None) -> Rows | None:
    """The clicks before the log, one row each."""
    if not isinstance(paths, (str, Path)):
        return None
    log = Path(paths).expanduser()
    file = (log if log.is_dir() else log.parent) / "history.parquet"
    if not file.is_file():
        return None
    parts = open_parts(file, side=side)
    lists = ["impression_time_fixed", "article_id_fixed", "read_time_fixed"]
    exploded = []
    for part in parts:
        known = part.frame.collect_schema().names()
        there = [name for name in lists if name in known]
        frame = part.frame.explode(there, empty_as_null=False, keep_nulls=False)
        exploded.append(Part(part.path, frame, part.side))
    own = Schema(
        user="user_id",
        item="article_id_fixed",
        time="impression_time_fixed",
        time_zone=schema.time_zone,
        dwell=None if schema.short_dwell is None else "read_time_fixed",
        short_dwell=schema.short_dwell,
    )
    return event_rows(exploded, own)


def _articles(
    source: DataSource, paths: Paths
) -> tuple[pl.DataFrame, CatalogSchema, Sequence[Part]] | None:
    """The item table with the columns that articles.parquet usually has."""
    found = source.items
    if found is None:
        first = expand(_inside(paths, "behaviors"))[0][0]
        if isinstance(paths, (str, Path)) and Path(paths).expanduser().is_dir():
            near = [folder / "articles.parquet" for folder in (first.parent, first.parent.parent)]
            found = next((str(file) for file in near if file.is_file()), None)
    if found is None:
        return None
    parts = open_parts(found)
    known = parts[0].frame.collect_schema().names()
    there = {name: name if name in known else None for name in ("title", "published_time")}
    schema = with_defaults(
        source.catalog,
        item="article_id",
        title=there["title"],
        text=tuple(name for name in TEXT if name in known),
        categories=tuple(name for name in CATEGORIES if name in known),
        published=there["published_time"],
    )
    return catalog_frame(parts, schema), schema, parts
