"""Vocabulary of external ids; row 0 is "unknown"."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl

from recsys.errors import DataError
from recsys.files import sha256_bytes


class Vocab:
    """A frozen list of distinct ids: `ids[0]` is row 1.

    Args:
        ids: distinct strings, none null or empty.
        checked: they are known to be so.

    Raises:
        DataError: an id is null, empty or stands twice.
    """

    def __init__(self, ids: pl.Series | Iterable[str], *, checked: bool = False) -> None:
        series = ids if isinstance(ids, pl.Series) else pl.Series(list(ids), dtype=pl.String)
        self.ids = series.cast(pl.String).alias("id").rechunk()
        if checked:
            return
        if self.ids.null_count() or (self.ids == "").any():
            raise DataError("A vocabulary cannot hold a null or empty id. Drop those rows first.")
        if self.ids.n_unique() != len(self.ids):
            twice = self.ids.filter(self.ids.is_duplicated())[0]
            raise DataError(f"Id {twice!r} stands twice. Each id may stand once.")

    @property
    def size(self) -> int:
        """Number of rows, row 0 included."""
        return len(self.ids) + 1

    @cached_property
    def _rows(self) -> pl.DataFrame:
        rows = pl.int_range(1, self.size, dtype=pl.Int32, eager=True)
        return pl.DataFrame({"id": self.ids, "row": rows})

    def encode(self, ids: pl.Series | Iterable[object]) -> np.ndarray:
        """(n,) int32 row of each id; 0 where the id is unknown or null."""
        if isinstance(ids, pl.Series):
            series = ids
        else:
            series = pl.Series([None if i is None else str(i) for i in ids], dtype=pl.String)
        frame = series.cast(pl.String).alias("id").to_frame()
        joined = frame.join(self._rows, on="id", how="left", maintain_order="left")
        return joined["row"].fill_null(0).to_numpy().astype(np.int32)

    def decode(self, rows: np.ndarray | Iterable[int]) -> pl.Series:
        """Ids of the rows, null where the row is 0 or less (padding)."""
        rows = np.asarray(rows, np.int64)
        known = pl.Series(np.where(rows > 0, rows - 1, 0), dtype=pl.Int64)
        if not len(self.ids):
            return pl.Series("id", [None] * len(rows), dtype=pl.String)
        found = self.ids.gather(known)
        return pl.select(
            pl.when(pl.Series(rows > 0)).then(found).otherwise(None).alias("id")
        ).to_series()

    def extended(self, ids: Iterable[str]) -> Vocab:
        """This vocabulary with new ids after its own; ids already known are left out."""
        new = pl.Series("id", list(ids), dtype=pl.String)
        new = new.filter(~new.is_in(self.ids.implode()))
        return Vocab(pl.concat([self.ids, new]))

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 of the ids in order."""
        lengths = self.ids.str.len_bytes().to_numpy().astype("<u4").tobytes()
        text = str(self.ids.str.join("").item() or "").encode()  # not a million strings first
        return sha256_bytes(lengths, text)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the ids to a Parquet file."""
        self.ids.to_frame().write_parquet(Path(path), compression="zstd", statistics=False)

    @staticmethod
    def load(path: str | os.PathLike[str], *, checked: bool = False) -> Vocab:
        """Read what `save` wrote.

        Args:
            path: of the file.
            checked: a digest says that it is what was written.

        Raises:
            DataError: the file is missing, is no Parquet or has no column `id`.
        """
        if not Path(path).exists():
            raise DataError(f"There is no vocabulary {path}.")
        try:
            frame = pl.read_parquet(Path(path))
        except pl.exceptions.PolarsError as error:
            raise DataError(f"{path} cannot be read as Parquet: {error}.") from None
        if "id" not in frame.columns:
            raise DataError(f"{path} has the columns {frame.columns}, but no column 'id'.")
        return Vocab(frame["id"], checked=checked)
