"""What each user was shown and passed over: it stood there, and something else was chosen.

Not what training calls a skip (skips.py): whether a user comes back for an item within the
horizon is known only later, and decides a label. Here everything is known the moment after the
request was answered, so that nothing of the future enters what the towers read.

Legend: R requests, T items shown in all, U user rows, P items passed over in all, Q queries.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from recsys.features.prepared.timeline import count_before
from recsys.ragged import Ragged, gather

PASSED = 100
"""Newest passed-over items that are read of a user."""


@dataclass(frozen=True)
class PassedOver:
    """Items that users passed over, and when.

    Args:
        items: U ragged item rows, oldest first; what one request shows stays in its order.
        time: (P,) int64 microseconds of the request, beside `items.values`.
    """

    items: Ragged
    time: np.ndarray

    @staticmethod
    def of_requests(
        user: np.ndarray,
        time: np.ndarray,
        shown: Ragged,
        clicked: np.ndarray,
        position: np.ndarray | None,
        n_users: int,
    ) -> PassedOver:
        """Shown in a request in which something was chosen, not chosen, and not below the last
        choice where positions say so: what stands below it was perhaps never looked at.

        Args:
            user: (R,) user rows; row 0, who nothing is known of, passes nothing over.
            time: (R,) int64 microseconds.
            shown: R ragged item rows; row 0 is left out.
            clicked: (T,) whether it was chosen.
            position: (T,) declared positions, negative where there is none; None: none at all.
            n_users: U.
        """
        request, chosen = shown.row_of(), np.asarray(clicked).astype(bool)
        some = np.zeros(len(shown), bool)
        some[request[chosen]] = True
        kept = ~chosen & some[request] & (np.asarray(shown.values) > 0)
        kept &= np.asarray(user)[request] > 0
        if position is not None:
            position = np.asarray(position).astype(np.int64)
            lowest = np.full(len(shown), -1, np.int64)
            np.maximum.at(lowest, request[chosen], position[chosen])
            unsaid = (position < 0) | (lowest < 0)[request]
            kept &= unsaid | (position <= lowest[request])
        of = request[kept]
        return _sorted(
            np.asarray(user)[of], np.asarray(shown.values)[kept], np.asarray(time)[of], n_users
        )

    def before(self, users: np.ndarray, times: np.ndarray | None, last: int | None) -> Ragged:
        """Item rows that each user passed over strictly before each time, oldest first.

        Args:
            users: (Q,) user rows.
            times: (Q,) moments; None: everything known.
            last: keep only so many of the newest; None: all.
        """
        start, end = self.items.offsets[users], self.items.offsets[users + 1]
        if times is not None:
            end = start + count_before(Ragged(self.items.offsets, self.time), users, times)
        if last is not None:
            start = np.maximum(start, end - last)
        return gather(self.items.values, start, end)

    def joined(self, later: PassedOver | None, n_users: int) -> PassedOver:
        """These and later ones in one, of `n_users` user rows."""
        both = [self] if later is None else [self, later]
        return _sorted(
            np.concatenate([one.items.row_of() for one in both]),
            np.concatenate([one.items.values for one in both]),
            np.concatenate([one.time for one in both]),
            n_users,
        )

    def renumbered(self, users: np.ndarray, place: np.ndarray) -> PassedOver:
        """Of the given user rows only, with `place` (N,) the new row of each item."""
        return PassedOver(
            Ragged(self.items.offsets, place[self.items.values].astype(np.int32)).take(users),
            Ragged(self.items.offsets, self.time).take(users).values,
        )


def _sorted(user: np.ndarray, item: np.ndarray, time: np.ndarray, n_users: int) -> PassedOver:
    order = np.lexsort((time, user))  # stable: ties keep their order
    offsets = np.searchsorted(user[order], np.arange(n_users + 1)).astype(np.int64)
    return PassedOver(Ragged(offsets, item[order].astype(np.int32)), time[order].astype(np.int64))
