"""A field of an item, as JSON says it, in the type of the bundle's catalogue."""

from __future__ import annotations

from datetime import date, datetime
from typing import Any

import polars as pl

from recsys.errors import QueryError

_INT = 2**63


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
        if isinstance(value, str) and dtype.is_temporal():
            value = _moment(name, value, dtype)
        try:
            return pl.Series(name, [value], dtype=dtype, strict=True)[0]
        except (pl.exceptions.PolarsError, TypeError, ValueError, OverflowError):
            pass
    raise QueryError(f"{name!r} holds {value!r}, but the catalogue has a column of {dtype}.")


def _moment(name: str, value: str, dtype: pl.DataType) -> date | datetime:
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        raise QueryError(f"{name!r} holds {value!r}, which is no time in ISO 8601.") from None
    return moment.date() if dtype == pl.Date else moment
