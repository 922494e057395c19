"""Reader of impression lists: a row a request, with items shown and clicked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from recsys.errors import DataError
from recsys.features.readers.assemble import assemble, open_log
from recsys.features.readers.events import columns_of, context_columns, meaning, number_checks
from recsys.features.readers.files import Part
from recsys.features.readers.source import DataSource
from recsys.features.readers.survey import SIDE, Check, Table, missing, survey, table
from recsys.tables import Kind, Log, Schema


@dataclass(frozen=True)
class Requests:
    """Canonical requests and the clicks in them.

    Args:
        impressions: a row a request; `request` is the row's number, for a row is a request.
        clicks: user, item, time, weight, kind, request and optional columns, in source order.
        positives: how many clicks are positives.
        notes: counts by reason.
        files: what was read.
    """

    impressions: pl.LazyFrame
    clicks: pl.LazyFrame
    positives: int
    notes: dict[str, int]
    files: list[Path]


def read(source: DataSource) -> Log:
    """Read impression lists."""
    schema = source.columns
    parts = open_log(source, [schema.user])
    requests = read_requests(parts, schema)
    return assemble(
        source,
        schema,
        requests.clicks,
        impressions=requests.impressions,
        positives=requests.positives,
        files=requests.files,
        notes=requests.notes,
        no_positives=f"No row has anything in {schema.clicked!r} (data.columns.clicked).",
    )


def read_requests(parts: Sequence[Part], schema: Schema) -> Requests:
    """Canonical requests of files that are open.

    A click with a short dwell (`short_dwell`) stands in the interactions as a rejection; the list
    of clicks is left as the log has it.

    Raises:
        DataError: a column is missing; a row has no user, time or list; an id in a list is null;
            positions are not beside what was shown.
    """
    wanted = columns_of(schema, item=False)
    beside = {} if schema.position is None else {"position": schema.position}
    wanted |= {f"data.columns.{key}": column for key, column in beside.items()}
    wanted |= {"data.columns.shown": schema.shown, "data.columns.clicked": schema.clicked}
    if not schema.time:
        raise DataError("Impression lists need a time column: set data.columns.time.")
    rows = table(
        parts,
        wanted,
        ids=("data.columns.user",),
        lists=("data.columns.shown", "data.columns.clicked"),
    )
    shown = item_list(rows, schema.shown, schema.separator)
    clicked = item_list(rows, schema.clicked, schema.separator)
    lists = {key: number_list(rows, column, key, schema) for key, column in beside.items()}
    checks = [missing(schema.user, "user"), *number_checks(schema)]
    checks += [_no_list(schema.shown, shown), _no_null(schema.shown, shown)]
    checks += [_no_null(schema.clicked, clicked)]
    checks += [_as_long(beside[key], values, shown) for key, values in lists.items()]
    kind, weight, reasons = meaning(schema, rows)
    many = clicked.list.len().fill_null(0).cast(pl.Int64)
    facts = {
        "positives": pl.when(kind == Kind.POSITIVE).then(many).sum(),
        "unseen": clicked.list.set_difference(shown).list.len().sum(),
        "nothing": (shown.list.len() == 0).sum(),
    }
    facts |= {f"note.{name}": pl.when(cond).then(many).sum() for name, cond in reasons.items()}
    found, time = survey(rows, checks, facts, rows.clock(schema.time, schema))
    side = [pl.col(SIDE).alias("side")] if rows.split else []
    frame = rows.frame.select(
        pl.col(schema.user).alias("user"),
        time.alias("time"),
        shown.alias("shown"),
        clicked.fill_null([]).alias("clicked"),
        *[values.alias(key) for key, values in lists.items()],
        weight.cast(pl.Float32).alias("weight"),
        kind.alias("kind"),
        *side,
        *context_columns(schema),
    ).with_row_index("request")
    frame = frame.with_columns(pl.col("request").cast(pl.Int64))
    clicks = (
        frame.drop("shown", *lists)
        .rename({"clicked": "item"})
        .explode("item", empty_as_null=False, keep_nulls=False)
    )
    notes = {name: found[f"note.{name}"] or 0 for name in reasons}
    notes["clicked_but_not_shown"] = found["unseen"] or 0
    notes["requests_that_show_nothing"] = found["nothing"] or 0
    return Requests(
        frame.drop("weight", "kind"), clicks, found["positives"] or 0, notes, rows.files
    )


def item_list(rows: Table, column: str, separator: str) -> pl.Expr:
    """A column of lists of ids, also written as text: "a b", "[1, 2]", "['a' 'b']"."""
    if isinstance(rows.dtypes[column], pl.List):
        return pl.col(column)
    sample = rows.head(column)
    text = pl.col(column)
    if len(sample) and sample.str.starts_with("[").any():
        return text.str.extract_all(r"[^\s,'\"\[\]]+")
    if separator.isspace():
        return text.str.extract_all(r"\S+")
    pieces = text.str.split(separator).list.eval(pl.element().str.strip_chars())
    return pieces.list.filter(pl.element() != "")


def number_list(rows: Table, column: str, key: str, schema: Schema) -> pl.Expr:
    """A column of lists of numbers, also when they are written as text."""
    dtype = pl.Int32 if key == "position" else pl.Float32
    if isinstance(rows.dtypes[column], (pl.List, pl.Array)):
        return pl.col(column).cast(pl.List(dtype), strict=False)
    if rows.dtypes[column] != pl.String:
        raise DataError(
            f"{rows.name}: column {column!r} (data.columns.{key}) holds {rows.dtypes[column]}, but "
            "beside a list of what was shown it must hold a list too."
        )
    return item_list(rows, column, schema.separator).cast(pl.List(dtype), strict=False)


def _no_list(column: str, lists: pl.Expr) -> Check:
    return Check(column, lists.is_null(), lambda value: "is null. Write an empty list, or drop it")


def _no_null(column: str, lists: pl.Expr) -> Check:
    bad = lists.list.eval(pl.element().is_null() | (pl.element() == "")).list.any()
    return Check(column, bad.fill_null(False), lambda value: "holds a null or empty item id")


def _as_long(column: str, values: pl.Expr, shown: pl.Expr) -> Check:
    bad = (values.list.len() != shown.list.len()).fill_null(True)
    bad |= values.list.eval(pl.element().is_null()).list.any().fill_null(True)
    return Check(column, bad, lambda value: "does not hold one number for each item that was shown")
