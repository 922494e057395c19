"""The first rows of a table, by which its columns are guessed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import polars as pl

from recsys.features.readers import aliases as names
from recsys.features.readers.files import reading
from recsys.features.readers.read import scan

LOOK = 5_000
"""Rows that are looked at."""


@dataclass(frozen=True)
class Look:
    """The first rows of a table, by which columns are guessed."""

    frame: pl.DataFrame
    name: str

    @staticmethod
    def at(paths: str) -> Look:
        frame, files = scan(paths)
        with reading(paths):
            head = frame.head(LOOK).collect()
        return Look(head.drop([c for c in head.columns if c == ""]), str(files[0]))

    def find(self, among: Iterable[str], taken: Sequence[str | None] = ()) -> str | None:
        """The first column whose plain name is one of those, in their order."""
        plain = {plainly(c): c for c in reversed(self.frame.columns) if c not in taken}
        return next((plain[name] for name in among if name in plain), None)

    def is_list(self, column: str) -> bool:
        """Whether a column holds lists, native or written in brackets."""
        series = self.frame[column]
        if isinstance(series.dtype, (pl.List, pl.Array)):
            return True
        if series.dtype != pl.String:
            return False
        text = series.drop_nulls().head(100)
        return bool(len(text)) and bool(text.str.contains(r"^\[.*\]$").all())

    def number(self, column: str) -> pl.Series | None:
        """A column as numbers, None when it is not numbers."""
        series = self.frame[column].drop_nulls()
        if series.dtype == pl.Boolean or not (
            series.dtype.is_numeric() or series.dtype == pl.String
        ):
            return None
        values = series.cast(pl.Float64, strict=False)
        return values if len(values) and values.null_count() == 0 else None


def plainly(name: str) -> str:
    """A name without case and punctuation."""
    return "".join(letter for letter in name.lower() if letter.isalnum())


def ids_in(look: Look, column: str) -> pl.Series:
    """The ids of a column, those within lists too."""
    series = look.frame[column]
    if isinstance(series.dtype, (pl.List, pl.Array)):
        return series.explode().drop_nulls().cast(pl.String)
    if look.is_list(column) or plainly(column) in (*names.SHOWN, *names.ITEMS):
        return series.str.extract_all(r"[^\s,'\"\[\]]+").explode().drop_nulls()
    return series.drop_nulls().cast(pl.String)
