"""Lists of users and histories, from files and frames."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from recsys.errors import DataError, QueryError, nearest
from recsys.features.readers.read import scan
from recsys.ragged import Ragged
from recsys.serving.bundle import Bundle


@dataclass(frozen=True)
class People:
    """Who is asked for.

    Args:
        ids: (P,) external ids.
        rows: (P,) user rows, 0 for unknown.
        history: P ragged item rows given with them, or None: what the bundle knows.
    """

    ids: pl.Series
    rows: np.ndarray
    history: Ragged | None

    @property
    def unknown(self) -> int:
        """How many of them the bundle does not know."""
        return int((self.rows == 0).sum())

    def take(self, rows: np.ndarray) -> People:
        """The given people, in the given order."""
        history = None if self.history is None else self.history.take(rows)
        return People(self.ids.gather(rows), self.rows[rows], history)


def need(frame: pl.DataFrame, column: str, path: str | Path) -> None:
    """Refuse a table without the column.

    Raises:
        DataError: it names the file, the column and the nearest one.
    """
    if column not in frame.columns:
        raise DataError(f"{path} has no column {column!r}. {nearest(column, frame.columns)}")


def as_lists(values: pl.Series) -> pl.Series:
    """Lists of ids as text: a list column, or ids in one text separated by blanks or commas."""
    if values.dtype == pl.List or isinstance(values.dtype, pl.Array):
        return values.cast(pl.List(pl.String))
    text = values.cast(pl.String).fill_null("")
    return text.str.extract_all(r"[^\s,;|\[\]'\"]+")


def rows_of_lists(lists: pl.Series, bundle: Bundle) -> Ragged:
    """Lists of external item ids as ragged item rows; unknown items are left out."""
    lengths = lists.list.len().fill_null(0).to_numpy().astype(np.int64)
    flat = lists.filter(lists.list.len() > 0).explode()
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    rows = Ragged(offsets, bundle.items.encode(flat).astype(np.int64))
    return rows.where(rows.values > 0)


def read_people(path: str | Path, bundle: Bundle, *, histories: bool) -> People:
    """Read a list of users, or users with histories.

    Args:
        path: CSV, TSV, NDJSON or Parquet with a column `user`; for histories also `history`
            (lists) or `item` (rows in order).
        bundle: knows the ids.
        histories: whether histories are wanted.

    Raises:
        DataError: the file or a column is missing, a user is null or empty, or one user has two
            histories.
    """
    return _people(scan(str(path))[0].collect(), bundle, path, histories=histories)


def users_of(users: Any, bundle: Bundle) -> People:
    """Users from ids or from a frame, with histories where it has them.

    Args:
        users: ids, or a Polars or pandas frame with `user`, perhaps with `history` or `item`.
        bundle: knows the ids.

    Raises:
        QueryError: one text where many are meant, or an id that is no text.
        DataError: as `read_people`.
    """
    if isinstance(users, str):
        raise QueryError(f"`users` are many; {users!r} is one. Say user={users!r}, or give a list.")
    if isinstance(users, pl.DataFrame) or hasattr(users, "columns"):
        frame = as_frame(users)
        histories = "history" in frame.columns or "item" in frame.columns
        return _people(frame, bundle, "the frame of users", histories=histories)
    listed = list(users)
    for one in listed:
        if not isinstance(one, str):
            raise QueryError(f"{one!r} among `users` is a {type(one).__name__}, and ids are text.")
    frame = pl.DataFrame({"user": pl.Series(listed, dtype=pl.String)})
    return _people(frame, bundle, "the list of users", histories=False)


def as_frame(table: Any) -> pl.DataFrame:
    """A Polars frame of a Polars or pandas frame, or of a file.

    Raises:
        DataError: it is none of these, or cannot be read.
    """
    if isinstance(table, pl.DataFrame):
        return table
    if isinstance(table, pl.LazyFrame):
        return table.collect()
    if isinstance(table, str | Path):
        return scan(str(table))[0].collect()
    if hasattr(table, "columns") and hasattr(table, "to_numpy"):
        frame: pl.DataFrame = pl.from_pandas(table)
        return frame
    raise DataError(
        f"A table is a Polars or pandas frame, or the path of a file; this is a "
        f"{type(table).__name__}."
    )


def _people(frame: pl.DataFrame, bundle: Bundle, path: str | Path, *, histories: bool) -> People:
    need(frame, "user", path)
    frame = frame.with_columns(pl.col("user").cast(pl.String))
    bad = frame["user"].is_null() | (frame["user"] == "")
    if bad.any():
        raise DataError(f"{path} has a null or empty user in row {int(bad.arg_true()[0]) + 1}.")
    history = None
    if histories:
        if "history" not in frame.columns:
            need(frame, "item", path)
            frame = frame.group_by("user", maintain_order=True).agg(
                pl.col("item").cast(pl.String).alias("history")
            )
        history = rows_of_lists(as_lists(frame["history"]), bundle)
    elif frame["user"].is_duplicated().any():
        frame = frame.unique("user", keep="first", maintain_order=True)
    twice = frame["user"].is_duplicated()
    if twice.any():
        raise DataError(
            f"{path} has more than one history of user {frame['user'].filter(twice)[0]!r}. "
            "Keep one row a user, or give rows of user and item."
        )
    ids = frame["user"]
    return People(ids, bundle.users.encode(ids).astype(np.int64), history)
