"""Reader of event rows: user, item, time, and what happened."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import polars as pl

from recsys.features.readers.assemble import assemble, open_log
from recsys.features.readers.files import Part
from recsys.features.readers.source import DataSource
from recsys.features.readers.survey import (
    SIDE,
    Check,
    Table,
    missing,
    not_a_number,
    number,
    survey,
    table,
)
from recsys.tables import CONTEXT, CatalogSchema, Kind, Log, Schema


@dataclass(frozen=True)
class Rows:
    """Canonical rows that a reader made, and what it found out.

    Args:
        frame: user, item, time, weight, kind, and optional columns, in source order.
        positives: how many rows are positives.
        notes: counts of rows by reason.
        files: what was read.
        timed: whether time is a clock.
    """

    frame: pl.LazyFrame
    positives: int
    notes: dict[str, int]
    files: list[Path]
    timed: bool


def read(source: DataSource) -> Log:
    """Read event rows."""
    schema = source.columns
    parts = open_log(source, [schema.user, schema.item])
    return read_parts(source, schema, parts)


def read_parts(
    source: DataSource,
    schema: Schema,
    parts: Sequence[Part],
    *,
    files: Sequence[Path] = (),
    catalog: tuple[pl.DataFrame, CatalogSchema] | None = None,
) -> Log:
    """Read event rows from files that are open already."""
    rows = event_rows(parts, schema)
    return assemble(
        source,
        schema,
        rows.frame,
        positives=rows.positives,
        files=[*rows.files, *files],
        timed=rows.timed,
        notes=rows.notes,
        no_positives=_why_none(parts, schema, rows.notes) if not rows.positives else "",
        catalog=catalog,
    )


def event_rows(parts: Sequence[Part], schema: Schema) -> Rows:
    """Canonical rows of event files.

    Raises:
        DataError: a column is missing, or a row has no id, no time, or no number where one must be.
    """
    rows = table(
        parts, columns_of(schema, item=True), ids=("data.columns.user", "data.columns.item")
    )
    kind, weight, reasons = meaning(schema, rows)
    checks = [
        missing(schema.user, "user"),
        missing(schema.item, "item"),
        *number_checks(schema),
    ]
    # With `user` beside it a constant kind is as long as the table.
    positive = (kind == Kind.POSITIVE) & pl.col(schema.user).is_not_null()
    facts = {"positives": positive.sum(), **request_facts(schema, rows)}
    facts |= {f"note.{name}": condition.sum() for name, condition in reasons.items()}
    tells = rows.clock(schema.time, schema) if schema.time else None
    found, time = survey(rows, checks, facts, tells)
    chosen = [
        pl.col(schema.user).alias("user"),
        pl.col(schema.item).alias("item"),
        time.alias("time"),
        weight.cast(pl.Float32).alias("weight"),
        kind.cast(pl.UInt8).alias("kind"),
        *optional_columns(schema, rows, found),
    ]
    frame = rows.frame.select(chosen).filter(pl.col("kind").is_not_null())
    if tells is None:
        frame = frame.with_columns(
            pl.int_range(pl.len(), dtype=pl.Int64).over("user").alias("time")
        )
    notes = {name: found[f"note.{name}"] or 0 for name in reasons}
    return Rows(frame, found["positives"] or 0, notes, rows.files, tells is not None)


def columns_of(schema: Schema, *, item: bool) -> dict[str, str | None]:
    """Configuration key → column, of all that the schema names for a row."""
    keys = ["user", "time", "weight", "dwell"]
    if item:
        keys += ["item", "event", "value", "request", "position"]
    # An empty name in a TOML file, which has no null, says that there is no such column.
    wanted = {f"data.columns.{key}": getattr(schema, key) or None for key in keys}
    for key in ("context_categories", "context_numbers"):
        wanted |= {f"data.columns.{key} ({name})": name for name in getattr(schema, key)}
    return wanted


def number_checks(schema: Schema) -> list[Check]:
    """The columns of numbers hold numbers."""
    columns = [schema.weight, schema.dwell, schema.value, *schema.context_numbers]
    checks = [not_a_number(column) for column in dict.fromkeys(columns) if column is not None]
    if schema.weight:
        negative = (number(schema.weight) < 0).fill_null(False)
        checks.append(
            Check(
                schema.weight, negative, lambda value: f"holds {value!r}: a weight is not negative"
            )
        )
    return checks


def meaning(schema: Schema, rows: Table) -> tuple[pl.Expr, pl.Expr, dict[str, pl.Expr]]:
    """What each row means.

    Returns:
        kind: a `Kind`, null for a row that is left out.
        weight: of a positive its strength times the weight column; 1 for the others.
        reasons: name of a note → condition that a row is counted there.
    """
    kind: pl.Expr = pl.lit(int(Kind.POSITIVE), pl.UInt8)
    weight: pl.Expr = pl.lit(1.0, pl.Float64)
    reasons: dict[str, pl.Expr] = {}
    if schema.event and (schema.positive or schema.shown_events or schema.rejected):
        event = pl.col(schema.event).cast(pl.String)
        known = {name: int(Kind.POSITIVE) for name in schema.positive}
        known |= {name: int(Kind.SHOWN) for name in schema.shown_events}
        known |= {name: int(Kind.REJECTED) for name in schema.rejected}
        kind = _by_name(event, known, pl.UInt8)
        if any(strength != 1.0 for strength in schema.positive.values()):
            weight = _by_name(event, schema.positive, pl.Float64)
        reasons["unknown_event"] = kind.is_null()
    if schema.value and (schema.positive_from is not None or schema.rejected_to is not None):
        kind, more = _by_value(schema, schema.value, kind)
        reasons |= more
    if schema.dwell and schema.short_dwell is not None:
        bounce = (number(schema.dwell) < schema.short_dwell).fill_null(False)
        bounce &= (kind == Kind.POSITIVE).fill_null(False)
        kind = pl.when(bounce).then(pl.lit(int(Kind.REJECTED), pl.UInt8)).otherwise(kind)
        reasons["short_dwell"] = bounce
    if schema.weight:
        weight = weight * number(schema.weight).fill_null(1.0)
    positive = (kind == Kind.POSITIVE).fill_null(False)
    return kind, pl.when(positive).then(weight).otherwise(1.0), reasons


def _by_name(event: pl.Expr, values: Mapping[str, float], dtype: type[pl.DataType]) -> pl.Expr:
    """The value of each event name, null for others: for a few names much faster than `replace`."""
    found = pl.lit(None, dtype)
    for name, value in values.items():
        found = pl.when(event == name).then(pl.lit(value, dtype)).otherwise(found)
    return found


def _by_value(schema: Schema, column: str, kind: pl.Expr) -> tuple[pl.Expr, dict[str, pl.Expr]]:
    """Ratings decide about rows that would be positives."""
    value, high, low = number(column), schema.positive_from, schema.rejected_to
    would = (kind == Kind.POSITIVE).fill_null(False)
    is_high = value > low if high is None else value >= high
    is_low = pl.lit(False) if low is None else value <= low
    unrated = would & value.is_null()
    between = would & ~(is_high | is_low).fill_null(True)
    reasons = {"value_between": between}
    positive = pl.lit(int(Kind.POSITIVE), pl.UInt8)
    rejected = pl.lit(int(Kind.REJECTED), pl.UInt8)
    decided = pl.when(is_high).then(positive).when(is_low).then(rejected).otherwise(None)
    if schema.event:
        # A click among ratings has no value and stays the click it is.
        decided = pl.when(unrated).then(kind).otherwise(decided)
    else:
        reasons["value_missing"] = unrated
    return pl.when(would).then(decided).otherwise(kind), reasons


def request_facts(schema: Schema, rows: Table) -> dict[str, pl.Expr]:
    """Whether the requests are whole numbers, which saves ranking them."""
    if not schema.request or rows.split:
        return {}
    request = pl.col(schema.request)
    lost = request.is_not_null() & request.cast(pl.Int64, strict=False).is_null()
    return {"requests.text": lost.sum()}


def optional_columns(schema: Schema, rows: Table, found: dict) -> list[pl.Expr]:
    """Side, request, position, propensity and context, where the log has them."""
    chosen = []
    if rows.split:
        chosen.append(pl.col(SIDE).alias("side"))
    if schema.request:
        request = pl.col(schema.request)
        if found.get("requests.text") == 0:
            request = request.cast(pl.Int64, strict=False)
        else:
            # Files that are split may count their requests from 1 each.
            text = request.cast(pl.String)
            text = pl.concat_str(pl.col(SIDE), text, separator=":") if rows.split else text
            request = text.rank("dense").cast(pl.Int64)
        chosen.append(request.alias("request"))
    if schema.position:
        chosen.append(number(schema.position).cast(pl.Int32, strict=False).alias("position"))
    return chosen + context_columns(schema)


def context_columns(schema: Schema) -> list[pl.Expr]:
    """Context under its own names, categories as String and numbers as Float32."""
    categories = [
        pl.col(name).cast(pl.String).alias(CONTEXT + name) for name in schema.context_categories
    ]
    numbers = [
        number(name).cast(pl.Float32).alias(CONTEXT + name) for name in schema.context_numbers
    ]
    return categories + numbers


def _why_none(parts: Sequence[Part], schema: Schema, notes: dict[str, int]) -> str:
    """What the log does hold, when nothing of it is a positive."""
    if notes.get("unknown_event") and schema.event:
        counts = pl.concat(
            [part.frame.select(pl.col(schema.event).cast(pl.String)) for part in parts]
        )
        top = counts.group_by(schema.event).len().sort("len", descending=True).head(8).collect()
        names = ", ".join(f"{name!r} ({count})" for name, count in top.iter_rows())
        return f"Its events are {names}: name the good ones in data.columns.positive."
    if notes.get("value_between") or notes.get("value_missing"):
        return f"No {schema.value!r} reaches data.columns.positive_from = {schema.positive_from}."
    if not any(notes.values()):
        return "It has no rows of that kind."
    left = reduce(operator.add, [f", {name} {count}" for name, count in notes.items() if count])
    return f"Rows were left out{left}: look at data.columns."
