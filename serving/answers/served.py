"""A bundle made ready for questions: ids to rows in half a microsecond, ids as JSON, fields.

Legend: N item rows (row 0 is "nothing known"), n indexed items, K neighbours of each.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Iterable, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import polars as pl

from recsys.errors import QueryError
from serving import bundle as bundles
from serving.bundle import Bundle
from serving.neighbours import Neighbours
from serving.recommender import Recommender

ESCAPED = r'[\x00-\x1f"\\]'
"""Characters that JSON writes otherwise than they are."""


class Served:
    """A bundle made ready for questions; immutable.

    Args:
        bundle: what is known.
        neighbours: the nearest items of every indexed one, or None.
        version: of the model; the first 12 digits of the manifest's content digest when absent.

    Attributes:
        recommender: answers from the bundle.
        position: (N,) int32 index position of each item row, -1 for those not in the index.
        ids: item ids.
        row_of: external id → item row; 0: unknown.
        fragment: item row → JSON string of its id, quotes included; `b"null"` of row 0.
    """

    def __init__(
        self, bundle: Bundle, neighbours: Neighbours | None = None, *, version: str | None = None
    ) -> None:
        self.bundle = bundle
        self.recommender = Recommender(bundle)
        self.neighbours = neighbours
        self.version = version or str(bundle.manifest.get("content", ""))[:12]
        self.position = np.full(bundle.items.size, -1, np.int32)
        self.position[bundle.rows] = np.arange(len(bundle.rows), dtype=np.int32)
        self.ids = IdTable(bundle.items.ids)
        # Asked for every item of every request: a call less each.
        self.row_of, self.fragment = self.ids.row_of, self.ids.fragment

    @staticmethod
    def load(path: str | Path, *, verify: bool = True) -> Served:
        """Read a bundle and its table of neighbours.

        Args:
            path: the bundle's folder.
            verify: compare the digests of all files with the manifest first.

        Raises:
            BundleError: it is damaged, foreign or does not match itself.
        """
        path = Path(path)
        bundle = bundles.load(path, verify=verify)
        served = Served(bundle, Neighbours.load(path, bundle.manifest))
        _give_back()
        return served

    @property
    def field_names(self) -> list[str]:
        """What the catalogue says of each item, beside its id."""
        return [name for name in self.bundle.catalog.columns if name != "item"]

    def fields(self, rows: np.ndarray, names: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """What the catalogue says of items, as JSON takes it.

        Args:
            rows: (R,) item rows, none below 1.
            names: columns wanted, in that order; None: all.

        Returns:
            One object a row: dates and times in ISO 8601, durations in seconds, decimals as
            floats; null for NaN and infinity.

        Raises:
            QueryError: a column that the catalogue has not.
        """
        known = self.field_names
        wanted = known if names is None else list(dict.fromkeys(names))  # each named once
        if missing := [name for name in wanted if name not in known]:
            raise QueryError(
                f"There is no field {missing[0]!r}. Known fields: {', '.join(known) or 'none'}."
            )
        if not wanted:
            return [{} for _ in rows]
        return json_rows(self.bundle.catalog.select(wanted)[np.asarray(rows, np.int64) - 1])


def _give_back() -> None:
    """Ask the C library for what was freed on the way: 50 MB of a million items."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:  # glibc
        trim(0)


class IdTable:
    """External ids → rows and rows → JSON, in about 25 bytes an id beside the id itself.

    A dictionary of strings takes 140. Ids lie in one text of JSON strings; rows are found by open
    addressing with linear probing. Places of sorted hashes are `max(hash, place before + 1)`, so
    that all are laid at once, and the table has no end to wrap around.

    Args:
        ids: distinct, not null; `ids[0]` is row 1.
    """

    def __init__(self, ids: pl.Series) -> None:
        names = ids.to_list()
        lengths = (ids.str.len_bytes() + 2).to_numpy().astype(np.int64)
        for row in ids.str.contains(ESCAPED).arg_true().to_list() if len(ids) else ():
            lengths[row] = len(orjson.dumps(names[row]))
        # A list in JSON is `["a","b"]`: the k-th string begins after k commas and a bracket.
        self._text = orjson.dumps(names)
        start = np.ones(len(names) + 2, np.int64)
        np.cumsum(lengths + 1, out=start[2:])
        start[2:] += 1
        dtype = np.int32 if len(self._text) < 2**31 else np.int64
        self._start = start.astype(dtype).data  # of row r; the next one is a comma later

        self._mask = (1 << max(1, 2 * len(names) - 1).bit_length()) - 1
        hashes = np.fromiter(map(hash, names), np.int64, len(names)) & self._mask
        order = np.argsort(hashes, kind="stable")
        step = np.arange(len(names))
        place = np.maximum.accumulate(hashes[order] - step) + step
        table = np.zeros(max(self._mask + 1, int(place[-1]) + 1 if len(place) else 0) + 1, np.int32)
        table[place] = order + 1
        self._table = table.data

    def row_of(self, id: str) -> int:
        """Row of the id; 0: unknown."""
        try:
            fragment = orjson.dumps(id)
        except TypeError:  # a lone surrogate, which no id holds
            return 0
        table, start, text = self._table, self._start, self._text
        place = hash(id) & self._mask
        while row := table[place]:
            if text[start[row] : start[row + 1] - 1] == fragment:
                return row
            place += 1
        return 0

    def fragment(self, row: int) -> bytes:
        """The JSON string of the row's id; `b"null"` of row 0."""
        if row <= 0:
            return b"null"
        return self._text[self._start[row] : self._start[row + 1] - 1]

    def fragments(self, rows: Iterable[int]) -> list[bytes]:
        """The JSON strings of the ids of rows, none below 1."""
        text, start = self._text, self._start
        return [text[start[row] : start[row + 1] - 1] for row in rows]

    def decode(self, rows: Iterable[int]) -> list[str]:
        """Ids of rows, none below 1; quicker than `Vocab.decode` for a few."""
        return orjson.loads(b"[" + b",".join(self.fragments(rows)) + b"]")


def json_rows(frame: pl.DataFrame) -> list[dict[str, Any]]:
    """Rows of a frame as objects of JSON values, see `Served.fields`."""
    awkward = [name for name, dtype in frame.schema.items() if not _plain(dtype)]
    rows = frame.to_dicts()
    for row in rows:
        for name in awkward:
            row[name] = json_value(row[name])
    return rows


def _plain(dtype: pl.DataType) -> bool:
    """Whether Python values of the type are JSON values as they are."""
    return dtype.is_integer() or dtype in (pl.String, pl.Boolean, pl.Categorical, pl.Enum, pl.Null)


def json_value(value: Any) -> Any:
    """A Python value as JSON takes it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (datetime, date, time)):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, Decimal):
        return json_value(float(value))
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {name: json_value(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_value(one) for one in value]
    return value
