"""Filters of the catalogue as masks over index positions.

Each condition becomes a mask over the catalogue once, and is kept: a shop asks for the same few
categories all day.
Legend: N item rows, n index positions, R rows of a small table.
"""

from __future__ import annotations

import math
import sys
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from functools import partial
from threading import Lock
from typing import Any

import numpy as np
import polars as pl

from recsys.errors import QueryError, nearest
from recsys.serving.bundle import Bundle
from recsys.serving.engine.query import Filter, Value
from recsys.serving.engine.snapshot import AllowedItems, CatalogSnapshot

KEPT_BYTES = 64 << 20
"""Memory that kept masks may take; one over a million items takes a megabyte."""
KEPT_MOST = 4096
"""Masks that are kept, however small they are."""
ENTRY_BYTES = 200
"""Memory that one more kept thing takes beside itself and its key."""
LEAST = -(2**63)
"""Smallest whole number that is compared; what lies beyond either end equals nothing but it."""
SECONDS = 1_000_000
"""Microseconds of a second."""
_MOMENT = pl.Datetime("us")
"""Times of every unit and zone, in UTC."""
_START, _TICK = datetime(1970, 1, 1, tzinfo=UTC), timedelta(microseconds=1)


def key_bytes(key: Hashable) -> int:
    """Memory of a key, nearly: its texts, which a request may make a megabyte long, most of all."""
    size = sys.getsizeof(key)
    return size + sum(map(key_bytes, key)) if isinstance(key, tuple) else size


class Kept:
    """The values asked for last; safe to use from several threads.

    Args:
        limit: bytes of the values and of their keys.
        most: values.
    """

    def __init__(self, limit: int = KEPT_BYTES, most: int = KEPT_MOST) -> None:
        self._limit, self._most, self._held = limit, most, 0
        self._values: OrderedDict[Hashable, tuple[np.ndarray, int]] = OrderedDict()
        self._lock = Lock()

    def get(self, key: Hashable, make: Callable[[], np.ndarray]) -> np.ndarray:
        """The value of the key, made when it is not there; two threads may make it at once."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key][0]
        value = make()
        size = value.nbytes + key_bytes(key) + ENTRY_BYTES
        with self._lock:
            if key not in self._values and size <= self._limit:
                self._values[key] = value, size
                self._held += size
                while self._held > self._limit or len(self._values) > self._most:
                    self._held -= self._values.popitem(last=False)[1][1]
        return value

    @property
    def held(self) -> int:
        """Bytes of what is kept."""
        return self._held

    def __len__(self) -> int:
        return len(self._values)


class Filters:
    """Filters over a catalogue.

    Args:
        catalog: one row an item, row 1 first; the column `item` is no condition.
        rows: (n,) item rows of the index positions.
        limit: bytes of masks kept.
        separated: column of texts → what stands between the several categories of one text.
    """

    def __init__(
        self,
        catalog: pl.DataFrame,
        rows: np.ndarray,
        limit: int = KEPT_BYTES,
        separated: Mapping[str, str] | None = None,
    ) -> None:
        self._separated = separated or {}
        self._catalog = catalog
        # Positions are mostly all rows in order; a slice then spares a gather.
        whole = len(rows) == len(catalog) and bool((np.diff(rows) == 1).all())
        self._place: np.ndarray | slice = slice(None) if whole else np.asarray(rows) - 1
        self._kept = Kept(limit)
        self._schema = {name: dtype for name, dtype in catalog.schema.items() if name != "item"}

    def check(self, filter: Filter) -> None:
        """Refuse what cannot be asked.

        Raises:
            QueryError: an unknown column, or a value that its type cannot hold.
        """
        for _ in self._clauses(filter):
            pass

    def mask(self, filter: Filter) -> np.ndarray | None:
        """(n,) bool index positions that meet every condition on columns; None: all do.

        Not to be written to. Lists of ids are not looked at.

        Raises:
            QueryError: an unknown column, or a value that its type cannot hold.
        """
        out: np.ndarray | None = None
        for key, expression in self._clauses(filter):
            one = self._kept.get(key, partial(self._positions, expression))
            out = one if out is None else out & one
        return out

    def _positions(self, expression: pl.Expr) -> np.ndarray:
        return self._over(self._catalog, expression)[self._place]

    def mask_of(self, frame: pl.DataFrame, filter: Filter) -> np.ndarray:
        """(R,) bool: which rows of a table with the catalogue's columns meet the conditions."""
        out = np.ones(len(frame), bool)
        for _, expression in self._clauses(filter):
            out &= self._over(frame, expression)
        return out

    @staticmethod
    def _over(frame: pl.DataFrame, expression: pl.Expr) -> np.ndarray:
        return frame.select(expression.fill_null(False).alias("m"))["m"].to_numpy()

    def _clauses(self, filter: Filter) -> Iterator[tuple[Hashable, pl.Expr]]:
        for name, values in filter.equals.items():
            dtype = self._dtype(name)
            several = isinstance(dtype, pl.List | pl.Array)
            inner: Any = dtype.inner if isinstance(dtype, pl.List | pl.Array) else dtype
            wanted = sorted({_value(name, inner, value) for value in values})
            compared = _compared(inner)
            column = pl.col(name)
            if isinstance(inner, pl.Datetime):
                column = column.cast(pl.List(_MOMENT) if several else _MOMENT)
            column = column.cast(pl.List(compared) if several else compared)
            # One by one: a list of the values would be an empty one's error, and they are few.
            hits = [
                column.list.contains(pl.lit(value, compared)) if several else column == value
                for value in wanted
            ]
            if not several and isinstance(inner, pl.String) and self._separated.get(name):
                parts = column.str.split(self._separated[name])
                parts = parts.list.eval(pl.element().str.strip_chars())
                hits += [parts.list.contains(pl.lit(value, compared)) for value in wanted]
            expression = pl.any_horizontal(hits) if hits else pl.col(name).is_null() & False
            yield ("equals", name, tuple(wanted)), expression
        for name, (low, high) in filter.ranges.items():
            number = _number(name, self._dtype(name))
            for bound in (low, high):
                if bound is not None and (isinstance(bound, bool) or not math.isfinite(bound)):
                    raise QueryError(
                        f"The range of {name!r} has the bound {bound!r}; give a finite number, or "
                        "none to leave that side open."
                    )
            # NaN is above every number to polars, and within no range to us.
            expression = number.is_finite()
            if low is not None:
                expression &= number >= low
            if high is not None:
                expression &= number <= high
            yield ("range", name, low, high), expression

    def _dtype(self, name: str) -> Any:
        if name not in self._schema:
            known = nearest(name, self._schema) if self._schema else "It has none."
            raise QueryError(
                f"The catalogue has no column {name!r} to filter by. {known} "
                f"All: {', '.join(self._schema) or 'none'}."
            )
        return self._schema[name]


def _compared(dtype: Any) -> Any:
    """The type in which values of a column are compared."""
    if isinstance(dtype, pl.Categorical | pl.Enum):
        return pl.String
    if isinstance(dtype, pl.Datetime):
        return pl.Int64  # microseconds since 1970: one with a zone and one without cannot meet
    return pl.Int64 if dtype.is_integer() and dtype != pl.UInt64 else dtype


def _value(name: str, dtype: Any, value: Value) -> Any:
    """The value as it is compared with the column's; numbers and truth values may come as text
    from a URL. Times are microseconds since 1970; without an offset they are UTC.
    """
    try:
        if isinstance(dtype, pl.String | pl.Categorical | pl.Enum) and isinstance(value, str):
            return value
        if isinstance(dtype, pl.Boolean):
            if isinstance(value, bool):
                return value
            return {"true": True, "false": False}[str(value).lower()]
        if dtype.is_integer() and not isinstance(value, bool):
            whole, most = int(value), 2**64 - 1 if dtype == pl.UInt64 else -LEAST - 1
            if whole >= 0 or not dtype.is_unsigned_integer():
                return min(max(whole, LEAST), most)
        if dtype.is_float() and not isinstance(value, bool):
            number_ = float(value)
            if math.isfinite(number_):
                return number_
        if isinstance(dtype, pl.Datetime) and isinstance(value, str):
            instant = datetime.fromisoformat(value)
            if instant.tzinfo is None:
                instant = instant.replace(tzinfo=UTC)
            return (instant - _START) // _TICK
        if isinstance(dtype, pl.Date) and isinstance(value, str):
            return date.fromisoformat(value)
    except (ValueError, KeyError, OverflowError):
        pass
    raise QueryError(
        f"Column {name!r} holds {_words(dtype)}, and {value!r} is none. "
        f"Give {_words(dtype)} to compare with."
    )


def _words(dtype: Any) -> str:
    if dtype.is_integer():
        return "whole numbers"
    if dtype.is_float():
        return "numbers"
    if isinstance(dtype, pl.Boolean):
        return "true or false"
    if isinstance(dtype, pl.Date | pl.Datetime):
        return "dates in ISO 8601"
    return "texts" if isinstance(dtype, pl.String | pl.Categorical | pl.Enum) else f"{dtype}"


def _number(name: str, dtype: Any) -> pl.Expr:
    """The column as float64; times as seconds since 1970."""
    if dtype.is_numeric():
        return pl.col(name).cast(pl.Float64)
    if isinstance(dtype, pl.Date | pl.Datetime):
        return pl.col(name).cast(_MOMENT).dt.epoch("us").cast(pl.Float64) / SECONDS
    raise QueryError(
        f"Column {name!r} holds {_words(dtype)}, so that a range says nothing. "
        "Ask for equal values instead."
    )


KEPT_MASKS = 16
"""Filters whose allowed is kept until the live items change; one over a million items is a
megabyte."""
MANY = 64
"""Denied items from which on they make a allowed of their own instead of being fetched and left."""


class FilterMasks:
    """From filters to masks; safe to use from several threads.

    Args:
        bundle: whose catalogue is filtered.
        limit: bytes of masks over columns that are kept; and of masks, with what was asked.
    """

    def __init__(self, bundle: Bundle, limit: int = KEPT_BYTES) -> None:
        self._catalog = bundle.catalog
        said = bundle.manifest.get("config", {}).get("data", {}).get("catalog", {})
        columns, separator = said.get("categories", ()), said.get("category_separator", "")
        self._filters = Filters(
            bundle.catalog, bundle.rows, limit, dict.fromkeys(columns, separator)
        )
        self._limit = limit
        self._known: OrderedDict[Any, tuple[AllowedItems, int]] = OrderedDict()
        self._lock = Lock()

    @property
    def held(self) -> int:
        """Bytes of the masks that are kept, and of the filters they were made of."""
        return sum(size for _, size in self._known.values())

    def of(self, filter: Filter, snapshot: CatalogSnapshot) -> AllowedItems:
        """What a filter lets through.

        Raises:
            QueryError: an unknown column, or a value that its type cannot hold.
        """
        if filter.empty:
            return snapshot.open
        if filter.allow is not None:
            return self._listed(filter, snapshot)
        if len(filter.deny) <= MANY:
            filter = replace(filter, deny=())  # left out of what is found
            if filter.empty:
                return snapshot.open
        said = filter.key()
        key = snapshot, said
        with self._lock:
            if (known := self._known.get(key)) is not None:
                self._known.move_to_end(key)
                return known[0]
        allowed = self._chosen(filter, snapshot)
        held = allowed.extra.nbytes + (0 if allowed.mask is None else allowed.mask.nbytes)
        size = held + key_bytes(said) + ENTRY_BYTES
        with self._lock:
            self._known[key] = allowed, size
            # What was open before something changed is asked for no more.
            for old in [old for old in self._known if old[0] is not snapshot]:
                del self._known[old]
            while len(self._known) > KEPT_MASKS or (
                self.held > self._limit and len(self._known) > 1
            ):
                self._known.popitem(last=False)
        return allowed

    def _chosen(self, filter: Filter, snapshot: CatalogSnapshot) -> AllowedItems:
        mask, open_mask = self._filters.mask(filter), snapshot.open.mask
        if mask is not None and open_mask is not None:
            mask = mask & open_mask
        elif mask is None:
            mask = open_mask
        extra = snapshot.open.extra & self._extra_of(filter, snapshot)
        denied = places_of(filter.deny, snapshot)
        if len(denied):
            mask = np.ones(snapshot.n, bool) if mask is None else mask.copy()
            mask[denied[denied < snapshot.n]] = False
            extra[denied[denied >= snapshot.n] - snapshot.n] = False
        count = snapshot.n if mask is None else int(np.count_nonzero(mask))
        return AllowedItems(mask, count, extra)

    def _extra_of(self, filter: Filter, snapshot: CatalogSnapshot) -> np.ndarray:
        """(X,) bool: which live items and late rows meet the conditions."""
        meets = np.ones(len(snapshot.extra), bool)
        if len(meets) and (filter.equals or filter.ranges):
            meets[: snapshot.live] = self._filters.mask_of(snapshot.view.fields, filter)
            if len(snapshot.late):
                late = self._catalog[snapshot.late - 1]
                meets[snapshot.live :] = self._filters.mask_of(late, filter)
        return meets

    def _listed(self, filter: Filter, snapshot: CatalogSnapshot) -> AllowedItems:
        """A list of ids says how few there can be: no mask over the catalogue is made of it."""
        places = np.unique(places_of(filter.allow or (), snapshot))
        places = places[~np.isin(places, places_of(filter.deny, snapshot))]
        positions = places[places < snapshot.n]
        if snapshot.open.mask is not None:
            positions = positions[snapshot.open.mask[positions]]
        if (mask := self._filters.mask(filter)) is not None:
            positions = positions[mask[positions]]
        extra = np.zeros(len(snapshot.extra), bool)
        extra[places[places >= snapshot.n] - snapshot.n] = True
        extra &= snapshot.open.extra & self._extra_of(filter, snapshot)
        return AllowedItems(None, len(positions), extra, positions)


def places_of(ids: Sequence[str], snapshot: CatalogSnapshot) -> np.ndarray:
    """Places of ids, those that cannot be answered left out."""
    places = np.array([snapshot.place_of(id) for id in ids], np.int64)
    return places[places >= 0]
