"""Reader of the item table and the user table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from recsys.errors import ConfigError, DataError
from recsys.features.readers.files import Part, Paths, open_lines, open_parts, reading
from recsys.features.readers.survey import (
    Check,
    Table,
    complain,
    not_a_number,
    number,
    survey,
    table,
)
from recsys.tables import CatalogSchema, Schema, UserSchema

TRUE = ("true", "1", "yes", "y", "t")
FALSE = ("false", "0", "no", "n", "f")


def read_catalog(paths: Paths, schema: CatalogSchema) -> tuple[pl.DataFrame, list[Path]]:
    """Read an item table.

    Returns:
        The table with the canonical `item` and its own columns as they were, times as Int64
        microseconds, numbers as Float64, vectors as List(Float32); and the files read.

    Raises:
        DataError: a column is missing, an id is null, a time, number or vector cannot be read.
    """
    parts = open_parts(paths, ids=[schema.item]) if schema.header else _lines(paths, schema)
    return catalog_frame(parts, schema), [part.path for part in parts]


def _lines(paths: Paths, schema: CatalogSchema) -> list[Part]:
    """Lines of an id, white space and a text, as tables of two columns; empty lines are left out.

    Raises:
        ConfigError: the schema does not name the text, or names more than there is.
    """
    named = {
        *schema.text, *schema.categories, *schema.numbers, *schema.fields,
        schema.title, schema.vector, schema.published, schema.available,
        schema.available_from, schema.available_until,
    } - {None, schema.item}  # fmt: skip
    if len(named) != 1 or named != {*schema.text, schema.title} - {None}:
        raise ConfigError(
            "With data.catalog.header = false a line is an id and one text, and data.catalog names "
            f"the columns {', '.join(sorted(map(str, named))) or 'of nothing'}. Name one, as "
            'title = "name" or text = ["name"] or both.'
        )
    text = str(named.pop())
    line = pl.col("line").str.strip_chars()
    split = line.str.extract_groups(r"^(?<id>\S+)\s*(?<text>.*)$").struct
    return [
        Part(
            part.path,
            part.frame.filter(line != "").select(
                split.field("id").alias(schema.item),
                split.field("text").replace("", None).alias(text),
            ),
        )
        for part in open_lines(paths)
    ]


def catalog_frame(parts: Sequence[Part], schema: CatalogSchema) -> pl.DataFrame:
    """The checked frame of an item table whose files are open."""
    times = [schema.published, schema.available_from, schema.available_until]
    wanted = {
        "data.catalog.item": schema.item,
        "data.catalog.title": schema.title,
        "data.catalog.vector": schema.vector,
        "data.catalog.available": schema.available,
        "data.catalog.published": schema.published,
        "data.catalog.available_from": schema.available_from,
        "data.catalog.available_until": schema.available_until,
    }
    for key in ("text", "categories", "numbers", "fields"):
        wanted |= {f"data.catalog.{key} ({name})": name for name in getattr(schema, key)}
    rows = table(parts, wanted, ids=("data.catalog.item",))
    frame = _collect(rows, schema.item, "item")
    columns = [number(name).alias(name) for name in schema.numbers]
    columns += [
        pl.col(name).cast(pl.String) for name in (schema.title, *schema.text) if name is not None
    ]
    _check_numbers(rows, schema.numbers)
    columns += [_time(rows, name) for name in times if name is not None]
    if schema.available is not None:
        columns.append(_boolean(rows, schema.available))
    frame = frame.with_columns(_distinct(columns))
    if "item" in frame.columns and schema.item != "item" and "item" in wanted.values():
        raise ConfigError(
            "The item table uses 'item' for something other than the id, but that name is taken. "
            "Rename the column 'item' in the file."
        )
    frame = frame.rename({schema.item: "item"} if schema.item != "item" else {})
    if schema.vector is not None:
        frame = frame.with_columns(_vectors(frame, schema.vector))
    return frame


def read_users(paths: Paths, schema: UserSchema) -> tuple[pl.DataFrame, list[Path]]:
    """Read a user table: the canonical `user` and its own columns.

    Raises:
        DataError: a column is missing, an id is null, a number cannot be read.
    """
    parts = open_parts(paths, ids=[schema.user])
    wanted = {"data.user_table.user": schema.user}
    for key in ("categories", "numbers", "text"):
        wanted |= {f"data.user_table.{key} ({name})": name for name in getattr(schema, key)}
    rows = table(parts, wanted, ids=("data.user_table.user",))
    frame = _collect(rows, schema.user, "user")
    _check_numbers(rows, schema.numbers)
    columns = [number(name).alias(name) for name in schema.numbers]
    columns += [pl.col(name).cast(pl.String) for name in schema.text]
    frame = frame.with_columns(_distinct(columns)).rename(
        {schema.user: "user"} if schema.user != "user" else {}
    )
    return frame, [part.path for part in parts]


def _collect(rows: Table, column: str, what: str) -> pl.DataFrame:
    with reading(rows.name):
        frame = rows.frame.collect()
    bad = pl.col(column).is_null() | (pl.col(column).str.strip_chars() == "")
    count = int(frame.select(bad.sum()).item())
    if count:
        says = f"is a null or empty {what} id. Fill it in or drop the row"
        complain(rows, Check(column, bad, lambda value: says), count)
    return frame


def _check_numbers(rows: Table, columns: Sequence[str]) -> None:
    """Text among numbers is a mistake; null and NaN mean that the number is not known."""
    checks = []
    for name in columns:
        if not rows.dtypes[name].is_numeric():
            checks.append(not_a_number(name))
        elif rows.dtypes[name].is_float():
            infinite = pl.col(name).is_infinite().fill_null(False)
            checks.append(Check(name, infinite, lambda value: f"holds {value!r}, not a number"))
    survey(rows, checks, {})


def _time(rows: Table, column: str) -> pl.Expr:
    """A time that may be missing."""
    schema = Schema()
    present = Table(
        tuple(
            Part(part.path, part.frame.filter(pl.col(column).is_not_null()), part.side)
            for part in rows.parts
        )
    )
    _, time = survey(present, [], {}, present.clock(column, schema))
    return time.alias(column)


def _boolean(rows: Table, column: str) -> pl.Expr:
    if rows.dtypes[column] == pl.Boolean:
        return pl.col(column)
    text = pl.col(column).cast(pl.String).str.strip_chars().str.to_lowercase()
    known = dict.fromkeys(TRUE, True) | dict.fromkeys(FALSE, False)
    value = text.replace_strict(known, default=None, return_dtype=pl.Boolean)
    bad = value.is_null() & text.is_not_null()
    survey(rows, [Check(column, bad, lambda v: f"holds {v!r}; write true or false")], {})
    return value.alias(column)


def _vectors(frame: pl.DataFrame, column: str) -> pl.Series:
    """Vectors as List(Float32), all of one length and finite; null stays null."""
    series = frame[column]
    if series.dtype == pl.String:
        numbers = series.str.extract_all(r"[^\s,\[\]]+")
        parsed = numbers.list.eval(pl.element().cast(pl.Float32, strict=False))
    elif isinstance(series.dtype, pl.Array):
        parsed = series.cast(pl.List(pl.Float32))
    elif isinstance(series.dtype, pl.List):
        parsed = series.cast(pl.List(pl.Float32), strict=False)
    else:
        raise DataError(
            f"data.catalog.vector names {column!r}, a column of {series.dtype}. "
            "A vector column holds lists of numbers."
        )
    lengths = parsed.list.len()
    given = lengths.drop_nulls()
    usual = int(given.mode().sort().to_list()[0]) if len(given) else 0
    odd = (lengths != usual).fill_null(False)
    if odd.any():
        at = int(odd.arg_true()[0])
        raise DataError(
            f"The vector of item {frame['item'][at]!r} in column {column!r} has {lengths[at]} "
            f"numbers, but others have {usual}. Give every item a vector of one length, or none."
        )
    flat = parsed.drop_nulls().explode(empty_as_null=False).to_numpy().astype(np.float32)
    finite = np.isfinite(flat)
    if not finite.all():
        rows = parsed.is_not_null().arg_true()
        at = int(rows[int(np.flatnonzero(~finite)[0]) // usual])
        raise DataError(
            f"The vector of item {frame['item'][at]!r} in column {column!r} holds a value that is "
            "not a finite number. Mend it, or leave the vector out (null)."
        )
    return parsed.alias(column)


def _distinct(columns: list[pl.Expr]) -> list[pl.Expr]:
    """Each output column once: a title that is text as well is cast once."""
    return list({column.meta.output_name(): column for column in columns}.values())
