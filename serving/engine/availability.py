"""Availability windows of items.

Legend: N item rows.
"""

from __future__ import annotations

import numpy as np

from recsys.serving import bundle as bundles
from recsys.serving.bundle import Bundle

MINUTE = 60_000_000
"""Microseconds between two looks at what has come to be available."""
FOREVER = np.iinfo(np.int64).max


class Windows:
    """Which items are available as of now, found again when that changes, once a minute at most.

    Args:
        bundle: what is known.
        position: (N,) index position of each item row, -1 for those not indexed.
    """

    def __init__(self, bundle: Bundle, position: np.ndarray) -> None:
        self._bundle, self._position = bundle, position
        born = bundle.timeline.exists_from if bundle.timeline.timed else np.empty(0, np.int64)
        # Without the free ones first: most are.
        self._changes = np.unique(np.concatenate([_finite(bundle.window), _finite(born)]))
        self._next = -FOREVER if len(self._changes) else FOREVER
        self._over = self._late = np.empty(0, np.int64)

    def at(self, as_of: int | None) -> tuple[np.ndarray, np.ndarray, int]:
        """What is otherwise than the index has it.

        Args:
            moment: microseconds; None without a clock: nothing is.

        Returns:
            Sorted index positions whose time is over; sorted rows that are not indexed but
            available; the moment from which on to ask again.
        """
        if as_of is None:
            return self._over, self._late, FOREVER
        if as_of >= self._next:
            allowed = bundles.answerable(self._bundle, as_of)
            self._late = np.flatnonzero(allowed & (self._position < 0))
            self._over = np.flatnonzero(~allowed[self._bundle.rows])
            place = int(np.searchsorted(self._changes, as_of, side="right"))
            self._next = FOREVER
            if place < len(self._changes):
                self._next = max(int(self._changes[place]), as_of + MINUTE)
        return self._over, self._late, self._next


def _finite(as_of_times: np.ndarray) -> np.ndarray:
    return as_of_times[(as_of_times > -FOREVER) & (as_of_times < FOREVER)]


__all__ = ["FOREVER", "MINUTE", "Windows"]
