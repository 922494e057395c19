"""Encoding of feature columns: codes, numbers, vectors, texts and times.

Everything fitted (vocabularies, means, deviations, bin edges) looks at the rows marked `fit` alone.

Legend: N rows (row 0 is "nothing known" and stays empty), F number columns, V vector size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

from recsys.errors import DataError
from recsys.features.readers.times import clock
from recsys.ragged import Ragged
from recsys.tables import CatalogSchema, Schema
from recsys.vocab import Vocab

BEGINNING = np.iinfo(np.int64).min
NEVER = np.iinfo(np.int64).max
BINS = 10
"""Context numbers become the tenth of the training side that they fall in."""


def aligned(frame: pl.DataFrame | None, key: str, ids: pl.Series) -> pl.DataFrame:
    """The table's rows in the order of `ids`, all null where the table lacks an id.

    Args:
        frame: with the unique column `key`; None: a table without columns.
        key: "item" or "user".
        ids: the ids of rows 1, 2, ….
    """
    wanted = ids.alias(key).to_frame()
    if frame is None:
        return wanted.with_columns(pl.lit(False).alias(LISTED))
    known = frame.with_columns(pl.col(key).cast(pl.String), pl.lit(True).alias(LISTED))
    found = wanted.join(known, on=key, how="left", maintain_order="left")
    return found.with_columns(pl.col(LISTED).fill_null(False))


LISTED = "recsys.listed"
"""Column of `aligned`: whether the table has the id."""


def lists_of(values: pl.Series, separator: str) -> pl.Series:
    """Each row's categories as List(String), trimmed, none null or empty."""
    if not isinstance(values.dtype, pl.List | pl.Array):
        text = values.cast(pl.String)
        parts = text.str.split(separator) if values.dtype == pl.String and separator else None
        values = text.reshape((-1, 1)).arr.to_list() if parts is None else parts
    values = values.cast(pl.List(pl.String)).alias("c")
    clean = pl.element().str.strip_chars()
    kept = pl.col("c").list.eval(clean.filter(clean.is_not_null() & (clean != "")))
    return values.to_frame().select(kept.fill_null([])).to_series()


def categories(values: pl.Series, separator: str, fit: np.ndarray) -> tuple[Ragged, Vocab]:
    """Codes of one category column.

    Args:
        values: (N-1,) the column for rows 1, 2, …: text, numbers, booleans or lists of them.
        separator: between several categories in one text.
        fit: (N-1,) bool, the rows whose categories make the vocabulary.

    Returns:
        Codes (int32) of N rows, 0 for a category outside the vocabulary; the vocabulary, sorted.
    """
    lists = lists_of(values, separator)
    flat = lists.explode(empty_as_null=False, keep_nulls=False)
    lengths = lists.list.len().to_numpy().astype(np.int64)
    vocab = Vocab(flat.filter(pl.Series(np.repeat(fit, lengths))).unique().sort())
    offsets = np.concatenate([[0, 0], np.cumsum(lengths)])
    return Ragged(offsets, vocab.encode(flat)), vocab


@dataclass(frozen=True)
class Numbers:
    """Standardised columns: (N, F) float32, and what was taken off and divided by."""

    values: np.ndarray
    means: list[float]
    deviations: list[float]


def numbers(frame: pl.DataFrame, names: tuple[str, ...], fit: np.ndarray, table: str) -> Numbers:
    """Number columns with mean 0 and deviation 1 over the rows of `fit`; a missing one becomes 0.

    Raises:
        DataError: a column holds something that is no number.
    """
    values = np.zeros((len(frame) + 1, len(names)), np.float32)
    means, deviations = [], []
    for place, name in enumerate(names):
        column = frame[name]
        number = column.cast(pl.Float64, strict=False)
        if number.null_count() > column.null_count():
            row = int((number.is_null() & column.is_not_null()).arg_true()[0])
            raise DataError(
                f"{name!r} of {table} {frame.to_series(0)[row]!r} is {column[row]!r}, which is no "
                f"number. Mend it, or list {name!r} under categories instead of numbers."
            )
        raw = number.fill_null(float("nan")).to_numpy()
        finite = np.isfinite(raw)
        known = raw[finite & fit]
        mean = float(known.mean()) if known.size else 0.0
        deviation = float(known.std()) if known.size else 1.0
        deviation = deviation if deviation > 0 else 1.0
        values[1:, place] = np.where(finite, (raw - mean) / deviation, 0.0)
        means.append(mean)
        deviations.append(deviation)
    return Numbers(values, means, deviations)


def vectors(values: pl.Series, ids: pl.Series) -> np.ndarray:
    """(N, V) float32 given vectors; zeros where an item has none.

    Raises:
        DataError: two vectors differ in length, or one has a NaN, infinite or null entry.
    """
    lists = values.cast(pl.List(pl.Float32))
    lengths = lists.list.len()
    there = lengths.is_not_null() & (lengths > 0)
    if not there.any():
        raise DataError(
            f"The vector column {values.name!r} is empty for every item. "
            "Fill it in or leave out data.catalog.vector."
        )
    size = int(lengths.filter(there)[0])
    odd = (there & (lengths != size)).arg_true()
    if len(odd):
        row = int(odd[0])
        raise DataError(
            f"The vector of item {ids[row]!r} has {lengths[row]} numbers, but others have {size}. "
            f"Give every vector in {values.name!r} the same length."
        )
    flat = lists.filter(there).explode(empty_as_null=False, keep_nulls=False)
    matrix = flat.fill_null(float("nan")).to_numpy().reshape(-1, size)
    rows = there.arg_true().to_numpy().astype(np.int64)
    bad = np.flatnonzero(~np.isfinite(matrix).all(1))
    if bad.size:
        raise DataError(
            f"The vector of item {ids[int(rows[bad[0]])]!r} has a NaN, infinite or null entry in "
            f"{values.name!r}. Mend it, or leave the vector out: an item may have none."
        )
    result = np.zeros((len(values) + 1, size), np.float32)
    result[rows + 1] = matrix
    return result


def texts(frame: pl.DataFrame, names: tuple[str | None, ...]) -> pl.Series:
    """(N,) the named columns joined by ". ", each once, empty parts left out; row 0 is empty."""
    parts = []
    for name in dict.fromkeys(name for name in names if name):
        column = frame[name]
        if isinstance(column.dtype, pl.List | pl.Array):
            column = column.cast(pl.List(pl.String)).list.drop_nulls().list.join(", ")
        column = column.cast(pl.String).str.strip_chars()
        parts.append(column.set(column.fill_null("") == "", None).alias(name))
    empty = pl.Series("text", [""], dtype=pl.String)
    if not parts:
        return pl.concat([empty, pl.Series("text", [""] * len(frame), dtype=pl.String)])
    joined = pl.concat_str(pl.all(), separator=". ", ignore_nulls=True).fill_null("")
    return pl.concat([empty, pl.DataFrame(parts).select(joined.alias("text")).to_series()])


def instants(values: pl.Series, schema: Schema, missing: int, ids: pl.Series) -> np.ndarray:
    """(N,) int64 microseconds of a time column of a table; `missing` where it is null.

    Raises:
        DataError: a value is no time.
    """
    frame = values.to_frame()
    reading = clock(values.name, values.dtype, values.drop_nulls().head(1000), schema)
    reading = reading.widened() or reading
    largest = frame.select(reading.largest).item()
    times = frame.select(reading.microseconds(largest).alias("t")).to_series()
    bad = (times.is_null() & values.is_not_null()).arg_true()
    if len(bad):
        row = int(bad[0])
        complaint = reading.complaint(values[row])
        raise DataError(f"Column {values.name!r} of item {ids[row]!r} {complaint}.")
    filled = times.fill_null(missing).to_numpy().astype(np.int64)
    return np.concatenate([[missing], filled]).astype(np.int64)


def joined_text(schema: CatalogSchema) -> tuple[str | None, ...]:
    """The columns whose text stands for an item: title first, then the rest."""
    return (schema.title, *schema.text)


@dataclass(frozen=True)
class ContextColumn:
    """How one context column becomes codes 1 … size - 1; 0 is unknown."""

    name: str
    vocab: Vocab | None
    edges: list[float] | None

    @staticmethod
    def fit(name: str, values: pl.Series, number: bool) -> ContextColumn:
        """From the values of the training side: the distinct texts, or the tenths of numbers."""
        if not number:
            distinct = values.cast(pl.String).unique().drop_nulls()
            return ContextColumn(name, Vocab(distinct.filter(distinct != "").sort()), None)
        known = _finite(values, name)
        known = known[np.isfinite(known)]
        if not known.size:
            return ContextColumn(name, None, [])
        shares = np.arange(1, BINS) / BINS
        # Values, not interpolations between them, so that equal numbers share one bin.
        edges = np.quantile(known, shares, method="inverted_cdf")
        return ContextColumn(name, None, np.unique(edges).tolist())

    @property
    def size(self) -> int:
        """Number of codes, the unknown one included."""
        return self.vocab.size if self.vocab is not None else len(self.edges or []) + 2

    def encode(self, values: pl.Series) -> np.ndarray:
        """(n,) int32 codes; 0 where the value is missing or was not in the training side."""
        if self.vocab is not None:
            return self.vocab.encode(values.cast(pl.String))
        raw = _finite(values, self.name)
        codes = np.searchsorted(np.asarray(self.edges, np.float64), raw, side="left") + 1
        return np.where(np.isfinite(raw), codes, 0).astype(np.int32)


def _finite(values: pl.Series, name: str) -> np.ndarray:
    number = values.cast(pl.Float64, strict=False)
    if number.null_count() > values.null_count():
        wrong = values.filter(number.is_null() & values.is_not_null())[0]
        raise DataError(
            f"The context column {name!r} holds {wrong!r}, which is no number. Mend it, or move it "
            "from data.columns.context_numbers to context_categories."
        )
    return number.fill_null(float("nan")).to_numpy()
