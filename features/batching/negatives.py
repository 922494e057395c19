"""Per-query positive masks and per-query hard negatives.

Legend: Q queries, U user rows, E masked edges, S per-query negatives, T entries of a table.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from recsys.features.batching.batch import Source
from recsys.features.batching.samplers import BatchQueries
from recsys.features.prepared.first_seen import FirstSeen
from recsys.features.prepared.timeline import Timeline
from recsys.ragged import Ragged, gather


@dataclass(frozen=True)
class UserNegatives:
    """Hard negatives of each user: mined from a model, or read from a file.

    Args:
        offsets: (U+1,) int64, the items of user row u are `items[offsets[u]:offsets[u+1]]`.
        items: (T,) item rows.
        weights: (T,) float32, how many items each stands for; 0 leaves it out.

    Raises:
        ValueError: the sizes do not fit.
    """

    offsets: np.ndarray
    items: np.ndarray
    weights: np.ndarray

    def __post_init__(self) -> None:
        if len(self.items) != len(self.weights) or int(self.offsets[-1]) != len(self.items):
            raise ValueError(
                f"Negatives of users have {len(self.items)} items, {len(self.weights)} weights and "
                f"offsets that end at {self.offsets[-1]}; the three have to be equal."
            )

    @property
    def n_users(self) -> int:
        """U."""
        return len(self.offsets) - 1

    def draw(
        self, users: np.ndarray, most: int | None, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """At most `most` entries for each query, without repetition, each as likely as the others.

        Args:
            users: (Q,) user row of each query.
            most: None: all of them.
            rng: draws.

        Returns:
            (S,) query, (S,) item row and (S,) weight, ordered by query.
        """
        start, end = self.offsets[users], self.offsets[np.asarray(users) + 1]
        places = gather(np.arange(len(self.items)), start, end)
        query, place = places.row_of(), places.values
        if most is not None and len(place) and int(places.lengths.max()) > most:
            # In random order within each query; the first of each are taken.
            order = np.argsort(query + rng.random(len(query)))
            rank = np.arange(len(query)) - np.repeat(places.offsets[:-1], places.lengths)
            taken = np.sort(order[rank < most])
            query, place = query[taken], place[taken]
        return query, self.items[place].astype(np.int64), self.weights[place]


@dataclass(frozen=True)
class PerQueryNegatives:
    """Negatives of single queries, as edges.

    Args:
        query, item: (S,) int64.
        weight: (S,) float32, above 0.
        source: (S,) uint8 of `Source`.
    """

    query: np.ndarray
    item: np.ndarray
    weight: np.ndarray
    source: np.ndarray

    @staticmethod
    def of(
        query: np.ndarray, item: np.ndarray, weight: np.ndarray, source: Source
    ) -> PerQueryNegatives:
        """Edges of one source; row 0, which is no item, and weights of 0 are left out."""
        keep = (item > 0) & (weight > 0)
        return PerQueryNegatives(
            query[keep].astype(np.int64), item[keep].astype(np.int64),
            weight[keep].astype(np.float32), np.full(int(keep.sum()), source, np.uint8),
        )  # fmt: skip

    @staticmethod
    def joined(parts: list[PerQueryNegatives]) -> PerQueryNegatives:
        """All edges, part after part."""
        if len(parts) == 1:
            return parts[0]
        if not parts:
            nothing = np.empty(0, np.int64)
            return PerQueryNegatives.of(nothing, nothing, np.empty(0, np.float32), Source.SKIPPED)
        return PerQueryNegatives(
            np.concatenate([part.query for part in parts]),
            np.concatenate([part.item for part in parts]),
            np.concatenate([part.weight for part in parts]),
            np.concatenate([part.source for part in parts]),
        )

    def where(self, keep: np.ndarray) -> PerQueryNegatives:
        """The edges for which `keep` (S,) is true."""
        return PerQueryNegatives(
            self.query[keep], self.item[keep], self.weight[keep], self.source[keep]
        )


class PositiveMask:
    """What each user is known to like: every item of it on the training side.

    Args:
        timeline: the training side.
    """

    def __init__(self, timeline: Timeline) -> None:
        self.timeline = timeline
        self._users = Distinct(timeline.n_users)

    def edges(
        self, queries: BatchQueries, target: np.ndarray, candidate: np.ndarray, n_candidates: int
    ) -> np.ndarray:
        """(2, E) query and candidate that each query's user is known to like.

        Args:
            queries: of the batch.
            target: (B,) candidate of each example; left out where each query has one example.
            candidate: (n_items,) candidate of each item row; what is not in [0, n_candidates) is
                none.
            n_candidates: candidates and queued columns.
        """
        timeline = self.timeline
        users = queries.query_users
        offsets = np.asarray(timeline.user_offsets)
        # Once a user, not once a query: a heavy user stands in a batch many times.
        distinct = self._users.add(users, 0)
        of_query = self._users.place[users]
        self._users.forget(distinct)
        items = gather(timeline.item, offsets[distinct], offsets[distinct + 1])
        liked = candidate[items.values]
        keep = (liked >= 0) & (liked < n_candidates)
        edges = Ragged(items.offsets, liked).where(keep).take(of_query)
        query, liked = edges.row_of(), edges.values
        if queries.owner is None:
            other = liked != target[query]
            query, liked = query[other], liked[other]
        return np.stack([query, liked])

    def holds(self, queries: BatchQueries, query: np.ndarray, item: np.ndarray) -> np.ndarray:
        """(S,) bool, whether the user of each query is known to like the item."""
        if not len(query):
            return np.zeros(0, bool)
        users = queries.query_users[query]
        ends = np.asarray(self.timeline.user_offsets)[users + 1]
        return self._first_seen.before(users, item, ends)

    @cached_property
    def _first_seen(self) -> FirstSeen:
        return FirstSeen(self.timeline)


def is_target(
    queries: BatchQueries, targets: np.ndarray, negatives: PerQueryNegatives, n_items: int
) -> np.ndarray:
    """(S,) bool, whether a per-query negative is what its very query went on to choose.

    Args:
        queries: the queries.
        targets: (B,) item row of each example.
        negatives: S edges.
        n_items: item rows are smaller.
    """
    if queries.owner is None:
        return targets[negatives.query] == negatives.item
    chosen = queries.owner * n_items + targets
    return np.isin(negatives.query * n_items + negatives.item, chosen)


def skips_of(queries: BatchQueries, skips: Ragged, weight: np.ndarray) -> PerQueryNegatives:
    """Skipped impressions in the requests of the examples.

    Args:
        queries: of the batch.
        skips: skipped item rows of each event of the training side.
        weight: of each value of `skips`.
    """
    start = np.asarray(skips.offsets)[queries.events]
    end = np.asarray(skips.offsets)[queries.events + 1]
    skipped = gather(skips.values, start, end)
    weights = gather(weight, start, end).values
    query = queries.query_of(skipped.row_of())
    return PerQueryNegatives.of(query, skipped.values, weights, Source.SKIPPED)


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
