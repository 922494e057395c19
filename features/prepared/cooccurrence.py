"""Co-occurrence graph of items: what came before each, how many, how late.

Legend: E events, N item rows, U users, M entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from recsys.features.prepared.item_time import Order, pairs
from recsys.features.prepared.timeline import Timeline

LATE = 8
"""Events after an item that are told apart, at most."""


@dataclass(frozen=True)
class CooccurrenceGraph:
    """Neighbours of each item, and its events, each with the user they come from.

    Args:
        offsets: (N+1,) int64; the entries of item n are `[offsets[n], offsets[n+1])`.
        item: (M,) int32 row of each neighbour.
        user: (M,) int32 user row of whose history it is.
        weight: (M,) float32, of mean 1: less for what stands far off, and for what is everywhere.
        user_offsets: (U+1,) int64; the events of user u are `[user_offsets[u], user_offsets[u+1])`.
        event_item: (E,) int32 item row of each event.
        event_after: (E,) float32 how many events of its user came later, up to `LATE`.
        order: where items and events stand in time.
    """

    offsets: np.ndarray
    item: np.ndarray
    user: np.ndarray
    weight: np.ndarray
    user_offsets: np.ndarray
    event_item: np.ndarray
    event_after: np.ndarray
    order: Order

    @property
    def n_items(self) -> int:
        """N."""
        return len(self.offsets) - 1

    @staticmethod
    def of(timeline: Timeline, n_items: int, most: int, seed: int) -> CooccurrenceGraph:
        """What stands around each of the first `n_items` item rows.

        An entry weighs its pair's weight / √(events of the neighbour), as in the normalised
        adjacency of graph convolutions, on one side.

        Args:
            timeline: events of all users.
            n_items: N; no event is of a row beyond.
            most: entries of an item; of more, a seeded sample.
            seed: of that sample.
        """
        users = len(timeline.user_offsets) - 1
        item = np.asarray(timeline.item).astype(np.int32)
        lengths = np.diff(timeline.user_offsets)
        user = np.repeat(np.arange(users, dtype=np.int32), lengths)
        ends = np.repeat(np.asarray(timeline.user_offsets)[1:], lengths)
        after = np.minimum(ends - 1 - np.arange(len(item)), LATE).astype(np.float32)
        near, far, whose, faded = [], [], [], []
        for weighs, earlier, later in pairs(timeline.user_offsets, item):
            near.append(item[later])
            far.append(item[earlier])
            whose.append(user[later])
            faded.append(np.full(len(later), weighs, np.float32))
        of = np.concatenate(near)
        # A seeded shuffle before a stable sort: the first entries of an item are a fair sample.
        order = np.random.default_rng([seed, 29]).permutation(len(of))
        order = order[np.argsort(of[order], kind="stable")]
        counts = np.bincount(of, minlength=n_items)
        starts = np.cumsum(counts) - counts
        order = order[np.arange(len(order)) - np.repeat(starts, counts) < most]
        neighbour = np.concatenate(far)[order]
        weight = np.concatenate(faded)[order]
        weight = weight / np.sqrt(np.bincount(item, minlength=n_items)[neighbour])
        if len(weight):
            weight = weight / weight.mean()
        return CooccurrenceGraph(
            np.concatenate([[0], np.cumsum(np.minimum(counts, most))]),
            neighbour,
            np.concatenate(whose)[order],
            weight.astype(np.float32),
            np.asarray(timeline.user_offsets).astype(np.int64),
            item,
            after,
            Order.of(timeline.user_offsets, item, n_items),
        )
