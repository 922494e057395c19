"""Distinct rows and the place of each, without sorting."""

from __future__ import annotations

import numpy as np


class Distinct:
    """Distinct rows in time linear in their number, by a scratch table of one entry an item.

    Args:
        n_rows: rows are in [0, n_rows).
    """

    def __init__(self, n_rows: int) -> None:
        self.place = np.full(n_rows, -1, np.int64)

    def add(self, rows: np.ndarray, start: int) -> np.ndarray:
        """Give places from `start` on to rows without one; return those rows, in place order."""
        new = rows[self.place[rows] < 0]
        self.place[new] = np.arange(len(new))
        new = new[self.place[new] == np.arange(len(new))]
        self.place[new] = start + np.arange(len(new))
        return new

    def forget(self, rows: np.ndarray) -> None:
        """Take the places back."""
        self.place[rows] = -1
