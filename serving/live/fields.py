"""A field of an item, as JSON says it, in the type of the bundle's catalogue."""

from __future__ import annotations

from datetime import UTC, date, datetime
from typing import Any

import polars as pl

from recsys.errors import QueryError

_INT = 2**63
_UNITS = {"ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}


def field_value(name: str, value: Any, dtype: pl.DataType, separator: str) -> Any:
    """The value as the column holds it.

    Args:
        name: of the column.
        value: JSON value.
        dtype: of the column.
        separator: between several categories in one text.

    Raises:
        QueryError: the column cannot hold the value.
    """
    if value is None:
        return None
    # Most values take no look by Polars, which costs more than all the rest of an item.
    if dtype == pl.String:
        if isinstance(value, str):
            return value
        if isinstance(value, (list, tuple)):
            return (separator or ", ").join(str(one) for one in value if one is not None)
        if isinstance(value, bool):
            return "true" if value else "false"
        if isinstance(value, (int, float)):
            return str(value)
    elif dtype == pl.Boolean:
        if isinstance(value, bool):
            return value
    elif isinstance(value, bool):
        pass
    elif dtype == pl.Float64 and isinstance(value, (int, float)):
        return float(value)
    elif dtype == pl.Int64 and isinstance(value, int) and -_INT <= value < _INT:
        return value
    else:
        try:
            held = value
            if isinstance(value, str) and isinstance(dtype, pl.Date | pl.Datetime):
                held = _moment(name, value, dtype)
            series = pl.Series(name, [held], dtype=dtype, strict=True)
            if series.dtype == dtype:  # a list makes one of lists, whatever was wanted
                if dtype.is_nested():
                    series.to_list()  # an answer that tells of the item will read what is in it
                return series[0]
        except QueryError:
            raise
        # Polars refuses in many ways; a time that Python cannot hold makes it panic, which is no
        # Exception.
        except (Exception, pl.exceptions.PanicException):
            pass
    raise QueryError(
        f"{name!r} holds {value!r}, but the catalogue has a column of {dtype}. "
        f"Give {_fitting(dtype)}."
    )


def _fitting(dtype: pl.DataType) -> str:
    """What a column takes, in words."""
    if isinstance(dtype, pl.Date):
        return "a date in ISO 8601, or days since 1970, within the years 1 to 9999"
    if isinstance(dtype, pl.Datetime):
        unit = _UNITS[dtype.time_unit]
        return f"a time in ISO 8601, or {unit} since 1970, within the years 1 to 9999"
    if isinstance(dtype, pl.Duration):
        return f"a whole number of {_UNITS[dtype.time_unit]}"
    if isinstance(dtype, pl.List | pl.Array):
        return f"a list of {dtype.inner}"
    if isinstance(dtype, pl.Boolean):
        return "true or false"
    if dtype.is_integer():
        return "a whole number that fits"
    return "a number" if dtype.is_numeric() else "a value of that type"


def _moment(name: str, value: str, dtype: pl.Date | pl.Datetime) -> date | datetime:
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        raise QueryError(f"{name!r} holds {value!r}, which is no time in ISO 8601.") from None
    if isinstance(dtype, pl.Date):
        return moment.date()
    if moment.tzinfo is not None:
        # A column without a zone holds UTC, as a time without one is read everywhere.
        moment = moment.astimezone(UTC)
        if dtype.time_zone is None:
            moment = moment.replace(tzinfo=None)
    return moment
