"""Validation of a log in one pass, before anything is built."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl

from recsys.errors import DataError
from recsys.features.readers.files import Part, reading, require
from recsys.features.readers.times import Clock, clock
from recsys.tables import Schema

SIDE = "__side__"
SAMPLE = 1_000
"""Rows that are looked at to tell how text is written."""


@dataclass(frozen=True)
class Table:
    """The columns that are needed of all files, ids as String, files below one another.

    Args:
        parts: the files, narrowed to the same columns.
    """

    parts: tuple[Part, ...]

    @cached_property
    def frame(self) -> pl.LazyFrame:
        """All rows in the order of the files; `SIDE` when the files are split."""
        return pl.concat([self._with_side(part) for part in self.parts], how="vertical_relaxed")

    @staticmethod
    def _with_side(part: Part) -> pl.LazyFrame:
        if part.side is None:
            return part.frame
        return part.frame.with_columns(pl.lit(part.side, pl.UInt8).alias(SIDE))

    @cached_property
    def dtypes(self) -> dict[str, pl.DataType]:
        with reading(self.name):
            return dict(self.frame.collect_schema())

    @property
    def name(self) -> str:
        """The files in words."""
        return " and ".join(str(path) for path in self.files[:3]) + " …" * (len(self.files) > 3)

    @property
    def files(self) -> list[Path]:
        return [part.path for part in self.parts]

    @property
    def split(self) -> bool:
        return self.parts[0].side is not None

    def head(self, column: str) -> pl.Series:
        """The first values of a column that are not null."""
        chosen = self.frame.select(pl.col(column).drop_nulls().head(SAMPLE))
        with reading(self.name):
            return chosen.collect(engine="streaming").to_series()

    def clock(self, column: str, schema: Schema) -> Clock:
        dtype = self.dtypes[column]
        sample = self.head(column) if dtype == pl.String else pl.Series([], dtype=dtype)
        return clock(column, dtype, sample, schema)

    def first(self, bad: pl.Expr, column: str) -> tuple[Path, int, Any]:
        """File, number (from 1) and value of the first row for which `bad` is true."""
        for part in self.parts:
            rows = self._with_side(part).with_row_index("__row__")
            found = rows.filter(bad).select("__row__", column).head(1).collect()
            if len(found):
                number, value = found.row(0)
                return part.path, number + 1, value
        raise AssertionError("no row is bad")


def table(
    parts: Sequence[Part],
    wanted: Mapping[str, str | None],
    *,
    ids: Iterable[str] = (),
    lists: Iterable[str] = (),
) -> Table:
    """Narrow the files to the wanted columns.

    Args:
        parts: the files.
        wanted: configuration key → column; None where there is none.
        ids: keys whose column holds ids: read as String, 7 and 7.0 as "7".
        lists: keys whose column holds lists of ids.

    Raises:
        DataError: a column is missing.
    """
    text = {wanted[key] for key in ids}
    nested = {wanted[key] for key in lists}
    columns = list(dict.fromkeys(column for column in wanted.values() if column is not None))
    narrowed = []
    for part in parts:
        with reading(part.path):
            known = part.frame.collect_schema()
        require(part.path, known.names(), wanted)
        chosen = [
            as_id(column, known[column])
            if column in text
            else as_ids(column, known[column])
            if column in nested
            else pl.col(column)
            for column in columns
        ]
        narrowed.append(replace(part, frame=part.frame.select(chosen)))
    return Table(tuple(narrowed))


def as_id(column: str, dtype: pl.DataType) -> pl.Expr:
    """A column of ids as String; whole floats (7 beside a null in pandas) lose the .0."""
    col = pl.col(column)
    if dtype.is_float():
        whole = col.cast(pl.Int64, strict=False)
        text = pl.when(col == whole).then(whole.cast(pl.String)).otherwise(col.cast(pl.String))
        return pl.when(col.is_not_nan()).then(text).alias(column)
    return col if dtype == pl.String else col.cast(pl.String)


def as_ids(column: str, dtype: pl.DataType) -> pl.Expr:
    """A column of lists of ids as List(String); text stays text."""
    if isinstance(dtype, (pl.List, pl.Array)):
        return pl.col(column).cast(pl.List(pl.String))
    return pl.col(column).cast(pl.String)


@dataclass(frozen=True)
class Check:
    """Something that no row may be.

    Args:
        column: where it shows.
        bad: true for a row that is.
        says: the value → what is wrong with it and the way out, one sentence after the place.
    """

    column: str
    bad: pl.Expr
    says: Callable[[Any], str]


def missing(column: str, what: str) -> Check:
    """A null or empty id."""
    bad = pl.col(column).is_null() | (pl.col(column) == "")
    return Check(column, bad, lambda value: f"is a null or empty {what} id. Fill it in or drop it")


def not_a_number(column: str) -> Check:
    """Text or NaN where a number must stand; null is let through."""
    bad = pl.col(column).is_not_null() & ~number(column).is_finite().fill_null(False)
    return Check(column, bad, lambda value: f"holds {value!r}, which is not a finite number")


def number(column: str) -> pl.Expr:
    """A column as Float64, null where it cannot be."""
    return pl.col(column).cast(pl.Float64, strict=False)


def survey(
    rows: Table,
    checks: Sequence[Check],
    facts: dict[str, pl.Expr],
    tells: Clock | None = None,
) -> tuple[dict[str, Any], pl.Expr]:
    """Look at all rows once.

    Args:
        rows: the table.
        checks: what no row may be.
        facts: aggregates to know.
        tells: the clock of the rows.

    Returns:
        The facts, with `rows` their number; and the time in microseconds, 0 without a clock.

    Raises:
        DataError: a check failed; names file, column, row, value and how many there are.
    """
    while True:
        timed = [] if tells is None else [_readable(tells)]
        every = [*checks, *timed]
        counts = [check.bad.sum().alias(f"bad.{i}") for i, check in enumerate(every)]
        wanted = [aggregate.alias(f"fact.{name}") for name, aggregate in facts.items()]
        largest = [] if tells is None else [tells.largest.alias("largest")]
        with reading(rows.name):
            chosen = rows.frame.select(pl.len().alias("rows"), *counts, *wanted, *largest)
            found = chosen.collect(engine="streaming").row(0, named=True)
        wider = tells.widened() if tells is not None and found[f"bad.{len(checks)}"] else None
        if wider is None:
            break
        tells = wider
    for i, check in enumerate(every):
        if found[f"bad.{i}"]:
            complain(rows, check, found[f"bad.{i}"])
    known = {name: found[f"fact.{name}"] for name in facts} | {"rows": found["rows"]}
    return known, pl.lit(0, pl.Int64) if tells is None else tells.microseconds(found.get("largest"))


def _readable(tells: Clock) -> Check:
    return Check(tells.column, tells.value.is_null(), tells.complaint)


def complain(rows: Table, check: Check, count: int) -> None:
    """Say where a check fails first.

    Raises:
        DataError: always.
    """
    path, number_, value = rows.first(check.bad, check.column)
    more = f" ({count} rows are like this.)" if count > 1 else ""
    raise DataError(f"{path}, row {number_}: column {check.column!r} {check.says(value)}.{more}")
