"""MIND as published: behaviors.tsv and news.tsv (msnews.github.io)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from recsys.features.readers.assemble import assemble, sides
from recsys.features.readers.files import Part, Paths, expand, open_file
from recsys.features.readers.impressions import read_requests
from recsys.features.readers.items import catalog_frame
from recsys.features.readers.source import DataSource, with_defaults
from recsys.features.readers.survey import survey, table
from recsys.tables import CatalogSchema, Kind, Log, Schema

BEHAVIORS = ("impression", "user", "time", "history", "impressions")
NEWS = (
    "item",
    "category",
    "subcategory",
    "title",
    "abstract",
    "url",
    "title_entities",
    "abstract_entities",
)


def read(source: DataSource) -> Log:
    """Read MIND.

    `log` (or train, valid, test) is a behaviors file or a folder that holds behaviors.tsv; news.tsv
    in that folder is read too, unless `items` names it. The items of a user's history become
    positives before the first impression of the whole log, a microsecond apart: MIND tells their
    order and not their times, and all of them happened before it. Of a given split they are on the
    training side.
    The order of an impression list is no position.
    """
    schema = with_defaults(
        source.columns, user="user", time="time", shown="shown", clicked="clicked"
    )
    parts = [
        Part(path, open_file(path, separator="\t", names=BEHAVIORS, quote=None), side)
        for paths, side in sides(source)
        for path in _files(paths, "behaviors.tsv")
    ]
    requests = read_requests([Part(p.path, _lists(p.frame), p.side) for p in parts], schema)
    history, count = _history(parts, schema)
    catalog, news = _news(source, parts[0].path)
    return assemble(
        source,
        schema,
        pl.concat([history, requests.clicks], how="diagonal_relaxed"),
        impressions=requests.impressions,
        positives=requests.positives + count,
        files=[*requests.files, *news],
        notes=requests.notes | {"clicks_from_history": count},
        catalog=catalog,
    )


def _files(paths: Paths, name: str) -> list[Path]:
    if isinstance(paths, (str, Path)) and (Path(paths).expanduser() / name).is_file():
        return [Path(paths).expanduser() / name]
    return [path for path, _ in expand(paths)]


def _lists(frame: pl.LazyFrame) -> pl.LazyFrame:
    """What was shown and what was clicked, from "N1-1 N2-0"."""
    words = pl.col("impressions").str.extract_all(r"\S+")
    shown = words.list.eval(pl.element().str.replace(r"-[01]$", ""))
    clicked = words.list.eval(
        pl.element().filter(pl.element().str.ends_with("-1")).str.strip_suffix("-1")
    )
    return frame.with_columns(shown=shown, clicked=clicked)


def _history(parts: Sequence[Part], schema: Schema) -> tuple[pl.LazyFrame, int]:
    """The history beside each user's first impression, as rows before the log, and how many."""
    rows = table(parts, {"user": "user", "time": "time", "history": "history"}, ids=("user",))
    _, time = survey(rows, [], {}, rows.clock("time", schema))
    first = (
        rows.frame.select("user", time.alias("time"), pl.col("history").fill_null(""))
        .with_row_index("at")
        .sort("time", "at")
        .group_by("user", maintain_order=True)
        .first()
    )
    items = pl.col("history").str.extract_all(r"\S+")
    side = [pl.lit(0, pl.UInt8).alias("side")] if rows.split else []
    # A few thousand lists are sorted here and not streamed, so they are held.
    held = first.select("user", "time", items.alias("item")).collect(engine="streaming")
    held = held.with_columns(pl.col("time").min())
    length = pl.col("item").list.len().cast(pl.Int64)
    frame = (
        held.lazy()
        .select(
            "user",
            "item",
            pl.int_ranges(pl.col("time") - length, pl.col("time")).alias("time"),
            pl.lit(1.0, pl.Float32).alias("weight"),
            pl.lit(int(Kind.POSITIVE), pl.UInt8).alias("kind"),
            *side,
        )
        .explode("item", "time", empty_as_null=False, keep_nulls=False)
    )
    return frame, int(held["item"].list.len().sum() or 0)


def _news(
    source: DataSource, behaviors: Path
) -> tuple[tuple[pl.DataFrame, CatalogSchema] | None, list[Path]]:
    """news.tsv as item table."""
    if source.items is not None:
        files = _files(source.items, "news.tsv")
    elif isinstance(source.log, str) and Path(source.log).expanduser().is_dir():
        files = [path for path in [behaviors.parent / "news.tsv"] if path.is_file()]
    else:
        files = []
    if not files:
        return None, []
    schema = with_defaults(
        source.catalog,
        title="title",
        text=("title", "abstract"),
        categories=("category", "subcategory"),
    )
    parts = [Part(path, open_file(path, separator="\t", names=NEWS, quote=None)) for path in files]
    return (catalog_frame(parts, schema), schema), files
