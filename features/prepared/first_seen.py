"""First time that each user had each item, for many pairs at once.

Legend: P pairs, E events of a timeline, U user rows.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from recsys.features.prepared.timeline import Timeline
from recsys.ragged import slots


class FirstSeen:
    """Each user's first event of each item.

    Events of a user are in order of time, so that an item was had before some event when its first
    event was: one number for each pair says what whole histories would.

    Args:
        timeline: whose events.
        users: (n,) user rows that will be asked about, repeats allowed; None: all.
    """

    def __init__(self, timeline: Timeline, users: np.ndarray | None = None) -> None:
        self.timeline = timeline
        offsets = np.asarray(timeline.user_offsets)
        rows = np.arange(timeline.n_users) if users is None else np.unique(users).astype(np.int64)
        counts = offsets[rows + 1] - offsets[rows]
        events = slots(offsets[rows], counts)
        keys = np.repeat(rows, counts) * timeline.n_items + np.asarray(timeline.item)[events]
        self._keys, at = np.unique(keys, return_index=True)
        self._first = events[at]

    def before(self, users: np.ndarray, items: np.ndarray, until: np.ndarray) -> np.ndarray:
        """(P,) bool, whether each user had each item before the event `until` of its own.

        Args:
            users, items: (P,) rows.
            until: (P,) event of the timeline; one after the user's last: whenever it was.
        """
        if not len(self._keys):
            return np.zeros(len(items), bool)
        pairs = np.asarray(users, np.int64) * self.timeline.n_items + items
        place = np.minimum(np.searchsorted(self._keys, pairs), len(self._keys) - 1)
        return (self._keys[place] == pairs) & (self._first[place] < until)

    @cached_property
    def are_first(self) -> np.ndarray:
        """(E,) bool, the events that are their user's first of their item."""
        found = np.zeros(len(self.timeline.item), bool)
        found[self._first] = True
        return found
