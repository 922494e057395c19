"""Assemble a Log of lazy rows: item table, user table, unknown items, row numbers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import polars as pl

from recsys.errors import DataError
from recsys.features.readers.files import Part, Paths, open_parts
from recsys.features.readers.items import read_catalog, read_users
from recsys.features.readers.source import DataSource
from recsys.tables import Catalog, CatalogSchema, Log, Schema, Side


def sides(source: DataSource) -> list[tuple[Paths, int | None]]:
    """The paths of the log, each with its side of a given split."""
    if source.log is not None:
        return [(source.log, None)]
    named = ((source.train, Side.TRAIN), (source.valid, Side.VALID), (source.test, Side.TEST))
    return [(paths, int(side)) for paths, side in named if paths is not None]


def open_log(source: DataSource, ids: Iterable[str] = ()) -> list[Part]:
    """Scan the files of the log lazily."""
    ids = list(ids)
    return [part for paths, side in sides(source) for part in open_parts(paths, side=side, ids=ids)]


def assemble(
    source: DataSource,
    schema: Schema,
    interactions: pl.LazyFrame,
    *,
    positives: int,
    files: Iterable[Path],
    impressions: pl.LazyFrame | None = None,
    timed: bool = True,
    notes: dict[str, int] | None = None,
    catalog: tuple[pl.DataFrame, CatalogSchema] | None = None,
    no_positives: str = "",
) -> Log:
    """Put a Log together.

    Args:
        source: the `[data]` section.
        schema: its columns with the format's defaults.
        interactions: canonical rows in source order, without `row`.
        positives: how many of them are positives.
        files: what was read.
        impressions: canonical requests.
        timed: whether time is a clock.
        notes: counts so far.
        catalog: an item table that the format has read its own way.
        no_positives: what to say when there are none.

    Raises:
        DataError: no positives, or an item or user table that cannot be read.
    """
    files = list(files)
    if positives == 0:
        raise DataError(
            f"{files[0]} has no positive interaction. "
            + (no_positives or "Every row was left out: look at data.columns.")
        )
    interactions = interactions.with_row_index("row").with_columns(pl.col("row").cast(pl.Int64))
    notes = {name: count for name, count in (notes or {}).items() if count}
    if catalog is None and source.items is not None:
        frame, more = read_catalog(source.items, source.catalog)
        catalog = (frame, source.catalog)
        files += more
    read_items = None
    if catalog is not None:
        read_items = Catalog(_first_rows(catalog[0], "item", notes), catalog[1])
    users = None
    if source.users is not None:
        users, more = read_users(source.users, source.user_table)
        users = _first_rows(users, "user", notes)
        files += more
    if read_items is not None:
        known = read_items.frame.lazy().select("item")
        interactions, impressions, counts = _unknown(
            interactions, impressions, known, drop=source.unknown_items == "drop"
        )
        notes |= counts
    return Log(
        interactions=interactions,
        impressions=impressions,
        catalog=read_items,
        users=users,
        timed=timed,
        given_split=source.log is None,
        sources=tuple(sorted(set(files))),
        schema=schema,
        user_schema=source.user_table,
        notes=notes,
    )


def _first_rows(frame: pl.DataFrame, column: str, notes: dict[str, int]) -> pl.DataFrame:
    """The first row of each id; how many others are left out goes into the notes."""
    kept = frame.unique(column, keep="first", maintain_order=True)
    if len(kept) < len(frame):
        notes[f"{column}_rows_of_an_id_met_before"] = len(frame) - len(kept)
    return kept


def _unknown(
    interactions: pl.LazyFrame, impressions: pl.LazyFrame | None, known: pl.LazyFrame, drop: bool
) -> tuple[pl.LazyFrame, pl.LazyFrame | None, dict[str, int]]:
    """Count events on items that the item table lacks, and drop them when asked to."""
    lists = [c for c in ("shown", "position") if _has(impressions, c)]
    counted = {"events_on_unknown_items": interactions.select("item")}
    if impressions is not None:
        shown = impressions.select(pl.col("shown").alias("item"))
        counted["shown_unknown_items"] = shown.explode("item", empty_as_null=False)
    absent = [
        frame.join(known, on="item", how="anti").select(pl.len()) for frame in counted.values()
    ]
    found = [int(n.item()) for n in pl.collect_all(absent, engine="streaming")]
    counts = {name: n for name, n in zip(counted, found, strict=True) if n}
    if not drop or not counts:
        return interactions, impressions, counts
    interactions = interactions.join(known, on="item", how="semi")
    if impressions is not None:
        rest = impressions.drop(*lists, "clicked")
        long = impressions.select("request", *lists).explode(lists, empty_as_null=False)
        long = long.with_row_index("at").join(known, left_on="shown", right_on="item", how="semi")
        kept = long.sort("at").group_by("request").agg(lists)
        clicked = impressions.select("request", item="clicked").explode("item", empty_as_null=False)
        clicked = clicked.with_row_index("at").join(known, on="item", how="semi").sort("at")
        clicked = clicked.group_by("request").agg(pl.col("item").alias("clicked"))
        # A request of which nothing is left says nothing and goes.
        whole = rest.join(kept, on="request").join(clicked, on="request", how="left")
        impressions = whole.with_columns(pl.col("clicked").fill_null([])).sort("request")
    return interactions, impressions, counts


def _has(frame: pl.LazyFrame | None, column: str) -> bool:
    return frame is not None and column in frame.collect_schema()
