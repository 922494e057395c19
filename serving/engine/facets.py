"""Values that people may filter by: what a page offers before anything was asked."""

from __future__ import annotations

from typing import Any

import polars as pl

MOST = 100
"""A column with more distinct values is typed into, not chosen from."""


def facets(catalog: pl.DataFrame) -> dict[str, list[Any]]:
    """Columns of words with few distinct values → those, the most frequent first.

    Args:
        catalog: one row an item; `item` and `title` are never filtered by.
    """
    found = {}
    for name, kind in catalog.schema.items():
        listed = isinstance(kind, pl.List) and kind.inner == pl.String
        words = kind == pl.String or isinstance(kind, pl.Categorical | pl.Enum)
        if name in ("item", "title") or not (listed or words):
            continue
        value = pl.col(name).explode() if listed else pl.col(name)
        column = catalog.lazy().select(value.cast(pl.String).alias("value").drop_nulls())
        # An estimate is enough to pass over texts, and needs no table of a million of them.
        if column.select(pl.col("value").approx_n_unique()).collect().item() > 2 * MOST:
            continue
        counts = column.group_by("value").len().sort("len", "value", descending=[True, False])
        values = counts.collect()["value"].to_list()
        if 0 < len(values) <= MOST:
            found[name] = values
    return found
