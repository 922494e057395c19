"""Reader of sequences: a row a user, with items in order (SASRec, MicroLens, Amazon)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from recsys.features.readers.assemble import assemble, sides
from recsys.features.readers.files import Part, expand, first_line, form, open_lines, open_parts
from recsys.features.readers.impressions import item_list
from recsys.features.readers.source import DataSource
from recsys.features.readers.survey import SIDE, Check, Table, missing, survey, table
from recsys.tables import Kind, Log, Schema, Side

HEADERS = ("user", "user_id", "userid", "uid", "user_token")


@dataclass(frozen=True)
class Lists:
    """A row a user: user, items, and SIDE when the files are split."""

    rows: Table
    items: pl.Expr


def read(source: DataSource) -> Log:
    """Read sequences: a table with a column of lists, or lines `user<TAB>item item …`."""
    return read_lists(source, source.columns, ordered=True)


def read_lists(source: DataSource, schema: Schema, *, ordered: bool) -> Log:
    """Read a list of items a user.

    Time is the position in the list, going on where the same user stood before. Where files are
    given as lists whose order is not vouched for, validation items are a random part of a user's
    list that has lost its places: they are spread evenly over the training items, so that if there
    is an order after all, what is learned from both sides together keeps it. Test items all get the
    position after everything else, so that none of them is history for another.

    Args:
        source: the `[data]` section.
        schema: its columns.
        ordered: whether the order of a list means anything.

    Raises:
        DataError: a column is missing, or a user or item id is null.
    """
    lists = _open(source, schema)
    rows, items = lists.rows, lists.items
    user = schema.user
    empty = Check(
        schema.items,
        items.list.eval(pl.element().is_null() | (pl.element() == "")).list.any().fill_null(False),
        lambda value: "holds a null or empty item id",
    )
    facts = {
        "items": items.list.len().sum(),
        "users": pl.col(user).n_unique(),
        "empty": (items.list.len() == 0).fill_null(True).sum(),
    }
    found, _ = survey(rows, [missing(user, "user"), empty], facts)
    side = [pl.col(SIDE).alias("side")] if rows.split else []
    frame = rows.frame.select(
        pl.col(user).alias("user"),
        items.alias("item"),
        pl.int_ranges(0, items.list.len(), dtype=pl.Int64).alias("time"),
        *side,
    ).explode("item", "time", empty_as_null=False, keep_nulls=False)
    if found["users"] != found["rows"]:
        frame = frame.with_columns(
            pl.int_range(pl.len(), dtype=pl.Int64).over("user").alias("time")
        )
        if rows.split and not ordered:
            frame = frame.with_columns(_unordered_sides())
    frame = frame.with_columns(
        pl.lit(1.0, pl.Float32).alias("weight"), pl.lit(int(Kind.POSITIVE), pl.UInt8).alias("kind")
    )
    return assemble(
        source,
        schema,
        frame,
        positives=found["items"] or 0,
        files=rows.files,
        timed=False,
        notes={"users_without_items": found["empty"] or 0},
        no_positives=f"No user has an item in {schema.items!r}.",
    )


def _unordered_sides() -> pl.Expr:
    """Times where the order of validation and test items says nothing; see `read_lists`."""
    time, side = pl.col("time"), pl.col("side")
    place = time - time.min().over("user", "side") + 0.5
    trained = (side == Side.TRAIN).sum().over("user")
    spread = (place * trained / pl.len().over("user", "side")).floor().cast(pl.Int64)
    return (
        pl.when(side == Side.TRAIN)
        .then(time)
        .when(side == Side.VALID)
        .then(spread)
        .otherwise(time.min().over("user", "side"))
        .alias("time")
    )


def _open(source: DataSource, schema: Schema) -> Lists:
    """Files with a header as tables, files without one as lines."""
    if _has_header(source, schema):
        parts = [p for paths, side in sides(source) for p in open_parts(paths, side=side)]
        wanted = {"data.columns.user": schema.user, "data.columns.items": schema.items}
        rows = table(parts, wanted, ids=("data.columns.user",), lists=("data.columns.items",))
        return Lists(rows, item_list(rows, schema.items, schema.separator))
    parts = [p for paths, side in sides(source) for p in open_lines(paths, side=side)]
    rows = Table(tuple(_split_lines(parts, schema)))
    return Lists(rows, pl.col(schema.items))


def _has_header(source: DataSource, schema: Schema) -> bool:
    if any(isinstance(paths, pl.DataFrame) for paths, _ in sides(source)):
        return True
    paths: list[Path] = [file for paths, _ in sides(source) for file, _ in expand(paths)]
    if form(paths[0]) != "csv":
        return True
    if (schema.user, schema.items) != (Schema().user, Schema().items):
        return True
    words = [word.strip(" \"'").lower() for word in _words(first_line(paths[0]))]
    return bool(words) and (schema.items in words or words[0] in HEADERS)


def _words(line: str) -> list[str]:
    for mark in ("\t", ",", ";"):
        if mark in line:
            return line.split(mark)
    return line.split()


def _split_lines(parts: Sequence[Part], schema: Schema) -> list[Part]:
    """The first word of a line is the user, the rest are the items; empty lines are left out."""
    line = pl.col("line")
    if schema.separator.isspace():
        words = line.str.extract_all(r"\S+")
    else:
        # "user<TAB>a,b,c" and "user,a,b,c" alike.
        plain = line.str.replace("\t", schema.separator, literal=True)
        words = plain.str.split(schema.separator).list.eval(pl.element().str.strip_chars())
        words = words.list.filter(pl.element() != "")
    return [
        Part(
            part.path,
            part.frame.filter(line.str.strip_chars() != "").select(
                words.list.first().alias(schema.user),
                words.list.slice(1).alias(schema.items),
            ),
            part.side,
        )
        for part in parts
    ]
