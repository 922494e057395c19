"""Time parsing: numbers, text and dates of any zone to int64 microseconds since 1970, UTC."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import polars as pl

from recsys.errors import ConfigError
from recsys.tables import Schema

PER_UNIT = {"s": 1_000_000, "ms": 1_000, "us": 1}
"""Microseconds in a unit; a nanosecond is the thousandth part of one."""
NAIVE = (
    "%Y-%m-%d %H:%M:%S",
    "%Y-%m-%d %H:%M:%S%.f",
    "%Y-%m-%d",
    "%Y-%m-%d %H:%M",
    "%Y/%m/%d %H:%M:%S",
    "%Y/%m/%d",
    "%m/%d/%Y %I:%M:%S %p",
)
ZONED = ("%Y-%m-%d %H:%M:%S%.f%#z", "%Y-%m-%d %H:%M%#z")
ZONE = re.compile(r":\d\d(?:[.,]\d+)?\s*(?:Z|UTC|GMT|[+-]\d\d(?::?\d\d)?)$")
"""The end of a time that says its own zone."""


@dataclass(frozen=True)
class Clock:
    """How one column tells the time.

    Args:
        column: its name.
        value: Int64 microseconds, or, while `unit` is set, the bare number; null where unreadable.
        unit: of the bare numbers: s, ms, us, ns, or auto; None when `value` is microseconds.
        zone: the zone of times that say none.
        formats: of text that was tried; empty otherwise.
        zoned: whether the times say their own zone.
    """

    column: str
    value: pl.Expr
    unit: str | None = None
    zone: str = "UTC"
    formats: tuple[str, ...] = ()
    zoned: bool = False

    @property
    def largest(self) -> pl.Expr:
        """An aggregate that `microseconds` wants back, by which an unknown unit is told."""
        return self.value.abs().max() if self.unit == "auto" else pl.lit(0.0)

    def microseconds(self, largest: float | None) -> pl.Expr:
        """Int64 microseconds since 1970, UTC."""
        if self.unit is None:
            return self.value
        unit = unit_of(largest or 0.0) if self.unit == "auto" else self.unit
        if unit == "ns":
            return (self.value // 1_000).cast(pl.Int64)
        scaled = self.value * PER_UNIT[unit]
        return scaled.round().cast(pl.Int64)

    def widened(self) -> Clock | None:
        """The same clock that tries every known format; None when it does already."""
        every = ZONED if self.zoned else NAIVE
        if not self.formats or self.formats == every:
            return None
        return replace(
            self, formats=every, value=_parsed(self.column, every, self.zoned, self.zone)
        )

    def complaint(self, value: object) -> str:
        """What is wrong with a value that this clock cannot read, and the way out."""
        if value is None:
            return "has no time. Drop the row or fill in the time"
        if isinstance(value, str) and self.formats and bool(ZONE.search(value)) != self.zoned:
            has, others = ("no zone", "one") if self.zoned else ("a zone", "none")
            return f"holds {value!r}, which has {has}, while others have {others}. Write all in UTC"
        if self.unit is not None:
            return f"holds {value!r}, which is not a number as the others are"
        return (
            f"holds {value!r}, which is not a time in {self.zone}. "
            "Known are ISO 8601 and numbers since 1970 (data.columns.time_unit)"
        )


def unit_of(largest: float) -> str:
    """The unit of numbers since 1970, by the largest: seconds until the year 5138, and so on."""
    for unit, limit in (("s", 1e11), ("ms", 1e14), ("us", 1e17)):
        if largest < limit:
            return unit
    return "ns"


def clock(column: str, dtype: pl.DataType, sample: pl.Series, schema: Schema) -> Clock:
    """Find out how a column tells the time.

    Args:
        column: its name.
        dtype: its type.
        sample: some of its first values.
        schema: `time_unit` and `time_zone`.

    Raises:
        ConfigError: the zone is not known.
    """
    col, zone = pl.col(column), schema.time_zone
    _check_zone(zone)
    if dtype == pl.Date or isinstance(dtype, pl.Datetime):
        aware = isinstance(dtype, pl.Datetime) and dtype.time_zone is not None
        when = col if isinstance(dtype, pl.Datetime) else col.cast(pl.Datetime("us"))
        return Clock(column, _epoch(when, None if aware else zone), zone=zone, zoned=aware)
    if dtype.is_integer():
        return Clock(column, col.cast(pl.Int64, strict=False), schema.time_unit)
    if dtype.is_numeric():
        number = col.cast(pl.Float64)
        return Clock(column, pl.when(number.is_finite()).then(number), schema.time_unit)
    text = sample.cast(pl.String, strict=False).drop_nulls().str.strip_chars()
    if text.head(1).cast(pl.Float64, strict=False).count():
        number = col.str.strip_chars()
        if text.cast(pl.Int64, strict=False).count() == text.cast(pl.Float64, strict=False).count():
            return Clock(column, number.cast(pl.Int64, strict=False), schema.time_unit)
        number = number.cast(pl.Float64, strict=False)
        return Clock(column, pl.when(number.is_finite()).then(number), schema.time_unit)
    zoned = bool(len(text)) and bool(ZONE.search(text[0]))
    formats = _needed(text, ZONED if zoned else NAIVE, zoned, zone)
    return Clock(column, _parsed(column, formats, zoned, zone), None, zone, formats, zoned)


def _needed(text: pl.Series, known: tuple[str, ...], zoned: bool, zone: str) -> tuple[str, ...]:
    """The known formats that the sample needs: each costs a pass over the column."""
    left, needed = text.alias("t"), []
    for form in known:
        good = left.to_frame().select(_parsed("t", (form,), zoned, zone)).to_series().is_not_null()
        if good.any():
            needed.append(form)
            left = left.filter(~good)
    return tuple(needed) or known


def _parsed(column: str, formats: tuple[str, ...], zoned: bool, zone: str) -> pl.Expr:
    text = pl.col(column).cast(pl.String).str.strip_chars()
    if zoned:
        text = text.str.replace(r"\s*(?:Z|UTC|GMT)$", "+00:00")
    text = text.str.replace("T", " ", literal=True)
    if zoned:
        tries = [
            text.str.to_datetime(form, strict=False, time_unit="us", time_zone="UTC")
            for form in formats
        ]
        return _epoch(pl.coalesce(tries), None)
    tries = [text.str.to_datetime(form, strict=False, time_unit="us") for form in formats]
    return _epoch(pl.coalesce(tries), zone)


def _epoch(when: pl.Expr, zone: str | None) -> pl.Expr:
    if zone is not None and zone != "UTC":
        # An hour that a change of the clock repeats is taken as its first run; one that it
        # leaves out is no time at all.
        when = when.dt.replace_time_zone(zone, ambiguous="earliest", non_existent="null")
    return when.dt.epoch("us")


def _check_zone(zone: str) -> None:
    try:
        pl.Series([0]).cast(pl.Datetime("us")).dt.replace_time_zone(zone)
    except pl.exceptions.PolarsError:
        raise ConfigError(
            f"data.columns.time_zone = {zone!r} is not a known zone. "
            'Write a name such as "UTC" or "Europe/Copenhagen".'
        ) from None
