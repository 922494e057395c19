"""Ragged arrays: rows of unequal length in one flat array.

Legend: R rows, T values in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Ragged:
    """R rows of unequal length.

    Args:
        offsets: (R+1,) int64, row r is `values[offsets[r]:offsets[r+1]]`.
        values: (T,) of any dtype.
    """

    offsets: np.ndarray
    values: np.ndarray

    def __post_init__(self) -> None:
        if len(self.offsets) == 0 or self.offsets[0] != 0 or self.offsets[-1] != len(self.values):
            raise ValueError(
                f"offsets must run from 0 to {len(self.values)}, the number of values, "
                f"not {self.offsets[:1]} to {self.offsets[-1:]}."
            )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """(R,) number of values of each row."""
        return np.diff(self.offsets)

    def row_of(self) -> np.ndarray:
        """(T,) the row that each value stands in."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def take(self, rows: np.ndarray) -> Ragged:
        """The given rows, in the given order, repeats allowed."""
        return gather(self.values, self.offsets[rows], self.offsets[rows + 1])

    def last(self, n: int) -> Ragged:
        """The last `n` values of each row."""
        end = self.offsets[1:]
        return gather(self.values, np.maximum(self.offsets[:-1], end - n), end)

    def where(self, keep: np.ndarray) -> Ragged:
        """The values for which `keep` (T,) is true; every row stays, perhaps empty."""
        kept = np.flatnonzero(keep)
        return Ragged(np.searchsorted(kept, self.offsets), self.values[kept])

    def distinct(self) -> Ragged:
        """The distinct values of each row in ascending order; values are whole and at least 0."""
        if not len(self.values):
            return self
        width = int(self.values.max()) + 1
        row, value = np.divmod(np.unique(self.row_of() * width + self.values), width)
        return Ragged(np.searchsorted(row, np.arange(len(self) + 1)), value)

    @staticmethod
    def from_lists(rows: Sequence[Sequence], dtype: type = np.int64) -> Ragged:
        """From a list of lists; for tests and small requests."""
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)])
        values = np.concatenate([np.asarray(row, dtype) for row in rows] or [np.empty(0, dtype)])
        return Ragged(offsets, values.astype(dtype))

    @staticmethod
    def empty(rows: int, dtype: type = np.int64) -> Ragged:
        """`rows` rows without a value."""
        return Ragged(np.zeros(rows + 1, np.int64), np.empty(0, dtype))


def gather(values: np.ndarray, start: np.ndarray, end: np.ndarray) -> Ragged:
    """The slices `values[start:end]` as one Ragged, without a loop.

    Args:
        values: (T,) any array.
        start: (R,) first position of each slice.
        end: (R,) position after the last; `end >= start`.
    """
    lengths = (end - start).astype(np.int64)
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    index = np.repeat(start - offsets[:-1], lengths)
    index += np.arange(len(index))
    return Ragged(offsets, np.asarray(values).take(index))


def slots(start: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Positions of rows in a flat array: `start[r] … start[r] + lengths[r] - 1`, row after row."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return np.arange(offsets[-1]) + np.repeat(start - offsets[:-1], lengths)
